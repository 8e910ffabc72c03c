"""Compare two runs of the same cases: times, statuses and cells of the support matrix.

A slower day is not a slower candidate. In each run a candidate's time is divided by that of a
normalizer in the same rounds, and the two ratios are compared. Each run's ratio carries what lies
between runs of one code on one machine (poolbench.stats.runs), so that identical code differs seldom.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import (
    FASTER_THAN_LIMIT,
    Environment,
    MatrixCell,
    Measurement,
    Node,
    TimeBreakdown,
    is_right,
)
from poolbench.core.text import one_line, with_interval
from poolbench.report.changes import (
    Change,
    Race,
    RaceKey,
    changes,
    common,
    peer_changes,
    races_of,
)
from poolbench.report.environments import timing_facts
from poolbench.report.formats import as_table
from poolbench.report.frame import MARGIN, axis_names, case_cells, with_axes
from poolbench.report.medians import all_process_medians, median
from poolbench.report.programs import compare_programs
from poolbench.stats import estimate
from poolbench.stats import verdict as verdicts
from poolbench.stats.batch import Logs
from poolbench.stats.prior import SHIPPED, Prior
from poolbench.stats.runs import detectable_slowdown
from poolbench.store.journal import StoredRun
from poolbench.store.runs import check_allowed, field_names

# One process does not show how processes differ: a candidate that stopped early in its first process must
# change by this much to count. Between processes a true ratio moves by a few percent (docs/method.md).
SETTLED_MARGIN = 0.25
ORDER = {"SLOWER": 0, "FASTER": 1, "UNDECIDED": 2, "SAME": 3, "": 4}
COLUMNS = """
    op label candidate node base_status status base_seconds seconds normalizer ratio ratio_low
    ratio_high verdict adjusted_p detectable note
""".split()
CELL_COLUMNS = ("change", "op", "candidate", "probe", "device", "before", "after", "evidence")
NEWS = {True: "went away", False: "new"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field in which the environments differ, and its two values as short text."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two runs, compared.

    Attributes:
        base, run: names of the runs.
        margin: equivalence margin of the verdicts.
        table: one row a candidate, case and node that both runs have, the surest and largest change
            first; columns are COLUMNS.
        cells: cells of the support matrix that moved; columns are CELL_COLUMNS.
        differences: of the environments, all allowed by the user.
        notes: what a reader must know beside the verdicts, a sentence each.
    """

    base: str
    run: str
    margin: float
    table: pd.DataFrame
    cells: pd.DataFrame
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def detectable(self) -> float:
        """Return the slowdown that half of the comparisons would have shown; nan without a comparison."""
        found = self.table["detectable"].to_numpy(dtype=float)
        found = found[np.isfinite(found)]
        return float(np.median(found)) if len(found) else math.nan

    @property
    def slower(self) -> list[str]:
        """Return the names and cases that became slower: by verdict, or correct before and timed out now."""
        table = self.table
        timed_out = (table["base_status"] == "ok") & (table["status"] == "timeout")
        rows = table[(table["verdict"] == "SLOWER") | timed_out].to_dict("records")
        return [name_of(row) for row in rows]


def compare_runs(
    base: StoredRun,
    run: StoredRun,
    *,
    margin: float = MARGIN,
    allowed: Collection[str] = (),
    prior: Prior = SHIPPED,
) -> Compared:
    """Return what changed from one run to another.

    Args:
        base: the run to compare with.
        run: the run to judge.
        margin: equivalence margin of the verdicts.
        allowed: names of environment fields that may differ.
        prior: of what lies between runs.

    Raises:
        StoreError: a journal was cut off.
        UsageError: the environments differ where it is not allowed, or there is no common case.
    """
    for one in (base, run):
        if one.dropped:
            raise StoreError(
                f"{one.path.name}: {one.dropped}; finish the run with --resume {one.path.name}"
            )
    differences = differing(base, run)
    check_allowed(allowed, {name for one in (base, run) for name in _fields(one)})
    _refuse(differences, allowed)
    before, after = races_of(base), races_of(run)
    pairs = common(before, after)
    both_checked = _cells(base.capabilities).keys() & _cells(run.capabilities).keys()
    if not pairs and (before or after or not both_checked):
        raise UsageError(
            f"{base.path.name} and {run.path.name} have no case and candidate in common; "
            "compare runs of the same sweep"
        )
    return Compared(
        base=base.header.run,
        run=run.header.run,
        margin=margin,
        table=_sorted(_table(before, after, pairs, margin, prior)),
        cells=moved_cells(base.capabilities, run.capabilities),
        differences=tuple(differences),
        notes=(
            *_notes(base, run, before, after),
            *filter(None, [compare_programs(base, run).note]),
        ),
    )


