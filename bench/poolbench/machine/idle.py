"""Processors that stay awake while something is measured, where the system lets a process ask for it.

On a virtual machine a processor that has nothing to do is given back to the host, and to get it again
takes tens of microseconds and more, a time that changes with what the host's other guests do. An op that
hands its work to another thread waits for it in every call. Without the sleep its calls are shorter and
steadier: it is the op that is measured, not the host's scheduler.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

# Linux' PM QoS: the latency that is written holds for as long as the file is open.
# https://docs.kernel.org/power/pm_qos_interface.html
REQUESTS = Path("/dev/cpu_dma_latency")
CPU_INFO = Path("/proc/cpuinfo")

_held: list[int] = []


def is_virtual(cpu_info: Path = CPU_INFO) -> bool:
    """Whether this is a virtual machine, as far as its processors say."""
    try:
        return " hypervisor " in cpu_info.read_text()
    except OSError:
        return False


def keep_awake(requests: Path = REQUESTS) -> bool:
    """Keep the processors from sleeping until `let_sleep` or the end of this process.

    They poll for work meanwhile, which the system counts as idle time.

    Returns:
        Whether they do. Not where the system has no such request or this user may not make it. Nor on
        hardware that is not virtual: there a sleeping processor wakes within a few microseconds, and lends
        its power to those that work.
    """
    if not _held and is_virtual():
        with contextlib.suppress(OSError):
            request = os.open(requests, os.O_WRONLY)
            _held.append(request)
            os.write(request, struct.pack("i", 0))
    return bool(_held)


def let_sleep() -> None:
    """Withdraw the request of this process."""
    while _held:
        os.close(_held.pop())


@contextlib.contextmanager
def kept_awake() -> Iterator[None]:
    """Processors that stay awake, where they may be kept so; asleep they may be again afterwards.

    Not for the life of a process: the host brings processors together when one wakes the other
    (poolbench.machine.core_distance), and leaves them wherever they are while they do not sleep.
    """
    keep_awake()
    try:
        yield
    finally:
        let_sleep()


def can_keep_awake() -> bool:
    """Whether a process here may keep the processors awake."""
    held = bool(_held)
    can = keep_awake()
    if not held:
        let_sleep()
    return can
