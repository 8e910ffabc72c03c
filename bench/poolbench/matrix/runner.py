"""Fill the support matrix: every cell in a worker with a time limit, two workers side by side.

A worker serves many cells, for starting TensorFlow costs more than most probes; one that crashes or
hangs costs its own cell only, and is replaced. Claims about another process, op determinism or
threads wait for a phase of their own, in which one process serves every candidate.
"""

from __future__ import annotations

import contextlib
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from poolbench.core.errors import WorkerFailure
from poolbench.core.records import CellState, MatrixCell, Status
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import Worker, WorkerLike
from poolbench.matrix import PROBES
from poolbench.matrix.probe import PROCESSES, Finding, Probe, Trial, attempt
from poolbench.store.journal import read_run
from poolbench.worker import session

if TYPE_CHECKING:
    from poolbench.engine.run import Run

Key = tuple[str, str, str]
# Each phase is lanes that work side by side; a lane holds one worker a process that it names. The
# last has one lane only, for what it times must have the machine to itself.
PHASES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("shared",), ("shared",)),
    (("deterministic",), ("fresh",)),
    (("one-thread", "other"),),
)
NUMPY_PROBE = "forward-eager"


@dataclass(kw_only=True)
class Cell:
    """A probe of a candidate on a device, and what its steps have come to so far.

    Attributes:
        folder: scratch that its steps share, whatever process they run in.
    """

    op: str
    candidate: str
    probe: Probe
    device: str
    folder: Path = Path()
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def process(self) -> str | None:
        """The process that the next step needs; None: the cell is decided."""
        if self.findings and self.findings[-1].state != "pass":
            return None
        left = self.probe.steps[len(self.findings) :]
        return left[0].process if left else None

    def record(self) -> MatrixCell:
        """The cell as a line of the journal."""
        finding = self.findings[-1]
        if finding.state == "pass":
            finding = self.probe.judge(self.findings)
        return MatrixCell(
            op=self.op,
            candidate=self.candidate,
            probe=self.probe.key,
            device=self.device,
            state=finding.state,
            evidence=finding.evidence or WORDS[finding.state],
            figures=finding.figures,
            issue=finding.issue,
            seconds=round(self.seconds, 3),
        )


# Said where a probe has nothing to add: no cell is without words.
WORDS: Mapping[CellState, str] = {"pass": "as the reference has it"}

STATES: Mapping[Status, CellState] = {
    "error": "error",
    "crashed": "crashed",
    "timeout": "timeout",
    "out_of_memory": "error",
}


def plan_cells(keys: Iterable[Key], devices: Sequence[str]) -> list[Cell]:
    """The cells of these (op, candidate, probe) by device: on a GPU, what a GPU may change."""
    return [
        Cell(op=op, candidate=candidate, probe=PROBES[probe], device=device)
        for device in devices
        for op, candidate, probe in keys
        if device == "cpu:0" or PROBES[probe].accelerators
    ]


def all_keys() -> list[Key]:
    """Every (op, candidate, probe) that is registered and makes sense."""
    return [
        (op.name, name, probe.key)
        for op in REGISTRY.ops.values()
        for name in REGISTRY.of(op.name)
        for probe in PROBES.values()
        if probe.applies(op)
    ]


def reason_to_skip(cell: Cell, *, exports: bool) -> str:
    """Why a cell is not run at all; '' if it is."""
    if cell.probe.exports and not exports:
        return "exports are asked for by --with-exports"
    entry = REGISTRY.candidates[cell.op, cell.candidate]
    if entry.framework == "numpy" and cell.probe.key != NUMPY_PROBE:
        return "a NumPy candidate has values only: no graph, no gradient, no model"
    return ""


def fill(
    cells: Sequence[Cell],
    open_worker: Callable[[str, int], WorkerLike],
    *,
    timeout_seconds: float,
    exports: bool = False,
    phases: Sequence[Sequence[Sequence[str]]] = PHASES,
) -> Iterator[MatrixCell]:
    """Try every cell and yield its record as soon as it is decided.

    `open_worker(process, lane)` starts a worker; it is closed at the end of its phase.
    """
    waiting = []
    for cell in cells:
        if reason := reason_to_skip(cell, exports=exports):
            cell.findings.append(Finding(state="not_run", evidence=reason))
            yield cell.record()
        else:
            waiting.append(cell)
    with tempfile.TemporaryDirectory(prefix="poolbench-") as scratch:
        for number, cell in enumerate(waiting):
            cell.folder = Path(scratch) / str(number)
            cell.folder.mkdir()
        for lanes in phases:
            yield from _run_phase(waiting, lanes, open_worker, timeout_seconds)
            waiting = [cell for cell in waiting if cell.process is not None]


def _run_phase(  # noqa: C901 (one phase: its lanes and what comes out of them)
    cells: Sequence[Cell],
    lanes: Sequence[Sequence[str]],
    open_worker: Callable[[str, int], WorkerLike],
    timeout_seconds: float,
) -> Iterator[MatrixCell]:
    """The cells whose next step one of the lanes can run; yields those that it decides."""
    served = {process for lane in lanes for process in lane}
    todo = [cell for cell in cells if cell.process in served]
    if not todo:
        return
    done: queue.SimpleQueue[Cell | None] = queue.SimpleQueue()
    stop = threading.Event()
    # A candidate stays with one worker: what it traced and imported is there already.
    batches: dict[tuple[str, ...], queue.SimpleQueue[list[Cell]]] = {}
    for lane in lanes:
        batches.setdefault(tuple(lane), _batches(cell for cell in todo if cell.process in lane))

    def work(number: int, lane: Sequence[str]) -> None:
        workers: dict[str, WorkerLike] = {}
        try:
            workers |= {process: open_worker(process, number) for process in lane}
            for batch in _drain(batches[tuple(lane)]):
                for cell in batch:
                    while cell.process in workers and not stop.is_set():
                        _take_step(cell, workers[cell.process], timeout_seconds)
                    done.put(cell)
        finally:
            for worker in workers.values():
                worker.close()
            done.put(None)

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(work, number, lane) for number, lane in enumerate(lanes)]
        try:
            open_lanes = len(lanes)
            while open_lanes:
                cell = done.get()
                if cell is None:
                    open_lanes -= 1
                elif cell.process is None and cell.findings:
                    yield cell.record()
        finally:
            stop.set()
        for future in futures:
            future.result()


