"""Record the support matrix in a run's journal."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.records import MatrixCell
from poolbench.engine.process import Worker, WorkerLike
from poolbench.matrix.probe import PROCESSES
from poolbench.matrix.runner import Key, fill, plan_cells
from poolbench.store.journal import read_run
from poolbench.worker import session

if TYPE_CHECKING:
    from poolbench.engine.run import Run


def run_matrix(
    run: Run,
    keys: Sequence[Key],
    *,
    exports: bool = False,
    devices: Sequence[str] = (),
    say: Callable[[str], None] = print,
    count: Callable[[], None] = lambda: None,
) -> dict[Key, list[MatrixCell]]:
    """Fill the matrix of a run, journal every cell, and return them by (op, candidate, check).

    The workers are the matrix' own: those of the run's races stay as they are. `devices`: those to
    try; none: all that TensorFlow sees. `count` is called after each cell.
    """
    spare: list[Worker] = []

    def open_worker(process: str) -> Worker:
        if process == "shared" and spare:
            return spare.pop()
        options = run.options
        worker = Worker(
            PROCESSES[process], files=options.files, memory_nbytes=options.memory_nbytes
        )
        # Start before the first cell's clock does. A start that fails fails again in that cell.
        with contextlib.suppress(WorkerFailure):
            worker.wait_started()
        return worker

    spare.append(open_worker("shared"))
    try:
        seen: dict[str, str] = spare[0].call(session.list_devices, timeout=60.0)
        if missing := [device for device in devices if device not in seen]:
            raise UsageError(f"there is no {missing[0]}; TensorFlow sees {', '.join(sorted(seen))}")
        run.journal(seen)
        return _fill_missing(run, keys, devices or sorted(seen), open_worker, exports, say, count)
    finally:
        for worker in spare:
            worker.close()


def _fill_missing(
    run: Run,
    keys: Sequence[Key],
    devices: Sequence[str],
    open_worker: Callable[[str], WorkerLike],
    exports: bool,
    say: Callable[[str], None],
    count: Callable[[], None],
) -> dict[Key, list[MatrixCell]]:
    """Fill and journal the cells that the journal lacks; return all by (op, candidate, check)."""
    start = time.monotonic()
    records = list(read_run(run.options.folder).capabilities)
    known = {(record.device, record.op, record.candidate, record.probe) for record in records}
    cells = [
        cell
        for cell in plan_cells(keys, devices)
        if (cell.device, cell.op, cell.candidate, cell.probe.key) not in known
    ]
    states: Counter[str] = Counter()
    limit = run.options.plan.timeout_seconds
    for record in fill(cells, open_worker, timeout_seconds=limit, exports=exports):
        run.append(record)
        records.append(record)
        states[record.state] += 1
        count()
    counts = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    say(f"{len(cells)} cells in {time.monotonic() - start:.0f} s: {counts}")
    say(f"stored in {run.options.folder}")
    found: dict[Key, list[MatrixCell]] = {}
    for record in records:
        found.setdefault((record.op, record.candidate, record.probe), []).append(record)
    return found
