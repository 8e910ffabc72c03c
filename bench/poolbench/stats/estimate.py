"""Ratios of times, their intervals and verdicts: pure functions over recorded samples.

Derivations, sources and simulated figures are in docs/method.md. Values are natural logs of
candidate seconds over baseline seconds: below 0 the candidate is faster. The cores take arrays
with any leading axes, so that the simulation in tests/test_stats.py runs the very code that a
report runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from scipy import special

from poolbench.core.records import Samples

Array = npt.NDArray[Any]
Level = Literal["process", "allocation"]

MOST_LOG = 709.0  # beyond it math.exp overflows


@dataclass(frozen=True, kw_only=True, eq=False)
class Paired:
    """Log ratios of rounds that both sides have, as columns of equal length.

    `contended_used`: contended blocks were kept, because too few processes have enough others.
    """

    process: Array
    allocation: Array
    round: Array
    value: Array
    contended_used: bool = False


class Estimate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A log ratio with its t interval.

    A struct, because a large run has hundreds of thousands: a dataclass takes four times as long and as much memory.

    Attributes:
        log_ratio: log(candidate seconds / baseline seconds); nan where nothing pairs.
        standard_error: of log_ratio; nan for fewer than two units.
        degrees: of freedom of the t distribution; 0 without an interval.
        processes: units at the level of the interval (processes unless another level was asked).
        low, high: of log_ratio at `confidence`; None without an interval.
        contended_used: see Paired.
    """

    log_ratio: float
    standard_error: float
    degrees: float
    processes: int
    low: float | None
    high: float | None
    confidence: float = 0.95
    contended_used: bool = False

    @property
    def ratio(self) -> float:
        return to_ratio(self.log_ratio)

    @property
    def ratio_low(self) -> float:
        return math.nan if self.low is None else to_ratio(self.low)

    @property
    def ratio_high(self) -> float:
        return math.nan if self.high is None else to_ratio(self.high)

    @property
    def half_width(self) -> float:
        """Return the relative half width of the interval, 0.02 for 2%; inf without an interval."""
        if self.low is None or self.high is None:
            return math.inf
        return to_ratio((self.high - self.low) / 2) - 1.0

    @property
    def spread(self) -> float:
        """Return the standard deviation of the log between processes."""
        return self.standard_error * math.sqrt(self.processes)

    def p_faster(self, margin: float) -> float:
        """Return the one-sided p against 'not faster than 1/(1 + margin)'."""
        return _p_below(self.log_ratio, self.standard_error, self.degrees, -log_margin(margin))

    def p_slower(self, margin: float) -> float:
        """Return the one-sided p against 'not slower than 1 + margin'."""
        return _p_below(-self.log_ratio, self.standard_error, self.degrees, -log_margin(margin))

    def p_same(self, margin: float) -> float:
        """Return the larger p of the two one-sided tests (TOST) against 'outside the margin'."""
        args = (self.standard_error, self.degrees, log_margin(margin))
        return max(_p_below(self.log_ratio, *args), _p_below(-self.log_ratio, *args))


def to_ratio(log_ratio: float) -> float:
    """Return e to the log; inf on overflow, which times of a damaged journal may cause."""
    return math.exp(log_ratio) if not log_ratio > MOST_LOG else math.inf


def log_margin(margin: float) -> float:
    """Return the log of 1 + margin."""
    if margin < 0:
        raise ValueError(f"margin must be 0 or more; got {margin}")
    return math.log1p(margin)


def quantile(confidence: float, degrees: Any) -> Any:
    """Return the two-sided t quantile."""
    return special.stdtrit(degrees, (1 + confidence) / 2)


def _p_below(value: float, error: float, degrees: float, bound: float) -> float:
    """Return the one-sided p against 'the true value is at or above bound'; 1 without an interval."""
    if not degrees > 0:
        return 1.0
    if error == 0:
        return 0.0 if value < bound else 1.0
    return float(special.stdtr(degrees, (value - bound) / error))


def interquartile_mean(values: Array) -> Array:
    """Return the mean of the middle half: (..., n), nan missing -> (...); nan if all are missing.

    The two values at the quarters count by the part of them that lies within: nearly as steady as a
    mean where noise is normal, and as deaf as a median to a quarter of odd ones on either side.
    """
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    ordered = np.sort(values, axis=-1)  # nan last
    counts = np.sum(~np.isnan(ordered), axis=-1, keepdims=True)
    places = np.arange(ordered.shape[-1])
    inside = np.minimum(places + 1, 0.75 * counts) - np.maximum(places, 0.25 * counts)
    weights = np.clip(inside, 0.0, None)
    total = np.sum(np.where(weights > 0, ordered, 0.0) * weights, axis=-1)
    with np.errstate(invalid="ignore"):  # 0/0 gives nan, as intended
        return np.asarray(total / np.sum(weights, axis=-1))


def process_values(cube: Array) -> Array:
    """Return one value per process: (..., process, allocation, round), nan missing -> (..., process)."""
    return interquartile_mean(cube.reshape(*cube.shape[:-2], -1))


def mean_and_error(units: Array) -> tuple[Array, Array, int]:
    """Return mean, standard error and degrees of freedom: (..., n) -> (...), (...), n - 1."""
    n = units.shape[-1]
    mean = units.mean(axis=-1)
    error = units.std(axis=-1, ddof=1) / math.sqrt(n) if n > 1 else np.full_like(mean, np.nan)
    return mean, error, n - 1


