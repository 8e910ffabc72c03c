"""Whether a virtual machine's two processors are near each other, and what brings them together.

The host moves them as it likes. Within a core complex what one has written is soon read by the other; from one
complex to another it takes several times as long. An op that two threads share is then up to a third slower
and varies twice as much, one implementation more than another, for seconds or for minutes: no interval of a run that
saw only one of the two places tells of the other. The host brings processors together when one wakes the other,
and leaves them where they are as long as they stay awake.
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

# Read right after the other processor has written them, 256 KiB take 7 to 17 us in one core complex of an
# AMD EPYC, and 24 to 38 us from another: the least of ten times, against the least that was ever seen.
SHARED_NBYTES, READS, FAR = 1 << 18, 10, 3.0
# Of a tenth of a second in which they wake each other every other one brings them together; of a fiftieth few do.
WAKING_SECONDS = 0.1
# How long in all: so much for each time that it is asked, a tenth of what is then measured, saved up to so much.
EARNED_SECONDS, MOST_SAVED_SECONDS = 0.015, 0.6


class Placement:
    """A partner process on the second processor, which answers what this process asks from the first.

    Raises:
        OSError: the partner could not be started.
    """

    def __init__(self, cpus: tuple[int, int]) -> None:
        self._cpus = cpus
        self._least = float("inf")
        self._saved_seconds = MOST_SAVED_SECONDS
        self._copy = memoryview(bytearray(SHARED_NBYTES))
        # Not a file: to write to one that is mapped kills the process where the disk is full.
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
        """Bring the processors together, if the host does so in the time; whether they are far apart after all.

        They are called together in any case the first time: until they were near, what is far is not known.

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
        """Seconds to read what the other processor has just written: the least of some.

        Raises:
            OSError: the partner is gone.
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
        """Have the partner write what is shared, and wait until it has."""
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
    """Whether this machine's processors are far apart although they were called together; None: not to be seen.

    It is seen on virtual machines of two processors under Linux: where there are more, hosts as a rule leave
    each in its place.
    """
    if not _placements:
        _placements.append(None)
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if is_virtual() and len(cpus) == 2:
            with contextlib.suppress(OSError):  # no process more is to be had: it goes without
                _placements[0] = Placement((cpus[0], cpus[1]))
    placement = _placements[0]
    try:
        return placement.gather() if placement else None
    except OSError:  # somebody has ended the partner: from now on it goes without
        _placements[0] = None
        return None
