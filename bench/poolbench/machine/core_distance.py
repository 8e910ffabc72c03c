"""Measure the distance of a virtual machine's two processors, and bring them together.

The host moves virtual processors between cores. Data written by one processor reaches the other quickly within a core
complex and several times more slowly from another. An op of two threads is then up to a third slower and varies
twice as much, some implementations more than others, for seconds or minutes. The interval of a run that saw
one placement does not cover the other. The host brings processors together when one wakes the other, and leaves
them in place while both stay awake.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time

from poolbench.machine import _ping
from poolbench.machine.idle import is_virtual

# Reading 256 KiB just written by the other processor takes 7 to 17 us within a core complex of an AMD
# EPYC and 24 to 38 us from another. The minimum of ten reads is compared with the smallest minimum so far.
SHARED_NBYTES, READS, FAR = 1 << 18, 10, 3.0
# Waking each other for 0.1 s succeeds in about half of the attempts; 0.02 s rarely does.
WAKING_SECONDS = 0.1
# Time budget: each call earns 0.015 s, a tenth of the measurement that follows, and saves up to 0.6 s.
EARNED_SECONDS, MOST_SAVED_SECONDS = 0.015, 0.6


class Placement:
    """A partner process on the second processor that answers requests of this process on the first.

    Raises:
        OSError: the partner could not be started.
    """

    def __init__(self, cpus: tuple[int, int]) -> None:
        self._cpus = cpus
        self._least = float("inf")
        self._saved_seconds = MOST_SAVED_SECONDS
        self._copy = memoryview(bytearray(SHARED_NBYTES))
        # Not a file: writing to a mapped file kills the process if the disk is full.
        with os.fdopen(os.memfd_create("poolbench"), "wb") as memory:
            memory.truncate(SHARED_NBYTES)
            self._shared = memoryview(mmap.mmap(memory.fileno(), SHARED_NBYTES))
            numbers = map(str, (memory.fileno(), SHARED_NBYTES, cpus[1]))
            self._partner = subprocess.Popen(  # noqa: S603 (this Python, a file of ours)
                [sys.executable, "-S", "-E", _ping.__file__, *numbers],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                pass_fds=[memory.fileno()],
            )  # fmt: skip

    def gather(self) -> bool:
        """Bring the processors together within the time budget; return whether they are still distant.

        The first call always tries, because a distance is known only relative to the nearest one seen.


        Raises:
            OSError: the partner is gone.
        """
        self._saved_seconds = min(MOST_SAVED_SECONDS, self._saved_seconds + EARNED_SECONDS)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus[:1])
        try:
            if self._least == float("inf"):
                self._wake_each_other()
            while self._are_far():
                if self._saved_seconds < WAKING_SECONDS:
                    return True
                self._wake_each_other()
            return False
        finally:
            os.sched_setaffinity(0, before)

    def read_seconds(self) -> float:
        """Return the seconds to read memory just written by the other processor, the minimum of several reads.

        Raises:
            OSError: the partner has ended.
        """
        times = []
        for _ in range(READS):
            self._ask()
            start = time.perf_counter()
            self._copy[:] = self._shared
            times.append(time.perf_counter() - start)
        return min(times)

    @property
    def pid(self) -> int:
        """The partner's process number."""
        return self._partner.pid

    def close(self) -> None:
        """End the partner."""
        assert self._partner.stdin is not None
        assert self._partner.stdout is not None
        self._partner.stdin.close()
        self._partner.stdout.close()
        self._partner.wait()

    def _are_far(self) -> bool:
        seconds = self.read_seconds()
        self._least = min(self._least, seconds)
        return seconds > FAR * self._least

    def _wake_each_other(self) -> None:
        self._saved_seconds -= WAKING_SECONDS
        end = time.monotonic() + WAKING_SECONDS
        while time.monotonic() < end:
            self._ask()

    def _ask(self) -> None:
        """Have the partner rewrite the shared memory, and wait for it."""
        assert self._partner.stdin is not None
        assert self._partner.stdout is not None
        self._partner.stdin.write(b".")
        if not self._partner.stdout.read(1):
            raise BrokenPipeError("the partner is gone")


_placements: list[Placement | None] = []


def partners() -> set[int]:
    """Return the process numbers of this process' partner, if it has one."""
    return {placement.pid for placement in _placements if placement is not None}


def gather() -> bool | None:
    """Bring this machine's processors together; return whether they are still distant, None if unknown.

    It is known on Linux virtual machines of two processors only. With more processors, hosts usually
    leave each in its place.
    """
    if not _placements:
        _placements.append(None)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if is_virtual() and len(cpus) == 2:
            with contextlib.suppress(OSError):  # no process can be started: continue without it
                _placements[0] = Placement((cpus[0], cpus[1]))
    placement = _placements[0]
    try:
        return placement.gather() if placement else None
    except OSError:  # the partner has ended: continue without it
        _placements[0] = None
        return None
