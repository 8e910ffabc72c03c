"""Measure interference during a race: other processes, other guests of the host, slowdowns of the GPU."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from poolbench.core.records import Contention
from poolbench.engine.process import WorkerLike
from poolbench.machine import core_distance
from poolbench.machine.info import Seen, Usage, seen_between, usage_reader
from poolbench.machine.nvml import DeviceUsage, is_gpu
from poolbench.worker.timing import Batch


@dataclass(frozen=True, kw_only=True)
class TaskNoise:
    """Interference during one task of a worker.

    Attributes:
        seen: background load.
        cores_distant: whether two virtual processors were on distant cores; None where that is not known.
        smt_sibling_busy: share of the tests that found an SMT sibling busy; None as above.
        switches: involuntary context switches of the worker.
    """

    seen: Seen
    cores_distant: bool | None = None
    smt_sibling_busy: float | None = None
    switches: int = 0


class NoiseProbe(Protocol):
    """Reads the machine's state around each task of a worker."""

    def now(self) -> float:
        """Return the clock, in seconds."""

    def before(self, worker: WorkerLike) -> None:
        """Note the machine's state; the worker may bring its cores together."""

    def after(self, batch: Batch) -> TaskNoise:
        """Return the interference since `before`."""


class MachineNoise:
    """Reads interference from every source that this machine offers.

    Args:
        device: of the case.
        timeout: seconds for a task of a worker.
        read_usage: reads the machine's counters.
    """

    def __init__(
        self, device: str, timeout: float, read_usage: Callable[[], Usage] | None = None
    ) -> None:
        self._on_gpu = is_gpu(device)
        self._timeout = timeout
        self._read_usage = read_usage or usage_reader(device)
        self._start: Usage | None = None
        self._distant: bool | None = None

    def now(self) -> float:
        """Return the clock, in seconds."""
        return self._read_usage().clock

    def before(self, worker: WorkerLike) -> None:
        """Bring the cores together where the case runs on them, then read the counters."""
        if not self._on_gpu:
            self._distant = worker.call(core_distance.gather, timeout=self._timeout)
        self._start = self._read_usage()

    def after(self, batch: Batch) -> TaskNoise:
        """Return the interference since `before`."""
        assert self._start is not None, "before() comes first"
        return TaskNoise(
            seen=seen_between(self._start, self._read_usage(), batch.cpu_seconds),
            cores_distant=self._distant,
            smt_sibling_busy=batch.smt_sibling_busy,
            switches=batch.switches,
        )


class NoiseLog:
    """Adds up the interference of a race."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._usages: list[DeviceUsage] = []
        self._siblings: list[float] = []
        self._visible = False

    def enter_task(self, noise: TaskNoise) -> None:
        """Count a task."""
        self._counts["switches"] += noise.switches
        if noise.smt_sibling_busy is not None:
            self._siblings.append(noise.smt_sibling_busy)

    def enter_blocks(self, distant: Sequence[bool | None], seen: Seen) -> list[bool]:
        """Count the blocks of a batch; return which of them are noisy.

        Args:
            distant: whether the cores were distant during each block.
            seen: background load during the batch.
        """
        marked = [seen.contended() or bool(one) for one in distant]
        self._counts["marked"] += sum(marked)
        self._counts["watched"] += sum(one is not None for one in distant)
        self._counts["distant"] += sum(bool(one) for one in distant)
        if seen.device is not None:
            self._usages.append(seen.device)
        self._visible = self._visible or seen.others_seconds is not None
        self._counts["wall_us"] += int(seen.wall_seconds * 1e6)
        self._counts["steal_us"] += int((seen.steal_seconds or 0.0) * 1e6)
        self._counts["others_us"] += int((seen.others_seconds or 0.0) * 1e6)
        if seen.throttled_seconds is not None:
            self._counts["throttled_us"] += int(seen.throttled_seconds * 1e6)
        return marked

    def enter_redone(self, blocks: int) -> None:
        """Count blocks that are run again because they were noisy."""
        self._counts["redone"] += blocks

    def contention(self) -> Contention:
        """Return the summary that goes into the journal."""
        wall = self._counts["wall_us"] or 1
        watched = self._counts["watched"]
        return Contention(
            steal=round(self._counts["steal_us"] / wall, 4) if self._visible else None,
            others=round(self._counts["others_us"] / wall, 4) if self._visible else None,
            throttled=round(self._counts["throttled_us"] / wall, 4)
            if "throttled_us" in self._counts
            else None,
            blocks_marked=self._counts["marked"],
            blocks_redone=self._counts["redone"],
            involuntary_switches=self._counts["switches"] if self._visible else None,
            cores_distant=round(self._counts["distant"] / watched, 4) if watched else None,
            smt_sibling_busy=round(statistics.fmean(self._siblings), 4) if self._siblings else None,
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
