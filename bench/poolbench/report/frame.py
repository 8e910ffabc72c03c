"""A run's journal as one tidy DataFrame: one row a measurement, statistics in columns.

The statistics themselves are poolbench.stats.estimate'; here they are only looked up, called and laid out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from poolbench.core.axes import STANDARD, Value, format_value
from poolbench.core.case import Case, case_label
from poolbench.core.errors import StoreError
from poolbench.core.records import (
    Clock,
    MatrixCell,
    Measurement,
    Samples,
    Status,
    common_clock,
    samples_by,
)
from poolbench.core.registry import REGISTRY, Registry, input_nbytes
from poolbench.machine.nvml import is_gpu
from poolbench.stats import estimate
from poolbench.store.journal import JOURNAL, StoredRun, read_run

MARGIN = 0.05
WITHHELD = "WITHHELD"
EFFICIENCY_FROM_NBYTES = 1 << 20  # below it the call's own cost decides, not the memory
PROBE_KINDS = {"bandwidth-read": "read_nbytes", "bandwidth-write": "written_nbytes"}
Indices = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True, kw_only=True)
class RunFrame:
    """A run, laid out.

    Attributes:
        run: the records.
        table: one row a candidate's measurement; see `COLUMNS` for what each holds.
        samples: by row of `table`, the raw samples.
        bandwidth limits: by row, the bandwidth limit's time for that row's bytes, block by block; {} below 1 MiB.
        probes: one row a bandwidth limit probe: case columns, probe, bandwidth in bytes a second.
        margin: the equivalence margin of the verdicts.
    """

    run: StoredRun
    table: pd.DataFrame
    samples: Sequence[Samples]
    bandwidth_limits: Mapping[int, Samples] = field(default_factory=dict)
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
    margin: float = MARGIN

    def row(self, number: int) -> dict[str, Any]:
        """A row of `table` by column; pandas takes as long for a cell as this for all of a row."""
        return {name: values[number] for name, values in self._columns.items()}

    @functools.cached_property
    def _columns(self) -> dict[str, list[Any]]:
        return {str(name): self.table[name].tolist() for name in self.table.columns}


COLUMNS: dict[str, str] = {
    "line": "line of the journal, the header being 1",
    "race": "number of the race: one case on one node",
    "op": "name; the columns of the axes follow it",
    "label": "the case in one word, without its op",
    "nbytes": "bytes of x",
    "moved_nbytes": "fewest bytes that a call must read and write",
    "candidate": "name",
    "form": "function or layer",
    "status": "ok, unsupported, wrong, error, crashed, out_of_memory, timeout, not_run",
    "reason": "why it is not ok",
    "issue": "upstream issue",
    "right": "ok, and its error within the bound: may be ranked",
    "baseline": "candidate that the ratio is taken to",
    "clock": "wall: a call from Python; device: of it the time in which the GPU was at work",
    "seconds": "median of the processes' medians, seconds a call by that clock",
    "seconds_low": "fastest process's median",
    "seconds_high": "slowest process's median",
    "wall_seconds": "the same by the wall's clock",
    "samples": "number of samples",
    "processes": "number of processes",
    "first_seconds": "median first call: trace and compile",
    "ratio": "time over the baseline's time",
    "ratio_low": "lower end of its 95% interval",
    "ratio_high": "upper end",
    "verdict": "FASTER, SLOWER, SAME, UNDECIDED, WITHHELD; empty where it is not ranked",
    "processes_needed": "more processes that would decide an UNDECIDED",
    "recipe_ratio": "time over the time of the book's recipe",
    "recipe_low": "lower end of its 95% interval",
    "recipe_high": "upper end",
    "recipe_reason": "why there is no ratio to the recipe",
    "bandwidth_limit_seconds": "what the memory allows: bytes read and written over the bandwidths",
    "efficiency": "bandwidth limit time over time, from 1 MiB up",
    "efficiency_low": "lower end of its 95% interval",
    "efficiency_high": "upper end",
    "worst": "largest error over its bound; 1 is at the bound",
    "max_relative": "largest relative error of y",
    "tie": "where a tie's gradient goes",
    "peak_nbytes": "peak of the device's memory above the inputs",
    "stopped_early": "stopped after the first process at ten times the baseline: no interval",
    "disagree": "its processes disagree by more than the rest of the run's do",
    "flags": "what the race said of it",
    "steal": "share of the processors' time that the hypervisor took during the race",
    "others": "share that other processes used",
    "blocks_marked": "blocks under contention",
    "blocks_redone": "of these, done again",
    "cores_distant": "share of the race's blocks while the host had the two processors far from each other",
    "smt_sibling_busy": "share of probes at which another guest of the host kept a core's other hardware thread busy",
    "node": "machine",
}


def register_builtin(registry: Registry = REGISTRY) -> Registry:
    """Enter the package's own ops; importing them loads no TensorFlow.

    The registry is the process's; the argument is there for tests that bring their own.
    """
    import importlib
    import pkgutil

    import poolbench.ops

    for module in pkgutil.iter_modules(poolbench.ops.__path__, "poolbench.ops."):
        importlib.import_module(module.name)
    return registry


def find_run(root: Path, given: str | None) -> Path:
    """The folder of the run that the user means.

    Args:
        root: folder that holds runs, `results/`.
        given: a path, a run's name under `root`, or None for the newest, and without a run of one's
            own the reference run.

    Raises:
        StoreError: there is none.
    """
    if given is not None:
        for folder in (Path(given), root / given):
            if (folder / JOURNAL).is_file():
                return folder
        if Path(given).name == JOURNAL and Path(given).is_file():
            return Path(given).parent
        raise StoreError(
            f"no {JOURNAL} in {given!r}, nor in {root.name}/{given}; name a run's folder"
        )
    journals = [
        path for path in root.glob(f"*/{JOURNAL}") if not path.parent.name.startswith("reference")
    ]
    if journals:
        return max(journals, key=lambda path: path.stat().st_mtime).parent
    if (root / "reference" / JOURNAL).is_file():
        return root / "reference"
    raise StoreError(f"no run under {root.name}/ yet: measure one with `nox -s bench-cpu`")


def load(folder: Path, *, margin: float = MARGIN, registry: Registry | None = None) -> RunFrame:
    """The run in a folder, laid out.

    Raises:
        StoreError: the journal cannot be read.
    """
    return lay_out(read_run(folder), margin=margin, registry=registry)


def lay_out(
    run: StoredRun, *, margin: float = MARGIN, registry: Registry | None = None
) -> RunFrame:
    """A run's measurements with every statistic in columns."""
    registry = registry or register_builtin()
    lines: list[int] = []
    found: list[Measurement] = []
    probes: list[Measurement] = []
    last = {id(record) for record in run.measurements}  # a race that ran again replaces itself
    for line, record in enumerate(run.records, 2):
        if not isinstance(record, Measurement) or id(record) not in last:
            continue
        if record.kind == "probe":
            probes.append(record)
        else:
            lines.append(line)
            found.append(record)
    races: dict[tuple[Case, str], int] = {}
    axes = axis_names(found)
    numbers = [races.setdefault((m.case, m.node), len(races)) for m in found]
    table = pd.DataFrame([_row(m, axes) for m in found], columns=_row_columns(axes))
    table.insert(0, "race", numbers)
    table.insert(0, "line", lines)
    samples = [m.samples for m in found]
    bandwidth_limits = _bandwidth_limits(found, numbers, probes, races)
    confidence = _confidence(run.header.options)
    columns = _statistics(table, found, bandwidth_limits, margin, registry, confidence)
    columns["verdict"] = withheld(columns, noise_floor(run), margin)
    table = pd.concat([table, columns], axis=1)
    return RunFrame(
        run=run,
        table=table[with_axes(COLUMNS, axes)],
        samples=samples,
        bandwidth_limits=bandwidth_limits,
        probes=_probe_table(probes),
        margin=margin,
    )


