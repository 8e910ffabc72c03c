"""Verdicts: equivalence tests, false discovery control over a run, and the set of the best."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from poolbench.core.records import Samples
from poolbench.stats.estimate import Array, Estimate, estimate, log_margin, quantile

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNDECIDED"]
Key = TypeVar("Key", bound=Hashable)

FASTER: Verdict = "FASTER"
SLOWER: Verdict = "SLOWER"
SAME: Verdict = "SAME"
UNDECIDED: Verdict = "UNDECIDED"
MOST_PROCESSES = 200  # larger predictions only mean that it is out of reach


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A verdict within a run; `adjusted_p` is its p after false-discovery control.

    `processes_needed`: further processes predicted to settle an UNDECIDED one; None if not UNDECIDED
    or hopeless.
    """

    estimate: Estimate
    verdict: Verdict
    adjusted_p: float
    processes_needed: int | None = None


@dataclass(frozen=True, kw_only=True)
class BestSet:
    """Names not shown slower than the best, and the one with the lowest time."""

    names: tuple[str, ...]
    best: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _verdict_p(found: Estimate, margin: float) -> tuple[float, Verdict]:
    """Return twice the smallest of the three one-sided p, and its verdict.

    Twice: a true SAME can be missed on two sides. At 0.05 it says that the 95% interval lies wholly
    in the verdict's region.
    """
    ways: tuple[tuple[float, Verdict], ...] = (
        (found.p_faster(margin), FASTER),
        (found.p_slower(margin), SLOWER),
        (found.p_same(margin), SAME),
    )
    p, name = min(ways, key=lambda way: way[0])
    return min(1.0, 2 * p), name


def verdict(found: Estimate, margin: float = 0.05) -> Verdict:
    """Return the verdict of one comparison by itself."""
    p, name = _verdict_p(found, margin)
    return name if p <= 0.05 else UNDECIDED


def compare_run(
    pairs: Mapping[Key, Estimate], margin: float = 0.05, fdr: float = 0.05
) -> dict[Key, Comparison]:
    """Return the verdicts of a whole run, of which at most the share `fdr` is expected to be false."""
    judged = {key: _verdict_p(found, margin) for key, found in pairs.items()}
    adjusted = _false_discovery([p for p, _ in judged.values()])
    comparisons = {}
    for (key, (_, name)), p in zip(judged.items(), adjusted, strict=True):
        clear = p <= fdr
        comparisons[key] = Comparison(
            estimate=pairs[key],
            verdict=name if clear else UNDECIDED,
            adjusted_p=p,
            processes_needed=None if clear else processes_needed(pairs[key], margin),
        )
    return comparisons


def _false_discovery(p_values: Sequence[float]) -> list[float]:
    """Return p adjusted by Benjamini and Hochberg (1995); scipy.stats has it, and takes a second to load."""
    count = len(p_values)
    order = np.argsort(p_values)[::-1]  # the largest first
    adjusted = np.empty(count)
    adjusted[order] = np.minimum.accumulate(
        np.array(p_values)[order] * count / np.arange(count, 0, -1)
    )
    found: list[float] = np.minimum(adjusted, 1.0).tolist()
    return found


def processes_needed(found: Estimate, margin: float) -> int | None:
    """Return the further processes until the interval leaves the edge at its present spread; None: too many."""
    distance = abs(abs(found.log_ratio) - log_margin(margin))
    if not (found.degrees > 0 and distance > 0):
        return None
    fits = np.flatnonzero(_reach(found.confidence)[found.processes :] * found.spread <= distance)
    return int(fits[0]) + 1 if len(fits) else None


@functools.cache
def _reach(confidence: float) -> Array:
    """Return half an interval's width over the spread, for 1 to MOST_PROCESSES processes."""
    totals = np.arange(1, MOST_PROCESSES + 1)
    return np.asarray(quantile(confidence, np.maximum(totals - 1, 1)) / np.sqrt(totals))


def best_set(
    samples: Mapping[str, Samples],
    *,
    confidence: float = 0.95,
    estimator: Callable[[Samples, Samples], Estimate] = estimate,
) -> BestSet:
    """Return the names not shown slower than the best: Hsu's comparisons, at simultaneous `confidence`.

    `estimator` is there for callers that estimated their pairs all at once (`estimate_all`).

    A name is out when it is shown slower than some other, each of its K - 1 one-sided comparisons
    at (1 - confidence) / (K - 1): so the true best stays in with at least `confidence`.
    """
    if not samples:
        raise ValueError("best_set needs at least one name; got none")
    names = list(samples)
    alpha = (1 - confidence) / max(1, len(names) - 1)
    slower: set[str] = set()
    total = dict.fromkeys(names, 0.0)
    for one, other in itertools.combinations(names, 2):
        found = estimator(samples[one], samples[other])
        if not math.isfinite(found.log_ratio):
            continue
        total[one] += found.log_ratio
        total[other] -= found.log_ratio
        if found.p_slower(0.0) <= alpha:
            slower.add(one)
        if found.p_faster(0.0) <= alpha:
            slower.add(other)
    ranked = sorted(names, key=total.__getitem__)
    kept = tuple(name for name in ranked if name not in slower)
    return BestSet(names=kept or (ranked[0],), best=ranked[0])


def flag_disagreeing(pairs: Mapping[Key, Estimate]) -> set[Key]:
    """Return the keys whose processes disagree more than those of the rest of the run.

    Robust z of the log spread over 3.5 (median and MAD, which is at least the sampling deviation of
    a log standard deviation, 1 / sqrt(2 degrees)). Needs three comparisons to have a rest.
    """
    spreads = {key: e.spread for key, e in pairs.items() if e.degrees > 0 and e.spread > 0}
    if len(spreads) < 3:
        return set()
    logs = np.log(np.array(list(spreads.values())))
    middle = float(np.median(logs))
    mad = 1.4826 * float(np.median(np.abs(logs - middle)))
    return {
        key
        for key, value in zip(spreads, logs, strict=True)
        if value - middle > 3.5 * max(mad, 1 / math.sqrt(2 * pairs[key].degrees))
    }
