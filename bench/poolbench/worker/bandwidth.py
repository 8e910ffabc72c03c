"""Bandwidth probes: read, write and copy as many bytes as the case's candidates, as fast as possible."""

from __future__ import annotations

import numpy as np

from poolbench.core.registry import REGISTRY
from poolbench.worker.backends import Array, Call
from poolbench.worker.backends.base import host_probes
from poolbench.worker.session import OpenCase, Session
from poolbench.worker.timing import clock, estimate_seconds

# Below this size a write probe would measure the cost of the call instead of the memory.
MIN_WRITE_NBYTES = 1 << 20
MIN_DEVICE_WRITE_NBYTES = 1 << 24  # a GPU writes 1 MB in less time than it takes to start


def open_probe(session: Session, name: str) -> tuple[float, int, float]:
    """Choose the fastest of several ways to read, write or copy, once per process.

    Returns:
        Seconds per call, bytes that a call moves, seconds that the choice took.
    """
    opened = session.open
    # The largest input: of a small one a probe would measure the call's own cost.
    place = max(range(len(opened.host)), key=lambda i: opened.host[i].nbytes)
    nbytes = opened.host[place].nbytes
    if name == "bandwidth-write":
        least = MIN_WRITE_NBYTES if opened.on_cpu else MIN_DEVICE_WRITE_NBYTES
        op = REGISTRY.ops.get(opened.case.op)
        nbytes = max(least, op.traffic_of(opened.case).written_nbytes if op else nbytes)
    start = clock()
    ways = _ways(opened, name.removeprefix("bandwidth-"), nbytes, opened.host[place])
    key = (name, nbytes, opened.device)
    if key not in session.fastest:
        seconds = {}
        for way, call in ways.items():
            opened.calls[name] = (call, (place,))
            seconds[way] = estimate_seconds(opened, name)
        best = min(seconds, key=lambda way: seconds[way])
        session.fastest[key] = best, seconds[best]
    best, call_seconds = session.fastest[key]
    opened.calls[name] = (ways[best], (place,))
    return call_seconds, nbytes, clock() - start


def _ways(opened: OpenCase, kind: str, nbytes: int, largest: Array) -> dict[str, Call]:
    """Return the calls that move this many bytes: of NumPy if the inputs are on the host, and of the backend."""
    ways: dict[str, Call] = {}
    if opened.on_cpu:
        source = largest.reshape(-1)
        words = source.view(np.uint8)[: nbytes // 8 * 8].view(np.int64)
        arrays: list[Array]
        work: Call
        if kind == "read":
            arrays, work = [words], lambda part: part.max()
        elif kind == "write":
            arrays, work = [np.ones(nbytes // 4, np.float32)], lambda part: part.fill(1.0)
        else:
            arrays, work = [np.ones_like(source), source], np.copyto
        ways = host_probes(work, arrays, opened.case.threads, opened.pools)
    return ways | opened.backend.bandwidth_probes(kind, opened.device, nbytes // 4)
