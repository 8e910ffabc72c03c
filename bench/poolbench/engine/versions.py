"""Base against head: the same candidates in workers of two kinds, in one race that ends when all are decided.

The kinds may differ in interpreter, environment, backend or threads. A third worker per process, of base's kind,
races base against base: its false alarms are those of this very race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from poolbench.core.case import Case
from poolbench.core.plan import Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.records import common_clock
from poolbench.core.registry import REGISTRY
from poolbench.engine.race import Race, Result
from poolbench.engine.recorder import to_samples
from poolbench.engine.recovery import Tasks, Workers
from poolbench.stats.estimate import Estimate, estimate
from poolbench.stats.verdict import Verdict, verdict

BASE, HEAD, AGAIN = "base", "head", "base-again"
# Processes after which the race looks whether every comparison is decided.
LOOKS = (4, 6, 9, 14, 20)
# No framework reads this variable: it makes a second worker of one kind another worker.
COPY = "POOLBENCH_COPY"


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """One candidate's head (or base-again) over its base.

    Attributes:
        candidate: its name.
        verdict: of `found`; UNDECIDED where the race ended first.
        found: the log ratio, its interval at the confidence of one look.
        processor: the same ratio of the workers' processor time, which sees less of what else uses the machine
            and nothing of waiting; without an interval where several candidates share a leg.
        reason: why a side has no samples; '' if both have.
    """

    candidate: str
    verdict: Verdict
    found: Estimate
    processor: Estimate
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class VersionsResult:
    """What a race of two versions came to.

    Attributes:
        heads: each candidate's head over its base.
        controls: each candidate's base over itself, in other processes; every verdict but SAME and UNDECIDED
            is a false alarm.
        processes: processes of each kind that were run.
        race: all measurements.
    """

    heads: tuple[SideBySide, ...]
    controls: tuple[SideBySide, ...]
    processes: int
    race: Result


def make_versions_spec(
    case: Case, candidates: Sequence[str], *, base: WorkerSpec, head: WorkerSpec, plan: Plan
) -> RaceSpec:
    """Return the race of each candidate in workers of base, of head, and of base once more.

    Args:
        case: the case.
        candidates: names; the first's base is the baseline.
        base: the kind of worker that ratios are taken to.
        head: the other kind; it may be equal.
        plan: with at most `plan.processes` processes of each kind.
    """
    if head == base:
        head = _copy_of(head, "2")
    sides = {BASE: base, HEAD: head, AGAIN: _copy_of(base, "1")}
    contenders = tuple(
        Contender(candidate=name, worker=worker, label=label)
        for name in candidates
        for label, worker in sides.items()
    )
    baseline = Contender(candidate=candidates[0], label=BASE).name
    return RaceSpec(case=case, contenders=contenders, baseline=baseline, plan=plan)


def make_versions_race(spec: RaceSpec) -> Race:
    """Return the race of the registered candidates, without bandwidth probes."""
    of = REGISTRY.of(spec.case.op)
    names = dict.fromkeys(one.candidate for one in spec.contenders)
    return Race(spec, [of[name] for name in names], tasks=Tasks(probes=()))


def race_versions(
    race: Race,
    workers: Workers,
    *,
    margin: float = 0.02,
    alpha: float = 0.01,
    looks: Sequence[int] = LOOKS,
) -> VersionsResult:
    """Run the race until a look finds every head decided, or to the end of its plan.

    Each look tests at `alpha` over the number of looks, so that by Bonferroni's inequality a comparison
    gets a false verdict in at most a share `alpha` of races, whenever the race ends.

    Args:
        race: of `make_versions_spec`.
        workers: where its processes come from.
        margin: sides that differ by less are equivalent.
        alpha: share of false verdicts per comparison.
        looks: numbers of processes after which to look.
    """
    each = alpha / len(looks)
    done, more = 0, True
    heads: tuple[SideBySide, ...] = ()
    while more:
        more = race.run_process(workers)
        done += 1
        if done in looks or not more:
            heads = compare_sides(race, HEAD, margin, each)
            more = more and any(one.verdict == "UNDECIDED" and not one.reason for one in heads)
    return VersionsResult(
        heads=heads,
        controls=compare_sides(race, AGAIN, margin, each),
        processes=done,
        race=race.result(),
    )


def compare_sides(race: Race, label: str, margin: float, alpha: float) -> tuple[SideBySide, ...]:
    """Compare each candidate of this label with its base, as far as the race has gone."""
    found = []
    for name in dict.fromkeys(one.candidate for one in race.spec.contenders):
        base, other = (
            race.records[Contender(candidate=name, label=side).name] for side in (BASE, label)
        )
        clock = common_clock(other.clock, base.clock)
        ratio = estimate(other.samples(clock), base.samples(clock), confidence=1 - alpha)
        processor = estimate(
            to_samples(other.processor_columns),
            to_samples(base.processor_columns),
            confidence=1 - alpha,
        )
        reason = "; ".join(
            f"{one.name}: {one.status}: {one.reason}" for one in (base, other) if one.status != "ok"
        )
        decided: Verdict = "UNDECIDED" if reason else verdict(ratio, margin, alpha=alpha)
        found.append(
            SideBySide(
                candidate=name, verdict=decided, found=ratio, processor=processor, reason=reason
            )
        )
    return tuple(found)


def _copy_of(spec: WorkerSpec, number: str) -> WorkerSpec:
    environment = (*spec.environment, (COPY, number))
    return msgspec.structs.replace(spec, environment=environment)