def noise_floor(run: StoredRun) -> float:
    """The size of log ratio that an op against itself reaches on this machine; 0 without a selftest."""
    return max((s.noise_floor for s in run.selftests if s.injected == 0), default=0.0)


def withheld(columns: pd.DataFrame, floor: float, margin: float) -> list[str]:
    """The verdicts, those finer than the noise floor replaced by WITHHELD.

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


def _confidence(options: Mapping[str, Any]) -> float:
    """Of the interval that is reported: higher where races looked whether they could stop."""
    least, most = (options.get(name) for name in ("processes", "max_processes"))
    if not isinstance(least, int) or not isinstance(most, int):
        return 0.95
    return estimate.StopRule(min_processes=least, max_processes=most).reported_confidence


def paired(one: Measurement, other: Measurement) -> tuple[Samples, Samples]:
    """The samples of both by the clock that they have in common."""
    clock = common_clock(one.clock, other.clock)
    return samples_by(one, clock), samples_by(other, clock)


def is_right(measurement: Measurement) -> bool:
    """Whether it may be ranked: status ok, its error within the bound, and it has samples."""
    accuracy = measurement.accuracy
    return (
        measurement.status == "ok"
        and (accuracy is None or accuracy.worst <= 1)
        and len(measurement.samples) > 0
    )


def axis_names(measurements: Iterable[Measurement]) -> tuple[str, ...]:
    """Return the axes of all cases, those of the ops first, the standard ones last."""
    own = (name for m in measurements for name in m.case.axes if name not in STANDARD)
    return tuple(dict.fromkeys([*own, *STANDARD]))


def with_axes(columns: Iterable[str], axes: Sequence[str]) -> list[str]:
    """Return the columns with those of the axes behind 'op'."""
    return [
        name for column in columns for name in ((column, *axes) if column == "op" else (column,))
    ]


def axes_in(table: pd.DataFrame) -> tuple[str, ...]:
    """Return the axes of a table, which stand between its columns 'op' and 'label'."""
    names = [str(name) for name in table.columns]
    return tuple(names[names.index("op") + 1 : names.index("label")])


def axis_cell(case: Case, name: str) -> Value | None:
    """Return the value of an axis as a cell of a table: a shape as text, None where the case has none."""
    value: Value | None = case.get(name)
    return format_value(value) if isinstance(value, tuple) else value


def middle_of(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Along the last axis, of finite values; numpy's own takes ten times as long for a few of them."""
    ordered, count = np.sort(values, axis=-1), values.shape[-1]
    return np.asarray((ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2)


def process_medians(samples: Samples) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One median a process, seconds a call; shape (processes,)."""
    seconds = np.array(samples.seconds, dtype=float)
    if not len(seconds):
        return seconds
    parts = _process_parts(samples.process)
    if len({len(part) for part in parts}) == 1:
        return middle_of(seconds[np.array(parts)])
    return np.array([middle_of(seconds[part]) for part in parts])


@functools.lru_cache(maxsize=256)
def _process_parts(process: tuple[int, ...]) -> list[Indices]:
    """Where each process's blocks stand; the same for all that raced alike, so that it is worth keeping."""
    numbers = np.array(process)
    return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]