def keep(found: Compared, table: pd.DataFrame) -> Compared:
    """Return the comparison of these rows alone, with the verdicts of the whole run."""
    cells = found.cells[found.cells["op"].isin(table["op"])]
    return replace(found, table=table, cells=cells)


def differing(base: StoredRun, run: StoredRun) -> list[Difference]:
    """Return the fields on which a timing depends and in which the runs differ; 'NODE.FIELD' of a cluster."""
    found = _differing(base.header.environment, run.header.environment)
    old, new = ({n.name: n.environment for n in one.of(Node)} for one in (base, run))
    for name in sorted(old.keys() & new.keys()):
        found += [replace(d, name=f"{name}.{d.name}") for d in _differing(old[name], new[name])]
    return found


def _fields(run: StoredRun) -> set[str]:
    return field_names(run.header.environment) | {
        f"{node.name}.{name}" for node in run.of(Node) for name in field_names(node.environment)
    }


def _differing(before: Environment, after: Environment) -> list[Difference]:
    # The source is excluded: the command compares two commits.
    left, right = timing_facts(before), timing_facts(after)
    return [
        Difference(name=name, before=_short(left, name), after=_short(right, name))
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    ]


def _short(values: Mapping[str, object], name: str) -> str:
    return one_line(str(values[name]), 40) if name in values else "absent"


def _refuse(differences: Sequence[Difference], allowed: Collection[str]) -> None:
    refused = [difference for difference in differences if difference.name not in allowed]
    if refused:
        words = ", ".join(f"{one_line(d.name, 40)} ({d.before} | {d.after})" for d in refused[:6])
        rest = f" and {len(refused) - 6} more" if len(refused) > 6 else ""
        flags = " ".join(f"--allow-different {shlex.quote(d.name)}" for d in refused)
        raise UsageError(
            f"the runs differ in what changes timings: {words}{rest}; to compare them anyway: {flags}"
        )


def _table(
    before: Mapping[RaceKey, Race],
    after: Mapping[RaceKey, Race],
    pairs: Sequence[tuple[RaceKey, str]],
    margin: float,
    prior: Prior,
) -> pd.DataFrame:
    measured = [(before[key].candidates[name], after[key].candidates[name]) for key, name in pairs]
    right = [row for row, both in enumerate(measured) if all(is_right(m) for m in both)]
    raced = [(before[key], after[key], name) for key, name in (pairs[row] for row in right)]
    logs: Logs = {}
    found_in: dict[tuple[bool, int], Change] = {}  # by (against the other candidates, row)
    for by_peers, judge in ((True, peer_changes), (False, changes)):
        for row, found in zip(right, judge(raced, prior, logs), strict=True):
            if found is not None:
                found_in[by_peers, row] = found
    stopped = {row for row in right if any(m.stopped_early for m in measured[row])}
    judged = _verdicts(found_in, stopped, margin)
    cases = dict.fromkeys(old.case for old, _ in measured)
    axes = axis_names(cases)
    cells = {case: case_cells(case, axes) for case in cases}
    medians = map(median, all_process_medians([m.samples for both in measured for m in both]))
    rows = []
    for row, (old, new) in enumerate(measured):
        seconds = next(medians), next(medians)
        decisive = _decisive(found_in, judged, row)
        rows.append(cells[old.case] + _row(old, new, seconds, decisive, row in stopped, margin))
    return as_table(rows, with_axes(COLUMNS, axes))


def _verdicts(
    found: Mapping[tuple[bool, int], Change], stopped_early: Collection[int], margin: float
) -> dict[tuple[bool, int], verdicts.Comparison]:
    """Return verdicts under one false-discovery control for each of the two margins."""
    usual = {key: one.estimate for key, one in found.items() if key[1] not in stopped_early}
    wide = {key: one.estimate for key, one in found.items() if key[1] in stopped_early}
    return {
        **verdicts.compare_run(usual, margin),
        **verdicts.compare_run(wide, max(margin, SETTLED_MARGIN)),
    }


def _decisive(
    found: Mapping[tuple[bool, int], Change],
    judged: Mapping[tuple[bool, int], verdicts.Comparison],
    row: int,
) -> tuple[Change, verdicts.Comparison] | None:
    """Return a row's change with its verdict: the worse of that by the others and that by the normalizer.

    Against the others a change of one candidate is seen best, and one of all candidates not at all.
    """
    there = [key for key in ((True, row), (False, row)) if key in found]
    order = ("SLOWER", "FASTER", "SAME", "UNDECIDED")
    key = min(there, key=lambda one: order.index(judged[one].verdict), default=None)
    return (found[key], judged[key]) if key else None


