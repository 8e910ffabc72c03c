"""Two runs of the same cases: what became slower or faster, what broke, and what works now.

A slower day is not a slower candidate: in each run a candidate's time is taken over a yardstick that
raced in the same rounds, and the two ratios are compared. The statistics are poolbench.stats.estimate'.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.case import Case, case_label
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import (
    Clock,
    Environment,
    MatrixCell,
    Measurement,
    Node,
    Samples,
    TimeBreakdown,
    samples_by,
)
from poolbench.core.text import format_seconds, markdown_cell, one_line, with_interval
from poolbench.report.frame import (
    MARGIN,
    axis_cell,
    axis_names,
    bandwidth_limit_samples,
    is_right,
    middle_of,
    process_medians,
    with_axes,
)
from poolbench.report.tables import WRITERS, as_markdown
from poolbench.stats import estimate
from poolbench.store.journal import StoredRun

# One process says nothing of how processes differ: a candidate that was stopped early in its first process must
# move by this much to count. Between processes a true ratio moves by a few percent (docs/method.md).
SETTLED_MARGIN = 0.25
ROWS_SHOWN = 100  # of a table in Markdown: a comment on a pull request holds 65,536 characters
# What the two runs are there to tell apart; everything else of the environment must be alike.
MAY_DIFFER = frozenset({"poolbench"})
PARTS = ("machine", "devices", "versions", "settings")
ORDER = {"SLOWER": 0, "FASTER": 1, "UNDECIDED": 2, "SAME": 3, "": 4}
MEASURED = """
    label candidate node base_status status base_seconds seconds yardstick ratio ratio_low ratio_high
    verdict adjusted_p processes_needed note
"""
COLUMNS = ("op", *MEASURED.split())
CELL_COLUMNS = ("change", "op", "candidate", "probe", "device", "before", "after", "evidence")
NEWS = {True: "went away", False: "new"}

RaceKey = tuple[Case, str]


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
    def slower(self) -> list[str]:
        """Names with case of what became slower: by verdict, or right before and timed out now."""
        table = self.table
        timed_out = (table["base_status"] == "ok") & (table["status"] == "timeout")
        return [_name(row) for row in _rows(table[(table["verdict"] == "SLOWER") | timed_out])]


def compare_runs(
    base: StoredRun, run: StoredRun, *, margin: float = MARGIN, allowed: Collection[str] = ()
) -> Compared:
    """What changed from one run to another.

    Args:
        base: the run to compare with.
        run: the run to judge.
        margin: equivalence margin of the verdicts.
        allowed: names of environment fields that may differ.

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
    _refuse(differences, allowed)
    before, after = _races(base), _races(run)
    pairs = _common(before, after)
    cells = moved_cells(base.capabilities, run.capabilities)
    if not pairs and (before or after or not _common_cells(base, run)):
        raise UsageError(
            f"{base.path.name} and {run.path.name} have no case and candidate in common; "
            "compare runs of the same sweep"
        )
    return Compared(
        base=base.header.run,
        run=run.header.run,
        margin=margin,
        table=_sorted(_table(before, after, pairs, margin)),
        cells=cells,
        differences=tuple(differences),
        notes=_notes(base, run, before, after),
    )


def keep(found: Compared, table: pd.DataFrame) -> Compared:
    """The comparison of these rows alone; their verdicts stay those of the whole run."""
    ops = set(table["op"])
    cells = found.cells[[op in ops for op in found.cells["op"]]]
    return replace(found, table=table, cells=cells)


# Environments.


def differing(base: StoredRun, run: StoredRun) -> list[Difference]:
    """In what the two environments differ; fields of a fleet's node are named 'NODE.FIELD'."""
    found = _differing(base.header.environment, run.header.environment)
    before, after = ({n.name: n.environment for n in one.of(Node)} for one in (base, run))
    for name in sorted(before.keys() & after.keys()):
        found += [
            replace(difference, name=f"{name}.{difference.name}")
            for difference in _differing(before[name], after[name])
        ]
    return found


