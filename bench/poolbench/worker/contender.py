"""Open contenders: build a candidate or probe, make its first call, check it, and estimate its time."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from poolbench.core.errors import Status, reason_of, status_of
from poolbench.core.plan import PROBE_NAMES
from poolbench.core.program import Program
from poolbench.core.records import Accuracy
from poolbench.core.registry import REGISTRY
from poolbench.worker import check as checks
from poolbench.worker import isolation
from poolbench.worker.backends import Array, Call, to_numpy
from poolbench.worker.bandwidth import open_probe
from poolbench.worker.session import OpenCase, Session, bind
from poolbench.worker.timing import clock, estimate_seconds

# The CPU's allocator does not count tensors below 256 KiB, so the peak of a small case would be too low.
MIN_PEAK_NBYTES = 1 << 20


class OpenedContender(msgspec.Struct, frozen=True, kw_only=True):
    """The result of opening a contender.

    Attributes:
        status, reason: 'ok', or why it cannot race.
        first_call_seconds: trace and compile and the first run.
        call_seconds: a rough time of one call, to plan blocks by; 0 where it was not checked, for
            then an earlier process knows it.
        read_nbytes, written_nbytes: fewest bytes a call reads and writes.
        check_seconds, calibration_seconds: what else opening took.
        settings: of the framework, which affect times.
        tainted: it left the process other than it was: its other candidates need a fresh one.
    """

    status: Status = "ok"
    reason: str = ""
    accuracy: Accuracy | None = None
    first_call_seconds: float = 0.0
    call_seconds: float = 0.0
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int | None = None
    check_seconds: float = 0.0
    calibration_seconds: float = 0.0
    settings: dict[str, str] = {}
    tainted: bool = False


def open_contender(session: Session, name: str, check: bool) -> OpenedContender:
    """Build a candidate or a probe and make its first call; with `check`, compare it with the reference and time it.

    A candidate that raises comes back with status 'error' and its text; so does one that leaves
    threads or processes behind, or changes what its other candidates share with it.
    """
    if name in PROBE_NAMES:
        seconds, nbytes, taken = open_probe(session, name)
        return OpenedContender(
            call_seconds=seconds,
            read_nbytes=0 if name == "bandwidth-write" else nbytes,
            written_nbytes=0 if name == "bandwidth-read" else nbytes,
            calibration_seconds=taken,
        )
    before = isolation.read()
    try:
        contender = _open_candidate(session, name, check=check)
    except Exception as error:  # noqa: BLE001 (what a candidate raises is a result)
        contender = OpenedContender(status=status_of(error), reason=reason_of(error))
    if left := isolation.left_behind(before):
        reason = left if contender.status == "ok" else f"{contender.reason}; {left}"
        status = "error" if contender.status == "ok" else contender.status
        return msgspec.structs.replace(contender, status=status, reason=reason, tainted=True)
    return contender


def _open_candidate(session: Session, name: str, *, check: bool) -> OpenedContender:
    opened = session.open
    case = opened.case
    candidate = REGISTRY.candidates[case.op, name]

    start = clock()
    if case.mode != "eager" and (case.op, name) not in session.converted:
        # AutoGraph converts a candidate's Python once per process, and the first candidate also pays 0.25 s for
        # loading AutoGraph. Neither is part of tracing and compiling this case.
        with opened.backend.on(opened.device):
            opened.backend.convert(bind(candidate, case, opened.backend), opened.inputs)
        session.converted.add((case.op, name))
    converting = clock() - start

    contender = open_call(
        session,
        name,
        lambda: bind(candidate, case, opened.backend),
        judge=(lambda outputs: checks.judge(answers_of(opened), outputs)) if check else None,
        calibrate=check,
        measure_peak=check and sum(array.nbytes for array in opened.host) >= MIN_PEAK_NBYTES,
    )
    return msgspec.structs.replace(
        contender,
        calibration_seconds=contender.calibration_seconds + converting,
        settings=opened.backend.settings(case.mode, opened.device) if check else {},
    )


def read_program(session: Session, name: str) -> Program | None:
    """Return what the framework made of an opened contender; it is compiled or traced once more."""
    opened = session.open
    call, arguments = opened.bound(name)
    if REGISTRY.candidates[opened.case.op, name].backends == ("numpy",):
        return None
    with opened.backend.on(opened.device):
        return opened.backend.program(call, arguments, opened.case.mode)


def answers_of(opened: OpenCase) -> checks.Answers:
    """Return the reference's outputs for the inputs of the open case."""
    if opened.answers is None:
        op = REGISTRY.ops[opened.case.op]
        opened.answers = checks.Answers(op=op, case=opened.case, inputs=opened.host)
    return opened.answers


def open_call(
    session: Session,
    name: str,
    make: Callable[[], Call],
    *,
    places: tuple[int, ...] | None = None,
    judge: Callable[[tuple[Array, ...]], checks.Verdict] | None = None,
    calibrate: bool = True,
    measure_peak: bool = False,
) -> OpenedContender:
    """Make the callable, run its first call, check the result, and estimate its time.

    Args:
        session: whose case is open.
        name: of the contender, for a BlockRequest.
        make: makes the call; its time is part of the first call's.
        places: which of the case's inputs it takes; None: all.
        judge: given the outputs of the first call; None: they are not checked.
        calibrate: whether to estimate the time of a call.
        measure_peak: whether to read the peak of the device's memory.
    """
    opened = session.open
    places = tuple(range(len(opened.inputs))) if places is None else places
    arguments = [opened.inputs[i] for i in places]
    start = clock()
    with opened.backend.on(opened.device):
        call = make()
        result = call(*arguments)
        opened.backend.synchronize(opened.device)
    first_call = clock() - start
    outputs = outputs_of(result)
    del result
    opened.calls[name] = (call, places)
    start = clock()
    verdict = judge(outputs) if judge else None
    check_seconds = clock() - start
    start = clock()
    peak = (
        opened.backend.peak_nbytes(opened.make_step(name), opened.device) if measure_peak else None
    )
    call_seconds = estimate_seconds(opened, name) if calibrate else 0.0
    return OpenedContender(
        status=verdict.status if verdict else "ok",
        reason=verdict.reason if verdict else "",
        accuracy=verdict.accuracy if verdict else None,
        first_call_seconds=first_call,
        call_seconds=call_seconds,
        read_nbytes=sum(opened.host[i].nbytes for i in places),
        written_nbytes=sum(array.nbytes for array in outputs),
        peak_nbytes=peak,
        check_seconds=check_seconds,
        calibration_seconds=clock() - start,
    )


def outputs_of(result: object) -> tuple[Array, ...]:
    """Return the result of a call on the host."""
    return tuple(to_numpy(value) for value in (result if isinstance(result, tuple) else (result,)))