def log_ratios(candidate: Samples, baseline: Samples) -> Paired:
    """Pair the blocks of two sides by (process, allocation, round), in that order.

    Contended blocks are left out, unless more than a third of the processes (or all but two of three or
    more) would keep less than half of their blocks. All blocks then say more than a few clean ones, because
    both sides of a pair share the interference.
    """
    left, right = _by_place(candidate), _by_place(baseline)
    places = sorted(left.keys() & right.keys())
    clean = [place for place in places if not (left[place][1] or right[place][1])]
    before, after = (Counter(place[0] for place in some) for some in (places, clean))
    whole = sum(after[process] >= count / 2 for process, count in before.items())
    enough = whole >= max(2 * len(before) / 3, min(3, len(before)))
    kept = clean if enough else places
    where = np.array(kept, dtype=np.int64).reshape(-1, 3)
    above, below = (np.log([side[place][0] for place in kept]) for side in (left, right))
    return Paired(
        process=where[:, 0],
        allocation=where[:, 1],
        round=where[:, 2],
        value=above - below,
        contended_used=not enough,
    )


def _by_place(samples: Samples) -> dict[tuple[int, int, int], tuple[float, int]]:
    places = zip(samples.process, samples.allocation, samples.round, strict=True)
    contended = samples.contended or (0,) * len(samples)
    blocks = zip(samples.seconds, contended, strict=True)
    return {
        place: block
        for place, block in zip(places, blocks, strict=True)
        if block[0] > 0 and math.isfinite(block[0])
    }


def to_cube(paired: Paired) -> Array:
    """Return the values as (process, allocation, round), nan where there is no block."""
    axes = [
        np.unique(axis, return_inverse=True)
        for axis in (paired.process, paired.allocation, paired.round)
    ]
    cube = np.full([len(labels) for labels, _ in axes], np.nan)
    cube[tuple(index for _, index in axes)] = paired.value
    return cube


def estimate(
    candidate: Samples, baseline: Samples, *, confidence: float = 0.95, level: Level = "process"
) -> Estimate:
    """Estimate the log ratio, with a t interval over the units at `level`; no interval for fewer than two units.

    Below 'process' the interval covers only the sampled process (or allocation).
    """
    paired = log_ratios(candidate, baseline)
    if not len(paired.value):
        return from_error(math.nan, math.nan, 0, 0, confidence)
    cube = to_cube(paired)
    units = process_values(cube) if level == "process" else interquartile_mean(cube).ravel()
    units = units[~np.isnan(units)]
    mean, error, degrees = mean_and_error(units)
    return from_error(
        float(mean),
        float(error),
        degrees,
        len(units),
        confidence,
        contended_used=paired.contended_used,
    )


def from_errors(
    log_ratio: Array, error: Array, degrees: Array, processes: Sequence[int], confidence: float
) -> list[Estimate]:
    """Return estimates from columns of means and standard errors; one call for the quantiles of all."""
    reach = np.where(
        degrees > 0, quantile(confidence, np.where(degrees > 0, degrees, 1)) * error, np.nan
    )
    columns = (log_ratio, error, degrees, log_ratio - reach, log_ratio + reach)
    return [
        Estimate(
            log_ratio=at, standard_error=width, degrees=free, processes=count,
            low=low if free > 0 else None, high=high if free > 0 else None, confidence=confidence,
        )
        for count, at, width, free, low, high in zip(
            processes, *(column.tolist() for column in columns), strict=True
        )
    ]  # fmt: skip


def from_error(
    log_ratio: float,
    error: float,
    degrees: float,
    processes: int,
    confidence: float = 0.95,
    *,
    contended_used: bool = False,
) -> Estimate:
    """Return an estimate from its mean and standard error."""
    reach = float(quantile(confidence, degrees)) * error if degrees > 0 else None
    return Estimate(
        log_ratio=log_ratio,
        standard_error=error,
        degrees=degrees,
        processes=processes,
        low=None if reach is None else log_ratio - reach,
        high=None if reach is None else log_ratio + reach,
        confidence=confidence,
        contended_used=contended_used,
    )


def _combine(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted sum of independent estimates; degrees by Welch and Satterthwaite."""
    value = sum(w * e.log_ratio for w, e in zip(weights, estimates, strict=True))
    parts = [(w * e.standard_error) ** 2 for w, e in zip(weights, estimates, strict=True)]
    variance = sum(parts)
    processes = min(e.processes for e in estimates)
    confidence = estimates[0].confidence
    if not all(e.degrees > 0 for e in estimates):
        return from_error(value, math.nan, 0, processes, confidence)
    below = sum(p**2 / e.degrees for p, e in zip(parts, estimates, strict=True))
    degrees = variance**2 / below if below else float(sum(e.degrees for e in estimates))
    return from_error(value, math.sqrt(variance), degrees, processes, confidence)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Return the ratio of ratios a / b of two independent runs."""
    return _combine((a, b), (1.0, -1.0))


def reported_confidence(least: int, most: int) -> float:
    """Return the confidence of the intervals of a run that chose its number of processes by what it saw.

    Runs of today have a fixed number. Earlier ones looked after 5, 7 and 10 processes; the simulation behind the
    figures is in docs/method.md.
    """
    if most <= least:
        return 0.95
    return 0.97 if least >= 5 else 0.975


def geometric_mean(estimates: Iterable[Estimate]) -> Estimate:
    """Return the geometric mean of the ratios of these cases, assumed independent."""
    found = [e for e in estimates if math.isfinite(e.log_ratio)]
    if not found:
        return from_error(math.nan, math.nan, 0, 0)
    return _combine(found, [1 / len(found)] * len(found))
