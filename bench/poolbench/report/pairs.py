"""Ratios between the candidates of a race, and their mean over cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from poolbench.report import ratios
from poolbench.report.frame import RunFrame
from poolbench.stats import estimate
from poolbench.stats.estimate import Estimate

Interval = tuple[float, float, float]  # middle, low, high; nan if there is none
NOTHING: Interval = (math.nan, math.nan, math.nan)
# Correlation of the errors of two cases of one run: 0 to 0.2 in seven pairs of stored runs (poolbench.stats.prior).
CORRELATION = 0.2


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log ratios of the times of every two rows of a race, by (row, row) in either order.

    Attributes:
        mean: of this machine, for what is concluded.
        next_run: with the interval of what another run will find, for headline figures.
    """

    mean: Mapping[tuple[int, int], Estimate]
    next_run: Mapping[tuple[int, int], Estimate]


def estimate_pairs(loaded: RunFrame, races: Iterable[Sequence[int]]) -> Pairs:
    """Return the estimates of all pairs of rows of each race."""
    places = [pair for rows in races for pair in itertools.combinations(rows, 2)]
    by_run = [
        [
            ratios.paired(m, other) if (m := some[one]) and (other := some[two]) else None
            for one, two in places
        ]
        for some in loaded.measurements
    ]
    cases = [ratios.class_of(loaded.measurement(one)) for one, _ in places]
    over, within = ratios.pool(
        by_run, cases, loaded.confidence, prior=loaded.prior, logs=loaded.logs
    )
    found: list[dict[tuple[int, int], Estimate]] = [{}, {}]
    for (one, two), pooled, own in zip(places, over, within, strict=True):
        whole = pooled.mean.low is not None
        kinds = (pooled.mean, pooled.next_run) if whole else (own, own)
        for estimates, known in zip(found, kinds, strict=True):
            estimates[one, two] = known
            estimates[two, one] = mirrored(known)
    return Pairs(mean=found[0], next_run=found[1])


def mirrored(found: Estimate) -> Estimate:
    """Return the estimate of the inverse ratio."""
    return msgspec.structs.replace(
        found,
        log_ratio=-found.log_ratio,
        low=None if found.high is None else -found.high,
        high=None if found.low is None else -found.low,
    )


def mean_over_cases(found: Sequence[Estimate], confidence: float) -> Interval:
    """Return the geometric mean of ratios of several cases, whose errors are partly correlated."""
    usable = [one for one in found if math.isfinite(one.log_ratio)]
    if not usable:
        return NOTHING
    total = estimate.geometric_mean(usable)
    together = math.fsum(one.standard_error for one in usable) / len(usable)
    error = math.sqrt((1 - CORRELATION) * total.standard_error**2 + CORRELATION * together**2)
    known = estimate.from_error(total.log_ratio, error, total.degrees, total.processes, confidence)
    return known.ratio, known.ratio_low, known.ratio_high
