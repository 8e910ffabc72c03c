"""Fill the support matrix: run every cell in a worker with a time limit, on two workers at a time.

One worker serves many cells, because starting TensorFlow takes longer than most checks. A cell that
crashes or hangs its worker costs only itself: the worker is replaced. Checks that need another
process, op determinism or a number of threads run in later stages, in which one process serves all
candidates.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from poolbench.core.candidate import KERAS
from poolbench.core.errors import WorkerFailure
from poolbench.core.records import CellState, MatrixCell, Status
from poolbench.core.registry import REGISTRY
from poolbench.engine.cleanup import temporary_folder
from poolbench.engine.process import WorkerLike
from poolbench.matrix import PROBES
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import SupportProbe, attempt
from poolbench.matrix.trial import Trial

Key = tuple[str, str, str]
# The stages run one after the other. In a stage, threads work side by side, each with one worker
# for every kind of process that it names. The last stage has a single thread: it measures times.
STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("shared",), ("shared",)),
    (("deterministic",), ("fresh",)),
    (("jax",), ("torch",)),
    (("one-thread", "other"),),
)
NUMPY_PROBE = "forward-eager"


@dataclass(kw_only=True)
class PendingCell:
    """A check of a candidate on a device, with the findings of the steps that have run.

    Attributes:
        folder: scratch folder that its steps share across processes.
    """

    op: str
    candidate: str
    probe: SupportProbe
    device: str
    folder: Path = Path()
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def process(self) -> str | None:
        """The kind of process that the next step needs; None once the cell is decided."""
        if self.findings and self.findings[-1].state != "pass":
            return None
        left = self.probe.steps[len(self.findings) :]
        return left[0].process if left else None

    def record(self) -> MatrixCell:
        """Return the decided cell as a record of the journal."""
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


# The evidence of a cell whose check has nothing to add.
WORDS: Mapping[CellState, str] = {"pass": "agrees with the reference"}

STATES: Mapping[Status, CellState] = {
    "error": "error",
    "crashed": "crashed",
    "timeout": "timeout",
    "out_of_memory": "error",
}


def plan_cells(keys: Iterable[Key], devices: Sequence[str]) -> list[PendingCell]:
    """Return the cells of these keys on each device; on a GPU, only those that a GPU may change."""
    return [
        PendingCell(op=op, candidate=candidate, probe=PROBES[probe], device=device)
        for device in devices
        for op, candidate, probe in keys
        if device == "cpu:0" or PROBES[probe].accelerators
    ]


def all_keys() -> list[Key]:
    """Return every (op, candidate, check) that is registered and applies."""
    return [
        (op.name, name, probe.key)
        for op in REGISTRY.ops.values()
        # Once per op, not per candidate: that was a third of the time of a collection.
        for probes in ([probe for probe in PROBES.values() if probe.applies(op)],)
        for name, entry in REGISTRY.of(op.name).items()
        if {"tensorflow", "numpy"} & {*entry.backends}
        for probe in probes
    ]


def reason_to_skip(cell: PendingCell, *, exports: bool) -> str:
    """Return why a cell is not run; '' if it is."""
    if cell.probe.exports and not exports:
        return "exports run only with --with-exports"
    entry = REGISTRY.candidates[cell.op, cell.candidate]
    if entry.backends == ("numpy",) and cell.probe.key != NUMPY_PROBE:
        return "a NumPy candidate has no graph, no gradient and no model"
    backend = cell.probe.steps[0].process
    if backend in KERAS and backend not in entry.backends:
        return "it calls TensorFlow"
    if backend in KERAS and importlib.util.find_spec(backend) is None:
        return f"{backend} is not installed: the extra 'backends' has it"
    return ""


def fill(
    cells: Sequence[PendingCell],
    open_worker: Callable[[str], WorkerLike],
    *,
    timeout_seconds: float,
    exports: bool = False,
    stages: Sequence[Sequence[Sequence[str]]] = STAGES,
) -> Iterator[MatrixCell]:
    """Run every cell and yield its record as soon as it is decided.

    `open_worker(process)` starts a worker of this kind; it is closed at the end of its stage.
    """
    waiting = []
    for cell in cells:
        if reason := reason_to_skip(cell, exports=exports):
            cell.findings.append(Finding(state="not_run", evidence=reason))
            yield cell.record()
        else:
            waiting.append(cell)
    # In the folder that is removed however this process ends, kill -9 included.
    with tempfile.TemporaryDirectory(prefix="matrix-", dir=temporary_folder()) as scratch:
        for number, cell in enumerate(waiting):
            cell.folder = Path(scratch) / str(number)
            cell.folder.mkdir()
        for threads in stages:
            yield from _run_stage(waiting, threads, open_worker, timeout_seconds)
            waiting = [cell for cell in waiting if cell.process is not None]


def _run_stage(  # noqa: C901 (the threads of a stage share its queues)
    cells: Sequence[PendingCell],
    threads: Sequence[Sequence[str]],
    open_worker: Callable[[str], WorkerLike],
    timeout_seconds: float,
) -> Iterator[MatrixCell]:
    """Run the cells whose next step a worker of this stage can run; yield those that are decided."""
    served = {process for processes in threads for process in processes}
    todo = [cell for cell in cells if cell.process in served]
    if not todo:
        return
    done: queue.SimpleQueue[PendingCell | None] = queue.SimpleQueue()
    stop = threading.Event()
    # The cells of a candidate stay with one worker, which has traced and imported it already.
    batches = {
        tuple(processes): _batches(cell for cell in todo if cell.process in processes)
        for processes in threads
    }

    def work(processes: Sequence[str]) -> None:
        workers: dict[str, WorkerLike] = {}
        try:
            for process in processes:
                workers[process] = open_worker(process)
            for batch in _drain(batches[tuple(processes)]):
                for cell in batch:
                    while cell.process in workers and not stop.is_set():
                        _take_step(cell, workers[cell.process], timeout_seconds)
                    done.put(cell)
        finally:
            for worker in workers.values():
                worker.close()
            done.put(None)

    with ThreadPoolExecutor(len(threads)) as pool:
        futures = [pool.submit(work, processes) for processes in threads]
        try:
            at_work = len(threads)
            while at_work:
                cell = done.get()
                if cell is None:
                    at_work -= 1
                elif cell.process is None and cell.findings:
                    yield cell.record()
        finally:
            stop.set()
        for future in futures:
            future.result()


def _batches(cells: Iterable[PendingCell]) -> queue.SimpleQueue[list[PendingCell]]:
    """Group the cells by candidate and device."""
    found: dict[tuple[str, str, str], list[PendingCell]] = {}
    for cell in cells:
        found.setdefault((cell.op, cell.candidate, cell.device), []).append(cell)
    batches: queue.SimpleQueue[list[PendingCell]] = queue.SimpleQueue()
    for batch in found.values():
        batches.put(batch)
    return batches


def _drain(batches: queue.SimpleQueue[list[PendingCell]]) -> Iterator[list[PendingCell]]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield batches.get_nowait()


def _take_step(cell: PendingCell, worker: WorkerLike, timeout_seconds: float) -> None:
    """Run the cell's next step; losing the worker is a finding."""
    start = time.monotonic()
    step = len(cell.findings)
    try:
        finding = worker.call(
            run_step, cell.op, cell.candidate, cell.probe.key, step, cell.device, str(cell.folder),
            timeout=timeout_seconds,
        )  # fmt: skip
    except WorkerFailure as failure:
        finding = Finding(state=STATES[failure.status], evidence=_describe_loss(failure))
    cell.findings.append(finding)
    cell.seconds += time.monotonic() - start


def run_step(op: str, candidate: str, probe: str, step: int, device: str, folder: str) -> Finding:
    """Run one step in the worker; an exception becomes a finding."""
    trial = Trial(
        op=REGISTRY.ops[op],
        candidate=REGISTRY.candidates[op, candidate],
        device=device,
        folder=Path(folder),
    )
    run = PROBES[probe].steps[step].run
    return attempt(trial, trial.case(), lambda: run(trial))


def _describe_loss(failure: WorkerFailure) -> str:
    """Return why a worker did not answer, with the last line that it printed."""
    lines = failure.tail.strip().splitlines()
    if not lines or not failure.lost:
        return failure.reason
    said = next((line for line in lines if "Check failed" in line), lines[-1])
    return f"{failure.reason} [{_WHERE.sub('', said)[:300]}]"


# The prefix of a failed check: 'F0000 00:00:1763856.12 4242 tensor_shape.cc:12] '.
_WHERE = re.compile(r"^.*?[A-Za-z_]+\.(cc|h):\d+\]\s*")
