"""Describe the machine (an Environment, once per run) and its background load (per round)."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from poolbench.core.records import Environment
from poolbench.machine.idle import can_disable_idle_states
from poolbench.machine.limits import read_limits, read_throttled_seconds
from poolbench.machine.nvml import DeviceUsage, driver_versions, watch_device

PACKAGES = (
    "poolbench", "tensorflow", "tensorflow-cpu", "keras", "numpy", "pandas", "pytest",
    "pytest-benchmark", "tensorboard-plugin-profile", "ray", "ml_dtypes", "jax", "jaxlib", "torch",
)  # fmt: skip
SETTING_PREFIXES = (
    "TF_", "XLA_", "KERAS_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_TF32", "MALLOC_",
)  # fmt: skip
SETTING_NAMES = ("LD_PRELOAD", "PYTHONHASHSEED", "PYTHONMALLOC")
PROC_STAT = Path("/proc/stat")
STAT_LINE_NBYTES = 256  # first line: ten counters of at most twenty digits


@functools.cache
def machine_facts() -> dict[str, str | int | float | bool | None]:
    """Return the properties of this machine. Reading the processor's name takes a second."""
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    limits = read_limits()
    return {
        "processor": info.get("brand_raw") or platform.machine(),
        "architecture": info.get("arch") or platform.machine(),
        "features": " ".join(info.get("flags", [])),
        "cores": psutil.cpu_count(logical=False),
        "threads": os.cpu_count(),
        "usable_threads": usable_threads(),
        "memory_nbytes": psutil.virtual_memory().total,
        "cpu_quota": limits.cpu_quota,
        "memory_limit_nbytes": limits.memory_nbytes,
        "last_level_cache_nbytes": last_level_cache_nbytes(),
        "system": platform.system(),
        "release": platform.release(),
        "virtual": "hypervisor" in info.get("flags", []),
        "idle_states_disabled": can_disable_idle_states(),
    }


def collect_environment(devices: dict[str, str]) -> Environment:
    """Return the Environment of this machine, without host name, path or user name."""
    return Environment(
        machine=machine_facts(),
        devices=devices,
        versions=package_versions() | driver_versions(),
        settings=relevant_settings(),
        source=source_state(Path(__file__).parent),
    )


def usable_threads() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that affect results, and of Python."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def relevant_settings() -> dict[str, str]:
    """Return the environment variables that affect measurements; a path is cut to its last part."""
    return {
        name: os.path.basename(value) if os.path.isabs(value) else value  # noqa: PTH119, PTH117
        for name, value in sorted(os.environ.items())
        if name.startswith(SETTING_PREFIXES) or name in SETTING_NAMES
    }


def source_state(folder: Path) -> dict[str, str | bool]:
    """Return the commit of this package's checkout and whether it has changes; {} outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *words],  # noqa: S607
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def last_level_cache_nbytes() -> int:
    """Return the size of the largest cache of the first processor; 32 MiB if unknown."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(sizes, default=32 << 20)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The machine's counters at one moment; None if the system does not provide them.

    Attributes:
        clock: seconds.
        busy_seconds: processor time that all processes have used since boot, over all processors.
        steal_seconds: processor time that the hypervisor gave to others.
        own_seconds: processor time of this process.
        throttled_seconds: processor time that a CPU quota withheld; None also without a quota.
        device: the case's device; None on a CPU.
    """

    clock: float
    busy_seconds: float | None
    steal_seconds: float | None
    own_seconds: float
    throttled_seconds: float | None = None
    device: DeviceUsage | None = None


def read_usage(stat: Path = PROC_STAT) -> Usage:
    """Read the counters."""
    busy = steal = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        # A race reads this about 160 times, so the file stays open.
        line = os.pread(_open_to_read(stat), STAT_LINE_NBYTES, 0).split(b"\n", 1)[0]
        fields = [int(word) for word in line.split()[1:]]
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
        busy = (user + nice + system + irq + softirq) / tick
        steal = fields[7] / tick
    return Usage(
        clock=time.perf_counter(),
        busy_seconds=busy,
        steal_seconds=steal,
        own_seconds=time.process_time(),
        throttled_seconds=read_throttled_seconds(),
    )


@functools.cache
def _open_to_read(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def usage_reader(device: str) -> Callable[[], Usage]:
    """Return a function that reads the counters, and those of the device if it is a GPU."""
    watch = watch_device(device)
    if watch is None:
        return read_usage
    return lambda: replace(read_usage(), device=watch())


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Background load over a time, in processor seconds; None if the system does not provide it."""

    wall_seconds: float
    steal_seconds: float | None
    others_seconds: float | None
    throttled_seconds: float | None = None
    device: DeviceUsage | None = None

    def contended(self) -> bool:
        """Tell whether others used, or a CPU quota withheld, more than 15% of one processor.

        The counters of each processor step by 10 ms, so less than 35 ms is not evidence.
        """
        used = (self.steal_seconds or 0.0) + max(0.0, self.others_seconds or 0.0)
        used += self.throttled_seconds or 0.0
        on_device = self.device is not None and self.device.contended()
        return on_device or used > max(0.035, 0.15 * self.wall_seconds)


def seen_between(start: Usage, end: Usage, worker_seconds: float) -> Seen:
    """Return the background load between two readings, given the worker's own processor time."""
    others = None
    if start.busy_seconds is not None and end.busy_seconds is not None:
        ours = worker_seconds + end.own_seconds - start.own_seconds
        others = max(0.0, end.busy_seconds - start.busy_seconds - ours)
    return Seen(
        wall_seconds=end.clock - start.clock,
        steal_seconds=_difference(start.steal_seconds, end.steal_seconds),
        others_seconds=others,
        throttled_seconds=_difference(start.throttled_seconds, end.throttled_seconds),
        device=end.device,
    )


def seen_together(parts: Sequence[Seen]) -> Seen:
    """Add up the background load of several separate times."""
    return Seen(
        wall_seconds=sum(part.wall_seconds for part in parts),
        steal_seconds=_total(part.steal_seconds for part in parts),
        others_seconds=_total(part.others_seconds for part in parts),
        throttled_seconds=_total(part.throttled_seconds for part in parts),
        device=parts[-1].device if parts else None,
    )


def _difference(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
