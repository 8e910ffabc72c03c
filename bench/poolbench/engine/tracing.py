"""Record each candidate's trace in a process of its own, and summarise its time.

Traced times are never reported as benchmarks, because the profiler slows small operations by up to 25%.
The functions that run in the worker are in poolbench.worker.trace.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poolbench.core.candidate import BACKENDS, Candidate
from poolbench.core.case import Case, case_label, case_slug
from poolbench.core.errors import StoreError, UsageError, WorkerFailure
from poolbench.core.op import Op
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import TraceSummary
from poolbench.core.registry import (
    REGISTRY,
    load_builtin,
    load_candidates,
    parse_axis,
    user_files,
)
from poolbench.core.sweep import product
from poolbench.core.terminal import emit, poolbench_command
from poolbench.engine.contenders import worker_spec
from poolbench.engine.process import Worker
from poolbench.engine.run import Run, RunOptions
from poolbench.machine.info import collect_environment
from poolbench.machine.limits import total_memory_nbytes
from poolbench.store.journal import Journal, read_header, read_run
from poolbench.store.runs import (
    PROFILES,
    check_run_name,
    differing_fields,
    has_journal,
    new_run_folder,
    newest_run,
)
from poolbench.worker.trace import MEMORY_EVENTS, SUFFIX, trace_candidate

TIMEOUT_SECONDS = 120.0
# Two at once: starting a process takes longer than tracing and keeps one core busy.
WORKERS = 2
SECONDS_A_TRACE = 6.0
# A trace belongs to a run only if it explains the run's figures.
COMPARED_FIELDS = ("processor", "tensorflow", "tensorflow-cpu")
# Of a case's candidates without a selection: three minutes on two cores for all the cases.
DEFAULT_CANDIDATES = 6
MODES = BACKENDS["tensorflow"]
COMPARISON = "compare"
DEEPEST_FIRST = ("kernel", "hlo", "tf_op", "eager")


def trace_name(case: Case, candidate: str) -> str:
    """Return op, candidate and case in characters that are safe in a path and in the viewer.

    A digest distinguishes names that would otherwise be equal.
    """
    text = f"{case.op}-{candidate}-{case_label(case)}"
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", text).lstrip("._-")[:180]
    # The colon of a device is in every case's name.
    if safe != text.replace(":", "."):
        safe += f"-{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    return safe


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selection of traces, as typed by the user.

    Attributes:
        words: names of ops, modes or candidates (or a part of a candidate's name).
        axes: values of axes that replace those of the cases.
    """

    words: tuple[str, ...] = ()
    axes: tuple[tuple[str, tuple[Any, ...]], ...] = ()


def select(
    selection: Selection, ops: Mapping[str, Op], candidates: Iterable[Candidate]
) -> dict[Case, tuple[str, ...]]:
    """Return the cases to trace, and the candidates of each.

    Raises:
        UsageError: a word matches nothing, or the selection is empty.
    """
    candidates = tuple(candidates)
    words = selection.words
    named = [entry.name for entry in candidates]
    for word in words:
        if word not in ops and word not in MODES and not any(word in name for name in named):
            raise UsageError(
                f"{word!r} names no op, mode or candidate; ops: {', '.join(ops)}; "
                f"modes: {', '.join(MODES)}; candidates: {', '.join(dict.fromkeys(named))}"
            )
    modes = [word for word in words if word in MODES]
    wanted = [word for word in words if word not in ops and word not in MODES]
    chosen: dict[Case, tuple[str, ...]] = {}
    for op in ops.values():
        if any(word in ops for word in words) and op.name not in words:
            continue
        own = [entry for entry in candidates if entry.op == op.name]
        for case in telling_cases(op, modes, selection.axes):
            names = racing_names(op, case, own)
            if wanted:  # by name, including candidates outside the sweep; a full name selects that candidate only
                exact = {word for word in wanted if word in named}
                names = tuple(
                    entry.name
                    for entry in own
                    if entry.name in exact
                    or any(word in entry.name for word in wanted if word not in exact)
                )
            elif not words and not selection.axes:
                names = names[:DEFAULT_CANDIDATES]
            if names:
                chosen[case] = names
    if not chosen:
        raise UsageError(f"no case has a candidate by the names of {', '.join(words)}")
    return chosen