def _row(
    old: Measurement,
    new: Measurement,
    seconds: tuple[float, float],
    decisive: tuple[Change, verdicts.Comparison] | None,
    stopped_early: bool,
    margin: float,
) -> tuple[Any, ...]:
    """Return a row's columns behind those of its case."""
    found = None
    figures: tuple[Any, ...] = ("", math.nan, math.nan, math.nan, "", math.nan, math.nan)
    if decisive:
        change, judged = decisive
        found = change.estimate
        least = max(margin, SETTLED_MARGIN) if stopped_early else margin
        figures = (
            change.normalizer, found.ratio, found.ratio_low, found.ratio_high, judged.verdict,
            judged.adjusted_p, detectable_slowdown(found, margin=least),
        )  # fmt: skip
    return (
        old.candidate,
        old.node,
        _state(old),
        _state(new),
        *seconds,
        *figures,
        _note(old, new, found, stopped_early),
    )


def _state(m: Measurement) -> str:
    """Return its status; 'wrong' also for an ok measurement with an error beyond its tolerance."""
    wrong = m.status == "ok" and m.accuracy is not None and not m.accuracy.worst <= 1
    return "wrong" if wrong else m.status


def _note(
    old: Measurement, new: Measurement, found: estimate.Estimate | None, stopped_early: bool
) -> str:
    if _state(old) != _state(new):
        return one_line(new.reason or old.reason or new.issue or old.issue)
    if not (is_right(old) and is_right(new)):
        if FASTER_THAN_LIMIT in (*old.flags, *new.flags):
            return "faster than the memory allows: not judged"
        return one_line(new.reason) if new.status != "ok" else "no samples"
    if found is None:
        alone = old.candidate == old.baseline
        return "is itself the only normalizer" if alone else "no normalizer in both runs"
    if found.low is None:
        return "a single process: no interval"
    if stopped_early:
        return f"one process: judged at a margin of {SETTLED_MARGIN:.0%}"
    return "blocks under background load used" if found.contended_used else ""


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by verdict, then certainty, then size."""
    keys = pd.DataFrame(
        {
            "order": table["verdict"].map(ORDER),
            "p": table["adjusted_p"],
            "size": -np.log(table["ratio"].astype(float)).abs(),
        }
    )
    order = keys.sort_values(["order", "p", "size"], kind="stable", na_position="last").index
    return table.loc[order].reset_index(drop=True)


def moved_cells(before: Sequence[MatrixCell], after: Sequence[MatrixCell]) -> pd.DataFrame:
    """Return the cells whose state changed, removed limitations first; 'not_run' is ignored."""
    old, new = _cells(before), _cells(after)
    rows = []
    for key, cell in new.items():
        was = old.get(key)
        if was is None or was.state == cell.state or "not_run" in (was.state, cell.state):
            continue
        change = NEWS[cell.state == "pass"] if "pass" in (was.state, cell.state) else "changed"
        evidence = cell.evidence or was.evidence
        issue = cell.issue or was.issue
        rows.append((change, *key, was.state, cell.state, one_line(f"{evidence} {issue}".strip())))
    order = {"went away": 0, "new": 1, "changed": 2}
    rows.sort(key=lambda row: order[row[0]])
    return pd.DataFrame(rows, columns=list(CELL_COLUMNS))


def _cells(cells: Sequence[MatrixCell]) -> dict[tuple[str, str, str, str], MatrixCell]:
    return {(c.op, c.candidate, c.probe, c.device): c for c in cells}


def _notes(
    base: StoredRun, run: StoredRun, before: Mapping[RaceKey, Race], after: Mapping[RaceKey, Race]
) -> tuple[str, ...]:
    notes = [
        f"{one.header.run} did not end by itself, or is an import."
        for one in (base, run)
        if not one.of(TimeBreakdown)
    ]
    old, new = (
        {(key, name) for key, race in races.items() for name in race.candidates}
        for races in (before, after)
    )
    for missing, where in ((old - new, base), (new - old, run)):
        if missing:
            names = sorted({name for _, name in missing})
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            notes.append(f"{len(missing)} measurements are only in {where.header.run}: {shown}.")
    return tuple(one_line(note, 500) for note in notes)


def place_of(row: Mapping[str, Any]) -> str:
    """Return the case of a row, with its node if it is not this machine."""
    return row["label"] if row["node"] == "local" else f"{row['label']} on {row['node']}"


def name_of(row: Mapping[str, Any]) -> str:
    """Return op, candidate, case and ratio of a row in one line."""
    ratio = with_interval(row["ratio"], row["ratio_low"], row["ratio_high"]) or row["status"]
    return f"{row['op']} {row['candidate']} ({place_of(row)}) {ratio}"