def _row(m: Measurement, axes: Sequence[str]) -> tuple[Any, ...]:
    case = m.case
    medians = process_medians(m.samples)
    wall = medians if m.clock == "wall" else process_medians(m.wall_samples)
    accuracy, contention = m.accuracy, m.contention
    return (
        case.op,
        *(axis_cell(case, name) for name in axes),
        case_label(case),
        input_nbytes(case) or m.read_nbytes,
        m.read_nbytes + m.written_nbytes,
        m.candidate,
        m.form,
        m.status,
        m.reason,
        m.issue,
        is_right(m),
        m.baseline,
        m.clock,
        float(middle_of(medians)) if len(medians) else math.nan,
        float(medians.min()) if len(medians) else math.nan,
        float(medians.max()) if len(medians) else math.nan,
        float(middle_of(wall)) if len(wall) else math.nan,
        len(m.samples),
        len(medians),
        float(middle_of(np.array(m.first_call_seconds))) if m.first_call_seconds else math.nan,
        accuracy.worst if accuracy else math.nan,
        accuracy.max_relative if accuracy else math.nan,
        (accuracy.tie or "") if accuracy else "",
        m.peak_nbytes if m.peak_nbytes is not None else math.nan,
        m.stopped_early,
        " ".join(m.flags),
        contention.steal if contention and contention.steal is not None else math.nan,
        contention.others if contention and contention.others is not None else math.nan,
        contention.blocks_marked if contention else 0,
        contention.blocks_redone if contention else 0,
        contention.cores_distant
        if contention and contention.cores_distant is not None
        else math.nan,
        contention.smt_sibling_busy
        if contention and contention.smt_sibling_busy is not None
        else math.nan,
        m.node,
    )


