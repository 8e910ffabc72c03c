"""Measure interference during a race: other processes, other guests of the host, slowdowns of the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from poolbench.core.records import Contention
from poolbench.machine.info import Seen, Usage, seen_between, usage_reader
from poolbench.machine.nvml import DeviceUsage
from poolbench.worker.timing import Batch


class MachineNoise:
    """Reads interference from every source that this machine offers.

    Args:
        device: of the case.
        read_usage: reads the machine's counters.
    """

    def __init__(self, device: str, read_usage: Callable[[], Usage] | None = None) -> None:
        self._read_usage = read_usage or usage_reader(device)
        self._start: Usage | None = None

    def now(self) -> float:
        """Return the clock, in seconds."""
        return self._read_usage().clock

    def before(self) -> None:
        """Note the machine's state before a task of a worker."""
        self._start = self._read_usage()

    def after(self, batch: Batch) -> Seen:
        """Return the interference since `before`."""
        assert self._start is not None, "before() comes first"
        return seen_between(self._start, self._read_usage(), batch.cpu_seconds)


class NoiseLog:
    """Adds up the interference of a race."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._usages: list[DeviceUsage] = []
        self._visible = False

    def enter_task(self, batch: Batch) -> None:
        """Count a task."""
        self._counts["switches"] += batch.switches

    def enter_blocks(self, blocks: int, seen: Seen) -> bool:
        """Count the blocks of a batch and the background load; return whether they are noisy."""
        noisy = seen.contended()
        self._counts["marked"] += blocks * noisy
        if seen.device is not None:
            self._usages.append(seen.device)
        self._visible = self._visible or seen.others_seconds is not None
        self._counts["wall_us"] += int(seen.wall_seconds * 1e6)
        self._counts["steal_us"] += int((seen.steal_seconds or 0.0) * 1e6)
        self._counts["others_us"] += int((seen.others_seconds or 0.0) * 1e6)
        if seen.throttled_seconds is not None:
            self._counts["throttled_us"] += int(seen.throttled_seconds * 1e6)
        return noisy

    def enter_redone(self, blocks: int) -> None:
        """Count blocks that were run because earlier ones were noisy."""
        self._counts["redone"] += blocks

    def contention(self) -> Contention:
        """Return the summary that goes into the journal."""
        wall = self._counts["wall_us"] or 1
        return Contention(
            steal=round(self._counts["steal_us"] / wall, 4) if self._visible else None,
            others=round(self._counts["others_us"] / wall, 4) if self._visible else None,
            throttled=round(self._counts["throttled_us"] / wall, 4)
            if "throttled_us" in self._counts
            else None,
            blocks_marked=self._counts["marked"],
            blocks_redone=self._counts["redone"],
            involuntary_switches=self._counts["switches"] if self._visible else None,
            **device_contention(self._usages),
        )


def device_contention(usages: Sequence[DeviceUsage]) -> dict[str, Any]:
    """Return the fields of a Contention about the device, from its readings after each batch."""
    clocks = [usage.clock_mhz for usage in usages if usage.clock_mhz is not None]
    degrees = [usage.celsius for usage in usages if usage.celsius is not None]
    others = [usage.others_share for usage in usages if usage.others_share is not None]
    return {
        "device_clock_mhz": (min(clocks), max(clocks)) if clocks else None,
        "device_celsius": max(degrees, default=None),
        "device_slowdowns": tuple(dict.fromkeys(w for usage in usages for w in usage.slowdowns)),
        "device_others": max(others, default=None),
    }
