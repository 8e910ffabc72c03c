"""Recommend implementations for the pooling of a saved model on this machine: `poolbench which`.

The model is loaded in safe mode, its pooling is found and compared with the shipped ops by values, and its
step is raced as it is and with what could be written in the pooling's place. The answer is a sentence and a
snippet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.engine.pool import WorkerPool
from poolbench.machine.limits import total_memory_nbytes
from poolbench.models import config
from poolbench.models.answer import (
    SMALL_SHARE,
    conclude,
    conclude_alone,
    describe_layers,
    describe_pools,
    fastest,
    is_wide,
    needs_code,
    stands,
)
from poolbench.models.config import brief, clean
from poolbench.models.replace import check_written
from poolbench.models.results import Described, Entry
from poolbench.models.steps import ALONE, AS_BUILT
from poolbench.models.study import describe, race_model, write_model
from poolbench.models.zoo import Source

Say = Callable[[str], object]
DEFAULT_BATCH = 32
# Longer steps would leave too few of them in two minutes: multiply-adds per second of a modest core, and the
# longest step in seconds.
MACS_PER_SECOND = 1e10
STEP_SECONDS = 1.0
TRAINING_COST = 3.0  # forward, and twice as much backward
# A share with a wide interval is measured again, for this many times as long.
LONGER = 3
TASK_SECONDS = 180.0


def advise(
    path: Path,
    *,
    inputs: Sequence[str] = (),
    batch: int | None = None,
    direction: str = "training",
    mode: str = "graph",
    trust: bool = False,
    custom: Sequence[Path] = (),
    write: Path | None = None,
    processes: int = 3,
    budget: float = 12.0,
    say: Say = print,
) -> int:
    """Examine a saved model, race its step if there is a choice, and print the answer.

    Args:
        path: a .keras or .h5 file.
        inputs: open sizes, '224x224x3' or 'image=224x224x3'.
        batch: batch size; None: the one that the file fixes, or 32, or less for a large model.
        direction: 'training' or 'forward'.
        mode: 'graph', 'xla' or 'eager'.
        trust: whether Lambdas of the file may run.
        custom: Python files that define the classes that the file needs.
        write: a new .keras file for the model with the advised replacement; None: none is written.
        processes: fresh processes, at least 2.
        budget: seconds of rounds in each race.
        say: takes each line of the answer.

    Returns:
        0.

    Raises:
        UsageError: the file or an option cannot be used.
    """
    name = clean(path.name)
    if processes < 2 or (batch is not None and batch < 1):
        raise UsageError("--processes takes at least 2 and --batch at least 1")
    if write is not None and (write.suffix != ".keras" or write.exists()):
        raise UsageError(f"--write takes a new file called NAME.keras; got {clean(write.name)}")
    options = tuple(map(config.parse_input, inputs))
    config.read_file(path)
    source = Source(
        kind="file",
        name=str(path.resolve()),
        inputs=options,
        trust=trust,
        custom=tuple(str(file.resolve()) for file in custom),
    )
    entry = Entry(
        name=path.stem, source=source, direction=direction, batch=batch or 0, mode=mode,
        in_place=False, processes=processes, budget_seconds=budget,
    )  # fmt: skip
    workers = WorkerPool((), total_memory_nbytes() * 3 // 4)
    workers.prepare((WorkerSpec(),), 1)
    try:
        _Answer(entry, workers, say).run(write)
    except WorkerFailure as failure:
        if failure.reason.startswith("UsageError: "):
            raise UsageError(failure.reason.removeprefix("UsageError: ")) from None
        raise UsageError(
            f"{name} cannot be examined ({failure.status}): {brief(failure.reason)}"
        ) from None
    finally:
        workers.close()
    return 0


class _Answer:
    """One question in progress: the known facts about the model, and the output."""

    def __init__(self, entry: Entry, workers: WorkerPool, say: Say) -> None:
        self.entry = entry
        self.workers = workers
        self.say = say
        self.plan = Plan(timeout_seconds=TASK_SECONDS)

    def run(self, target: Path | None) -> None:
        """Describe, race, conclude and write."""
        found = self._describe()
        for line in describe_layers(found):
            self.say(line)
        if not found.pools:
            known = " in the layers that are known" if found.unknown else ""
            self.say(f"This model has no pooling{known}: there is nothing to choose.")
            return
        self._settle(found)
        # Start all at once, because a process takes seconds to start. The last one loads the written model.
        self.workers.prepare((WorkerSpec(),), self.entry.processes + (target is not None))
        for line in describe_pools(found, self.entry.batch):
            self.say(line)
        self.entry = replace(
            self.entry, candidates={op: tuple(names) for op, names in found.pastable.items()}
        )
        if found.unknown:
            stepped = race_model(self.entry, self.workers, self.plan, found)
            lines, chosen = conclude_alone(stepped), dict[str, str]()
        else:
            lines, chosen = self._race(found)
        for line in lines:
            self.say(line)
        if target is not None:
            self._write(target, chosen, found)

    def _describe(self) -> Described:
        arguments = (self.entry.source, self.entry.batch or None)
        try:
            found: Described = self.workers.worker(WorkerSpec()).call(
                describe, *arguments, timeout=TASK_SECONDS
            )
        except WorkerFailure as failure:
            if not (failure.lost and self.entry.source.trust):
                raise
            self.say(f"The file's code ended its process ({failure.status}): it is left out.")
            source = msgspec.structs.replace(self.entry.source, trust=False)
            self.entry = replace(self.entry, source=source)
            return self._describe()
        return found

    def _settle(self, found: Described) -> None:
        """Choose the direction and the batch size from the model."""
        direction = self.entry.direction
        if direction == "training" and not found.trains:
            why = "its outputs are integers" if found.weights else "no weight of it can be trained"
            self.say(f"This model has no training step ({why}): inference is raced.")
            direction = "forward"
        if found.batch and not self.entry.batch:
            self.say(f"The file fixes a batch of {found.batch}.")
        batch = self.entry.batch or found.batch or default_batch(found.macs, direction)
        self.entry = replace(self.entry, direction=direction, batch=batch)

    def _race(self, found: Described) -> tuple[list[str], dict[str, str]]:
        """Race pooling alone, then replaced if that can matter; return the answer and the replacements."""
        half = replace(self.entry, budget_seconds=self.entry.budget_seconds / 2)
        first = race_model(half, self.workers, self.plan, found)
        fails = first.measurements[AS_BUILT].status != "ok"
        if not fails and is_wide(first.share(ALONE + AS_BUILT, AS_BUILT)):
            longer = replace(half, budget_seconds=half.budget_seconds * LONGER)
            first = race_model(longer, self.workers, self.plan, found)
        share = first.share(ALONE + AS_BUILT, AS_BUILT)
        needed = dict.fromkeys(
            pool.op for pool in found.pools if pool.op and needs_code(pool, found)
        )
        small = share is not None and share[2] < SMALL_SHARE
        placed = {
            op: (best,)
            for op in dict.fromkeys(pool.op for pool in found.pools if pool.op)
            if (op in needed or fails or not small)
            if (best := fastest(first, op)) and (op in needed or not stands(found, op, best))
        }
        second = None
        if placed:
            others = {pool.op: () for pool in found.pools if pool.op not in placed}
            entry = replace(self.entry, in_place=True, alone=False, candidates={**others, **placed})
            second = race_model(entry, self.workers, self.plan, found)
        return conclude(first, second)

    def _write(self, target: Path, chosen: dict[str, str], found: Described) -> None:
        if not chosen:
            reason = " while layers of it do not run" if found.unknown else ""
            self.say(f"Nothing is to be replaced{reason}: {clean(target.name)} is not written.")
            return
        source = msgspec.structs.replace(
            self.entry.source,
            forms={pool.key: pool.form for pool in found.pools if pool.form is not None},
        )
        with tempfile.TemporaryDirectory(prefix="poolbench-") as folder:
            predictions = str(Path(folder) / "predictions.npz")
            written = self.workers.worker(WorkerSpec()).call(
                write_model, source, self.entry.batch, chosen, str(target.resolve()), predictions,
                timeout=TASK_SECONDS,
            )  # fmt: skip
            pools = [pool for pool in found.pools if pool.layer in written.layers]
            inputs = min(written.inputs, *(pool.inputs for pool in pools))
            gradients = min(written.gradients, *(pool.gradients for pool in pools))
            replaced = ", ".join(f"`{clean(layer)}`" for layer in written.layers)
            self.say(
                f"Wrote {clean(target.name)} with {replaced} replaced: values equal on {inputs} inputs, "
                f"gradients on {gradients}."
            )
            if written.code:
                left = ", ".join(f"`{clean(layer)}`" for layer in written.code)
                self.say(f"It still needs code for {left}: safe mode does not load it.")
                return
            fresh = self.workers.worker(WorkerSpec(), self.entry.processes)
            difference = fresh.call(
                check_written, str(target.resolve()), predictions, timeout=TASK_SECONDS
            )
        self.say(
            "Loaded in safe mode in a fresh process, its predictions differ from the original's by at most "
            f"{difference:.1g} of the largest."
        )


def default_batch(macs: float, direction: str) -> int:
    """Return the usual batch size, or the largest power of two whose step takes about a second."""
    cost = macs * (TRAINING_COST if direction == "training" else 1.0) / MACS_PER_SECOND
    batch = DEFAULT_BATCH
    while batch > 1 and batch * cost > STEP_SECONDS:
        batch //= 2
    return batch