def _batches(cells: Iterable[Cell]) -> queue.SimpleQueue[list[Cell]]:
    """The cells, a candidate's on a device together."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.op, cell.candidate, cell.device), []).append(cell)
    batches: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for batch in found.values():
        batches.put(batch)
    return batches


def _drain(batches: queue.SimpleQueue[list[Cell]]) -> Iterator[list[Cell]]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield batches.get_nowait()


def _take_step(cell: Cell, worker: WorkerLike, timeout_seconds: float) -> None:
    """Run the cell's next step; a worker that is lost meanwhile is a finding."""
    start = time.monotonic()
    step = len(cell.findings)
    try:
        finding = worker.call(
            run_step, cell.op, cell.candidate, cell.probe.key, step, cell.device, str(cell.folder),
            timeout=timeout_seconds,
        )  # fmt: skip
    except WorkerFailure as failure:
        finding = Finding(state=STATES[failure.status], evidence=_last_words(failure))
    cell.findings.append(finding)
    cell.seconds += time.monotonic() - start


def run_step(op: str, candidate: str, probe: str, step: int, device: str, folder: str) -> Finding:
    """One step, in the worker; whatever it raises becomes a finding."""
    trial = Trial(
        op=REGISTRY.ops[op],
        candidate=REGISTRY.candidates[op, candidate],
        device=device,
        folder=Path(folder),
    )
    run = PROBES[probe].steps[step].run
    return attempt(trial, trial.case(), lambda: run(trial))


def _last_words(failure: WorkerFailure) -> str:
    """Why a worker did not answer, and what it printed at the end: the failed check, if any."""
    lines = failure.tail.strip().splitlines()
    if not lines or not failure.lost:
        return failure.reason
    said = next((line for line in lines if "Check failed" in line), lines[-1])
    return f"{failure.reason} [{_WHERE.sub('', said)[:300]}]"


# 'F0000 00:00:1763856.12 4242 tensor_shape.cc:12] ' before what a failed check says.
_WHERE = re.compile(r"^.*?[A-Za-z_]+\.(cc|h):\d+\]\s*")


def run_matrix(
    bench: Run,
    keys: Sequence[Key],
    *,
    exports: bool = False,
    devices: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[Key, list[MatrixCell]]:
    """Fill the matrix of a run: journal every cell, and return them by (op, candidate, probe).

    `devices`: those to try; none: all that TensorFlow sees.
    """
    start = time.monotonic()
    shared = [bench.worker(PROCESSES["shared"], lane) for lane in range(len(PHASES[0]))]
    seen = sorted(shared[0].call(session.list_devices, timeout=60.0))
    wanted = tuple(devices) or tuple(seen)
    bench.journal()

    def open_worker(process: str, lane: int) -> WorkerLike:
        if process == "shared":
            return shared[lane]
        options = bench.options
        worker = Worker(
            PROCESSES[process], files=options.files, memory_nbytes=options.memory_nbytes
        )
        # Starting is no part of the first cell's time; a start that fails will fail again there.
        with contextlib.suppress(WorkerFailure):
            worker.wait_started()
        return worker

    found: dict[Key, list[MatrixCell]] = {}
    # The journal of a run that is gone on with holds cells already.
    for record in read_run(bench.options.folder).capabilities:
        found.setdefault((record.op, record.candidate, record.probe), []).append(record)
    known = {(record.device, *key) for key, records in found.items() for record in records}
    cells = [
        cell
        for cell in plan_cells(keys, wanted)
        if (cell.device, cell.op, cell.candidate, cell.probe.key) not in known
    ]
    counter = CellCounter(cells)
    limit = bench.options.plan.timeout_seconds
    for record in fill(cells, open_worker, timeout_seconds=limit, exports=exports):
        bench.append(record)
        found.setdefault((record.op, record.candidate, record.probe), []).append(record)
        if line := counter.count(record):
            say(line)
    say(f"{len(cells)} cells in {time.monotonic() - start:.0f} s: {counter.line()}")
    say(f"stored in results/{bench.options.folder.name}")
    return found


class CellCounter:
    """Counts cells by state, and says when a tenth more of them is done."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._total = len(cells)
        self._states: dict[str, int] = {}
        self._done = 0

    def count(self, record: MatrixCell) -> str:
        """Enter a record; a line of progress now and then, else ''."""
        self._states[record.state] = self._states.get(record.state, 0) + 1
        self._done += 1
        tenth = max(1, self._total // 10)
        return f"[{self._done}/{self._total}] {self.line()}" if self._done % tenth == 0 else ""

    def line(self) -> str:
        """'812 pass, 40 unsupported, 3 wrong'."""
        return ", ".join(f"{count} {state}" for state, count in sorted(self._states.items()))
