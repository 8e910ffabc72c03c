"""Races of a model's step: with each implementation, and pooling's share of the step.

A step is raced by `poolbench.engine.race.Race` like any op: the same rounds, processes and timing loop. What
differs is what a worker opens (`poolbench.models.steps`), and the contenders' names:

- `original`: the step of the model as it is;
- `OP=CANDIDATE`: the step with every pool of the op replaced by this candidate;
- `isolated:original`, `isolated:OP=CANDIDATE`: the isolated pooling.

The share. Isolated pooling runs, in the same rounds as the step, every pooling call of the model at its own
shapes, on random values of which half are zeros, in the step's mode and direction, one after another.
Its time over the step's is the share, paired by round. Two other ways were rejected. A cheap stand-in (a
slice) in the pool's place has a backward pass that writes as much as the pool's own, so that the difference
hides a part of the cost, and a share of 1% would be the difference of two times that are each known to 1%. A
profiler's self time counts neither dispatch nor the cache misses that pooling leaves to its neighbours. Two
errors remain: the cost of a call into TensorFlow, 0.1 to 0.2 ms, is divided by the number of copies that one
call runs; and in a compiled step the compiler may merge a pool with what is before it. Both make the share
too large, never too small: read it as "at most".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import poolbench.ops  # noqa: F401 (registers the ops)
from poolbench.core.candidate import Candidate, KnownFailure
from poolbench.core.case import Case
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import ALL_POOLING, Measurement, ModelResult
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import WorkerLike
from poolbench.engine.race import Result, race_in_one_worker
from poolbench.engine.recovery import Tasks, Workers
from poolbench.models import steps, zoo
from poolbench.models.config import fill_shapes, fixed_batch
from poolbench.models.find import find_pools
from poolbench.models.pools import Pool
from poolbench.models.replace import Written, pastable, predict, write
from poolbench.models.results import Described, Entry, Stepped, model_records
from poolbench.models.steps import ISOLATED, ORIGINAL, call_fields
from poolbench.models.zoo import Source
from poolbench.worker.session import Session, close_case

if TYPE_CHECKING:
    from poolbench.engine.run import Run


def contenders(entry: Entry, described: Described) -> list[Candidate]:
    """Return the original step, the step with each implementation, and each isolated pooling.

    A contender fails as its implementation does, and where that is documented, it is `unsupported` here too. Where
    stand-ins take the place of layers there is no step: isolated pooling is raced.
    """
    case, pools = entry.case, described.pools
    built = Candidate(
        op=case.op, name=ORIGINAL, form="layer", about="the model as it is", build=_opened_whole,
        file=__file__, builtin=True,
    )  # fmt: skip
    found = [] if described.unknown else [built]
    found += [replace(built, name=ISOLATED + ORIGINAL)] if pools else []
    for op in dict.fromkeys(pool.op for pool in pools if pool.op):
        entries = REGISTRY.of(op)
        for name in entry.candidates.get(op, tuple(entries)):
            candidate = entries[name]
            if "tensorflow" not in candidate.backends:
                continue  # it cannot be part of a graph
            own = [pool for pool in pools if pool.op == op]
            failures = _failures(candidate, own, case)
            step = replace(candidate, op=case.op, name=f"{op}={name}", failures=failures)
            found += [step] if entry.replaced and not described.unknown else []
            found += [replace(step, name=f"{ISOLATED}{op}={name}")] if entry.isolated else []
    return found


def _opened_whole(case: Case) -> Callable[..., Any]:
    raise UsageError(f"a {case.op} is opened whole (poolbench.models.steps.open_contender)")


def _failures(candidate: Candidate, pools: Sequence[Pool], case: Case) -> tuple[KnownFailure, ...]:
    """Return the known failures of an implementation for the cases of the pools instead of the model's."""
    fields = call_fields(case)

    def asked(known: KnownFailure, pool: Pool) -> Callable[[Case], bool]:
        return lambda _: known.when(pool.case(**fields))

    return tuple(
        replace(known, when=asked(known, pool)) for pool in pools for known in candidate.failures
    )


def describe(session: Session, source: Source, batch: int | None) -> Described:
    """Read or build the model and describe it.

    Args:
        session: of this worker.
        source: of the model.
        batch: its batch size; None: the one that the file fixes, or 2.
    """
    close_case(session)
    loaded = zoo.load(source)
    fixed = fixed_batch(loaded.specs)
    if batch is not None and fixed not in (None, batch):
        raise UsageError(f"the file fixes a batch of {fixed}; --batch {batch} does not fit it")
    size = batch or fixed or 2
    model = find_pools(loaded, fill_shapes(loaded.specs, source.inputs, size), source.forms)
    by_op: dict[str, dict[str, str]] = {}
    for pool, parts in zip(model.pools, model.parts, strict=True):
        if pool.op and pool.op not in by_op:
            by_op[pool.op] = pastable(model, pool, parts[-1])
    outputs = getattr(model.model, "outputs", None) or ()
    untrained = ""
    if not model.model.trainable_variables:
        untrained = "no weight of it can be trained"
    elif outputs and not any("float" in str(y.dtype) for y in outputs):
        untrained = "its outputs are integers"
    return Described(
        pools=model.pools, traced=size, macs=model.macs / size, pastable=by_op, batch=fixed,
        unknown=loaded.unknown, notes=dict(model.notes), untrained=untrained, code=loaded.code,
    )  # fmt: skip


