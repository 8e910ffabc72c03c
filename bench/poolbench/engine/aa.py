"""Races of an op with copies of itself: equal ones, and ones made slower by a known share.

A copy is traced on its own and gets the same input buffers as the others. Its true ratio is known,
so that a race of copies shows false alarms and the slowdowns that are detected. Workers, rounds and timing
loop are those of any other race.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from poolbench.core.case import Case
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import Contention, Measurement, Samples
from poolbench.core.registry import REGISTRY, load_builtin
from poolbench.engine.race import race_in_one_worker
from poolbench.engine.recovery import Tasks, Workers
from poolbench.stats.estimate import Estimate, estimate
from poolbench.stats.verdict import Verdict, verdict
from poolbench.worker.contender import OpenedContender, open_call
from poolbench.worker.session import Session, bind
from poolbench.worker.timing import time_block

CASE = next(
    op.sweep("selftest").base_case for op in load_builtin().ops.values() if "selftest" in op.sweeps
)
BASELINE = "copy-0"
MARGIN = Plan().margin
COPY_NAME = re.compile(r"copy-(\d+)(?:-slower-([0-9.]+))?")
CALIBRATION_BLOCKS = 5
CALIBRATION_BLOCK_SECONDS = 0.003


class ProofError(Exception):
    """A measurement of the self-test or an acceptance check failed; the text is the reason in one line."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """The design of one race of copies.

    Attributes:
        plain: equal copies beside the baseline, each one A/A comparison.
        slowdowns: one further copy each, slowed by this share of a call: 0.01 for 1%.
        plan: of the race; its seed is the first race's.
        case, source: the op and the candidate that is copied; '' takes the op's baseline.
    """

    plain: int
    slowdowns: tuple[float, ...] = ()
    plan: Plan = field(default_factory=Plan)
    case: Case = CASE
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A copy compared with the baseline copy: the injected slowdown and the estimate."""

    injected: float
    found: Estimate

    def verdict(self, margin: float) -> Verdict:
        """Return the verdict of this comparison by itself, which errs more often than a run's verdict."""
        return verdict(self.found, margin)


@dataclass(frozen=True, kw_only=True)
class CopiesRace:
    """The result of one race of copies.

    Attributes:
        compared: every copy but the baseline.
        equal: samples of the copies that are equal, the baseline's among them, by name.
        contention: background load during the race.
        blocks: recorded blocks, marked ones among them.
        seconds: wall time.
    """

    compared: tuple[Compared, ...]
    equal: Mapping[str, Samples]
    contention: Contention
    blocks: int
    seconds: float


def copy_names(design: Design) -> dict[str, float]:
    """Return the names of the copies and the slowdown of each; the baseline is the first."""
    names = {f"copy-{number}": 0.0 for number in range(design.plain + 1)}
    for slowdown in design.slowdowns:
        names[f"copy-{len(names)}-slower-{slowdown:g}"] = slowdown
    return names


def slowdown_of(name: str) -> float:
    """Return the slowdown that a copy's name stands for, as a share of a call.

    Raises:
        ValueError: not the name of a copy.
    """
    match = COPY_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"a copy is named 'copy-3' or 'copy-3-slower-0.01'; got {name!r}")
    return float(match.group(2) or 0.0)


