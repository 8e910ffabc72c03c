"""Build one tidy DataFrame from one or several journals: one row per measurement, statistics in columns.

The statistics are those of poolbench.stats, computed by poolbench.report.ratios.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.axes import STANDARD, format_value
from poolbench.core.case import Case, case_label
from poolbench.core.errors import UsageError
from poolbench.core.records import Measurement, Samples, is_right
from poolbench.core.registry import input_nbytes, load_builtin
from poolbench.report import programs, ratios
from poolbench.report.environments import check_poolable
from poolbench.report.formats import as_table
from poolbench.report.history import prior_for
from poolbench.report.medians import Floats, all_process_medians, median, process_medians
from poolbench.report.roofline import limits_of, probe_table
from poolbench.stats.batch import Logs
from poolbench.stats.prior import SHIPPED, Prior
from poolbench.store.journal import StoredRun, read_run

MARGIN = 0.05
Key = tuple[Case, str, str]  # case, node, candidate


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFrame:
    """One or several runs of one machine and code as a table.

    Attributes:
        runs: the records of each run, the newest last.
        table: one row per candidate and case; see `COLUMNS` for what each column holds.
        measurements: by run, then by row of `table`; None where the run lacks the row.
        probes: one row per bandwidth probe of the newest run: case columns, probe, bytes per second.
        margin: the equivalence margin of the verdicts.
        confidence: of every interval.
        prior: of what lies between runs.
        source: of it, 'prior' for the one that ships, or 'this machine: k runs'.
        logs: of the samples, computed once for all ratios.
    """

    runs: tuple[StoredRun, ...]
    table: pd.DataFrame
    measurements: tuple[Sequence[Measurement | None], ...]
    probes: pd.DataFrame
    margin: float
    confidence: float
    prior: Prior
    source: str
    logs: Logs

    @property
    def run(self) -> StoredRun:
        """Return the newest run, whose records are not pooled."""
        return self.runs[-1]

    @functools.cached_property
    def samples(self) -> list[Samples]:
        """Return the raw samples of the newest run that has any, by row."""
        return [self.measurement(row).samples for row in range(len(self.table))]

    def measurement(self, row: int) -> Measurement:
        """Return the newest run's measurement of a row."""
        return next(m for some in reversed(self.measurements) if (m := some[row]) is not None)

    def row(self, number: int) -> dict[str, Any]:
        """Return a row of `table` by column; pandas takes as long for a single cell."""
        return {name: values[number] for name, values in self._columns.items()}

    @functools.cached_property
    def row_of(self) -> dict[tuple[int, str], int]:
        """Return the rows by race and candidate."""
        keys = zip(self.table["race"].tolist(), self.table["candidate"].tolist(), strict=True)
        return {key: row for row, key in enumerate(keys)}

    def keep(self, rows: Sequence[int]) -> RunFrame:
        """Return the frame of these rows alone, with the statistics of the whole."""
        return replace(
            self,
            table=self.table.loc[list(rows)].reset_index(drop=True),
            measurements=tuple([some[row] for row in rows] for some in self.measurements),
        )

    @functools.cached_property
    def _columns(self) -> dict[str, list[Any]]:
        return {str(name): self.table[name].tolist() for name in self.table.columns}


