"""What this process may use of the machine: CPU quota and memory limit of its cgroups, versions 1 and 2."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
# Version 1 writes its largest number of pages where there is no limit.
NO_LIMIT_NBYTES = 1 << 60
STAT_NBYTES = 1024  # of cpu.stat: nine counters at most
# File of the limit, of what is used, and the field of memory.stat with caches that can be dropped, by version.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
SECONDS_PER_COUNT = {"throttled_usec": 1e-6, "throttled_time": 1e-9}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The tightest limits of the cgroups that hold this process; None: there is none.

    Attributes:
        cpu_quota: processor seconds per second.
        memory_nbytes: memory of all processes together.
        free_nbytes: what is left of it; caches that can be dropped count as free.
        throttled: files that count the time without a processor because the quota was used up.
    """

    cpu_quota: float | None = None
    memory_nbytes: int | None = None
    free_nbytes: int | None = None
    throttled: tuple[Path, ...] = ()


def read_limits(root: Path = ROOT) -> Limits:
    """Return the limits on this process now, of the file system at `root`."""
    quotas = {folder: quota for folder in _cgroups(root, "cpu") if (quota := _quota(folder))}
    memory = _memory_of_levels(root)
    return Limits(
        cpu_quota=min(quotas.values(), default=None),
        memory_nbytes=min((limit for limit, _ in memory), default=None),
        free_nbytes=min((free for _, free in memory), default=None),
        throttled=tuple(folder / "cpu.stat" for folder in quotas),
    )


def total_memory_nbytes() -> int:
    """Return the memory of the machine, or of its cgroup where that is less."""
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _memory_of_levels(ROOT))])


def free_memory_nbytes() -> int:
    """Return the memory that is free in the machine, or in its cgroup where that is less."""
    available: int = psutil.virtual_memory().available
    return min([available, *(free for _, free in _memory_of_levels(ROOT))])


def read_throttled_seconds() -> float | None:
    """Return the processor seconds that the CPU quota has withheld so far; None without a quota."""
    return throttled_seconds(_open_counters())


def throttled_seconds(files: Sequence[int]) -> float | None:
    """Return the sum over open files cpu.stat, in seconds; None without any that can be read."""
    seconds = None
    for file in files:
        with contextlib.suppress(OSError):  # the cgroup has gone: this process was moved
            for name, count in _fields(os.pread(file, STAT_NBYTES, 0).decode()):
                if name in SECONDS_PER_COUNT:
                    seconds = (seconds or 0.0) + count * SECONDS_PER_COUNT[name]
    return seconds


@functools.cache
def _open_counters() -> tuple[int, ...]:
    """Open the counters and keep them open: a race reads them 160 times."""
    files = []
    for path in read_limits().throttled:
        with contextlib.suppress(OSError):
            files.append(os.open(path, os.O_RDONLY))
    return tuple(files)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the cgroups that hold this process, the innermost first.

    In a container the path may be the host's, of which the container sees the last folder as its top.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if names else "")
        folder = top if ".." in path else top / path.strip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _quota(folder: Path) -> float | None:
    """Return the processor seconds per second of one cgroup; None without a quota."""
    words = _text(folder / "cpu.max").split() or [
        _text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    with contextlib.suppress(ValueError, ZeroDivisionError):  # 'max', or no such file
        quota = int(words[0]) / int(words[1])
        return quota if quota > 0 else None
    return None


def _memory_of_levels(root: Path) -> list[tuple[int, int]]:
    """Return limit and free memory of each cgroup that has a limit, in bytes."""
    return [found for folder in _cgroups(root, "memory") if (found := _memory(folder))]


def _memory(folder: Path) -> tuple[int, int] | None:
    """Return limit and free memory of one cgroup, in bytes; None without a limit."""
    for limit_file, used_file, droppable in MEMORY_FILES:
        with contextlib.suppress(ValueError):  # 'max', or no such file
            limit = int(_text(folder / limit_file))
            if limit >= NO_LIMIT_NBYTES:
                continue
            used = int(_text(folder / used_file) or 0)
            caches = dict(_fields(_text(folder / "memory.stat"))).get(droppable, 0)
            return limit, max(0, limit - max(0, used - caches))
    return None


def _fields(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, count = line.partition(" ")
        if count.isdigit():
            yield name, int(count)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