_DERIVED = (
    "line race ratio ratio_low ratio_high verdict processes_needed recipe_ratio recipe_low recipe_high "
    "recipe_reason bandwidth_limit_seconds efficiency efficiency_low efficiency_high disagree"
).split()  # fmt: skip


def _row_columns(axes: Sequence[str]) -> list[str]:
    return [name for name in with_axes(COLUMNS, axes) if name not in _DERIVED]


def _bandwidth_limits(
    found: Sequence[Measurement],
    numbers: Sequence[int],
    probes: Iterable[Measurement],
    races: Mapping[tuple[Case, str], int],
) -> dict[int, Samples]:
    """By row, the bandwidth limit's time for its bytes in each (process, allocation, round).

    Rows of one race that move the same bytes share one Samples object.
    """
    by_race: dict[int, dict[str, Measurement]] = {}
    for probe in probes:
        race = races.get((probe.case, probe.node))
        if race is not None and probe.status == "ok" and len(probe.samples):
            by_race.setdefault(race, {})[probe.candidate] = probe
    cache: dict[tuple[int, str, int, int], Samples | None] = {}
    bandwidth_limits: dict[int, Samples] = {}
    for row, (m, race) in enumerate(zip(found, numbers, strict=True)):
        if m.read_nbytes + m.written_nbytes < EFFICIENCY_FROM_NBYTES or race not in by_race:
            continue
        if m.clock == "wall" and is_gpu(m.case.device):
            continue  # a probe that is launched for longer than it runs tells nothing of the memory
        key = (race, m.clock, m.read_nbytes, m.written_nbytes)
        if key not in cache:
            cache[key] = bandwidth_limit_samples(
                by_race[race], m.read_nbytes, m.written_nbytes, clock=m.clock
            )
        bandwidth_limit = cache[key]
        if bandwidth_limit is not None:
            bandwidth_limits[row] = bandwidth_limit
    return bandwidth_limits


def bandwidth_limit_samples(
    probes: Mapping[str, Measurement],
    read_nbytes: int,
    written_nbytes: int,
    *,
    clock: Clock = "wall",
) -> Samples | None:
    """What the memory allows, block by block, by the probes that show it to be the fastest.

    Bytes read over the read bandwidth plus bytes written over the write bandwidth, or all of them over the
    copy's: short probes see less than the memory has, and which one is too short goes by the case.

    Args:
        probes: of the race, by name.
        read_nbytes: of a call.
        written_nbytes: of a call.
        clock: by which the probes are read.

    Returns:
        Seconds a call for each (process, allocation, round) that both probes have; None without them.
    """
    read, write = probes.get("bandwidth-read"), probes.get("bandwidth-write")
    if read is None or write is None or not read.read_nbytes or not write.written_nbytes:
        return None
    source, written = samples_by(read, clock), samples_by(write, clock)
    copy = probes.get("bandwidth-copy")
    left, right = _common_places(_columns_of(source), _columns_of(written))
    if not len(left):
        return None
    seconds = (
        np.array(source.seconds)[left] * (read_nbytes / read.read_nbytes)
        + np.array(written.seconds)[right] * (written_nbytes / write.written_nbytes)
    )  # fmt: skip
    if copy is not None and copy.read_nbytes:
        copied, moved = samples_by(copy, clock), copy.read_nbytes + copy.written_nbytes
        whole = np.array(copied.seconds) * ((read_nbytes + written_nbytes) / moved)
        if len(whole) and middle_of(whole) < middle_of(seconds):
            return msgspec.structs.replace(copied, seconds=tuple(whole.tolist()))
    if len(left) == len(source):
        return msgspec.structs.replace(source, seconds=tuple(seconds.tolist()))
    return Samples(
        process=tuple(source.process[i] for i in left),
        allocation=tuple(source.allocation[i] for i in left),
        round=tuple(source.round[i] for i in left),
        calls=tuple(source.calls[i] for i in left),
        seconds=tuple(seconds.tolist()),
        contended=tuple(source.contended[i] for i in left) if source.contended else (),
    )


