"""Judge measurements: each function returns the figures found and whether they meet the criterion."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
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
from poolbench.report.history import Agreement
from poolbench.stats.estimate import difference
from poolbench.stats.verdict import Comparison, best_set

from acceptance.measurements import Compared


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the outcome of a check: text, pass or fail, and the figures behind it."""

    text: str
    passed: bool
    figures: dict[str, Any] = {}


def at_most(share: float, count: int, total: int) -> bool:
    """Return whether `count` is at most `share` of `total`; False for an empty total."""
    return total > 0 and count <= share * total + 1e-9


def check_alarms(races: Sequence[CopiesRace]) -> Outcome:
    """Require false alarms in at most 1% of A/A comparisons."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    alarms = counts["FASTER"] + counts["SLOWER"]
    return Outcome(
        text=f"{alarms} of {len(same)}; noise floor {noise_floor(same):.2%}",
        passed=at_most(0.01, alarms, len(same)),
        figures={**counts, "noise_floor": noise_floor(same), "blocks_marked": share_marked(races)},
    )


def check_undecided(races: Sequence[CopiesRace]) -> Outcome:
    """Require UNDECIDED in at most 10% of A/A comparisons."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    width = statistics.median(one.found.half_width for one in same)
    return Outcome(
        text=f"{counts['UNDECIDED']} of {len(same)}; median half-width {width:.2%}",
        passed=at_most(0.10, counts["UNDECIDED"], len(same)),
        figures={**counts, "median_half_width": width},
    )


def check_power(
    races: Sequence[CopiesRace], injected: float, margin: float, required: float
) -> Outcome:
    """Require SLOWER for an injected slowdown in at least `required` of the comparisons."""
    slowed = of_injected(races, injected)
    counts = count_verdicts(slowed, margin)
    missed = len(slowed) - counts["SLOWER"]
    return Outcome(
        text=f"{counts['SLOWER']} of {len(slowed)}",
        passed=at_most(1 - required, missed, len(slowed)),
        figures={**counts, "log_ratios": [round(one.found.log_ratio, 5) for one in slowed]},
    )


