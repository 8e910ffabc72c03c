"""Variance between runs: what runs of the same code say of the next run on the same machine.

An interval from one run knows that run only. Between runs a log ratio moves by a further standard
deviation tau, which grows with how unlike the two sides are. One run takes tau from a prior;
several runs of one machine refit the prior and combine it with what each comparison shows. Values
are natural logs of candidate seconds over baseline seconds.

Sources: Smyth (2004), Stat. Appl. Genet. Mol. Biol. 3(1):3, moderated variances (limma); Hartung
and Knapp (2001), Stat. Med. 20:3875, t intervals for few runs; Higgins, Thompson and Spiegelhalter
(2009), J. R. Stat. Soc. A 172:137, prediction intervals; Satterthwaite (1946), Biometrics Bull.
2:110, degrees of freedom; Wilson (1927), JASA 22:209, interval of a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from poolbench.stats.estimate import Array, Estimate, difference, from_error

# Comparisons of one pair of runs are not independent draws of tau: z correlates by 0.15 to 0.25
# within a race (a shared baseline) and by 0 to 0.1 over a run, so 134 tell as much as about 70.
INDEPENDENT_SHARE = 0.5
ITERATIONS = 60  # of `_moderate`; further ones change tau by less than 1%


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Between-run standard deviation of a log ratio, by class of comparison.

    Attributes:
        base, slope: tau(theta) = hypot(base, slope * sqrt(min(|theta|, 1))).
        eager, one_thread: factors of tau in eager mode and in single-threaded races.
        degrees: chi-square degrees of how tau^2 varies between comparisons of a class.
        provenance: the runs that the constants were fitted on.
    """

    base: float
    slope: float
    eager: float
    one_thread: float
    degrees: float = 8.0
    provenance: str

    def tau(self, log_ratio: Any, *, eager: Any = False, one_thread: Any = False) -> Array:
        """Return tau for log ratios of any shape."""
        size = np.minimum(np.abs(log_ratio), 1.0)
        factor = np.where(eager, self.eager, 1.0) * np.where(one_thread, self.one_thread, 1.0)
        return np.asarray(np.hypot(self.base, self.slope * np.sqrt(size)) * factor)