def _differing(before: Environment, after: Environment) -> list[Difference]:
    # The source is left out: to compare two commits is what the command is for.
    found = []
    for part in PARTS:
        left, right = getattr(before, part), getattr(after, part)
        found += [
            Difference(name=name, before=_short(left, name), after=_short(right, name))
            for name in sorted({*left, *right} - MAY_DIFFER)
            if left.get(name) != right.get(name)
        ]
    return found


def _short(values: Mapping[str, object], name: str) -> str:
    return one_line(str(values[name]), 40) if name in values else "absent"


def _refuse(differences: Sequence[Difference], allowed: Collection[str]) -> None:
    refused = [difference for difference in differences if difference.name not in allowed]
    if refused:
        words = ", ".join(f"{one_line(d.name, 40)} ({d.before} | {d.after})" for d in refused[:6])
        rest = f" and {len(refused) - 6} more" if len(refused) > 6 else ""
        flags = " ".join(f"--allow-different {shlex.quote(d.name)}" for d in refused)
        raise UsageError(
            f"the runs are of unlike environments: {words}{rest}; to compare all the same: {flags}"
        )


# Races, pairs and yardsticks.


@dataclass(frozen=True, kw_only=True, eq=False)
class _Race:
    """One case on one node in one run: candidates and probes by name."""

    candidates: dict[str, Measurement] = field(default_factory=dict)
    probes: dict[str, Measurement] = field(default_factory=dict)
    bandwidth_limits: dict[tuple[int, int, str], Samples | None] = field(default_factory=dict)

    def bandwidth_limit(
        self, read_nbytes: int, written_nbytes: int, clock: Clock
    ) -> Samples | None:
        """What the memory allows for these bytes, block by block; shared by candidates alike."""
        key = (read_nbytes, written_nbytes, clock)
        if key not in self.bandwidth_limits:
            moved = read_nbytes or written_nbytes
            self.bandwidth_limits[key] = (
                bandwidth_limit_samples(self.probes, read_nbytes, written_nbytes, clock=clock)
                if moved
                else None
            )
        return self.bandwidth_limits[key]


def _races(run: StoredRun) -> dict[RaceKey, _Race]:
    races: dict[RaceKey, _Race] = {}
    for m in run.measurements:
        race = races.setdefault((m.case, m.node), _Race())
        if m.kind == "candidate":
            race.candidates[m.candidate] = m
        elif m.status == "ok" and len(m.samples):
            race.probes[m.candidate] = m
    return races


def _common(
    before: Mapping[RaceKey, _Race], after: Mapping[RaceKey, _Race]
) -> list[tuple[RaceKey, str]]:
    return [
        (key, name)
        for key, race in before.items()
        if key in after
        for name in race.candidates
        if name in after[key].candidates
    ]


def _from_bandwidth_limit(race: _Race, asked: Measurement) -> Samples | None:
    return race.bandwidth_limit(asked.read_nbytes, asked.written_nbytes, asked.clock)


def _from_copy(race: _Race, asked: Measurement) -> Samples | None:
    # The probe copies the case's own input: the same bytes in both runs.
    probe = race.probes.get("bandwidth-copy")
    return None if probe is None else samples_by(probe, asked.clock)


def _from_baseline(race: _Race, asked: Measurement) -> Samples | None:
    baseline = race.candidates.get(asked.baseline)
    if baseline is None or asked.candidate == asked.baseline or not is_right(baseline):
        return None
    return samples_by(baseline, asked.clock)


# The first that both runs have. The baseline last: it may itself be what changed.
YARDSTICKS: dict[str, Callable[[_Race, Measurement], Samples | None]] = {
    "bandwidth_limit": _from_bandwidth_limit,
    "copy": _from_copy,
    "baseline": _from_baseline,
}


def ratio_of_ratios(before: _Race, after: _Race, name: str) -> tuple[estimate.Estimate | None, str]:
    """(the candidate's time over the yardstick's, run over base; which yardstick), None without one."""
    asked = before.candidates[
        name
    ]  # its bytes for both runs: a change of their count is no change of time
    for yardstick, left, right in _yardsticks(before, after, asked):
        old = _estimate(asked, left, asked.clock)
        new = _estimate(after.candidates[name], right, asked.clock)
        if math.isfinite(old.log_ratio) and math.isfinite(new.log_ratio):
            return estimate.difference(new, old), yardstick
    return None, ""