Columns = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _columns_of(samples: Samples) -> Columns:
    return samples.process, samples.allocation, samples.round


def _common_places(one: Columns, other: Columns) -> tuple[Sequence[int], Sequence[int]]:
    """Indices on either side of the blocks that both have, in the order of the first."""
    if one == other:  # as of two probes that raced together
        everything = range(len(one[0]))
        return everything, everything
    places = {place: i for i, place in enumerate(zip(*other, strict=True))}
    found = [
        (i, places[place]) for i, place in enumerate(zip(*one, strict=True)) if place in places
    ]
    return [i for i, _ in found], [i for _, i in found]


def _statistics(
    table: pd.DataFrame,
    found: Sequence[Measurement],
    bandwidth_limits: Mapping[int, Samples],
    margin: float,
    registry: Registry,
    confidence: float,
) -> pd.DataFrame:
    """Ratios, verdicts and efficiencies, one row a row of `table`, each made of `found` there."""
    right = table["right"].tolist()
    stopped_early = table["stopped_early"].tolist()
    baselines = _partners(table, table["baseline"].tolist())
    recipes_of = {name: op.textbook for name, op in registry.ops.items()}
    recipe_names = [recipes_of.get(op, "") for op in table["op"]]
    recipes = _partners(table, recipe_names)
    rows = range(len(table))

    def pair(row: int, partner: int | None) -> bool:
        return right[row] and partner is not None and right[partner] and partner != row

    pairs: dict[tuple[str, int], tuple[Samples, Samples]] = {}
    for row, baseline, recipe in zip(rows, baselines, recipes, strict=True):
        if baseline is not None and pair(row, baseline):
            pairs["baseline", row] = paired(found[row], found[baseline])
        if recipe is not None and recipe != baseline and pair(row, recipe):
            pairs["recipe", row] = paired(found[row], found[recipe])
        if row in bandwidth_limits and right[row]:
            pairs["bandwidth_limit", row] = (bandwidth_limits[row], found[row].samples)
    estimates = dict(
        zip(pairs, estimate.estimate_all(pairs.values(), confidence=confidence), strict=True)
    )
    to_baseline, to_recipe, efficiency = (
        {row: estimate for (kind, row), estimate in estimates.items() if kind == wanted}
        for wanted in ("baseline", "recipe", "bandwidth_limit")
    )
    to_recipe |= {
        row: estimate for row, estimate in to_baseline.items() if recipes[row] == baselines[row]
    }
    judged = {row: estimate for row, estimate in to_baseline.items() if not stopped_early[row]}
    verdicts = estimate.compare_run(judged, margin, 1 - confidence) if judged else {}
    disagree = set(estimate.flag_disagreeing(judged)) if judged else set()
    columns: dict[str, list[Any]] = {name: [] for name in _DERIVED if name not in ("line", "race")}
    statuses, reasons = table["status"].tolist(), table["reason"].tolist()
    for row in rows:
        own = row == baselines[row] and right[row]
        _put(
            columns,
            "ratio",
            "ratio_low",
            "ratio_high",
            to_baseline.get(row),
            stopped_early[row],
            own,
        )
        verdict = verdicts.get(row)
        columns["verdict"].append(str(verdict.verdict) if verdict else "")
        columns["processes_needed"].append(
            verdict.processes_needed
            if verdict and verdict.processes_needed is not None and verdict.verdict == "UNDECIDED"
            else math.nan
        )
        partner = recipes[row]
        same = row == partner and right[row]
        _put(
            columns,
            "recipe_ratio",
            "recipe_low",
            "recipe_high",
            to_recipe.get(row),
            stopped_early[row],
            same,
        )
        columns["recipe_reason"].append(
            _recipe_reason(recipe_names[row], partner, right, statuses, reasons)
        )
        bandwidth_limit = bandwidth_limits.get(row)
        columns["bandwidth_limit_seconds"].append(_bandwidth_limit_seconds(bandwidth_limit))
        _put(
            columns, "efficiency", "efficiency_low", "efficiency_high",
            efficiency.get(row), stopped_early[row], False,
        )  # fmt: skip
        columns["disagree"].append(row in disagree)
    return pd.DataFrame(columns)