def telling_cases(
    op: Op, modes: Sequence[str], axes: Iterable[tuple[str, tuple[Any, ...]]]
) -> list[Case]:
    """Return the default sweep's base case in each mode, with these values of the axes."""
    sweep = replace(op.sweep("default"), parts=product(mode=modes or MODES))
    for name, values in axes:
        sweep = sweep.replace(name, values)
    return sweep.cases()


def racing_names(op: Op, case: Case, candidates: Iterable[Candidate]) -> tuple[str, ...]:
    """Return the candidates that the default sweep races in a case, and the user's own; else all."""
    planned = {item.case: item.candidates for item in op.sweep("default").planned()}.get(case, ())
    entries = {entry.name: entry for entry in candidates}
    own = [name for name, entry in entries.items() if not entry.builtin]
    names = planned or [op.baseline, *entries]
    return tuple(name for name in dict.fromkeys([*names, *own]) if name in entries)


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Records candidates, each in a fresh process.

    Attributes:
        logdir: results/<run>/traces.
        files: the user's files that register candidates.
        memory_nbytes: a worker's limit.
        timeout: seconds that a candidate may take.
    """

    logdir: Path
    files: tuple[Path, ...] = ()
    memory_nbytes: int | None = None
    timeout: float = TIMEOUT_SECONDS

    def record(self, case: Case, name: str) -> TraceSummary:
        """Return the candidate's trace summary; a failed one has a reason and no trace."""
        folder = self.logdir / PROFILES / trace_name(case, name)
        worker = Worker(
            worker_spec(case, "tensorflow", environment=MEMORY_EVENTS),
            files=self.files,
            memory_nbytes=self.memory_nbytes,
        )
        try:
            trace_summary: TraceSummary = worker.call(
                trace_candidate, case, name, str(folder), timeout=self.timeout
            )
        except WorkerFailure as failure:
            trace_summary = TraceSummary(
                case=case, candidate=name, trace="", status=failure.status, reason=failure.reason
            )
        finally:
            worker.close()
        if trace_summary.status != "ok":
            shutil.rmtree(folder, ignore_errors=True)
        return trace_summary

    def record_all(self, chosen: Mapping[Case, Sequence[str]]) -> Iterator[TraceSummary]:
        """Yield the trace summaries in order, each as soon as it is ready."""
        tasks = [(case, name) for case, names in chosen.items() for name in names]
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(lambda task: self.record(*task), tasks)

    def compare(self, case: Case, names: Iterable[str]) -> Path | None:
        """Write one run that shows the case's traces one above the other from time zero.

        The viewer takes each file of a run for a host and begins all of them at zero.
        """
        profiles = self.logdir / PROFILES
        folder = profiles / f"{COMPARISON}-{case_slug(case)}"
        shutil.rmtree(folder, ignore_errors=True)
        for name in names:
            own = trace_name(case, name)
            source = profiles / own / f"{own}{SUFFIX}"
            if source.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                host = re.sub(r"[^A-Za-z0-9._-]", ".", name)
                shutil.copyfile(source, folder / f"{host}{SUFFIX}")
        return folder if folder.is_dir() else None


def describe_account(trace_summary: TraceSummary) -> str:
    """Return one line for the terminal: the step's time and its largest part, or the reason for its absence."""
    head = f"{trace_summary.case.op} {case_label(trace_summary.case)} {trace_summary.candidate}"
    if trace_summary.status != "ok":
        return f"{head}: left out, {trace_summary.status}: {trace_summary.reason}"
    deepest = next((kind for kind in DEEPEST_FIRST if kind in trace_summary.covered), "")
    largest = next((part for part in trace_summary.parts if part["kind"] == deepest), None)
    text = f"{head}: {trace_summary.step_seconds * 1e3:.3g} ms per traced step"
    if largest is not None and trace_summary.step_seconds:
        share = float(largest["seconds"]) / trace_summary.step_seconds
        text += f"; {largest['kind']} {largest['name']} {share:.0%}"
    if trace_summary.peak_nbytes is not None:
        text += f"; peak {trace_summary.peak_nbytes / 2**20:.4g} MiB"
    return text


