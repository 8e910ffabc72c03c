"""Whether the host of a virtual machine has others at work on the same cores.

A core has two hardware threads, and the host may give each to another guest. Code that fills its core takes
half to three quarters longer beside a busy sibling, code that waits for the memory less: so ratios change with it,
and it comes and goes within a millisecond, more of it in one minute than in the next. No counter of the
guest's tells of it: it is neither stolen time nor another process's. A loop that fills a core does.
"""

from __future__ import annotations

import functools
import os
import random
import time

from poolbench.machine.idle import is_virtual

# To count a byte in 16 KiB keeps a core's units busy and touches no memory: 5 us on an AMD EPYC, or 8.5 to 10
# beside a busy sibling, and next to nothing between. Against the least that was ever seen.
COUNTED, BUSY = bytes(1 << 14), 1.4
# Processors looked at each time, at most: a look takes some 30 us, most of it to get there.
MOST_LOOKED_AT = 4

_least = [float("inf")]


def busy_share() -> float | None:
    """Share of this machine's processors (some of them, where there are many) whose sibling is at work now.

    None where that is not to be seen: it takes Linux and a virtual machine. Where the machine is one's own the
    system knows of all that runs on it.
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
    """Seconds of the loop on this processor, the second time it runs there."""
    os.sched_setaffinity(0, {cpu})
    COUNTED.count(1)
    start = time.perf_counter()
    COUNTED.count(1)
    return time.perf_counter() - start
