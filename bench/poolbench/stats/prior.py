"""Between-run standard deviation of a log ratio: a prior by class, and its update from runs.

Values are natural logs of candidate seconds over baseline seconds. Between runs of the same code on
the same machine they move by a standard deviation tau, which grows with how unlike the sides are.

Source: Smyth (2004), Stat. Appl. Genet. Mol. Biol. 3(1):3, moderated variances (limma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from poolbench.stats.estimate import Array, Estimate

# Comparisons of one pair of runs are not independent draws of tau. In seven pairs of stored runs z
# correlated by 0.14 to 0.30 within a race (a shared baseline) and by 0 to 0.2 over a whole run; at
# 0.08, the value of the latest pair, 134 comparisons are worth 70 independent ones.
INDEPENDENT_SHARE = 0.5
ITERATIONS = 60  # of `moderate`; further ones change tau by less than 1%


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
    base=0.004,
    slope=0.026,
    eager=0.5,
    one_thread=0.7,
    provenance="18 runs of virtual machines with two processors, AMD EPYC with and without AVX-512"
    " (134 comparisons each), checked on later runs",
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

    from scipy import optimize  # slow to load, and one run has nothing to fit

    found = optimize.minimize(loss, begin, jac=True, method="BFGS")
    text = (
        f"{np.count_nonzero(own)} comparisons of {own.max() + 1} runs, {len(machines)} machine(s)"
    )
    return replace(named(found.x), provenance=text)


def moderate(prior: Array, square: Array, own: Array, noise: Array, degrees: float) -> Array:
    """Return tau^2 = (d0 prior^2 + (k - 1) s^2) / (d0 + k - 1), s^2 freed of its within-run part.

    The part is taken out by expectation maximisation, which never lets a variance become negative.
    """
    found = prior
    for _ in range(ITERATIONS):
        total = found + noise
        shown = found + found**2 / total * (square / total - 1)
        found = (degrees * prior + own * shown) / (degrees + own)
    return found
