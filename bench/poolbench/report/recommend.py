"""Recommend implementations: the best set of each race, and one recommendation per op and device.

The recommendation has the least regret (Savage 1951, JASA 46:55): of the implementations that are
right in every case that they were raced in, the one whose largest loss against the best of each case
is least, then the one whose mean loss is.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from poolbench.core.candidate import split_contender
from poolbench.core.registry import REGISTRY
from poolbench.report.cases import GROUP, base_values, plain
from poolbench.report.frame import RunFrame
from poolbench.report.pairs import Interval, Pairs, estimate_pairs, mean_over_cases
from poolbench.report.support import failed_checks, supports
from poolbench.stats import estimate
from poolbench.stats import verdict as verdicts
from poolbench.stats.estimate import Estimate

LEAST = 0.5  # share of an op's cases that a candidate must have been in to be drawn in the profile


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer of one race.

    Attributes:
        race: its number; `row` is the table's row of the recommended candidate, `fastest_row` of the fastest.
        fastest: the right candidate with the least time.
        best: the candidates statistically tied for best, the fastest first.
        recommended: of these the op's recommendation, else the one with the fewest failed checks.
        alone: only one candidate was right, so that there was no choice.
    """

    race: int
    row: int
    fastest_row: int
    fastest: str
    best: tuple[str, ...]
    recommended: str
    alone: bool


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a candidate in one race: its time over the best one's.

    Attributes:
        row, best_row: of the candidate and of the best one; the same where the candidate is the best.
        ratio: with the interval of this machine's mean, corrected for all comparisons of the op.
    """

    row: int
    best_row: int
    ratio: Interval


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One answer for an op on a device, over all cases of the run.

    Attributes:
        op, device, candidate: the answer; `base_row` is its row nearest to the op's base case.
        cases, all_cases: in which it was raced and right, and in which anything was.
        complete: it is right in every case it was raced in, half of all or more; else it is right in the most.
        largest, mean: its loss against the best of each case, 1.0 for none, with intervals corrected
            for the choice among the implementations that are right in every case.
        losses: by race, the largest first; `exceptions` are those shown to exceed the margin.
        tied: other implementations whose largest loss is not shown to be larger.
        over: the textbook implementation, else the baseline; '' where the op has neither.
        speed_up: geometric mean of `over`'s time over its own, in the `over_cases` where both are right
            and neither was stopped early.
        least, most: the speed-up's range over these cases.
    """

    op: str
    device: str
    candidate: str
    base_row: int
    cases: int
    all_cases: int
    complete: bool
    largest: Interval
    mean: Interval
    losses: tuple[Loss, ...]
    exceptions: tuple[Loss, ...]
    tied: tuple[str, ...]
    over: str
    over_cases: int
    speed_up: Interval
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All recommendations of a run.

    Attributes:
        choices: one per race with a right candidate.
        recommendations: by (op, device).
        headline: one choice per op, device, mode and direction: nearest to the base case, then the largest.
        profiles: by (op, device), for each candidate its time over the best one's in each case that
            it was raced in; inf where it failed.
    """

    choices: tuple[Choice, ...]
    recommendations: Mapping[tuple[str, str], Recommendation]
    headline: tuple[Choice, ...]
    profiles: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]]


def pick(op: str, best: Sequence[str], failed: Mapping[tuple[str, str], int]) -> str:
    """Return the one with the fewest failed checks; of equals the first, which is the fastest."""
    return min(best, key=lambda name: failed.get((op, name), 0))


@functools.lru_cache(maxsize=1)  # page, terminal and tables of one run need it
def answer(loaded: RunFrame) -> Answers:
    """Return all recommendations of a run; wrong, failed and implausible candidates are excluded."""
    table = loaded.table
    right = table[table["right"] & table["seconds"].notna()]
    all_right = right.groupby("race", sort=True).groups
    races = {int(race): _by_one_clock(table, rows.tolist()) for race, rows in all_right.items()}
    pairs = estimate_pairs(loaded, races.values())
    places = list(zip(table["op"], table["device"], strict=True))
    by_place: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(dict)
    for race, rows in races.items():
        by_place[places[rows[0]]][race] = rows
    failed = failed_checks(cell for one in supports(loaded) for cell in one.cells)
    recommendations = {
        place: _recommendation(loaded, place, some, pairs, failed)
        for place, some in by_place.items()
    }
    names = table["candidate"].tolist()
    choices = []
    for race, rows in races.items():
        place = places[rows[0]]
        order = _in_order(table, rows, pairs)
        best = _tied(loaded, order, pairs)
        tied = [names[row] for row in best]
        usual = recommendations[place].candidate
        chosen = usual if usual in tied else pick(place[0], tied, failed)
        choices.append(
            Choice(
                race=race, row=best[tied.index(chosen)], fastest_row=best[0], fastest=tied[0],
                best=tuple(tied), recommended=chosen, alone=len(all_right[race]) == 1,
            )
        )  # fmt: skip
    profiles = {place: _profile(table, some, pairs) for place, some in by_place.items()}
    return Answers(
        choices=tuple(choices), recommendations=recommendations, profiles=profiles,
        headline=_headline(loaded, choices),
    )  # fmt: skip


def _by_one_clock(table: pd.DataFrame, rows: Sequence[int]) -> list[int]:
    """Return on a GPU the rows timed by its own clock: wall times cannot be compared with them."""
    clocks = table["clock"].to_numpy()
    return [row for row in rows if clocks[row] == "device"] or list(rows)


def _in_order(table: pd.DataFrame, rows: Sequence[int], pairs: Pairs) -> list[int]:
    """Return the rows that may be the best, the fastest first by paired ratios; none stopped early."""
    stopped = table["stopped_early"].to_numpy()
    left = [row for row in rows if not stopped[row]] or list(rows)

    def total(row: int) -> float:
        logs = (pairs.mean[row, other].log_ratio for other in left if other != row)
        return math.fsum(value for value in logs if math.isfinite(value))

    return sorted(left, key=total)


def _tied(loaded: RunFrame, order: Sequence[int], pairs: Pairs) -> list[int]:
    """Return the rows not shown slower than the best, the fastest first."""
    row_of = {id(loaded.samples[row]): row for row in order}
    kept = verdicts.best_set(
        {str(row): loaded.samples[row] for row in order},
        estimator=lambda one, other: pairs.mean[row_of[id(one)], row_of[id(other)]],
    )
    return [row for row in order if str(row) in set(kept)]


# Regret.


def _recommendation(
    loaded: RunFrame,
    place: tuple[str, str],
    races: Mapping[int, Sequence[int]],
    pairs: Pairs,
    failed: Mapping[tuple[str, str], int],
) -> Recommendation:
    """Return the candidate of least regret over the races of an op on a device.

    Every candidate counts that is right in all cases. Where there is none, those count that are right wherever
    they were raced, in half of the cases or more, and else those that are right in the most cases.

    Of candidates that are not shown to lose more than the one of least regret, the one with the
    fewest failed checks, then known failures: a tie in time is no reason to take what does not save or
    is wrong elsewhere.
    """
    names = loaded.table["candidate"].tolist()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for rows in races.values():
        for row in rows:
            rows_of[names[row]].append(row)
    here = (loaded.table["op"] == place[0]) & (loaded.table["device"] == place[1])
    broken = set(loaded.table.loc[here & ~loaded.table["right"], "candidate"])
    sound = [
        n for n, rows in rows_of.items() if n not in broken and len(rows) >= LEAST * len(races)
    ]
    most = max(map(len, rows_of.values()))
    whole = [name for name in sound if len(rows_of[name]) == len(races)]
    eligible = whole or sound or [name for name, rows in rows_of.items() if len(rows) == most]
    race_of = {row: rows for rows in races.values() for row in rows}
    found = {
        name: _regret(rows_of[name], race_of, pairs, choices=len(eligible)) for name in eligible
    }
    regret = {name: (found[name][0][0], found[name][1][0]) for name in eligible}
    limit = found[min(eligible, key=regret.__getitem__)][0][2]
    even = [name for name in eligible if not found[name][0][1] > limit]
    known = {n: REGISTRY.candidates.get((place[0], split_contender(n)[0])) for n in even}
    chosen = min(
        even,
        key=lambda name: (
            failed.get((place[0], name), 0),
            len(entry.failures) if (entry := known[name]) else 0,
            -len(rows_of[name]),
            regret[name],
        ),
    )
    largest, mean, losses = found[chosen]
    beyond = [loss for loss in losses if loss.ratio[1] > 1 + loaded.margin]
    over, over_rows = _compared(loaded, place[0], chosen, rows_of, race_of)
    speeds = [
        e for row, other in over_rows if math.isfinite((e := pairs.next_run[other, row]).log_ratio)
    ]
    # One process, as of what was stopped early at ten times the time, gives no interval.
    speeds = [e for e in speeds if e.low is not None] or speeds
    return Recommendation(
        op=place[0], device=place[1], candidate=chosen, cases=len(rows_of[chosen]), all_cases=len(races),
        base_row=_nearest(loaded, place[0], rows_of[chosen]), complete=bool(sound),
        largest=largest, mean=mean, losses=tuple(losses), exceptions=tuple(beyond),
        tied=tuple(n for n in eligible if n != chosen and not found[n][0][1] > largest[2]),
        over=over, over_cases=len(speeds), speed_up=mean_over_cases(speeds, loaded.confidence),
        least=min((e.ratio for e in speeds), default=math.nan),
        most=max((e.ratio for e in speeds), default=math.nan),
    )  # fmt: skip


def _regret(
    rows: Sequence[int], race_of: Mapping[int, Sequence[int]], pairs: Pairs, *, choices: int
) -> tuple[Interval, Interval, list[Loss]]:
    """Return a candidate's largest and mean loss against the best of each race, and the losses.

    The intervals hold for the chosen one of `choices` candidates (Bonferroni). A lower end of the
    largest loss also allows for all comparisons, of which the largest was taken; an upper end need
    not, for it is the largest of upper ends of which one belongs to the true largest loss.
    """
    comparisons = [
        [(other, pairs.mean[row, other]) for other in race_of[row] if other != row] for row in rows
    ]
    count = choices * max(1, sum(map(len, comparisons)))
    losses, kept = [], []
    upper = 0.0
    for row, beside in zip(rows, comparisons, strict=True):
        some = [(other, found) for other, found in beside if math.isfinite(found.log_ratio)]
        upper = max([upper, *(_end(found, 0.025 / choices) for _, found in some)])
        other, found = max(some, key=lambda one: one[1].log_ratio, default=(row, None))
        if found is None or found.log_ratio <= 0:
            losses.append(Loss(row=row, best_row=row, ratio=(1.0, 1.0, 1.0)))
            kept.append(estimate.from_error(0.0, 0.0, 1, 1))
            continue
        lowest, highest = (estimate.to_ratio(_end(found, sign * 0.025 / count)) for sign in (-1, 1))
        ends = (max(1.0, lowest), highest)
        losses.append(Loss(row=row, best_row=other, ratio=(found.ratio, *ends)))
        kept.append(found)
    mean, low, high = mean_over_cases(kept, 1 - 0.05 / choices)
    losses.sort(key=lambda loss: -loss.ratio[0])
    largest = losses[0].ratio[0]
    lowest = max(loss.ratio[1] for loss in losses)
    return (
        (largest, lowest, max(largest, estimate.to_ratio(upper))),
        (mean, max(1.0, low), high),
        losses,
    )


def _end(found: Estimate, tail: float) -> float:
    """Return the end of a log ratio's interval with this one-sided tail: below it for a tail below 0."""
    if not found.degrees > 0:
        return found.log_ratio
    reach = estimate.quantile(1 - 2 * abs(tail), found.degrees) * found.standard_error
    # Two processes of many candidates: the end is beyond what a float holds.
    return float(found.log_ratio + math.copysign(min(reach, 600.0), tail))