def write_model(
    session: Session,
    source: Source,
    batch: int,
    chosen: dict[str, str],
    target: str,
    predictions: str,
) -> Written:
    """Write the model with the chosen candidates, and what the original predicts.

    Args:
        session: of this worker.
        source: of the model.
        batch: its batch size.
        chosen: op to candidate.
        target: the .keras file to write.
        predictions: the .npz file to write inputs x0, x1, ... and predictions y0, y1, ... to.
    """
    close_case(session)
    model = steps.load(source, batch)
    inputs = steps.make_inputs(model, 0)
    written = write(model, source, chosen, Path(target), inputs)
    found: dict[str, Any] = {f"x{i}": x for i, x in enumerate(inputs)}
    found |= {f"y{i}": y for i, y in enumerate(predict(model.model, inputs))}
    np.savez(predictions, **found)
    return written


class StepRace:
    """The race of a model's step, which runs in as many processes as its results ask for.

    Args:
        entry: the race.
        workers: provides the workers.
        plan: its seed and limits.
        described: the model, if it has been described.
        most: processes, at most; 0: the entry's.

    Raises:
        WorkerFailure: the model cannot be loaded at all.
    """

    def __init__(
        self,
        entry: Entry,
        workers: Workers,
        plan: Plan,
        described: Described | None = None,
        *,
        most: int = 0,
    ) -> None:
        self._entry, self._workers = entry, workers
        self.worker = workers.worker(WorkerSpec(), 0)
        self._described = described or self.worker.call(
            describe, entry.source, entry.batch, timeout=plan.timeout_seconds
        )
        self.source = msgspec.structs.replace(entry.source, forms=self._described.forms)
        most = most or entry.processes
        self._race = race_in_one_worker(
            entry.case,
            contenders(entry, self._described),
            baseline=ISOLATED + ORIGINAL if self._described.unknown else ORIGINAL,
            plan=replace(
                plan,
                processes=most,
                budget_seconds=entry.budget_seconds * most / entry.processes,
                allocations=2,
                early_stop_ratio=math.inf,  # isolated pooling runs many copies
            ),
            tasks=Tasks(
                open_case=partial(steps.open_case, source=self.source),
                open_contender=steps.open_contender,
                probes=(),
            ),
        )
        self._done, self._more = 0, True

    def run(self, processes: int) -> Stepped:
        """Run until so many processes are done; return the result so far."""
        while self._more and self._done < processes:
            self._more = self._race.run_process(self._workers)
            self._done += 1
        return self._stepped(self._race.result())

    def keep(self, names: Collection[str]) -> None:
        """Leave the other contenders out of the processes that follow."""
        for name, record in self._race.records.items():
            record.stopped_early |= name not in names

    def check(self) -> Stepped:
        """Compare the implementations' outputs with each other once, timing nothing."""
        return self._stepped(self._race.check(self._workers))

    def _stepped(self, result: Result) -> Stepped:
        measurements = {m.candidate: m for m in result.measurements}
        return Stepped(entry=self._entry, described=self._described, measurements=measurements)


def race_model(entry: Entry, workers: Workers, plan: Plan) -> Stepped:
    """Describe the model, race its steps, and time single calls where the entry asks.

    Raises:
        WorkerFailure: the model cannot be loaded at all.
    """
    race = StepRace(entry, workers, plan)
    stepped = race.run(entry.processes)
    if entry.latency_calls:
        latencies = time_latencies(entry, race.source, stepped.measurements, race.worker, plan)
        stepped = replace(stepped, latencies=latencies)
    return stepped


def time_latencies(
    entry: Entry,
    source: Source,
    measurements: Mapping[str, Measurement],
    worker: WorkerLike,
    plan: Plan,
) -> dict[str, list[float]]:
    """Seconds of single calls by contender; {} if the worker fails, for the race itself stands."""
    names = [
        name
        for name, m in measurements.items()
        if m.status == "ok" and not name.startswith(ISOLATED)
    ]
    with contextlib.suppress(WorkerFailure):
        found: dict[str, list[float]] = worker.call(
            steps.time_calls, source, entry.case, plan.seed, names, entry.latency_calls,
            timeout=10 * plan.timeout_seconds,
        )  # fmt: skip
        return found
    return {}


def run_entry(entry: Entry, bench: Run, *, checks_only: bool = False) -> list[ModelResult]:
    """Race an entry in a run and journal its records; read those of a resumed run.

    A network that cannot be loaded at all is one record with the reason.
    """
    plan = bench.options.plan
    try:
        if checks_only:
            return model_records(StepRace(entry, bench, plan).check())
        bench.worker(WorkerSpec(), entry.processes - 1)
        bench.journal()
        own = (entry.name, entry.direction, entry.mode, entry.batch)
        known = bench.networks
        if done := [r for r in known if (r.model, r.direction, r.mode, r.batch) == own]:
            return done
        records = model_records(race_model(entry, bench, plan))
    except WorkerFailure as failure:
        records = [_unloaded(entry, failure)]
        if checks_only:
            return records
    bench.append(*records)  # one line: a race is stored whole or not at all
    return records


def _unloaded(entry: Entry, failure: WorkerFailure) -> ModelResult:
    return ModelResult(
        model=entry.name, op=ALL_POOLING, candidate=ORIGINAL, direction=entry.direction, mode=entry.mode,
        batch=entry.batch, status=failure.status, reason=failure.reason, baseline=ORIGINAL,
    )  # fmt: skip