def _yardsticks(
    before: _Race, after: _Race, asked: Measurement
) -> Iterator[tuple[str, Samples, Samples]]:
    """(name, its samples in base, in run) of each yardstick that both have, the best first."""
    for yardstick, take in YARDSTICKS.items():
        left, right = take(before, asked), take(after, asked)
        if left is not None and right is not None and len(left) and len(right):
            yield yardstick, left, right


def _ratios_at_once(
    raced: Sequence[tuple[_Race, _Race, str]],
) -> list[tuple[estimate.Estimate | None, str]]:
    """`ratio_of_ratios` of each: all by their best yardstick together, then one by one what is left."""
    first: dict[int, tuple[str, Samples, Samples]] = {}
    for at, (before, after, name) in enumerate(raced):
        old, new = before.candidates[name], after.candidates[name]
        found = next(_yardsticks(before, after, old), None)
        if found is not None and not (old.stopped_early or new.stopped_early):
            first[at] = found
    pairs = [
        pair
        for at, (_, left, right) in first.items()
        for before, after, name in (raced[at],)
        for pair in (
            (before.candidates[name].samples, left),
            (samples_by(after.candidates[name], before.candidates[name].clock), right),
        )
    ]
    estimates = iter(estimate.estimate_all(pairs))
    done = {
        at: (estimate.difference(new, old), yardstick)
        for (at, (yardstick, *_)), old, new in zip(first.items(), estimates, estimates, strict=True)
        if math.isfinite(old.log_ratio) and math.isfinite(new.log_ratio)
    }
    return [done.get(at) or ratio_of_ratios(*one) for at, one in enumerate(raced)]


def _estimate(m: Measurement, yardstick: Samples, clock: Clock) -> estimate.Estimate:
    """By the clock of the base run's measurement: one that the run has not leaves nothing to compare."""
    return estimate.estimate(
        samples_by(m, clock), yardstick, level="allocation" if m.stopped_early else "process"
    )


# The table.


def _table(
    before: Mapping[RaceKey, _Race],
    after: Mapping[RaceKey, _Race],
    pairs: Sequence[tuple[RaceKey, str]],
    margin: float,
) -> pd.DataFrame:
    estimates: dict[int, estimate.Estimate] = {}
    yardsticks: dict[int, str] = {}
    stopped_early: set[int] = set()
    measured = [(before[key].candidates[name], after[key].candidates[name]) for key, name in pairs]
    right = [row for row, both in enumerate(measured) if all(is_right(m) for m in both)]
    raced = [(before[key], after[key], name) for key, name in (pairs[row] for row in right)]
    for row, (found, yardstick) in zip(right, _ratios_at_once(raced), strict=True):
        yardsticks[row] = yardstick
        if found is None:
            continue
        estimates[row] = found
        if any(m.stopped_early for m in measured[row]):
            stopped_early.add(row)
    verdicts = _verdicts(estimates, stopped_early, margin)
    axes = axis_names(old for old, _ in measured)
    rows = [
        _row(old, new, yardsticks.get(row, ""), verdicts.get(row), row in stopped_early, axes)
        for row, (old, new) in enumerate(measured)
    ]
    return pd.DataFrame(rows, columns=with_axes(COLUMNS, axes))


def _verdicts(
    estimates: Mapping[int, estimate.Estimate], stopped_early: Collection[int], margin: float
) -> dict[int, estimate.Comparison]:
    """Verdicts under one false-discovery control for each of the two margins."""
    usual = {row: found for row, found in estimates.items() if row not in stopped_early}
    wide = {row: found for row, found in estimates.items() if row in stopped_early}
    return {
        **estimate.compare_run(usual, margin),
        **estimate.compare_run(wide, max(margin, SETTLED_MARGIN)),
    }