def _bandwidth_limit_seconds(bandwidth_limit: Samples | None) -> float:
    return (
        float(middle_of(process_medians(bandwidth_limit)))
        if bandwidth_limit is not None
        else math.nan
    )


def _put(
    columns: dict[str, list[Any]],
    middle: str,
    low: str,
    high: str,
    estimate: Any,
    stopped_early: bool,
    one: bool,
) -> None:
    """An estimate's three figures; no interval where the race stopped early it; 1 against itself."""
    if one:
        values = (1.0, math.nan, math.nan)
    elif estimate is None:
        values = (math.nan, math.nan, math.nan)
    elif stopped_early:
        values = (estimate.ratio, math.nan, math.nan)
    else:
        values = (estimate.ratio, estimate.ratio_low, estimate.ratio_high)
    for name, value in zip((middle, low, high), values, strict=True):
        columns[name].append(value)


def _partners(table: pd.DataFrame, names: Sequence[str]) -> list[int | None]:
    """For each row, the row of the candidate `names[row]` in the same race."""
    rows = {key: row for row, key in enumerate(zip(table["race"], table["candidate"], strict=True))}
    return [rows.get((race, name)) for race, name in zip(table["race"], names, strict=True)]


def _recipe_reason(
    name: str,
    partner: int | None,
    right: Sequence[bool],
    statuses: Sequence[Status],
    reasons: Sequence[str],
) -> str:
    if not name:
        return "the op names no recipe"
    if partner is None:
        return f"{name} was not raced here"
    if not right[partner]:
        return f"{name}: {statuses[partner]}: {reasons[partner]}".rstrip(": ")
    return ""


def _probe_table(probes: Iterable[Measurement]) -> pd.DataFrame:
    """One row a probe: its case, and bytes a second, the median of the processes' medians."""
    rows = []
    for probe in probes:
        medians = process_medians(probe.samples)
        if probe.status != "ok" or not len(medians):
            continue
        moved = probe.read_nbytes + probe.written_nbytes
        rows.append(
            {
                "op": probe.case.op,
                "label": case_label(probe.case),
                "device": probe.case.device,
                "dtype": probe.case.dtype,
                "threads": probe.case.threads,
                "cache": probe.case.cache,
                "node": probe.node,
                "probe": probe.candidate,
                "nbytes": moved,
                "bandwidth": moved / float(middle_of(medians)),
            }
        )
    names = "op label device dtype threads cache node probe nbytes bandwidth".split()
    return pd.DataFrame(rows, columns=names)


def red_cells(capabilities: Iterable[MatrixCell]) -> dict[tuple[str, str], int]:
    """(op, candidate) to the number of cells of the support matrix that are not 'pass'."""
    counts: dict[tuple[str, str], int] = {}
    for cell in capabilities:
        bad = cell.state not in ("pass", "not_run")
        key = (cell.op, cell.candidate)
        counts[key] = counts.get(key, 0) + bad
    return counts