def check_pairs(races: Sequence[CopiesRace], seconds: float) -> Outcome:
    """Require a slowdown of 1% to be found at margin zero in at least 90%, within `seconds` per pair."""
    slowed = [(race, one) for race in races for one in of_injected([race], 0.01)]
    slower = [race.seconds for race, one in slowed if one.verdict(0.0) == "SLOWER"]
    in_time = sum(taken <= seconds for taken in slower)
    longest = max(race.seconds for race in races)
    return Outcome(
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


def check_equal(races: Sequence[CopiesRace]) -> Outcome:
    """Require that no race of equal candidates has a sole winner."""
    sizes = [len(best_set(race.equal)) for race in races]
    return Outcome(
        text=f"{sizes.count(1)} sole winners in {len(sizes)} races; smallest set {min(sizes)}",
        passed=1 not in sizes,
        figures={"sizes": sizes},
    )


def check_runs(runs: Sequence[Compared]) -> Outcome:
    """Require consecutive runs to agree: differences cover zero in 93%, no FASTER turns SLOWER."""
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
    return Outcome(
        text=f"covers zero in {sum(covered)} of {comparisons}; {turned} turned",
        passed=at_most(0.07, comparisons - sum(covered), comparisons) and not turned,
        figures={"covered": covered, "comparisons": comparisons, "turned": turned},
    )


def check_agreements(found: Sequence[Agreement]) -> Outcome:
    """Require runs to agree as printed: 93% of the comparisons, 88% in each pair, no FASTER that turns SLOWER."""
    inside = [one.coverage.inside for one in found]
    comparisons = [one.coverage.comparisons for one in found]
    turned = sum(one.reversed for one in found)
    worst = min(one.coverage.observed for one in found)
    return Outcome(
        text=f"{sum(inside)} of {sum(comparisons)} agree in {len(found)} pairs, in the worst {worst:.0%}; {turned} turned",
        passed=at_most(0.07, sum(comparisons) - sum(inside), sum(comparisons))
        and worst >= 0.88
        and not turned,
        figures={"inside": inside, "comparisons": comparisons, "turned": turned},
    )


def check_falsely_slower(counts: Sequence[int]) -> Outcome:
    """Require `compare` of two runs of one code to name no candidate in 95% of the pairs, and never two."""
    clean = sum(not count for count in counts)
    return Outcome(
        text=f"{clean} of {len(counts)} pairs name none; {max(counts)} named at most",
        passed=at_most(0.05, len(counts) - clean, len(counts)) and max(counts) <= 1,
        figures={"named": list(counts)},
    )


def check_slowed_found(found: Mapping[str, bool]) -> Outcome:
    """Require `compare` to name the candidate that takes 25% longer in 95% of the trials."""
    missed = [label for label, named in found.items() if not named]
    return Outcome(
        text=f"{len(found) - len(missed)} of {len(found)} named",
        passed=at_most(0.05, len(missed), len(found)),
        figures={"trials": len(found), "missed": missed},
    )


def check_widths(
    comparisons: Sequence[Comparison], most: float, undecided: float | None
) -> Outcome:
    """Require a median half-width of at most `most` and, if given, few UNDECIDED comparisons."""
    if not comparisons:
        return Outcome(text="no comparison has an interval", passed=False)
    width = statistics.median(one.estimate.half_width for one in comparisons)
    open_ones = sum(one.verdict == "UNDECIDED" for one in comparisons)
    n = len(comparisons)
    few = undecided is None or at_most(undecided, open_ones, n)
    return Outcome(
        text=f"median half-width {width:.2%}; {open_ones} of {n} UNDECIDED",
        passed=width <= most and few,
        figures={"median_half_width": width, "undecided": open_ones, "comparisons": n},
    )


def check_shares(shares: TimeBreakdown) -> Outcome:
    """Require that rounds, with their warm-ups, take 45% of the time after the workers' start, and at most 10% is unaccounted for."""
    wall = shares.wall_seconds - shares.seconds.get("start", 0.0)
    rounds = (shares.seconds.get("samples", 0.0) + shares.seconds.get("warmup", 0.0)) / wall
    other = shares.seconds.get("other", 0.0) / wall
    return Outcome(
        text=f"rounds {rounds:.0%}, unaccounted for {other:.1%}",
        passed=rounds >= 0.45 and other <= 0.10,
        figures=dict(shares.seconds) | {"wall_seconds": shares.wall_seconds},
    )


def check_bias(ratios: Sequence[float]) -> Outcome:
    """Require each turn's warm median to be within 5% of the loop's."""
    off = max((abs(ratio - 1) for ratio in ratios), default=1.0)
    middle, turns = statistics.median(ratios), len(ratios)
    return Outcome(
        text=f"median {middle:.3f}, farthest {off:.1%} off in {turns} turns",
        passed=off <= 0.05,
        figures={"ratios": [round(ratio, 4) for ratio in ratios]},
    )


def check_sleep(ratios: Sequence[float]) -> Outcome:
    """Require calls with CPU idle states disabled to be no slower."""
    middle = statistics.median(ratios)
    low, high = min(ratios), max(ratios)
    return Outcome(
        text=f"with idle states {middle:.2f} times as long, {low:.2f} to {high:.2f} in {len(ratios)} turns",
        passed=middle >= 0.98,
        figures={"ratios": [round(ratio, 4) for ratio in ratios]},
    )


def check_time(quiet: Sequence[CopiesRace], busy: Sequence[CopiesRace]) -> Outcome:
    """Require a race under background load to take at most three times as long."""
    times = statistics.mean(r.seconds for r in busy) / statistics.mean(r.seconds for r in quiet)
    return Outcome(text=f"{times:.2f} times", passed=times <= 3, figures={"times": times})


def check_contention(races: Sequence[CopiesRace]) -> Outcome:
    """Require the background load to be noticed: in most blocks, and as CPU time of other processes."""
    marked = share_marked(races)
    others = [race.contention.others for race in races if race.contention.others is not None]
    seen = statistics.median(others) if others else 0.0
    return Outcome(
        text=f"{marked:.0%} of the blocks marked; others used {seen:.2f} of a CPU",
        # Half of one core, minus what the counters' resolution of 10 ms may hide.
        passed=marked >= 0.5 and seen >= 0.25,
        figures={"marked": marked, "others": seen},
    )