def _compared(
    loaded: RunFrame,
    op: str,
    chosen: str,
    rows_of: Mapping[str, Sequence[int]],
    race_of: Mapping[int, Sequence[int]],
) -> tuple[str, list[tuple[int, int]]]:
    """Return the textbook implementation, else the baseline, and its rows beside the chosen one's."""
    entry = REGISTRY.ops.get(op)
    baseline = str(loaded.table.at[rows_of[chosen][0], "baseline"])
    over = (entry.textbook if entry else "") or baseline
    if over in (chosen, ""):
        over = baseline if baseline != chosen else ""
    theirs = set(rows_of.get(over, ()))
    return over, [
        (row, other) for row in rows_of[chosen] for other in race_of[row] if other in theirs
    ]


def _nearest(loaded: RunFrame, op: str, rows: Sequence[int]) -> int:
    """Return the row nearest to the op's base case, the largest input first."""
    base = base_values(loaded, op)
    return min(rows, key=lambda row: _distance(loaded.row(row), base))


def _distance(at: Mapping[str, Any], base: Mapping[str, object]) -> tuple[int, float]:
    """Return in how many axes a row differs from the base case, then the size, the largest first."""
    return sum(plain(at[name]) != value for name, value in base.items()), -at["nbytes"]


def _profile(
    table: pd.DataFrame, races: Mapping[int, Sequence[int]], pairs: Pairs
) -> dict[str, tuple[float, ...]]:
    """Return by candidate its time over the best one's in each race it was in; inf where it failed."""
    found: dict[str, list[float]] = defaultdict(list)
    names, right = table["candidate"].tolist(), table["right"].tolist()
    everyone = table[table["race"].isin(races)].groupby("race", sort=False).groups
    for race, rows in races.items():
        ranked = set(rows)
        for row in everyone[race]:
            if row in ranked:
                logs = (pairs.mean[row, other].log_ratio for other in rows if other != row)
                worst = max((value for value in logs if math.isfinite(value)), default=0.0)
                found[names[row]].append(estimate.to_ratio(max(0.0, worst)))
            elif not right[row]:  # else it was timed by another clock
                found[names[row]].append(math.inf)
    return {
        name: tuple(some)
        for name, some in found.items()
        if len(some) >= LEAST * len(races) and any(map(math.isfinite, some))
    }


def _headline(loaded: RunFrame, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    found: dict[tuple[str, ...], tuple[tuple[int, float], Choice]] = {}
    for choice in choices:
        at = loaded.row(choice.row)
        base = base_values(loaded, at["op"]).items()
        place = tuple(at[name] for name in GROUP)
        distance = _distance(at, {name: value for name, value in base if name not in GROUP})
        if place not in found or distance < found[place][0]:
            found[place] = distance, choice
    return tuple(choice for _, choice in found.values())
