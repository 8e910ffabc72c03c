"""Recommend implementations for the pooling of a saved model on this machine: `poolbench which`.

The model is loaded in safe mode, and its pooling is found and compared with the shipped ops by values. One process
looks whether a replacement can win anything. If so, the original step is raced against the step with the
replacement. The answer is a sentence and a snippet.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.engine.cleanup import temporary_folder
from poolbench.engine.pool import WorkerPool
from poolbench.machine.limits import total_memory_nbytes
from poolbench.models import config
from poolbench.models.answer import (
    conclude,
    conclude_isolated,
    describe_layers,
    describe_pools,
    is_negligible,
    is_wide,
    worth_racing,
)
from poolbench.models.config import brief, clean
from poolbench.models.replace import check_written
from poolbench.models.results import Described, Entry, Stepped
from poolbench.models.steps import ISOLATED, ORIGINAL
from poolbench.models.study import StepRace, describe, write_model
from poolbench.models.zoo import Source

Say = Callable[[str], object]
DEFAULT_BATCH = 32
# Longer steps would leave too few of them in two minutes: multiply-adds per second of a modest core, and the
# longest step in seconds.
MACS_PER_SECOND = 1e10
STEP_SECONDS = 1.0
TRAINING_COST = 3.0  # forward, and twice as much backward
# A share with a wide interval is measured in so many processes more, each begun within this time: an answer then takes
# less than a minute on two cores.
EXTRA, EXTRA_UNTIL_SECONDS = 2, 35.0
# A process takes this part of the budget: one looks, three race, two may be added.
PARTS = 6
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
    workers: WorkerPool | None = None,
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
        budget: seconds of rounds, at most.
        say: takes each line of the answer.
        workers: worker processes that stay when the answer is given; None: some that end with it.

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
    if write is not None and not write.absolute().parent.is_dir():
        raise UsageError(f"--write takes a file in a folder that exists; got {clean(str(write))}")
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
        processes=processes, budget_seconds=budget * processes / PARTS,
    )  # fmt: skip
    pool = workers or WorkerPool((), total_memory_nbytes() * 3 // 4)
    try:
        _Answer(entry, pool, say).run(write)
    except WorkerFailure as failure:
        if failure.reason.startswith("UsageError: "):
            raise UsageError(failure.reason.removeprefix("UsageError: ")) from None
        raise UsageError(
            f"{name} cannot be examined ({failure.status}): {brief(failure.reason)}"
        ) from None
    finally:
        if workers is None:
            pool.close()
    return 0


class _Answer:
    """One question in progress: the known facts about the model, and the output."""

    def __init__(self, entry: Entry, workers: WorkerPool, say: Say) -> None:
        self.entry = entry
        self.workers = workers
        self.say = say
        self.plan = Plan(timeout_seconds=TASK_SECONDS)
        self.start = time.monotonic()

    def run(self, target: Path | None) -> None:
        """Describe, race, conclude and write."""
        found = self._describe()
        for line in describe_layers(found):
            self.say(line)
        if not found.pools:
            known = " that can be told without running code" if found.unknown else ""
            self.say(f"This model has no pooling{known}: there is nothing to choose.")
            return
        self._settle(found)
        for line in describe_pools(found, self.entry.batch):
            self.say(line)
        raced = self._measure(found)
        if found.unknown:
            lines, chosen = conclude_isolated(raced), dict[str, str]()
        else:
            lines, chosen = conclude(raced)
        for line in lines:
            self.say(line)
        if target is not None:
            self._write(target, chosen, found)

    def _measure(self, found: Described) -> Stepped:
        """Look in one process; measure in more what may be won, or the share where it matters."""
        look = self._race(found, {op: tuple(found.pastable[op]) for op in found.pastable})
        seen = look.run(1)
        placed = {op: (best,) for op in found.pastable if (best := worth_racing(seen, op))}
        if found.unknown:
            return self._until_known(look) if placed else seen
        sure = seen.measurements[ORIGINAL].status != "ok" or is_negligible(seen)
        if placed:
            race = self._race(found, placed, replaced=True)
            return race.run(1) if sure else self._until_known(race)
        if sure:
            return seen
        look.keep((ORIGINAL, ISOLATED + ORIGINAL))
        return self._until_known(look)

    def _race(
        self, found: Described, candidates: Mapping[str, tuple[str, ...]], *, replaced: bool = False
    ) -> StepRace:
        entry = replace(
            self.entry, candidates={op: candidates.get(op, ()) for op in found.pastable},
            replaced=replaced, isolated=not replaced,
        )  # fmt: skip
        most = entry.processes + EXTRA
        return StepRace(entry, self.workers, self.plan, found, most=most)

    def _until_known(self, race: StepRace) -> Stepped:
        """Run all processes, and more while time is left and the share is not known well."""
        processes = self.entry.processes
        # Start all at once, because a process takes seconds to start.
        self.workers.prepare((WorkerSpec(),), processes)
        raced = race.run(processes)
        while (
            processes < self.entry.processes + EXTRA
            and not raced.described.unknown
            and is_wide(raced.share())
            and time.monotonic() - self.start < EXTRA_UNTIL_SECONDS
        ):
            processes += 1
            raced = race.run(processes)
        return raced

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
        if direction == "training" and found.untrained:
            self.say(f"This model has no training step ({found.untrained}): inference is raced.")
            direction = "forward"
        if found.batch and not self.entry.batch:
            self.say(f"The file fixes a batch of {found.batch}.")
        batch = self.entry.batch or found.batch or default_batch(found.macs, direction)
        self.entry = replace(self.entry, direction=direction, batch=batch)

    def _write(self, target: Path, chosen: dict[str, str], found: Described) -> None:
        if not chosen:
            reason = " while layers of it do not run" if found.unknown else ""
            self.say(f"Nothing is to be replaced{reason}: {clean(target.name)} is not written.")
            return
        source = msgspec.structs.replace(self.entry.source, forms=found.forms)
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
            predictions = str(Path(folder) / "predictions.npz")
            written = self.workers.worker(WorkerSpec()).call(
                write_model, source, self.entry.batch, chosen, str(target.resolve()), predictions,
                timeout=TASK_SECONDS,
            )  # fmt: skip
            replaced = ", ".join(f"`{clean(layer)}`" for layer in written.layers)
            self.say(
                f"Wrote {clean(target.name)} with {replaced} replaced: values equal on {written.inputs} inputs, "
                f"gradients on {written.gradients}."
            )
            if written.code:
                left = ", ".join(f"`{clean(layer)}`" for layer in written.code)
                self.say(f"It still needs code for {left}: safe mode does not load it.")
                return
            with contextlib.closing(WorkerPool()) as fresh:
                difference = fresh.worker(WorkerSpec()).call(
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
