"""Detect whether other guests of the host keep the SMT siblings of a virtual machine's processors busy.

A core has two hardware threads, and the host may give them to two guests. Beside a busy sibling,
compute-bound code takes 1.5 to 1.75 times as long, memory-bound code less, so ratios shift. The load comes and
goes within a millisecond and varies by the minute. No counter of the guest shows it: it is neither stolen
time nor the time of another process. A loop that fills the core does.
"""

from __future__ import annotations

import functools
import os
import random
import time

from poolbench.machine.idle import is_virtual

# Counting a byte in 16 KiB keeps a core's units busy without touching memory: 5 us on an AMD EPYC, 8.5 to 10 us
# beside a busy sibling, and rarely a value between. Compared with the smallest time so far.
COUNTED, BUSY = bytes(1 << 14), 1.4
# Processors tested per call; a test takes about 30 us, most of it for moving to the processor.
MOST_LOOKED_AT = 4

_least = [float("inf")]


def busy_share() -> float | None:
    """Return the share of tested processors whose SMT sibling is busy; None if that cannot be detected.

    Detection needs Linux and a virtual machine. On physical hardware the system's own counters cover
    all processes.
    """
    if not _can_be_seen():
        return None
    before = os.sched_getaffinity(0)
    some = random.sample(sorted(before), min(len(before), MOST_LOOKED_AT))
    try:
        times = [_loop_seconds(cpu) for cpu in some]
    finally:
        os.sched_setaffinity(0, before)
    _least[0] = min(_least[0], *times)
    return sum(seconds > BUSY * _least[0] for seconds in times) / len(times)


@functools.cache
def _can_be_seen() -> bool:
    return is_virtual() and hasattr(os, "sched_setaffinity")


def _loop_seconds(cpu: int) -> float:
    """Return the seconds of the loop on this processor, in its second run there."""
    os.sched_setaffinity(0, {cpu})
    COUNTED.count(1)
    start = time.perf_counter()
    COUNTED.count(1)
    return time.perf_counter() - start
