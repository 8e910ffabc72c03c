"""Decide the rounds per process and per allocation, and which candidates stop early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from poolbench.core.plan import Plan
from poolbench.core.records import Samples
from poolbench.engine.recorder import ContenderRecord, middle
from poolbench.engine.rounds import affordable

# After this many processes the noise of a race is known. The remaining processes get as many rounds as the target
# precision needs, within these multiples of the plan's rounds.
PACE_FROM = 3
LEAST_PACE, MOST_PACE = 0.25, 3.0


class RaceBudget:
    """The seconds of rounds of each process of a race.

    Attributes:
        usual_seconds: what the plan gives a process.
        pace: factor on it that the noise seen so far asks for; 1 until PACE_FROM processes are done.
    """

    def __init__(self, plan: Plan) -> None:
        self.usual_seconds = plan.budget_seconds / plan.processes
        self.pace = 1.0
        self._plan = plan

    @property
    def extra_seconds(self) -> float:
        """Return the seconds of the next process beyond the plan's; negative if fewer suffice."""
        return (self.pace - 1.0) * self.usual_seconds

    def set_pace(self, processes: int, pairs: Sequence[tuple[Samples, Samples]]) -> None:
        """Set the pace from the processes so far.

        Args:
            processes: how many are done.
            pairs: samples of each candidate that still runs, and of the baseline.
        """
        asked = [self._pace_of(*pair, processes) for pair in pairs]
        self.pace = min(MOST_PACE, max(LEAST_PACE, middle(asked or [1.0])))

    def _pace_of(self, candidate: Samples, baseline: Samples, processes: int) -> float:
        """Return the pace that one ratio needs; at most 1 if it is clearly faster or slower already."""
        from poolbench.stats import estimate, planning

        plan = self._plan
        seen = planning.components(candidate, baseline)
        if seen is None:
            return 1.0
        half_width = seen.half_width(
            processes=plan.processes, allocations=plan.allocations, rounds=seen.rounds
        )
        pace = planning.pace(half_width, plan.precision, done=processes, processes=plan.processes)
        distance = abs(estimate.estimate(candidate, baseline).log_ratio)
        clear = distance > math.log1p(plan.margin) + 2 * math.log1p(half_width)
        return min(pace, 1.0) if clear else pace


class RoundBudget:
    """Count the rounds of one allocation: the plan's, or as many as the seconds allow.

    Noisy rounds are kept, marked, and run again within the seconds: at most half as many, because more of
    them would not be quieter under load without end.
    """

    def __init__(self, *, most: int, seconds: float, round_seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._rounds = affordable(seconds, round_seconds, most)
        self._done = self._redone = 0
        self._spent = 0.0

    def next(self, count: int) -> range:
        """Return the numbers of the next rounds, up to a number; empty at the end."""
        return range(self._done, min(self._rounds, self._done + count))

    def enter(self, count: int, seconds: float, *, noisy: bool) -> None:
        """Count finished rounds and their seconds; noisy ones are repeated where the seconds allow."""
        self._done += count
        self._spent += seconds
        self._redone += min(self._most // 2 - self._redone, count) if noisy else 0
        self._rounds = affordable(
            self._seconds, self._spent / self._done, self._most + self._redone
        )


def stop_slow_candidates(
    candidates: Sequence[ContenderRecord], baseline: ContenderRecord, limit: float
) -> None:
    """Stop candidates that are more than `limit` times slower than the baseline."""
    if not baseline.columns:
        return
    seconds = limit * middle(row[4] for row in baseline.columns)
    for record in candidates:
        if record.columns and middle(row[4] for row in record.columns) > seconds:
            record.stopped_early = True
            record.flags.append("stopped_early")