SHIPPED = Prior(
    base=0.005,
    slope=0.025,
    eager=2.0,
    one_thread=0.5,
    provenance="two runs of a two-processor Intel Xeon virtual machine (134 comparisons),"
    " checked on two runs of an AMD EPYC one",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunTable:
    """Estimates of n comparisons in k runs of one machine, made by `tabulate`.

    Attributes:
        there: (n, k), where a run has an interval of a comparison; the others count with weight 0.
        value: (n, k), log ratios.
        noise: (n, k), their within-run variances, pooled over the runs, which share code and plan.
        degrees: (n, k), within-run degrees of freedom.
        eager, one_thread: (n,), the class of each comparison.
    """

    there: Array
    value: Array
    noise: Array
    degrees: Array
    eager: Array
    one_thread: Array

    def between(self) -> tuple[Array, Array, Array, Array]:
        """Return mean over runs, variance between runs, its degrees, its within-run part, (n,)."""
        runs = np.maximum(self.there.sum(axis=1), 1)
        middle = self.value.sum(axis=1) / runs
        away = self.there * (self.value - middle[:, None])
        usual = (self.there * self.noise).sum(axis=1) / runs
        return middle, (away**2).sum(axis=1) / np.maximum(runs - 1, 1), runs - 1, usual


@dataclass(frozen=True, kw_only=True)
class RunsEstimate:
    """What k runs of one machine say of a comparison.

    Attributes:
        mean: of the machine over runs, for verdicts.
        next_run: what another run will estimate, its own error included, for headline figures.
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
    """How often two runs agreed within their intervals.

    Attributes:
        inside, comparisons: counts.
        low, high: 95% Wilson interval of the share; too narrow, as comparisons share runs.
        nominal: the share to expect.
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


def tabulate(
    rows: Sequence[Sequence[Estimate | None]], *, eager: Sequence[bool], one_thread: Sequence[bool]
) -> RunTable:
    """Return a table with a row per comparison and a column per run; None: not in that run."""
    value, error, degrees = (
        np.array([[math.nan if e is None else getattr(e, name) for e in row] for row in rows])
        for name in ("log_ratio", "standard_error", "degrees")
    )
    there = np.isfinite(value + error) & (degrees > 0)
    value, error, degrees = (np.where(there, column, 0.0) for column in (value, error, degrees))
    unit = (degrees * error**2 * (degrees + 1)).sum(axis=1) / np.maximum(degrees.sum(axis=1), 1)
    return RunTable(
        there=there, value=value, noise=unit[:, None] / (degrees + 1), degrees=degrees,
        eager=np.array(eager, dtype=bool), one_thread=np.array(one_thread, dtype=bool),
    )  # fmt: skip


def fit_prior(machines: Sequence[RunTable], *, start: Prior = SHIPPED) -> Prior:
    """Return the prior that fits runs of one or more machines, one table each.

    Maximises the likelihood of the deviations between runs as Student's t with `start.degrees`, so
    that a comparison of two modes does not widen the rest. `start` is known to a factor of two: a
    log-normal penalty keeps a constant that no comparison speaks of. One run leaves `start`.
    """
    middle, square, own, noise, eager, one_thread = (
        np.concatenate(columns)
        for columns in zip(*((*t.between(), t.eager, t.one_thread) for t in machines), strict=True)
    )
    names = ("base", "slope", "eager", "one_thread")
    begin = np.log([getattr(start, name) for name in names])
    if not own.any():
        return start

    def named(logs: Array) -> Prior:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def loss(logs: Array) -> tuple[float, Array]:
        now = named(logs)
        between = now.tau(middle, eager=eager, one_thread=one_thread) ** 2
        total, d0 = between + noise, start.degrees
        z2 = square / total
        terms = (d0 + own) * np.log1p(own * z2 / d0) + own * np.log(total)
        slopes = own / total * (1 - (d0 + own) / (d0 + own * z2) * z2) * between
        flat = now.base**2 / (now.base**2 + now.slope**2 * np.minimum(np.abs(middle), 1.0))
        parts = np.stack([slopes * part for part in (flat, 1 - flat, eager, one_thread)])
        away = (logs - begin) / math.log(2)
        return (
            float(INDEPENDENT_SHARE * terms.sum() + away @ away) / 2,
            INDEPENDENT_SHARE * parts.sum(axis=1) + away / math.log(2),
        )

    found = optimize.minimize(loss, begin, jac=True, method="BFGS")
    text = (
        f"{np.count_nonzero(own)} comparisons of {own.max() + 1} runs, {len(machines)} machine(s)"
    )
    return replace(named(found.x), provenance=text)


def _moderate(prior: Array, square: Array, own: Array, noise: Array, degrees: float) -> Array:
    """Return tau^2 = (d0 prior^2 + (k - 1) s^2) / (d0 + k - 1), s^2 freed of its within-run part.

    The part is taken out by expectation maximisation, which never lets a variance become negative.
    """
    found = prior
    for _ in range(ITERATIONS):
        total = found + noise
        shown = found + found**2 / total * (square / total - 1)
        found = (degrees * prior + own * shown) / (degrees + own)
    return found


def _add_variances(one: Any, other: Any, degrees: Any, other_degrees: Any) -> Any:
    """Return standard error and Satterthwaite's degrees of the sum of two estimated variances."""
    total = one + other
    return np.sqrt(total), total**2 / (one**2 / degrees + other**2 / other_degrees)


def combine(
    table: RunTable, prior: Prior = SHIPPED, *, confidence: float = 0.95
) -> list[RunsEstimate]:
    """Return what k runs of one machine say, one random-effects estimate per comparison.

    Weights are inverse variances. tau comes from the prior, refitted on all comparisons of these
    runs where there are two or more, then moderated by the comparison's own runs.
    """
    middle, square, own, usual = table.between()
    runs = int(own.max(initial=0)) + 1
    prior = fit_prior([table], start=prior)
    tau2 = prior.tau(middle, eager=table.eager, one_thread=table.one_thread) ** 2
    tau2 = _moderate(tau2, square, own, usual, prior.degrees)
    weights = table.there / (table.noise + tau2[:, None])
    with np.errstate(invalid="ignore"):  # nan of a comparison that no run has
        weights = weights / weights.sum(axis=1, keepdims=True)
        between, within = tau2 * (weights**2).sum(axis=1), (weights**2 * table.noise).sum(axis=1)
        known = (prior.degrees + own, np.maximum(table.degrees.sum(axis=1), 1))
        mean = _add_variances(between, within, *known)
        new = _add_variances(between + tau2, within + usual, *known)
    center = (weights * table.value).sum(axis=1)
    columns = [column.tolist() for column in (center, *mean, *new, np.sqrt(tau2))]
    processes = (table.there * (table.degrees + 1)).sum(axis=1).astype(int).tolist()
    return [
        RunsEstimate(
            mean=from_error(at, error, degrees, units, confidence),
            next_run=from_error(at, wide, wide_degrees, units, confidence),
            tau=tau, runs=k, source=f"this machine: {runs} runs" if runs > 1 else "prior",
        )
        for at, error, degrees, wide, wide_degrees, tau, units, k in zip(
            *columns, processes, table.there.sum(axis=1).tolist(), strict=True
        )
    ]  # fmt: skip


def widen(
    estimate: Estimate, *, eager: bool, one_thread: bool, prior: Prior = SHIPPED
) -> RunsEstimate:
    """Return what one run says, its tau taken from the prior."""
    table = tabulate([[estimate]], eager=[eager], one_thread=[one_thread])
    return combine(table, prior, confidence=estimate.confidence)[0]


def detectable_slowdown(
    after: Estimate, before: Estimate, *, margin: float = 0.0, power: float = 0.9
) -> float:
    """Return the slowdown, 0.1 for 10%, shown to exceed `margin` with probability `power`; or inf."""
    found = difference(after, before)
    if found.low is None:
        return math.inf
    luck = float(special.stdtrit(found.degrees, power)) * found.standard_error
    return math.expm1(math.log1p(margin) + found.log_ratio - found.low + luck)


def coverage(pairs: Sequence[tuple[RunsEstimate, RunsEstimate]]) -> Coverage:
    """Return how many differences of two runs' estimates have an interval that holds 0."""
    both = (difference(second.mean, first.mean) for first, second in pairs)
    found = [(one, one.low, one.high) for one in both if one.low is not None]
    if not found:
        raise ValueError("coverage needs a comparison that both runs have; got none")
    n = len(found)
    inside = sum(low <= 0 <= high for _, low, high in found if high is not None)
    share = stats.binomtest(inside, n).proportion_ci(method="wilson")
    z2 = [(one.log_ratio / one.standard_error) ** 2 for one, _, _ in found]
    return Coverage(
        inside=inside, comparisons=n, low=float(share.low), high=float(share.high),
        nominal=found[0][0].confidence, deviation=math.sqrt(sum(z2) / n),
    )  # fmt: skip
