"""Probes: read, write and copy the bytes of the case's candidates, and the cheapest call, as fast as possible."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench.core.plan import IDENTITY
from poolbench.core.registry import REGISTRY
from poolbench.worker.backends import Array, Call
from poolbench.worker.backends.base import host_probes
from poolbench.worker.session import OpenCase, Session, differentiable_places
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
    if name == IDENTITY:
        return _open_identity(opened)
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
            try:
                seconds[way] = estimate_seconds(opened, name)
            except Exception as error:  # noqa: BLE001 (a framework's way takes some dtypes only)
                refused = error
        if not seconds:
            raise refused
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
            arrays, work = [words], lambda part: part.max(initial=0)
        elif kind == "write":
            arrays, work = [np.ones(nbytes // 4, np.float32)], lambda part: part.fill(1.0)
        else:
            arrays, work = [np.ones_like(source), source], np.copyto
        ways = host_probes(work, arrays, opened.case.threads, opened.pools)
    return ways | opened.backend.bandwidth_probes(kind, opened.device, nbytes // 4)


def _open_identity(opened: OpenCase) -> tuple[float, int, float]:
    """Open a call that returns its inputs unchanged, in the case's mode: as many outputs as a candidate has."""
    start = clock()
    case = opened.case
    call = one = opened.backend.identity(case.mode)
    places: tuple[int, ...] = (0,)
    if case.direction != "forward":
        # (y, gradients): the gradient of y has the shape of y, an input that of its gradient.
        chosen = [len(opened.host) - 1, *differentiable_places(case)]
        places = tuple(range(len(opened.host)))

        def call(*inputs: Any) -> Any:
            return tuple([one(inputs[place]) for place in chosen])

    opened.calls[IDENTITY] = opened.backend.compile(call, case.mode), places
    return estimate_seconds(opened, IDENTITY), 0, clock() - start
