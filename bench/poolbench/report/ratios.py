"""Ratios, verdicts and shares of the bandwidth limit of a table's rows, each with the variation between runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from poolbench.core.records import Measurement, Samples, common_clock, samples_by
from poolbench.report.formats import as_table
from poolbench.report.roofline import limit_seconds
from poolbench.stats import batch, estimate
from poolbench.stats import verdict as judging
from poolbench.stats.estimate import Estimate
from poolbench.stats.prior import SHIPPED, Prior, tabulate
from poolbench.stats.runs import RunsEstimate, combine

WITHHELD = "WITHHELD"
# Why a row has no ratio to the textbook implementation; else it failed.
NO_TEXTBOOK, NOT_RACED = "the op names no textbook implementation", "was not raced here"
Kind = Literal["baseline", "textbook", "limit"]
Pair = tuple[Samples, Samples]
COLUMNS = (
    "ratio ratio_low ratio_high mean_low mean_high verdict processes_needed textbook_ratio textbook_low textbook_high"
    " textbook_reason bandwidth_limit_seconds efficiency efficiency_low efficiency_high disagree"
).split()  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RowEstimates:
    """Estimates of a table's rows.

    Attributes:
        baselines, textbooks: by row, the row of its baseline and textbook implementation, or None.
        textbook_names: by row, the name; '' where the op has none.
        pooled: by kind and row, over the runs; nan in rows that no run has an interval of.
        within: by kind and row, the newest run's estimate, without what lies between runs.
        limit_seconds: by row.
        confidence: of all intervals.
    """

    baselines: Sequence[int | None]
    textbooks: Sequence[int | None]
    textbook_names: Sequence[str]
    pooled: Mapping[tuple[Kind, int], RunsEstimate]
    within: Mapping[tuple[Kind, int], Estimate]
    limit_seconds: Sequence[float]
    confidence: float


def reported_confidence(options: Mapping[str, Any]) -> float:
    """Return the confidence of intervals; higher if races could stop early."""
    least, most = (options.get(name) for name in ("processes", "max_processes"))
    if not isinstance(least, int) or not isinstance(most, int):
        return 0.95
    return estimate.reported_confidence(least, most)


def paired(one: Measurement, other: Measurement) -> Pair:
    """Return the samples of both by their common clock."""
    clock = common_clock(one.clock, other.clock)
    return samples_by(one, clock), samples_by(other, clock)


def pool(
    by_run: Sequence[Sequence[Pair | None]],
    cases: Sequence[tuple[bool, bool]],
    confidence: float = 0.95,
    *,
    prior: Prior = SHIPPED,
    logs: batch.Logs | None = None,
) -> tuple[list[RunsEstimate], list[Estimate]]:
    """Return for n pairs in k runs their estimates over runs, and within the newest run.

    Args:
        by_run: k sequences of n pairs; None where the run lacks one.
        cases: by pair, whether it ran in eager mode and whether on one thread.
        confidence: of the intervals.
        prior: of what lies between runs.
        logs: of samples, which calls share.
    """
    logs = {} if logs is None else logs
    rows: list[list[Estimate | None]] = [[None] * len(by_run) for _ in cases]
    for number, pairs in enumerate(by_run):
        there = [(row, pair) for row, pair in enumerate(pairs) if pair is not None]
        found = batch.estimate_all([pair for _, pair in there], confidence=confidence, logs=logs)
        for (row, _), one in zip(there, found, strict=True):
            rows[row][number] = one
    if not rows:
        return [], []
    table = tabulate(
        rows, eager=[eager for eager, _ in cases], one_thread=[one for _, one in cases]
    )
    nothing = estimate.from_error(math.nan, math.nan, 0, 0, confidence)
    within = [next((e for e in reversed(row) if e is not None), nothing) for row in rows]
    return combine(table, prior, confidence=confidence), within


def class_of(m: Measurement) -> tuple[bool, bool]:
    """Return whether it ran in eager mode, and whether on one thread."""
    return m.case.mode == "eager", m.case.threads == 1


def estimate_rows(
    table: pd.DataFrame,
    measurements: Sequence[Sequence[Measurement | None]],
    limits: Sequence[Sequence[Samples | None]],
    textbook_of: Mapping[str, str],
    confidence: float,
    prior: Prior,
    logs: batch.Logs,
) -> RowEstimates:
    """Return every row's ratios to its baseline, its textbook implementation and the bandwidth limit."""
    right = table["right"].tolist()
    names = [textbook_of.get(op, "") for op in table["op"]]
    baselines, textbooks = (_partners(table, some) for some in (table["baseline"].tolist(), names))
    wanted: dict[Kind, list[tuple[int, int]]] = {"baseline": [], "textbook": [], "limit": []}
    for row in range(len(table)):
        if not right[row]:
            continue
        partners: Mapping[Kind, int | None] = {
            "baseline": baselines[row],
            "textbook": textbooks[row],
        }
        for kind, partner in partners.items():
            if partner is not None and right[partner] and partner != row:
                wanted[kind].append((row, partner))
        if any(some[row] is not None for some in limits):
            wanted["limit"].append((row, row))
    pooled: dict[tuple[Kind, int], RunsEstimate] = {}
    within: dict[tuple[Kind, int], Estimate] = {}
    for kind, places in wanted.items():
        by_run = [
            [_pair(kind, found[row], found[partner], own[row]) for row, partner in places]
            for found, own in zip(measurements, limits, strict=True)
        ]
        cases = [
            class_of(next(m for found in measurements if (m := found[row]) is not None))
            for row, _ in places
        ]
        for (row, _), over, own in zip(
            places, *pool(by_run, cases, confidence, prior=prior, logs=logs), strict=True
        ):
            pooled[kind, row], within[kind, row] = over, own
    newest = [next((s for s in reversed(some) if s), None) for some in zip(*limits, strict=True)]
    return RowEstimates(
        baselines=baselines,
        textbooks=textbooks,
        textbook_names=names,
        pooled=pooled,
        within=within,
        limit_seconds=limit_seconds(newest),
        confidence=confidence,
    )


