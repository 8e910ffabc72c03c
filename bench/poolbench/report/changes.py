"""How candidates' times changed from one run to another, over a normalizer of the same rounds."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from poolbench.core.case import Case
from poolbench.core.records import Clock, Measurement, Samples, common_clock, is_right, samples_by
from poolbench.report import ratios
from poolbench.report.pairs import mirrored
from poolbench.report.roofline import limit_samples
from poolbench.stats import estimate
from poolbench.stats.batch import Logs
from poolbench.stats.prior import Prior
from poolbench.stats.runs import RunsEstimate, widen
from poolbench.store.journal import StoredRun

RaceKey = tuple[Case, str]
Pair = tuple[estimate.Estimate, estimate.Estimate]
PEERS = "other candidates"


@dataclass(frozen=True, kw_only=True, eq=False)
class Race:
    """One case on one node in one run: candidates and probes by name."""

    candidates: dict[str, Measurement] = field(default_factory=dict)
    probes: dict[str, Measurement] = field(default_factory=dict)
    bandwidth_limits: dict[tuple[int, int, str], Samples | None] = field(default_factory=dict)

    def bandwidth_limit(self, asked: Measurement) -> Samples | None:
        """Return the time that the memory needs for a measurement's bytes, block by block."""
        read, written, clock = asked.read_nbytes, asked.written_nbytes, asked.clock
        if not (read or written):
            return None
        key = (read, written, clock)
        if key not in self.bandwidth_limits:
            self.bandwidth_limits[key] = limit_samples(self.probes, read, written, clock=clock)
        return self.bandwidth_limits[key]


def races_of(run: StoredRun) -> dict[RaceKey, Race]:
    """Return the races of a run by case and node."""
    races: dict[RaceKey, Race] = {}
    for m in run.measurements:
        race = races.setdefault((m.case, m.node), Race())
        if m.kind == "candidate":
            race.candidates[m.candidate] = m
        elif m.status == "ok" and len(m.samples):
            race.probes[m.candidate] = m
    return races


def common(
    before: Mapping[RaceKey, Race], after: Mapping[RaceKey, Race]
) -> list[tuple[RaceKey, str]]:
    """Return the candidates that both runs raced in the same case on the same node."""
    return [
        (key, name)
        for key, race in before.items()
        if key in after
        for name in race.candidates
        if name in after[key].candidates
    ]


def _from_copy(race: Race, asked: Measurement) -> Samples | None:
    # The probe copies the case's own input: the same bytes in both runs.
    probe = race.probes.get("bandwidth-copy")
    return None if probe is None else samples_by(probe, asked.clock)


def _from_baseline(race: Race, asked: Measurement) -> Samples | None:
    baseline = race.candidates.get(asked.baseline)
    if baseline is None or asked.candidate == asked.baseline or not is_right(baseline):
        return None
    return samples_by(baseline, asked.clock)