def record_selection(
    words: Sequence[str],
    *,
    axes: Sequence[str] = (),
    run: str = "",
    candidates: Sequence[str] = (),
    results: Path = Path("results"),
) -> int:
    """Record the traces of the selected candidates; return 0, or 1 where none could be recorded.

    Args:
        words: names of ops, modes and candidates; none selects one case per mode of each op of the run.
        axes: 'NAME=V1,V2', values of axes.
        run: name of the run that holds the traces; '' for the newest.
        candidates: files that register candidates.
        results: folder that holds the runs.

    Raises:
        UsageError: nothing fits the selection, or the run is another machine's.
    """
    load_builtin()
    for file in candidates:
        load_candidates(file)
    REGISTRY.check_ops()
    selection = Selection(words=tuple(words), axes=tuple(parse_axis(text) for text in axes))
    held = set() if words else _held_ops(results, run)
    ops = {name: op for name, op in REGISTRY.ops.items() if name in held} or REGISTRY.ops
    chosen = select(selection, ops, REGISTRY.candidates.values())
    files = user_files([Path(file).resolve() for file in candidates])
    folder = run_folder(results, run, {case.op for case in chosen})
    count = sum(map(len, chosen.values()))
    recorder = Recorder(
        logdir=folder / "traces",
        files=files,
        memory_nbytes=total_memory_nbytes() * 3 // 4 // WORKERS,
    )
    kept = 0
    with open_journal(folder, {"trace": list(words), "axes": list(axes)}, files) as journal:
        seconds = count * SECONDS_A_TRACE / WORKERS
        where = recorder.logdir.as_posix()
        emit(f"{count} traces into {where}, about {seconds:.0f} s")
        for trace_summary in recorder.record_all(chosen):
            journal.append(trace_summary)
            kept += trace_summary.status == "ok"
            emit(describe_account(trace_summary))
        for case in chosen:
            recorder.compare(case, REGISTRY.of(case.op))
    where = shlex.quote(str(results))
    command = f"{poolbench_command()} tensorboard {folder.name} --results {where}"
    emit(f"{kept} of {count} recorded; open them with: {command}")
    return 0 if kept else 1


def run_folder(results: Path, name: str, ops: set[str]) -> Path:
    """Return the run of this name, or the newest one of this machine that holds one of the ops, or a new one.

    Raises:
        UsageError: the name is no run's name, or the run is another machine's.
    """
    if not name:
        own = _newest(results, lambda held: not held.isdisjoint(ops))
        return own or _newest(results, lambda held: not held) or new_run_folder(results, "trace")
    if different := differs_from(results / check_run_name(name)):
        raise UsageError(
            f"{name} was run elsewhere: {', '.join(different)} differ; pick another --run NAME"
        )
    return results / name


def _newest(results: Path, fits: Callable[[set[str]], bool]) -> Path | None:
    """Return the newest run of this machine whose measured ops fit."""

    def suits(folder: Path) -> bool:
        try:
            return not differs_from(folder) and fits(_measured_ops(folder))
        except StoreError:  # of another version, or damaged
            return False

    return newest_run(results, suits, reference=True)


def _measured_ops(folder: Path) -> set[str]:
    return {m.case.op for m in read_run(folder).measurements}


def _held_ops(results: Path, name: str) -> set[str]:
    """Return the ops that the run of this name has measured, or the newest one here; none without such a run."""
    folder = results / check_run_name(name) if name else _newest(results, bool)
    return _measured_ops(folder) if folder is not None and has_journal(folder) else set()


def differs_from(folder: Path) -> list[str]:
    """Return the differences of a run's machine and TensorFlow from this one; [] without a run."""
    if not has_journal(folder):
        return []
    header = read_header(folder)
    different = differing_fields(header.environment, collect_environment({}))
    return [field for field in different if field in COMPARED_FIELDS]


def open_journal(folder: Path, asked: Mapping[str, Any], files: tuple[Path, ...]) -> Journal:
    """Open the run's journal for appending; a new run gets its header first."""
    if not has_journal(folder):
        with Run(RunOptions(folder=folder, asked=asked, files=files)) as bench:
            bench.worker(WorkerSpec())  # the header lists the devices, which only a worker knows
            bench.journal()
    return Journal(folder)