def _pair(
    kind: Kind, m: Measurement | None, other: Measurement | None, limit: Samples | None
) -> Pair | None:
    if m is None or other is None or (kind == "limit" and limit is None):
        return None
    return (limit, m.samples) if kind == "limit" and limit is not None else paired(m, other)


def columns_of(table: pd.DataFrame, found: RowEstimates, margin: float) -> pd.DataFrame:
    """Return COLUMNS, one row per row of `table`."""
    right, stopped = table["right"].tolist(), table["stopped_early"].tolist()
    statuses, reasons = table["status"].tolist(), table["reason"].tolist()
    judged = {
        row: one.mean
        for (kind, row), one in found.pooled.items()
        if kind == "baseline" and not stopped[row] and one.mean.low is not None
    }
    verdicts = judging.compare_run(judged, margin, 1 - found.confidence) if judged else {}
    within = {row: found.within["baseline", row] for row in judged}
    disagree = judging.flag_disagreeing(within)
    rows = []
    for row in range(len(table)):
        verdict = str(verdicts[row].verdict) if row in verdicts else ""
        textbook = found.textbooks[row]
        own = right[row] and row == found.baselines[row]
        mean = found.pooled["baseline", row].mean if row in judged else None
        rows.append(
            (
                *_three(found, "baseline", row, stopped[row], one=own),
                mean.ratio_low if mean else math.nan,
                mean.ratio_high if mean else math.nan,
                verdict,
                _processes_needed(found, row, margin) if verdict == "UNDECIDED" else math.nan,
                *_three(found, "textbook", row, stopped[row], one=right[row] and row == textbook),
                _textbook_reason(found.textbook_names[row], textbook, right, statuses, reasons),
                found.limit_seconds[row],
                *_three(found, "limit", row, stopped[row]),
                row in disagree,
            )
        )
    return as_table(rows, COLUMNS)


def _three(
    found: RowEstimates, kind: Kind, row: int, stopped_early: bool, *, one: bool = False
) -> tuple[float, float, float]:
    """Return a ratio with the interval of the next run: none where the race was stopped early."""
    if one:
        return 1.0, math.nan, math.nan
    pooled, within = found.pooled.get((kind, row)), found.within.get((kind, row))
    if pooled is None or within is None:
        return math.nan, math.nan, math.nan
    if stopped_early or pooled.next_run.low is None:
        return within.ratio, math.nan, math.nan
    return pooled.mean.ratio, pooled.next_run.ratio_low, pooled.next_run.ratio_high


def _processes_needed(found: RowEstimates, row: int, margin: float) -> float:
    """Return further processes that would decide; nan if the variation between runs is too large."""
    pooled, within = found.pooled["baseline", row], found.within["baseline", row]
    distance = abs(abs(pooled.mean.log_ratio) - math.log1p(margin))
    needed = judging.processes_needed(within, margin)
    hopeless = needed is None or distance <= 2 * pooled.tau / math.sqrt(pooled.runs)
    return math.nan if hopeless or needed is None else needed


def _partners(table: pd.DataFrame, names: Sequence[str]) -> list[int | None]:
    """Return for each row the row of the candidate `names[row]` in the same race, or None."""
    rows = {key: row for row, key in enumerate(zip(table["race"], table["candidate"], strict=True))}
    return [rows.get((race, name)) for race, name in zip(table["race"], names, strict=True)]


def _textbook_reason(
    name: str,
    partner: int | None,
    right: Sequence[bool],
    statuses: Sequence[str],
    reasons: Sequence[str],
) -> str:
    if not name:
        return NO_TEXTBOOK
    if partner is None:
        return f"{name} {NOT_RACED}"
    if not right[partner]:
        return f"{name}: {statuses[partner]}: {reasons[partner]}".rstrip(": ")
    return ""


def withhold(columns: pd.DataFrame, floor: float, margin: float) -> list[str]:
    """Return the verdicts; those below the noise floor become WITHHELD.

    A difference is finer when it is smaller than the floor, and SAME when its margin is.
    """
    sizes = np.abs(np.log(columns["ratio"].to_numpy(dtype=float)))
    fine = {
        "FASTER": sizes <= floor,
        "SLOWER": sizes <= floor,
        "SAME": sizes * 0 + math.log1p(margin) < floor,
    }
    return [
        WITHHELD if verdict in fine and fine[verdict][row] else verdict
        for row, verdict in enumerate(columns["verdict"])
    ]