COLUMNS: dict[str, str] = {
    "line": "line of the newest run's journal; the header is line 1",
    "race": "number of the race: one case on one node",
    "op": "name; the columns of the axes follow it",
    "label": "the case in one word, without its op",
    "nbytes": "bytes of the inputs",
    "moved_nbytes": "fewest bytes that a call must read and write",
    "candidate": "name",
    "form": "function or layer",
    "status": "ok, unsupported, wrong, error, crashed, out_of_memory, timeout, not_run",
    "reason": "why the status is not ok",
    "issue": "upstream issue",
    "right": "ok, within the tolerance and not faster than the memory allows: may be ranked",
    "baseline": "candidate that the ratio is taken to",
    "program": "hash of what the compiler made of it; empty where it was not read",
    "unlike": "settings of its framework that differ from the baseline's: there is no verdict then",
    "clock": "wall: a call from Python; device: the time in it in which the GPU was at work",
    "seconds": "median of the processes' medians, seconds per call by that clock",
    "seconds_low": "fastest process's median",
    "seconds_high": "slowest process's median",
    "wall_seconds": "seconds per call by the wall clock",
    "samples": "number of samples",
    "processes": "number of processes",
    "first_seconds": "median first call: trace and compile",
    "ratio": "time over the baseline's time",
    "ratio_low": "lower end of the interval that holds 95% of the next run's ratios",
    "ratio_high": "upper end",
    "mean_low": "lower end of the 95% interval of this machine's mean ratio, which the verdict uses",
    "mean_high": "upper end",
    "verdict": "FASTER, SLOWER, SAME, UNDECIDED, WITHHELD; empty where nothing is ranked",
    "processes_needed": "further processes that would decide an UNDECIDED; empty where only more runs can",
    "textbook_ratio": "time over the textbook implementation's time",
    "textbook_low": "lower end of the interval that holds 95% of the next run's ratios",
    "textbook_high": "upper end",
    "textbook_reason": "why there is no ratio to the textbook implementation",
    "bandwidth_limit_seconds": "time that the memory needs: bytes read and written over its bandwidths",
    "efficiency": "bandwidth limit time over time, from 1 MiB up",
    "efficiency_low": "lower end of the interval that holds 95% of the next run's values",
    "efficiency_high": "upper end",
    "worst": "largest error over its tolerance; 1 is at the tolerance",
    "max_relative": "largest relative error of y",
    "tie": "where a tie's gradient goes",
    "peak_nbytes": "peak of the device's memory above the inputs",
    "stopped_early": "stopped after the first process at ten times the baseline: no interval",
    "disagree": "its processes disagree by more than those of the rest of the run",
    "flags": "remarks of the race",
    "steal": "share of processor time that the hypervisor took during the race",
    "others": "share that other processes used",
    "throttled": "processor time that a CPU quota withheld, per second; empty without a quota",
    "blocks_marked": "blocks under background load",
    "blocks_redone": "of these, repeated",
    "node": "machine",
}


def load(*places: Path | StoredRun, margin: float = MARGIN) -> RunFrame:
    """Load the run in a folder, unless it was read already; several runs of one machine and code are pooled.

    What lies between runs comes from the runs of this machine and code beside it, where there are two; runs that
    are pooled show it themselves.

    Raises:
        StoreError: a journal cannot be read.
        UsageError: the runs are of unlike machines or code.
    """
    runs = [read_run(place) if isinstance(place, Path) else place for place in places]
    if not runs:
        raise UsageError("no run to report")
    pooled = [run.header.run for run in runs] if len(runs) > 1 else []
    newest = max(runs, key=lambda run: run.header.created)
    prior, known = prior_for(newest, newest.path.absolute().parent, without=pooled)
    return lay_out(*runs, margin=margin, prior=(prior, known + len(pooled)))


def lay_out(
    *runs: StoredRun,
    margin: float = MARGIN,
    prior: tuple[Prior, int] = (SHIPPED, 0),
) -> RunFrame:
    """Return the measurements of one or several runs with every statistic in columns.

    A row that a run found wrong, or faster than the memory allows, is not ranked in any. `prior` comes
    with the number of runs that give it.

    Raises:
        UsageError: the runs are of unlike machines or code.
    """
    runs = tuple(sorted(runs, key=lambda run: run.header.created))
    check_poolable(runs)
    found = [_candidates(run) for run in runs]
    keys = dict.fromkeys(key for one in reversed(found) for key in one)
    there = tuple([one.get(key, (0, None))[1] for key in keys] for one in found)
    limits = tuple(limits_of(some, _probes(run)) for some, run in zip(there, runs, strict=True))
    by_row = [[m for m in some if m is not None] for some in zip(*there, strict=True)]
    cases = dict.fromkeys(case for case, *_ in keys)
    axes = axis_names(cases)
    races: dict[tuple[Case, str], int] = {}
    shared = {case: (case_cells(case, axes), input_nbytes(case)) for case in cases}
    medians = iter(all_process_medians([m.samples for some in by_row for m in some]))
    rows = []
    for (case, *_), some in zip(keys, by_row, strict=True):
        cells, nbytes = shared[case]
        rows.append(cells + _row([(next(medians), m) for m in some], nbytes))
    later = {"line", "race", "unlike", *ratios.COLUMNS}
    table = as_table(rows, [name for name in with_axes(COLUMNS, axes) if name not in later])
    table.insert(0, "race", [races.setdefault(key[:2], len(races)) for key in keys])
    # A candidate that did not run moved no bytes; the size of the input comes from others of its race.
    table["nbytes"] = table.groupby("race")["nbytes"].transform("max")
    table.insert(0, "line", [found[-1].get(key, (0, None))[0] for key in keys])
    confidence = ratios.reported_confidence(runs[-1].header.options)
    logs: Logs = {}
    estimates = ratios.estimate_rows(
        table, there, limits, {name: op.textbook for name, op in load_builtin().ops.items()},
        confidence, prior[0], logs,
    )  # fmt: skip
    columns = ratios.columns_of(table, estimates, margin)
    unlike = [
        "" if at is None else programs.unlike(some[-1], by_row[at][-1])
        for some, at in zip(by_row, estimates.baselines, strict=True)
    ]
    verdicts = ratios.withhold(columns, noise_floor(runs[-1]), margin)
    verdicts = ["" if words else one for one, words in zip(verdicts, unlike, strict=True)]
    columns["verdict"] = pd.Series(verdicts, dtype=object)
    columns["unlike"] = pd.Series(unlike, dtype=object)
    table = pd.concat([table, columns], axis=1)
    known = max(len(runs), prior[1])
    return RunFrame(
        runs=runs,
        table=table[with_axes(COLUMNS, axes)],
        measurements=there,
        probes=probe_table(_probes(runs[-1])),
        margin=margin,
        confidence=confidence,
        prior=prior[0],
        logs=logs,
        source=f"this machine: {known} runs" if known > 1 else "prior",
    )