def _row(
    old: Measurement,
    new: Measurement,
    yardstick: str,
    found: estimate.Comparison | None,
    stopped_early: bool,
    axes: Sequence[str],
) -> tuple[Any, ...]:
    case = old.case
    estimate = found.estimate if found else None
    return (
        case.op,
        *(axis_cell(case, name) for name in axes),
        case_label(case),
        old.candidate,
        old.node,
        _state(old),
        _state(new),
        _seconds(old),
        _seconds(new),
        yardstick,
        estimate.ratio if estimate else math.nan,
        estimate.ratio_low if estimate else math.nan,
        estimate.ratio_high if estimate else math.nan,
        str(found.verdict) if found else "",
        found.adjusted_p if found else math.nan,
        math.nan if found is None or found.processes_needed is None else found.processes_needed,
        _note(old, new, estimate, stopped_early),
    )


def _state(m: Measurement) -> str:
    """Its status; 'wrong' also where it says ok with an error beyond its bound."""
    wrong = m.status == "ok" and m.accuracy is not None and not m.accuracy.worst <= 1
    return "wrong" if wrong else m.status


def _seconds(m: Measurement) -> float:
    return float(middle_of(process_medians(m.samples))) if len(m.samples) else math.nan


def _note(
    old: Measurement, new: Measurement, found: estimate.Estimate | None, stopped_early: bool
) -> str:
    if _state(old) != _state(new):
        return one_line(new.reason or old.reason or new.issue or old.issue)
    if not (is_right(old) and is_right(new)):
        return one_line(new.reason) if new.status != "ok" else "no samples"
    if found is None:
        alone = old.candidate == old.baseline
        return "is the only yardstick itself" if alone else "no yardstick in both runs"
    if found.low is None:
        return "a single process: no interval"
    if stopped_early:
        return f"one process: judged at a margin of {SETTLED_MARGIN:.0%}"
    return "contended blocks used" if found.contended_used else ""


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """By verdict, then by how sure, then by how large."""
    keys = pd.DataFrame(
        {
            "order": table["verdict"].map(ORDER),
            "p": table["adjusted_p"],
            "size": -np.log(table["ratio"].astype(float)).abs(),
        }
    )
    order = keys.sort_values(["order", "p", "size"], kind="stable", na_position="last").index
    return table.loc[order].reset_index(drop=True)


# The support matrix.


def moved_cells(before: Sequence[MatrixCell], after: Sequence[MatrixCell]) -> pd.DataFrame:
    """Cells whose state changed, limitations that went away first; 'not_run' says nothing."""
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


def _common_cells(base: StoredRun, run: StoredRun) -> bool:
    return bool(_cells(base.capabilities).keys() & _cells(run.capabilities).keys())


