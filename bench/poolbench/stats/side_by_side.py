"""Base against head: the estimate from legs in turn, the sequential rule, and the results as plain data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poolbench.core.case import Case
from poolbench.stats.estimate import Estimate, from_error, log_margin

# Visits after which a race checks whether it is decided; the last one ends it.
LOOKS = (4, 6, 9, 13, 19, 28, 40)
# The quick blocks of a leg tell its speed: the others were interrupted by another process. Lower quantiles
# vary more between legs.
LEG_QUANTILE = 0.1
# What is known of a visit's deviation before any: processes of one program differ by 1 to 2%. With it four visits
# find 10%, where their own variance alone would find 30%. Simulated false verdicts stay below 1% up to 5%.
PRIOR_DEGREES, PROCESS_DEVIATION = 4, 0.03
# Of a block: process, allocation, round, calls, seconds, contended.
Row = tuple[int, int, int, int, float, int]

Outcome = Literal["SLOWER", "FASTER", "SAME", "UNDECIDED", "BROKE", "WORKS", "NOT_RUN"]
Clock = Literal["wall", "processor"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a difference is called one.

    A side is slower (or faster) if the interval excludes equality and the estimate exceeds the margin. They are
    the same if the interval lies within the margin. Each look has the error `alpha` over the number of looks,
    of which the end of the time is one more, if it is not before the first, and half of it is each clock's. By
    Bonferroni's inequality a comparison of equal sides gets a false verdict in at most a share `alpha` of races,
    whenever the race ends.
    """

    margin: float = 0.02
    alpha: float = 0.01
    looks: tuple[int, ...] = LOOKS

    @property
    def confidence(self) -> float:
        """Return the confidence of an interval of one clock at one look."""
        return 1 - self.alpha / (len(self.looks) + 1) / 2

    def judge_both(
        self, wall: Estimate, used: Estimate, base_runs: bool, other_runs: bool
    ) -> tuple[Outcome, Clock]:
        """Return the verdict and the clock that it is by, given which of the sides have a correct result."""
        if not (base_runs and other_runs):
            return "BROKE" if base_runs else "WORKS" if other_runs else "NOT_RUN", "wall"
        # Fewer visits than at the first look do not show how much visits differ: beside heavy load
        # two of them agreed on a third of the time for a head that was base.
        if wall.processes < self.looks[0]:
            return "UNDECIDED", "wall"
        verdict, by_processor = self.judge(wall), self.judge(used)
        # Processor time breaks a near tie: where the wall clock points the same way beyond the margin.
        beyond = abs(wall.log_ratio) > log_margin(self.margin)
        same_way = by_processor == ("SLOWER" if wall.log_ratio > 0 else "FASTER")
        if verdict == "UNDECIDED" and same_way and beyond:
            return by_processor, "processor"
        return verdict, "wall"

    def judge(self, found: Estimate) -> Outcome:
        """Return the verdict of one clock."""
        if found.low is None or found.high is None:
            return "UNDECIDED"
        margin = log_margin(self.margin)
        if found.low > 0 and found.log_ratio > margin:
            return "SLOWER"
        if found.high < 0 and found.log_ratio < -margin:
            return "FASTER"
        return "SAME" if -margin < found.low and found.high < margin else "UNDECIDED"


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """One candidate's head (or base-again) over its base in one case.

    Attributes:
        case, candidate: which.
        verdict: BROKE or WORKS where one side alone has no correct result, NOT_RUN where neither has.
        wall: the log ratio of wall times, with the interval of one look.
        processor: the same of the processor time of all threads: other processes affect it less, waiting not at all.
        clock: of the verdict.
        seconds: base's median time of a call.
        difference: how the outputs differ beyond the tolerance; '' if they agree.
        reason: why a side has no time; '' if both have.
        visits: to processes of each side.
    """

    case: Case
    candidate: str
    verdict: Outcome
    wall: Estimate
    processor: Estimate
    clock: Clock = "wall"
    seconds: float = math.nan
    difference: str = ""
    reason: str = ""
    visits: int = 0

    @property
    def detectable(self) -> float:
        """Return the slowdown that this race finds nine times of ten: 0.05 for 5%; nan without an interval."""
        if self.wall.low is None or self.wall.high is None:
            return math.nan
        half = (self.wall.high - self.wall.low) / 2
        # Power 0.9 needs 1.28 standard errors beyond the half-width.
        return math.expm1(half + 1.28 * self.wall.standard_error)

    @property
    def clocks_disagree(self) -> bool:
        """Tell whether the wall shows a difference that the processor time excludes."""
        wall, used = self.wall, self.processor
        if self.verdict not in ("SLOWER", "FASTER") or used.low is None or used.high is None:
            return False
        return (
            used.high < wall.log_ratio / 2 if wall.log_ratio > 0 else used.low > wall.log_ratio / 2
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a job.

    Attributes:
        base, head: titles of the sides.
        rule: that decided.
        heads: each candidate's head against its base, in the order of the request.
        controls: base against base, in other processes; a verdict SLOWER or FASTER is a false alarm.
        seconds: that it took.
    """

    base: str
    head: str
    rule: Rule
    heads: tuple[SideBySide, ...]
    controls: tuple[SideBySide, ...]
    seconds: float

    @property
    def found(self) -> tuple[SideBySide, ...]:
        """Return what fails a check: slower, broken, or another answer."""
        return tuple(
            one for one in self.heads if one.verdict in ("SLOWER", "BROKE") or one.difference
        )

    @property
    def false_alarms(self) -> tuple[SideBySide, ...]:
        """Return the comparisons of base with itself that found a difference."""
        return tuple(one for one in self.controls if one.verdict in ("SLOWER", "FASTER"))


def compare_legs(above: Sequence[Row], below: Sequence[Row], confidence: float) -> Estimate:
    """Estimate the log ratio of two sides from their blocks.

    Each pair of legs gives the difference of the logs of its sides' quick blocks, and each visit the mean of its
    pairs. The variance of a visit is estimated from the visits and, with the weight of PRIOR_DEGREES, from the
    pairs within a visit and PROCESS_DEVIATION. The interval is of a t distribution with the degrees of both.
    """
    left, right = _leg_logs(above), _leg_logs(below)
    visits: dict[int, list[float]] = defaultdict(list)
    for place in left.keys() & right.keys():
        visits[place[0]].append(left[place] - right[place])
    units = np.array([np.mean(values) for values in visits.values()])
    count = len(units)
    if count < 2:
        value = float(units.mean()) if count else math.nan
        return from_error(value, math.nan, 0, count, confidence)
    within = np.mean([np.var(v, ddof=1) / len(v) if len(v) > 1 else 0.0 for v in visits.values()])
    prior = float(within) + PROCESS_DEVIATION**2
    degrees = PRIOR_DEGREES + count - 1
    variance = (PRIOR_DEGREES * prior + (count - 1) * units.var(ddof=1)) / degrees
    error = math.sqrt(variance / count)
    return from_error(float(units.mean()), error, degrees, count, confidence)


def _leg_logs(rows: Sequence[Row]) -> dict[tuple[int, int], float]:
    """Return the log of the quick blocks' time of each leg, by (process, allocation)."""
    legs: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row[4] > 0:
            legs[row[0], row[1]].append(row[4])
    return {place: float(np.log(np.quantile(times, LEG_QUANTILE))) for place, times in legs.items()}
