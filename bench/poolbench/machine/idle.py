"""Disable CPU idle states while timing, where the system permits it.

On a virtual machine the hypervisor deschedules an idle processor. Waking it takes tens of microseconds or more,
depending on the host's other guests. An op that hands work to another thread pays this in every call. Without
idle states its calls are shorter and steadier, and the op is measured instead of the host's scheduler.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

# Linux PM QoS: the latency written holds while the file is open.
# https://docs.kernel.org/power/pm_qos_interface.html
REQUESTS = Path("/dev/cpu_dma_latency")
CPU_INFO = Path("/proc/cpuinfo")

_held: list[int] = []


def is_virtual(cpu_info: Path = CPU_INFO) -> bool:
    """Tell whether this is a virtual machine, by its processors' flags."""
    try:
        return "hypervisor" in cpu_info.read_text().split()
    except OSError:
        return False


def disable_idle_states(requests: Path = REQUESTS) -> bool:
    """Disable idle states until `enable_idle_states` or the end of this process.

    Processors then poll for work, which the system counts as idle time.

    Returns:
        Whether idle states are disabled. They are not if the system has no such request or this user may
        not make it, nor on physical hardware: there an idle processor wakes within a few microseconds and
        leaves its power to the busy ones.
    """
    if not _held and is_virtual():
        with contextlib.suppress(OSError):
            request = os.open(requests, os.O_WRONLY)
            _held.append(request)
            os.write(request, struct.pack("i", 0))
    return bool(_held)


def enable_idle_states() -> None:
    """Withdraw the request of this process."""
    while _held:
        os.close(_held.pop())


@contextlib.contextmanager
def idle_states_disabled() -> Iterator[None]:
    """Disable idle states inside the context, where permitted.

    Not for the life of a process: the host brings processors together when one wakes the other,
    and does not move them while both stay awake.
    """
    disable_idle_states()
    try:
        yield
    finally:
        enable_idle_states()


def can_disable_idle_states() -> bool:
    """Tell whether this process may disable idle states."""
    held = bool(_held)
    can = disable_idle_states()
    if not held:
        enable_idle_states()
    return can
