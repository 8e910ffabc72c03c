"""Recordings of the profiler, and time by the device's own clock; in a worker.

A trace explains a figure and is none: the profiler slows small operations by a quarter, so that no
traced time is ever reported as a benchmark.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from poolbench.core.case import Case
from poolbench.core.errors import own_folders
from poolbench.core.records import TraceSummary
from poolbench.worker.contender import open_contender
from poolbench.worker.program import buffer_nbytes
from poolbench.worker.session import Session, open_case
from poolbench.worker.xspace import read_device_seconds, read_trace

STEPS = 20
WARM_UP_CALLS = 3
SUFFIX = ".xplane.pb"  # suffix of the files that TensorBoard's profile plugin reads
# The executor's last callback may release memory shortly after the call returns.
SETTLE_SECONDS = 0.01
# Without oneDNN (no AVX-512) only this allocator records its allocations.
MEMORY_EVENTS = (("TF_CPU_ALLOCATOR_USE_BFC", "1"),)


def record_trace(
    step: Callable[[], object], folder: Path, *, name: str = "step", steps: int = STEPS
) -> Path:
    """Record marked steps into the run directory `folder`, which is replaced; return the trace's file.

    A step that raises ends the recording: what was recorded until then is kept, the error goes on.
    """
    import tensorflow as tf

    # The profiler names directories by the second, so two sessions might share one.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tf.profiler.experimental.Profile(scratch):
                for number in range(steps):
                    # Without _r=1 the viewer shows no step.
                    with tf.profiler.experimental.Trace(name, step_num=number, _r=1):
                        step()
                time.sleep(SETTLE_SECONDS)
        finally:
            target = _publish(Path(scratch), folder)
    return target


def _publish(scratch: Path, folder: Path) -> Path:
    """Move a recording to the place that the viewer reads, under a host named as its run."""
    # The viewer caches beside the file and would keep serving the first recording.
    shutil.rmtree(folder, ignore_errors=True)
    target = folder / f"{folder.name}{SUFFIX}"
    for source in scratch.glob(f"plugins/profile/*/*{SUFFIX}"):
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_without_folders(source.read_bytes()))
    return target


def _without_folders(recording: bytes) -> bytes:
    """Return the recording with the folders of this project and its libraries overwritten.

    XLA notes in which file an operation was traced. Recordings are given away, a machine's paths are not; and
    each is written over by as many bytes, for lengths are part of the format.
    """
    for folder in own_folders():
        path = os.fsencode(folder) + b"/"
        recording = recording.replace(path, b"." + b"/" * (len(path) - 1))
    return recording


def trace_candidate(session: Session, case: Case, name: str, folder: str) -> TraceSummary:
    """Warm up a candidate, record it, and summarise its time and memory."""
    open_case(session, case, 0)
    contender = open_contender(session, name, check=False)
    if contender.status != "ok":
        return TraceSummary(
            case=case, candidate=name, trace="", status=contender.status, reason=contender.reason
        )
    opened = session.open
    step = opened.make_step(name)  # the same call on the same inputs as in a race
    for _ in range(WARM_UP_CALLS):
        step()
    path = record_trace(step, Path(folder), name=name)
    compiler_nbytes = _compiler_nbytes(*opened.bound(name), case)
    # The fields of a reading, and of its memory, are those of a summary.
    reading = dataclasses.asdict(read_trace(load_trace(path), device=case.device))
    memory = reading.pop("memory") or {}
    return TraceSummary(
        case=case, candidate=name, trace=path.parent.name, compiler_nbytes=compiler_nbytes,
        **reading, **memory,
    )  # fmt: skip


def time_on_device(session: Session, names: Sequence[str], calls: int) -> list[float | None]:
    """Return the seconds per call of each contender during which the GPU was busy, by the device's own clock.

    The median over `calls` calls. One recording serves all contenders; the time of launching the work and of waiting
    for it is not in it. Where the case asks for cold caches they are emptied, untimed, before every call.

    Returns:
        None where no GPU was at work, or a step went on on the host.
    """
    import tensorflow as tf

    opened = session.open
    steps = [opened.make_step(name) for name in names]
    with tempfile.TemporaryDirectory() as scratch:
        with tf.profiler.experimental.Profile(scratch):
            for turn, step in enumerate(steps):
                for number in range(-WARM_UP_CALLS, calls):
                    if opened.evict:
                        opened.evict()
                    if number < 0:
                        step()
                        continue
                    with tf.profiler.experimental.Trace(f"turn {turn}", step_num=number, _r=1):
                        step()
        files = list(Path(scratch).glob(f"plugins/profile/*/*{SUFFIX}"))
        found = read_device_seconds(load_trace(files[0])) if files else {}
    return [
        statistics.median(seconds) if any(seconds := found.get(f"turn {turn}", [])) else None
        for turn in range(len(steps))
    ]


def load_trace(path: Path) -> Any:
    """Read the XSpace message in a file."""
    # TensorFlow must be imported first: the module of the message is part of it.
    import tensorflow as tf  # noqa: F401
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(path.read_bytes())
    return space


def _compiler_nbytes(call: Any, arguments: Sequence[Any], case: Case) -> int | None:
    """Return the bytes of XLA's buffer assignment besides inputs and constants; None without XLA."""
    if case.mode != "xla" or not hasattr(call, "experimental_get_compiler_ir"):
        return None
    show = call.experimental_get_compiler_ir(*arguments)
    return buffer_nbytes(show(stage="optimized_hlo_proto_serialized"))[0]