def _notes(
    base: StoredRun, run: StoredRun, before: Mapping[RaceKey, _Race], after: Mapping[RaceKey, _Race]
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


# Text.


def changed_statuses(table: pd.DataFrame) -> pd.DataFrame:
    """Measurements whose status is another now, those that work now last."""
    rows = [
        (
            "works now" if row["status"] == "ok" else "broke" if row["base_status"] == "ok" else "changed",
            row["op"],
            row["candidate"],
            row["label"],
            row["base_status"],
            row["status"],
            row["note"],
        )
        for row in _rows(table[table["base_status"] != table["status"]])
    ]  # fmt: skip
    order = {"broke": 0, "changed": 1, "works now": 2}
    rows.sort(key=lambda row: order[row[0]])
    names = ("change", "op", "candidate", "case", "before", "after", "why")
    return pd.DataFrame(rows, columns=list(names))


def verdict_table(table: pd.DataFrame) -> pd.DataFrame:
    """Verdicts as text, in the table's order."""
    rows = []
    for row in _rows(table):
        more = _more_processes(row["processes_needed"])
        rows.append(
            {
                "verdict": row["verdict"].lower() or "not judged",
                "op": row["op"],
                "candidate": row["candidate"],
                "case": _place(row),
                "time over base's": with_interval(
                    row["ratio"], row["ratio_low"], row["ratio_high"]
                ),
                "base": format_seconds(row["base_seconds"]),
                "run": format_seconds(row["seconds"]),
                "against": row["yardstick"],
                "note": "; ".join(text for text in (more, row["note"]) if text),
            }
        )
    return pd.DataFrame(rows)


def _more_processes(needed: float) -> str:
    if not math.isfinite(needed):
        return ""
    return f"{int(needed)} more process{'s' if needed > 1 else ''} would decide"


def summary(found: Compared) -> str:
    """'Slower: 1. Faster: 0. Same: 40. Undecided: 3. Not judged: 2.'."""
    counts = Counter(found.table["verdict"])
    words = {name: name.capitalize() or "Not judged" for name in ORDER}
    words["SAME"] = "Same"
    return " ".join(f"{word}: {counts.get(name, 0)}." for name, word in words.items())


def headline(found: Compared) -> str:
    """One sentence: what became slower, by name."""
    slower = found.slower
    if not slower:
        return "Nothing became slower."
    return f"Slower: {'; '.join(slower[:5])}" + (
        f"; and {len(slower) - 5} more." if len(slower) > 5 else "."
    )


def method(found: Compared) -> str:
    """What the figures are, in two sentences."""
    return (
        "Ratios are of time over the memory bandwidth limit (or the copy probe, or the baseline) of the same rounds, "
        "run "
        f"over base, with their 95% interval. Margin {found.margin:.3g}; at most 5% of the verdicts that are "
        "given are expected to be false."
    )


def as_comment(found: Compared) -> str:
    """The comparison as Markdown for a pull request."""
    judged = found.table
    clear = judged[judged["verdict"].isin(["SLOWER", "FASTER"])]
    rest = judged[~judged["verdict"].isin(["SLOWER", "FASTER"])]
    statuses = changed_statuses(judged)
    parts = [
        f"## {markdown_cell(found.run)} against {markdown_cell(found.base)}\n",
        f"**{markdown_cell(headline(found))}** {summary(found)}\n",
        f"{method(found)}\n",
    ]
    parts += [f"{markdown_cell(note)}\n" for note in found.notes]
    if found.differences:
        words = ", ".join(f"{d.name} ({d.before} | {d.after})" for d in found.differences)
        parts.append(f"Unlike, and allowed: {markdown_cell(words)}.\n")
    if len(clear):
        parts.append(f"### Slower and faster\n\n{_shown(verdict_table(clear))}")
    if len(statuses):
        parts.append(f"### Statuses that changed\n\n{_shown(statuses)}")
    if len(found.cells):
        parts.append(f"### Limitations that came and went\n\n{_shown(found.cells)}")
    if len(rest):
        parts.append(
            f"<details><summary>The other {len(rest)}</summary>\n\n{_shown(verdict_table(rest))}\n</details>\n"
        )
    return "\n".join(parts)


def _shown(frame: pd.DataFrame) -> str:
    text = as_markdown(frame.head(ROWS_SHOWN))
    left = len(frame) - ROWS_SHOWN
    return text + (f"\n{left} more rows: `--format csv` prints all.\n" if left > 0 else "")


def write_page(found: Compared, folder: Path) -> Path:
    """The comparison as one HTML file in the folder; its path."""
    from poolbench.report.page import fill_template

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "compare.html"
    context = {
        "found": found,
        "headline": headline(found),
        "summary": summary(found),
        "method": method(found),
        "statuses": changed_statuses(found.table),
        "verdicts": verdict_table(found.table),
    }
    page.write_text(fill_template("compare.html", context), encoding="utf-8")
    return page


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return list(table.to_dict("records"))


def _place(row: Mapping[str, Any]) -> str:
    return row["label"] if row["node"] == "local" else f"{row['label']} on {row['node']}"


def _name(row: Mapping[str, Any]) -> str:
    ratio = with_interval(row["ratio"], row["ratio_low"], row["ratio_high"]) or row["status"]
    return f"{row['op']} {row['candidate']} ({_place(row)}) {ratio}"


def _whole(write: Callable[[pd.DataFrame], str]) -> Callable[[Compared], str]:
    return lambda found: write(found.table)


FORMATS: dict[str, Callable[[Compared], str]] = {
    **{name: _whole(write) for name, write in WRITERS.items()},
    "markdown": as_comment,
}