def _candidates(run: StoredRun) -> dict[Key, tuple[int, Measurement]]:
    """Return the candidates' measurements with their lines; a repeated race replaces itself."""
    last = {id(record) for record in run.measurements}
    return {
        (record.case, record.node, record.candidate): (line, record)
        for line, record in enumerate(run.records, 2)
        if isinstance(record, Measurement) and id(record) in last and record.kind == "candidate"
    }


def _probes(run: StoredRun) -> list[Measurement]:
    return [m for m in run.measurements if m.kind == "probe"]


def noise_floor(run: StoredRun) -> float:
    """Return the noise floor as a log ratio; 0 without a self-test."""
    return max((s.noise_floor for s in run.selftests if s.injected == 0), default=0.0)


def axis_names(cases: Iterable[Case]) -> tuple[str, ...]:
    """Return the axes of all cases, those of the ops first, the standard ones last."""
    own = (name for case in cases for name in case.axes if name not in STANDARD)
    return tuple(dict.fromkeys([*own, *STANDARD]))


def with_axes(columns: Iterable[str], axes: Sequence[str]) -> list[str]:
    """Return the columns with those of the axes after 'op'."""
    return [
        name for column in columns for name in ((column, *axes) if column == "op" else (column,))
    ]


def axes_in(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the axes of a table, which are between its columns 'op' and 'label'."""
    names = [str(name) for name in table.columns]
    return tuple(names[names.index("op") + 1 : names.index("label")])


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def case_cells(case: Case, axes: Sequence[str]) -> tuple[Any, ...]:
    """Return the columns that the rows of a case share: a shape as text, None for an axis that it lacks."""
    values = (case.get(name) for name in axes)
    cells = (format_value(value) if isinstance(value, tuple) else value for value in values)
    return (case.op, *cells, case_label(case))


def _row(by_run: Sequence[tuple[Floats, Measurement]], nbytes: int) -> tuple[Any, ...]:
    """Return a row's own columns from its measurements and their processes' medians by run, the newest last."""
    some = [one for _, one in by_run]
    m = next((one for one in some if not is_right(one)), some[-1])
    medians = np.concatenate([one for one, _ in by_run])
    wall = np.concatenate(
        [own if one.clock == "wall" else process_medians(one.wall_samples) for own, one in by_run]
    )
    accuracy, contention = m.accuracy, m.contention
    return (
        nbytes or m.read_nbytes,
        m.read_nbytes + m.written_nbytes,
        m.candidate,
        m.form,
        m.status,
        m.reason,
        m.issue,
        all(map(is_right, some)),
        m.baseline,
        m.program.hash if m.program else "",
        m.clock,
        median(medians),
        min(medians.tolist(), default=math.nan),
        max(medians.tolist(), default=math.nan),
        median(wall),
        sum(len(one.samples) for one in some),
        len(medians),
        median(np.array(m.first_call_seconds)),
        accuracy.worst if accuracy else math.nan,
        accuracy.max_relative if accuracy else math.nan,
        (accuracy.tie or "") if accuracy else "",
        _nan(m.peak_nbytes),
        m.stopped_early,
        " ".join(m.flags),
        _nan(contention.steal) if contention else math.nan,
        _nan(contention.others) if contention else math.nan,
        _nan(contention.throttled) if contention else math.nan,
        contention.blocks_marked if contention else 0,
        contention.blocks_redone if contention else 0,
        m.node,
    )
