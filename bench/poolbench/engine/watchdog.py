"""Enforce a worker's limits on memory and log size while waiting for its reply."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil

from poolbench.core.errors import printable

TAIL_NBYTES = 2000
LOG_NBYTES = 1 << 20
# Largest log of a call before it is emptied, so that a flood of output does not fill the disk.
FLOOD_NBYTES = 64 << 20
PERIOD_SECONDS = 0.1


class Watchdog:
    """Kills a process that exceeds its memory limit, and empties a log that grows without end.

    Attributes:
        exceeded_nbytes: resident memory at which the process was killed; None: it was not.
        killings: how many processes the system had killed for want of memory at the beginning.
    """

    def __init__(self, pid: int, limit_nbytes: int | None, log: Path) -> None:
        self.exceeded_nbytes: int | None = None
        self.killings = system_killings()
        self._limit_nbytes = limit_nbytes or sys.maxsize
        self._log = log
        self._flooded = b""
        self._next = 0.0
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)

    def look(self) -> None:
        """Check the memory and the log, unless the last check was less than a period ago."""
        now = time.monotonic()
        if now < self._next or self._process is None:
            return
        self._next = now + PERIOD_SECONDS
        with contextlib.suppress(psutil.Error, OSError):
            nbytes = self._process.memory_info().rss
            if nbytes > self._limit_nbytes:
                self.exceeded_nbytes = nbytes
                self._process.kill()
            elif self._log.stat().st_size > FLOOD_NBYTES:
                with self._log.open("r+b") as file:
                    file.seek(-TAIL_NBYTES, os.SEEK_END)
                    self._flooded = file.read(TAIL_NBYTES)
                    file.truncate(0)

    def has_ended(self) -> bool:
        """Return whether the process has ended; it is not reaped, so that its number is not reused."""
        try:
            return self._process is None or self._process.status() in (
                psutil.STATUS_ZOMBIE,
                psutil.STATUS_DEAD,
            )
        except psutil.Error:
            return True

    def is_stopped(self) -> bool:
        """Return whether a signal has stopped the process (SIGSTOP)."""
        with contextlib.suppress(psutil.Error):
            return self._process is not None and self._process.status() == psutil.STATUS_STOPPED
        return False

    def log_nbytes(self) -> int:
        """Return the log's length, from which the next task's output is counted."""
        self._flooded = b""
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def take_tail(self, start: int) -> str:
        """Return the end of the output since `start`; empty a log that grew large."""
        try:
            with self._log.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                start = min(start, size)  # emptied meanwhile
                file.seek(max(start, size - TAIL_NBYTES))
                tail = (self._flooded + file.read(TAIL_NBYTES))[-TAIL_NBYTES:]
                if size > LOG_NBYTES:
                    file.truncate(0)
        except OSError:
            return ""
        return printable(tail.decode("utf-8", "replace").replace("\r\n", "\n")).strip()


def system_killings(counters: Path = Path("/proc/vmstat")) -> int:
    """Return the number of processes that the system has killed for lack of memory; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in counters.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
