"""How evidence is judged: each function says what it found, and whether that is enough."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from poolbench.core.records import TimeBreakdown
from poolbench.engine.aa import (
    MARGIN,
    CopiesRace,
    count_verdicts,
    noise_floor,
    of_injected,
    share_marked,
)
from poolbench.proof.evidence import Compared
from poolbench.stats.estimate import Comparison, best_set, difference


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a bar's judgement came to; figures are what it rests on."""

    text: str
    passed: bool
    figures: dict[str, Any] = {}


def at_most(share: float, count: int, total: int) -> bool:
    """Whether count is at most a share of total; false of nothing."""
    return total > 0 and count <= share * total + 1e-9


def judge_alarms(races: Sequence[CopiesRace]) -> Found:
    """A/A: false alarms in at most 1%."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    alarms = counts["FASTER"] + counts["SLOWER"]
    return Found(
        text=f"{alarms} of {len(same)}; noise floor {noise_floor(same):.2%}",
        passed=at_most(0.01, alarms, len(same)),
        figures={**counts, "noise_floor": noise_floor(same), "blocks_marked": share_marked(races)},
    )


def judge_undecided(races: Sequence[CopiesRace]) -> Found:
    """A/A: undecided in at most 10%."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    width = statistics.median(one.found.half_width for one in same)
    return Found(
        text=f"{counts['UNDECIDED']} of {len(same)}; median half-width {width:.2%}",
        passed=at_most(0.10, counts["UNDECIDED"], len(same)),
        figures={**counts, "median_half_width": width},
    )


def judge_power(
    races: Sequence[CopiesRace], injected: float, margin: float, required: float
) -> Found:
    """A known slowdown gets SLOWER often enough."""
    slowed = of_injected(races, injected)
    counts = count_verdicts(slowed, margin)
    missed = len(slowed) - counts["SLOWER"]
    return Found(
        text=f"{counts['SLOWER']} of {len(slowed)}",
        passed=at_most(1 - required, missed, len(slowed)),
        figures={**counts, "log_ratios": [round(one.found.log_ratio, 5) for one in slowed]},
    )


def judge_pairs(races: Sequence[CopiesRace], seconds: float) -> Found:
    """1% at margin zero in at least 90%; a pair that takes longer than it may has not found it."""
    slowed = [(race, one) for race in races for one in of_injected([race], 0.01)]
    slower = [race.seconds for race, one in slowed if one.verdict(0.0) == "SLOWER"]
    in_time = sum(taken <= seconds for taken in slower)
    longest = max(race.seconds for race in races)
    return Found(
        text=f"{in_time} of {len(slowed)} in time, {len(slower)} in all; {longest:.1f} s for the longest",
        passed=at_most(0.10, len(slowed) - in_time, len(slowed)),
        figures={
            "in_time": in_time,
            "slower": len(slower),
            "pairs": len(slowed),
            "longest_seconds": longest,
            "log_ratios": [round(one.found.log_ratio, 5) for _, one in slowed],
            "half_widths": [round(one.found.half_width, 5) for _, one in slowed],
        },
    )


def judge_equal(races: Sequence[CopiesRace]) -> Found:
    """Ten equal candidates: no race has a sole winner."""
    sizes = [len(best_set(race.equal)) for race in races]
    return Found(
        text=f"{sizes.count(1)} sole winners in {len(sizes)} races; smallest set {min(sizes)}",
        passed=1 not in sizes,
        figures={"sizes": sizes},
    )


def judge_runs(runs: Sequence[Compared]) -> Found:
    """The difference of log ratios of each two runs, one after the other, covers zero, and no FASTER turns SLOWER."""
    covered, comparisons, turned = [], 0, 0
    for first, second in itertools.pairwise(runs):
        keys = first.keys() & second.keys()
        comparisons += len(keys)
        covered.append(0)
        for key in keys:
            one, other = first[key], second[key]
            gap = difference(one.estimate, other.estimate)
            covered[-1] += gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high
            turned += {one.verdict, other.verdict} == {"FASTER", "SLOWER"}
    return Found(
        text=f"covers zero in {sum(covered)} of {comparisons}; {turned} turned",
        passed=at_most(0.07, comparisons - sum(covered), comparisons) and not turned,
        figures={"covered": covered, "comparisons": comparisons, "turned": turned},
    )


def judge_widths(comparisons: Sequence[Comparison], most: float, undecided: float | None) -> Found:
    """The median half-width, and how many comparisons are undecided."""
    if not comparisons:
        return Found(text="no comparison has an interval", passed=False)
    width = statistics.median(one.estimate.half_width for one in comparisons)
    open_ones = sum(one.verdict == "UNDECIDED" for one in comparisons)
    n = len(comparisons)
    few = undecided is None or at_most(undecided, open_ones, n)
    return Found(
        text=f"median half-width {width:.2%}; {open_ones} of {n} UNDECIDED",
        passed=width <= most and few,
        figures={"median_half_width": width, "undecided": open_ones, "comparisons": n},
    )


def judge_shares(shares: TimeBreakdown) -> Found:
    """Of the time after the workers' start: recorded samples, and what nothing trace summaries for."""
    wall = shares.wall_seconds - shares.seconds.get("start", 0.0)
    samples = shares.seconds.get("samples", 0.0) / wall
    other = shares.seconds.get("other", 0.0) / wall
    return Found(
        text=f"samples {samples:.0%}, unaccounted for {other:.1%}",
        passed=samples >= 0.30 and other <= 0.10,
        figures=dict(shares.seconds) | {"wall_seconds": shares.wall_seconds},
    )


def judge_bias(ratios: Sequence[float]) -> Found:
    """Each turn's warm median within 5% of the loop's."""
    off = max((abs(ratio - 1) for ratio in ratios), default=1.0)
    middle, turns = statistics.median(ratios), len(ratios)
    return Found(
        text=f"median {middle:.3f}, farthest {off:.1%} off in {turns} turns",
        passed=off <= 0.05,
        figures={"ratios": [round(ratio, 4) for ratio in ratios]},
    )


def judge_sleep(ratios: Sequence[float]) -> Found:
    """Processors that are kept awake make a call no slower."""
    middle = statistics.median(ratios)
    low, high = min(ratios), max(ratios)
    return Found(
        text=f"with sleep {middle:.2f} times as long, {low:.2f} to {high:.2f} in {len(ratios)} turns",
        passed=middle >= 0.98,
        figures={"ratios": [round(ratio, 4) for ratio in ratios]},
    )


def judge_time(quiet: Sequence[CopiesRace], busy: Sequence[CopiesRace]) -> Found:
    """A race beside a busy neighbour takes at most three times as long."""
    times = statistics.mean(r.seconds for r in busy) / statistics.mean(r.seconds for r in quiet)
    return Found(text=f"{times:.2f} times", passed=times <= 3, figures={"times": times})


def judge_contention(races: Sequence[CopiesRace]) -> Found:
    """The contention is seen: in most blocks, and as processor time of others."""
    marked = share_marked(races)
    others = [race.contention.others for race in races if race.contention.others is not None]
    seen = statistics.median(others) if others else 0.0
    return Found(
        text=f"{marked:.0%} of the blocks marked; others used {seen:.2f} of a processor",
        # Half of one core, less what the counters' steps of 10 ms may hide.
        passed=marked >= 0.5 and seen >= 0.25,
        figures={"marked": marked, "others": seen},
    )
