"""Intervals for the next run of the same code on the same machine, from one run or several.

An interval from one run knows that run only. These intervals also hold what lies between runs: one
run takes it from a prior; several runs of one machine refit the prior.

Sources: Hartung and Knapp (2001), Stat. Med. 20:3875, t intervals for few runs; Higgins, Thompson
and Spiegelhalter (2009), J. R. Stat. Soc. A 172:137, prediction intervals; Satterthwaite (1946),
Biometrics Bull. 2:110, degrees of freedom; Wilson (1927), JASA 22:209, interval of a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from scipy import special

from poolbench.stats.estimate import Estimate, difference, from_errors
from poolbench.stats.prior import SHIPPED, Prior, RunTable, fit_prior, moderate, tabulate


class RunsEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """The estimate of a comparison from k runs of one machine.

    Attributes:
        mean: of the machine over runs, for verdicts.
        next_run: prediction of another run's estimate, its own error included, for headline figures.
        tau: between-run standard deviation of the log ratio.
        runs: k.
        source: of tau, 'prior' or 'this machine: k runs'.
    """

    mean: Estimate
    next_run: Estimate
    tau: float
    runs: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The share of comparisons in which two runs agreed within their intervals.

    Attributes:
        inside, comparisons: counts.
        low, high: 95% Wilson interval of the share; too narrow, as comparisons share runs.
        nominal: the expected share.
        deviation: root mean square of z, the differences over their standard errors; about 1.
    """

    inside: int
    comparisons: int
    low: float
    high: float
    nominal: float
    deviation: float

    @property
    def observed(self) -> float:
        return self.inside / self.comparisons


def check_same_machine(fingerprints: Sequence[Mapping[str, object]]) -> None:
    """Raise ValueError naming the first field in which two machines differ."""
    for place, other in enumerate(fingerprints[1:], start=2):
        for field in sorted(fingerprints[0].keys() | other.keys()):
            here, there = fingerprints[0].get(field), other.get(field)
            if here != there:
                raise ValueError(
                    f"runs of unlike machines do not pool: {field} is {here!r} in run 1"
                    f" and {there!r} in run {place}"
                )


def _add_variances(one: Any, other: Any, degrees: Any, other_degrees: Any) -> Any:
    """Return standard error and Satterthwaite's degrees of the sum of two estimated variances."""
    total = one + other
    return np.sqrt(total), total**2 / (one**2 / degrees + other**2 / other_degrees)


def combine(
    table: RunTable, prior: Prior = SHIPPED, *, confidence: float = 0.95
) -> list[RunsEstimate]:
    """Combine k runs of one machine into one random-effects estimate per comparison.

    Weights are inverse variances. tau comes from the prior, refitted on all comparisons of these
    runs where there are two or more, then moderated by the comparison's own runs.

    Simulated coverage of the next run (tests/test_runs.py), nominally 95%: 93 to 97% of two and more
    runs, whatever moves them. One run shows nothing of what lies between runs: 95% where the prior
    is right, 98% where runs do not differ, 89% where tau is 1.6 times the prior, 85% where it is twice.
    """
    middle, square, own, usual = table.between()
    runs = int(own.max(initial=0)) + 1
    prior = fit_prior([table], start=prior)
    tau2 = prior.tau(middle, eager=table.eager, one_thread=table.one_thread) ** 2
    tau2 = moderate(tau2, square, own, usual, prior.degrees)
    weights = table.there / (table.noise + tau2[:, None])
    with np.errstate(invalid="ignore"):  # nan of a comparison that no run has
        weights = weights / weights.sum(axis=1, keepdims=True)
        between, within = tau2 * (weights**2).sum(axis=1), (weights**2 * table.noise).sum(axis=1)
        known = (prior.degrees + own, np.maximum(table.degrees.sum(axis=1), 1))
        mean = _add_variances(between, within, *known)
        new = _add_variances(between + tau2, within + usual, *known)
    center = (weights * table.value).sum(axis=1)
    processes = (table.there * (table.degrees + 1)).sum(axis=1).astype(int).tolist()
    means, next_runs = (
        from_errors(center, error, degrees, processes, confidence) for error, degrees in (mean, new)
    )
    counts, taus = table.there.sum(axis=1).tolist(), np.sqrt(tau2).tolist()
    source = f"this machine: {runs} runs" if runs > 1 else "prior"
    return [
        RunsEstimate(mean=one, next_run=next_run, tau=tau, runs=k, source=source)
        for one, next_run, tau, k in zip(means, next_runs, taus, counts, strict=True)
    ]


def widen(
    estimate: Estimate, *, eager: bool, one_thread: bool, prior: Prior = SHIPPED
) -> RunsEstimate:
    """Return the estimates of one run, with tau from the prior."""
    table = tabulate([[estimate]], eager=[eager], one_thread=[one_thread])
    return combine(table, prior, confidence=estimate.confidence)[0]


def detectable_slowdown(found: Estimate, *, margin: float = 0.0) -> float:
    """Return the slowdown, 0.1 for 10%, that an estimate like this one shows with probability 0.9; or inf.

    Shown is a slowdown whose interval lies beyond `margin`.
    """
    if found.low is None:
        return math.inf
    luck = float(special.stdtrit(found.degrees, 0.9)) * found.standard_error
    return math.expm1(math.log1p(margin) + found.log_ratio - found.low + luck)


def coverage(pairs: Sequence[tuple[RunsEstimate, RunsEstimate]]) -> Coverage:
    """Count the differences of two runs' estimates whose interval contains 0."""
    both = (difference(second.mean, first.mean) for first, second in pairs)
    found = [(one, one.low, one.high) for one in both if one.low is not None]
    if not found:
        raise ValueError("coverage needs a comparison that both runs have; got none")
    n = len(found)
    inside = sum(low <= 0 <= high for _, low, high in found if high is not None)
    from scipy import stats  # slow to load; reports of a run do not need it

    share = stats.binomtest(inside, n).proportion_ci(method="wilson")
    z2 = [(one.log_ratio / one.standard_error) ** 2 for one, _, _ in found]
    return Coverage(
        inside=inside, comparisons=n, low=float(share.low), high=float(share.high),
        nominal=found[0][0].confidence, deviation=math.sqrt(sum(z2) / n),
    )  # fmt: skip