def delay_call(
    call: Callable[..., Any], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Callable[..., Any]:
    """Return the call preceded by a busy wait of `seconds`; a sleep would idle the processor."""

    def delayed(*arguments: Any) -> Any:
        end = clock() + seconds
        while clock() < end:
            pass
        return call(*arguments)

    return delayed


def open_copy(
    session: Session,
    name: str,
    check: bool,  # noqa: ARG001
    *,
    case: Case,
    source: str,
) -> OpenedContender:
    """Trace the candidate again under a copy's name, with the slowdown of that name; in a worker.

    Equal copies go through the same wrapper with no wait, so that the wrapper is on both sides.
    """
    candidate = REGISTRY.candidates[case.op, source]
    call = bind(candidate, case)
    plain = delay_call(call, 0.0)
    contender = open_call(session, name, lambda: plain)
    slowdown = slowdown_of(name)
    if not slowdown or contender.status != "ok":
        return contender
    # The fastest of several blocks, so that the wait never exceeds its nominal share.
    calls = max(1, round(CALIBRATION_BLOCK_SECONDS / max(contender.call_seconds, 1e-9)))
    seconds = slowdown * min(
        time_block(session, name, calls, calls).seconds for _ in range(CALIBRATION_BLOCKS)
    )
    return open_call(session, name, lambda: delay_call(call, seconds))


def source_of(design: Design) -> str:
    """Return the name of the candidate that a design copies.

    Raises:
        ProofError: the op has no such candidate.
    """
    import poolbench.ops  # noqa: F401 (registers the ops that ship)

    op = REGISTRY.ops.get(design.case.op)
    name = design.source or (op.baseline if op else "")
    if (design.case.op, name) not in REGISTRY.candidates:
        raise ProofError(f"there is no candidate {name!r} of {design.case.op} to copy")
    return name


def race_copies(design: Design, workers: Workers, number: int = 0) -> CopiesRace:
    """Run one race of copies; `number` varies its inputs and orders.

    Raises:
        ProofError: a copy did not run.
    """
    source = source_of(design)
    names = copy_names(design)
    original = REGISTRY.candidates[design.case.op, source]
    start = time.perf_counter()
    race = race_in_one_worker(
        design.case,
        [replace(original, name=name) for name in names],
        baseline=BASELINE,
        plan=replace(design.plan, seed=design.plan.seed + number),
        worker=WorkerSpec(threads=design.case.threads),
        tasks=Tasks(
            open_contender=functools.partial(open_copy, case=design.case, source=source), probes=()
        ),
    )
    measurements = {m.candidate: m for m in race.run(workers).measurements}
    return judge_copies(names, measurements, time.perf_counter() - start)


def judge_copies(
    names: Mapping[str, float], measurements: Mapping[str, Measurement], seconds: float
) -> CopiesRace:
    """Return the comparisons of a race of copies from its measurements.

    Raises:
        ProofError: a copy did not run.
    """
    for name in names:
        if measurements[name].status != "ok":
            raise ProofError(f"{name}: {measurements[name].status}: {measurements[name].reason}")
    baseline = measurements[BASELINE]
    assert baseline.contention is not None
    return CopiesRace(
        compared=tuple(
            Compared(
                injected=injected, found=estimate(measurements[name].samples, baseline.samples)
            )
            for name, injected in names.items()
            if name != BASELINE
        ),
        equal={
            name: measurements[name].samples for name, injected in names.items() if not injected
        },
        contention=baseline.contention,
        blocks=sum(len(m.samples) for m in measurements.values()),
        seconds=seconds,
    )


def race_series(
    race: Callable[[int], CopiesRace],
    races: int,
    *,
    until: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[CopiesRace]:
    """Yield up to `races` races; stop before one that would end after `until` if it took as long as the longest."""
    longest = 0.0
    for number in range(races):
        begun = clock()
        if number and begun + longest > until:
            return
        yield race(number)
        longest = max(longest, clock() - begun)


def of_injected(races: Sequence[CopiesRace], injected: float) -> list[Compared]:
    """Return the comparisons of all races with this slowdown."""
    return [one for race in races for one in race.compared if one.injected == injected]


def noise_floor(same: Sequence[Compared]) -> float:
    """Return the 95th percentile of the absolute A/A log ratio."""
    return float(np.quantile([abs(one.found.log_ratio) for one in same], 0.95))


def count_verdicts(compared: Sequence[Compared], margin: float) -> dict[str, int]:
    """Count the comparisons by verdict."""
    counts: dict[str, int] = {"FASTER": 0, "SLOWER": 0, "SAME": 0, "UNDECIDED": 0}
    for one in compared:
        counts[one.verdict(margin)] += 1
    return counts


def share_marked(races: Sequence[CopiesRace]) -> float:
    """Return the share of the recorded blocks that were marked as contended."""
    return sum(r.contention.blocks_marked for r in races) / max(1, sum(r.blocks for r in races))