# The first that both runs have. The baseline last: it may itself be what changed.
NORMALIZERS: dict[str, Callable[[Race, Measurement], Samples | None]] = {
    "bandwidth_limit": Race.bandwidth_limit,
    "copy": _from_copy,
    "baseline": _from_baseline,
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a candidate's time over its normalizer changed from base to run.

    Attributes:
        estimate: of the ratio, run over base, with what lies between two runs.
        normalizer: what both runs divide by.
    """

    estimate: estimate.Estimate
    normalizer: str


def _change(old: RunsEstimate, new: RunsEstimate, normalizer: str, within: Pair) -> Change | None:
    """Return the change between two ratios; without an interval where a side has none."""
    before, after = (
        one.mean if one.mean.low is not None else own
        for one, own in zip((old, new), within, strict=True)
    )
    if not (math.isfinite(before.log_ratio) and math.isfinite(after.log_ratio)):
        return None
    return Change(estimate=estimate.difference(after, before), normalizer=normalizer)


def peer_changes(
    raced: Sequence[tuple[Race, Race, str]], prior: Prior, logs: Logs
) -> list[Change | None]:
    """Return for each candidate how its time changed against the other candidates of its race.

    A ratio of two candidates moves less between runs than one to a bandwidth probe. The change is
    the median over the others, so that one other that changed does not count. None where there are
    fewer than two others: with one, the two cannot be told apart.
    """
    races: dict[int, list[int]] = defaultdict(list)
    for at, (before, after, name) in enumerate(raced):
        if not (before.candidates[name].stopped_early or after.candidates[name].stopped_early):
            races[id(before)].append(at)
    places = [pair for some in races.values() for pair in itertools.combinations(some, 2)]
    pairs, classes = [], []
    for one, two in places:
        before, after, name = raced[one]
        other = raced[two][2]
        found = [(r.candidates[name], r.candidates[other]) for r in (before, after)]
        # One clock for both runs: one of them may lack the device's.
        clock = functools.reduce(common_clock, [m.clock for both in found for m in both])
        pairs += [(samples_by(m, clock), samples_by(peer, clock)) for m, peer in found]
        classes += [ratios.class_of(before.candidates[name])] * 2
    over, within = ratios.pool([pairs], classes, prior=prior, logs=logs)
    against: dict[int, list[Change]] = defaultdict(list)
    for i, (one, two) in enumerate(places):
        left, right = 2 * i, 2 * i + 1
        change = _change(over[left], over[right], PEERS, (within[left], within[right]))
        if change is not None:
            against[one].append(change)
            against[two].append(replace(change, estimate=mirrored(change.estimate)))
    return [_middle(against[at]) if len(against[at]) > 1 else None for at in range(len(raced))]


def _middle(changes: Sequence[Change]) -> Change:
    """Return the median change, of two middle ones the smaller."""
    order = sorted(changes, key=lambda change: change.estimate.log_ratio)
    middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
    return min(middle, key=lambda change: abs(change.estimate.log_ratio))


def changes(
    raced: Sequence[tuple[Race, Race, str]], prior: Prior, logs: Logs
) -> list[Change | None]:
    """Return for each candidate its change by its best normalizer.

    A candidate without a change by it is compared by its next normalizer. One that was stopped
    early has one process: its interval is that of the allocations.
    """
    first: dict[int, tuple[str, Samples, Samples]] = {}
    for at, (before, after, name) in enumerate(raced):
        old, new = before.candidates[name], after.candidates[name]
        found = next(_normalizers(before, after, old), None)
        if found is not None and not (old.stopped_early or new.stopped_early):
            first[at] = found
    pairs, classes = [], []
    for at, (_, left, right) in first.items():
        before, after, name = raced[at]
        old = before.candidates[name]
        pairs += [(old.samples, left), (samples_by(after.candidates[name], old.clock), right)]
        classes += [ratios.class_of(old)] * 2
    over, within = ratios.pool([pairs], classes, prior=prior, logs=logs)
    done = {
        at: _change(over[2 * i], over[2 * i + 1], first[at][0], (within[2 * i], within[2 * i + 1]))
        for i, at in enumerate(first)
    }
    return [done.get(at) or _one_change(*one, prior) for at, one in enumerate(raced)]


def _one_change(before: Race, after: Race, name: str, prior: Prior) -> Change | None:
    # Its bytes for both: another count of them is no change of time.
    asked = before.candidates[name]
    for normalizer, left, right in _normalizers(before, after, asked):
        within = (
            _estimate(asked, left, asked.clock),
            _estimate(after.candidates[name], right, asked.clock),
        )
        eager, one_thread = ratios.class_of(asked)
        old, new = (widen(one, eager=eager, one_thread=one_thread, prior=prior) for one in within)
        if (found := _change(old, new, normalizer, within)) is not None:
            return found
    return None


def _normalizers(
    before: Race, after: Race, asked: Measurement
) -> Iterator[tuple[str, Samples, Samples]]:
    """Yield (name, its samples in base, in run) of each normalizer that both have, the best first."""
    for normalizer, take in NORMALIZERS.items():
        left, right = take(before, asked), take(after, asked)
        if left is not None and right is not None and len(left) and len(right):
            yield normalizer, left, right


def _estimate(m: Measurement, normalizer: Samples, clock: Clock) -> estimate.Estimate:
    """Return the log ratio by the clock of the base run's measurement, within its run."""
    return estimate.estimate(
        samples_by(m, clock), normalizer, level="allocation" if m.stopped_early else "process"
    )
