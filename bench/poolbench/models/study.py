"""Whole networks: races of a step with each implementation in place, and pooling's share of it.

A network's step is raced by `poolbench.engine.race.Race` like any op: the same rounds, processes and timing loop. What
differs is what a worker opens (`open_case`, `open_contender`), and that the contenders' names say what is put in place:

- `as-built`: the step of the network as it is;
- `OP=SPELLING`: the step with every pool of the op in this implementation;
- `alone:as-built`, `alone:OP=SPELLING`: the pooling alone.

The share. Pooling alone runs, in the same rounds as the step, every pooling call of the network at its own
shapes, on the activations that the network itself makes, in the step's mode and direction (forward, or forward
and backward), one after another; its time over the step's is the share, paired by round. Two other
ways were left. Putting a cheap stand-in (a slice) in the pool's place and taking the difference seems closer
to what could be won, but a stand-in has a backward pass that writes as much as the pool's own, so that it
hides a part of the cost, and a share of 1% would be the difference of two times that are each known to 1%.
A profiler's self time counts neither dispatch nor the cache misses that pooling leaves to its neighbours.
What is left in this way: the cost of a call into TensorFlow, 0.1 to 0.2 ms, is divided by the number of copies
that one call runs; and in a compiled step the compiler may merge a pool with what is before it. Both make the
share too large, never too small: read it as "at most".
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import poolbench.ops  # noqa: F401 (registers the ops)
from poolbench.core.axes import Shape
from poolbench.core.candidate import Candidate, KnownFailure
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import ALL_POOLING, HEAD, Accuracy, Measurement, ModelResult, Samples
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import WorkerLike
from poolbench.engine.race import Fleet, Plan, Race, Tasks
from poolbench.models import zoo
from poolbench.models.zoo import Model, Pool, Source
from poolbench.worker.contender import OpenedContender, open_call
from poolbench.worker.session import Opened, Session, close_case, hold
from poolbench.worker.timing import time_block

if TYPE_CHECKING:
    from poolbench.engine.run import Run
    from poolbench.worker.check import Verdict

    Array = np.ndarray[Any, Any]

AS_BUILT = "as-built"
ALONE = "alone:"
# Calls of pools that one call of pooling alone runs at least, so that entering TensorFlow costs little of it.
ALONE_CALLS = 16
ALONE_NBYTES = 96 << 20
# Rounding differences of a pool grow through the layers that follow it and through the whole backward pass.
GROWTH = {"forward": 1.0, "training": 10.0}
PERCENTILES = (50.0, 95.0, 99.0, 99.9)
LATENCY_CHUNK = 50


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent needs to know of a model.

    Attributes:
        pools: calls of its pooling layers.
        shapes: of its inputs.
        layers: how many it has.
        macs: multiplications and additions of one forward call, about.
    """

    pools: tuple[Pool, ...]
    shapes: tuple[Shape, ...]
    layers: int
    macs: float


def describe(session: Session, source: Source, batch: int) -> Described:
    """A task: read or build the model and say what is in it."""
    close_case(session)
    model = zoo.load(source, batch)
    return Described(
        pools=model.pools,
        shapes=model.shapes,
        layers=sum(1 for _ in zoo.flatten(model.model)),
        macs=model.macs,
    )


@dataclass
class _Opened:
    """What this process holds of the network that is open."""

    source: Source
    case: Case
    model: Model
    inputs: int
    copies: int
    reference: dict[str, tuple[Array, ...]]
    seeds: list[tuple[Any, Array]]


def open_case(
    session: Session, case: Case, seed: int, tensorflow: bool, *, source: Source
) -> Opened:
    """A task: load the network and hold its inputs, and those of its pools for pooling alone."""
    close_case(session)
    model = zoo.load(source, case.shape[0])
    inputs = zoo.make_inputs(model, seed)
    copies = alone_copies(model.pools)
    given = zoo.pool_inputs(model, inputs) if model.pools else ()
    xs = [x.copy() for x in given for _ in range(copies)]
    dys: list[Array] = []
    if case.direction == "training":
        generator = np.random.default_rng(seed)
        block = generator.standard_normal(65537)
        dys = [
            np.resize(block, output_shape(pool)).astype(x.dtype)
            for pool, x in zip(model.pools, given, strict=True)
            for _ in range(copies)
        ]
    variables = [v for v in model.model.variables if "seed_generator" in v.path]
    session.extras["model"] = _Opened(
        source=source,
        case=case,
        model=model,
        inputs=len(inputs),
        copies=copies,
        reference={},
        seeds=[(variable, variable.numpy()) for variable in variables],
    )
    return hold(session, case, (*inputs, *xs, *dys), tensorflow=tensorflow)


def alone_copies(pools: Sequence[Pool]) -> int:
    """How often pooling alone runs each pool: enough to outweigh one call into TensorFlow."""
    if not pools:
        return 0
    nbytes = sum(4 * int(np.prod(pool.shape)) for pool in pools)
    return max(1, min(-(-ALONE_CALLS // len(pools)), ALONE_NBYTES // max(1, nbytes)))


def output_shape(pool: Pool) -> Shape:
    """Shape of the pool's output as it lies in memory."""
    n, h, w, c = pool.shape
    if pool.pool_size is None:
        return zoo.keep_shape(pool) if pool.keepdims else (n, c)
    k = pool.pool_size
    depth = c // k if pool.padding == "valid" else -(-c // k)
    return (n, h, w, depth) if pool.data_format == "channels_last" else (n, depth, h, w)


def open_contender(session: Session, name: str, check: bool) -> OpenedContender:
    """A task: build a contender, call it first, and hold what it returns against the others'."""
    from poolbench.core.errors import one_line, status_of

    try:
        if name.startswith(ALONE):
            return _open_alone(session, name, check=check)
        return _open_step(session, name, check=check)
    except Exception as error:  # noqa: BLE001 (what a implementation raises is a result)
        return OpenedContender(status=status_of(error), reason=one_line(error))


def parse_runner(name: str) -> dict[str, str]:
    """{'depth_max_pool': 'layer-depth_max_pool'} from a contender's name; {} for as-built."""
    op, equals, candidate = name.removeprefix(ALONE).partition("=")
    return {op: candidate} if equals else {}


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("direction", "mode", "device", "threads")}


def _modal(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    import tensorflow as tf

    if mode == "eager":
        return function
    compiled: Callable[..., Any] = tf.function(function, jit_compile=mode == "xla")
    return compiled


def _open_step(session: Session, name: str, *, check: bool) -> OpenedContender:
    opened: _Opened = session.extras["model"]
    case = opened.case
    calls = zoo.candidates(
        opened.model, parse_runner(name), opened.source.original, **_fields(case)
    )
    for variable, value in opened.seeds:  # the same dropout for every implementation's first step
        variable.assign(value)

    def make() -> Callable[..., Any]:
        step = zoo.make_step(opened.model, case.direction)

        def spelled(*inputs: Any) -> Any:
            with zoo.replaced(calls):
                return step(*inputs)

        return _modal(spelled, case.mode)

    return open_call(
        session,
        name,
        make,
        places=tuple(range(opened.inputs)),
        judge=partial(_judge, opened, "step", len(opened.model.model.outputs)) if check else None,
        calibrate=check,
        measure_peak=check,
    )


def _open_alone(session: Session, name: str, *, check: bool) -> OpenedContender:
    opened: _Opened = session.extras["model"]
    case, model = opened.case, opened.model
    wanted = parse_runner(name)
    chosen = [i for op in wanted for i in model.of(op)] or list(range(len(model.pools)))
    replacing = zoo.candidates(model, wanted, opened.source.original, **_fields(case))
    calls = [replacing.get(id(model.layers[i]), (None, model.layers[i]))[1] for i in chosen]
    base, total = opened.inputs, len(model.pools) * opened.copies
    xs = [base + i * opened.copies + copy for i in chosen for copy in range(opened.copies)]
    dys = [place + total for place in xs] if case.direction == "training" else []
    alone = zoo.make_alone(model, chosen, calls, opened.copies, case.direction)
    return open_call(
        session,
        name,
        lambda: _modal(alone, case.mode),
        places=(*xs, *dys),
        # Values only: where a tie's gradient goes differs by right, and is the reference's to judge.
        judge=partial(_judge, opened, ",".join(map(str, chosen)), len(xs)) if check else None,
        calibrate=check,
    )


def _judge(opened: _Opened, key: str, values: int, outputs: tuple[Array, ...]) -> Verdict:
    """Hold a contender's outputs against those of the first of its kind that ran here.

    Args:
        opened: the model that is open.
        key: what may be compared with each other.
        values: how many of the outputs are values; what follows is the gradient, or for pooling
            alone not compared.
        outputs: of the first call.
    """
    from poolbench.worker.check import Verdict

    compared = outputs if key == "step" else outputs[:values]
    reference = opened.reference.setdefault(key, compared)
    bound = {False: step_bound(opened.model, "forward"), True: step_bound(opened.model, "training")}
    errors = [
        normwise_error(mine, other) / bound[i >= values]
        for i, (mine, other) in enumerate(zip(compared, reference, strict=True))
    ]
    worst = max(errors)
    accuracy = Accuracy(
        worst=worst,
        max_relative=max(map(normwise_error, compared[:values], reference)),
        max_absolute=max(
            float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
            for a, b in zip(compared, reference, strict=True)
        ),
        bound=f"{bound[False]:.2g} of the largest output, {bound[True]:.2g} of the largest gradient",
    )
    if worst <= 1:
        return Verdict(accuracy=accuracy, status="ok", reason="")
    reason = f"it differs from the step as built by {worst:.3g} times the bound ({accuracy.bound})"
    return Verdict(accuracy=accuracy, status="wrong", reason=reason)


def normwise_error(mine: Array, other: Array) -> float:
    """Largest difference over the largest value; inf where one is not finite or shaped otherwise."""
    if mine.shape != other.shape:
        return float("inf")
    a, b = mine.astype(np.float64), other.astype(np.float64)
    difference = float(np.abs(a - b).max(initial=0.0))
    scale = float(np.abs(b).max(initial=0.0))
    if not np.isfinite(difference):
        return float("inf")
    return difference / scale if scale else difference


def step_bound(model: Model, direction: str) -> float:
    """How far two right implementations may be apart, over the largest output (or gradient).

    The reference's relative bound of the pools, times what the layers behind a pool may make of it:
    two neighbours in float32 are not more than that apart when only the order of a sum differs.
    """
    from poolbench.worker.check import BOUNDS, bound_for

    # No less than the dtype's own: convolutions are not exact where the pool is.
    relative = max(
        (bound_for(REGISTRY.ops[pool.op], pool.case()).relative for pool in model.pools),
        default=0.0,
    )
    return GROWTH[direction] * max(relative, BOUNDS["float32"].relative)


def time_calls(
    session: Session, source: Source, case: Case, seed: int, names: Sequence[str], calls: int
) -> dict[str, list[float]]:
    """A task: seconds of each of `calls` single calls of each contender, in shuffled chunks.

    A call is timed from its start until the device has finished, one at a time, as a server with one
    client sees it.
    """
    open_case(session, case, seed, True, source=source)
    ready = [name for name in names if open_contender(session, name, False).status == "ok"]
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(-(-calls // LATENCY_CHUNK)):
        for name in generator.sample(ready, len(ready)):
            time_block(
                session, name, 3, 1
            )  # the other candidate's caches are not this one's latency
            seconds[name] += [time_block(session, name, 0, 1).seconds for _ in range(LATENCY_CHUNK)]
    close_case(session)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One race of a suite of networks.

    Attributes:
        name: of the network.
        source: how a worker gets it.
        direction: 'forward' or 'training'.
        batch: its batch size.
        mode: as in Case.
        in_place: whether each implementation is put in place; otherwise only its pooling alone is raced,
            for a network that takes long to trace and whose step a pool cannot move.
        implementations: op to the candidates that race; an op that is not named races all of its own.
        latency_calls: single calls to time of each implementation; 0: none.
        processes: fresh processes.
        budget_seconds: of rounds.
    """

    name: str
    source: Source
    direction: str
    batch: int
    mode: str = "graph"
    device: str = "cpu:0"
    threads: int = 0
    in_place: bool = True
    candidates: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    latency_calls: int = 0
    processes: int = 3
    budget_seconds: float = 4.0

    @property
    def label(self) -> str:
        """'resnet50-head-training-graph-32'."""
        return f"{self.name}-{self.direction}-{self.mode}-{self.batch}"

    def case(self, shape: Shape) -> Case:
        """The race's case: the first input's shape stands for the network's."""
        four = (*shape, 1, 1, 1)[:4] if len(shape) < 4 else shape[:4]
        return make_case(
            op=DEPTH_OR_GLOBAL,
            shape=four,
            direction=self.direction,
            mode=self.mode,
            device=self.device,
            threads=self.threads,
        )


DEPTH_OR_GLOBAL = "network"


def contenders(entry: Entry, pools: Sequence[Pool], case: Case) -> list[Candidate]:
    """Who races: the step as built, each implementation in place, and each pooling alone.

    A contender fails as its implementation does, and where that is documented, it is `unsupported` here too.
    """
    originals = [
        (pool, REGISTRY.candidates[pool.op, entry.source.original[pool.layer]])
        for pool in pools
        if pool.layer in entry.source.original
    ]
    built = Candidate(
        op=case.op,
        name=AS_BUILT,
        form="layer",
        framework="keras",
        about="the network as it is",
        build=_built_by_its_author,
        failures=_failures(originals, case),
        file=__file__,
        builtin=True,
    )
    found = [built, replace(built, name=ALONE + AS_BUILT)] if pools else [built]
    for op in dict.fromkeys(pool.op for pool in pools):
        entries = REGISTRY.of(op)
        for name in entry.candidates.get(op, tuple(entries)):
            candidate = entries[name]
            if candidate.framework == "numpy":
                continue  # it cannot be part of a graph
            own = [(pool, candidate) for pool in pools if pool.op == op]
            step = replace(
                candidate, op=case.op, name=f"{op}={name}", failures=_failures(own, case)
            )
            found += [step] if entry.in_place else []
            found.append(replace(step, name=f"{ALONE}{op}={name}"))
    return found


def _built_by_its_author(case: Case) -> Callable[..., Any]:
    raise UsageError(
        f"the network of {case.op} is opened whole (poolbench.models.study.open_contender)"
    )


def _failures(uses: Sequence[tuple[Pool, Candidate]], case: Case) -> tuple[KnownFailure, ...]:
    """The documented failures of implementations, asked of the pools' cases instead of the network's."""
    fields = _fields(case)

    def asked(known: KnownFailure, pool: Pool) -> Callable[[Case], bool]:
        return lambda _: known.when(pool.case(**fields))

    return tuple(
        replace(known, when=asked(known, pool))
        for pool, candidate in uses
        for known in candidate.failures
    )


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A race of a network's steps that has been run."""

    entry: Entry
    case: Case
    described: Described
    measurements: dict[str, Measurement]
    latencies: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def copies(self) -> int:
        """How often one call of pooling alone runs each pool."""
        return alone_copies(self.described.pools)

    def share(self, alone: str, step: str) -> tuple[float, float, float] | None:
        """Low, middle and high of pooling's time over the step's; None without an interval."""
        pooling, whole = self.measurements.get(alone), self.measurements.get(step)
        if pooling is None or whole is None or {pooling.status, whole.status} != {"ok"}:
            return None
        from poolbench.stats.estimate import estimate  # SciPy, which collection need not wait for

        found = estimate(scaled(pooling.samples, 1 / self.copies), whole.samples)
        if found.low is None:
            return None
        return tuple(float(f"{v:.4g}") for v in (found.ratio_low, found.ratio, found.ratio_high))  # type: ignore[return-value]


def scaled(samples: Samples, factor: float) -> Samples:
    """The samples with their seconds multiplied."""
    seconds = tuple(value * factor for value in samples.seconds)
    return msgspec.structs.replace(samples, seconds=seconds)


def tasks_of(source: Source) -> Tasks:
    """What a race's workers are sent to open this network."""
    return Tasks(
        open_case=partial(open_case, source=source), open_contender=open_contender, probes=()
    )


def race_network(entry: Entry, fleet: Fleet, plan: Plan) -> Stepped:
    """Describe the network, race its steps, and time single calls where the entry asks.

    Raises:
        WorkerFailure: the network cannot be loaded at all.
    """
    plan = replace(
        plan,
        processes=entry.processes,
        max_processes=entry.processes,
        budget_seconds=entry.budget_seconds,
        allocations=2,
    )
    worker = fleet.worker(0)
    described = worker.call(describe, entry.source, entry.batch, timeout=plan.timeout_seconds)
    case = entry.case(described.shapes[0])
    race = Race(
        case,
        contenders(entry, described.pools, case),
        baseline=AS_BUILT,
        plan=plan,
        tasks=tasks_of(entry.source),
    )
    measurements = {m.candidate: m for m in race.run(fleet).measurements}
    latencies = (
        time_latencies(entry, case, measurements, worker, plan) if entry.latency_calls else {}
    )
    return Stepped(
        entry=entry,
        case=case,
        described=described,
        measurements=measurements,
        latencies=latencies,
    )


def check_network(entry: Entry, worker: WorkerLike, plan: Plan) -> Stepped:
    """Hold the implementations' outputs against each other once, timing nothing."""
    described = worker.call(describe, entry.source, entry.batch, timeout=plan.timeout_seconds)
    case = entry.case(described.shapes[0])
    race = Race(
        case,
        contenders(entry, described.pools, case),
        baseline=AS_BUILT,
        plan=plan,
        tasks=tasks_of(entry.source),
    )
    measurements = {m.candidate: m for m in race.check(worker).measurements}
    return Stepped(entry=entry, case=case, described=described, measurements=measurements)


def time_latencies(
    entry: Entry,
    case: Case,
    measurements: Mapping[str, Measurement],
    worker: WorkerLike,
    plan: Plan,
) -> dict[str, list[float]]:
    """Seconds of single calls by contender; {} if the worker fails, for the race itself stands."""
    names = [
        name for name, m in measurements.items() if m.status == "ok" and not name.startswith(ALONE)
    ]
    with contextlib.suppress(WorkerFailure):
        found: dict[str, list[float]] = worker.call(
            time_calls, entry.source, case, plan.seed, names, entry.latency_calls,
            timeout=10 * plan.timeout_seconds,
        )  # fmt: skip
        return found
    return {}


def network_records(stepped: Stepped) -> list[ModelResult]:
    """What goes into the journal: each op's implementations, then the network as it was built."""
    found = []
    for name in stepped.measurements:
        if name.startswith(ALONE) or name == AS_BUILT:
            continue
        ((op, candidate),) = parse_runner(name).items()
        found.append(_record(stepped, name, op=op, candidate=candidate))
    found.append(_record(stepped, AS_BUILT, op=ALL_POOLING, candidate=AS_BUILT))
    return found


def _record(stepped: Stepped, name: str, *, op: str, candidate: str) -> ModelResult:
    entry, step = stepped.entry, stepped.measurements[name]
    return ModelResult(
        model=entry.name,
        op=op,
        candidate=candidate,
        direction=_direction(entry),
        mode=entry.mode,
        batch=entry.batch,
        status=step.status,
        reason=step.reason,
        baseline=AS_BUILT if op == ALL_POOLING else REGISTRY.ops[op].baseline,
        samples=step.samples,
        share=stepped.share(ALONE + name, name),
        figures=figures(stepped, name),
    )


def figures(stepped: Stepped, name: str) -> dict[str, float | int | str | None]:
    """Throughput, peak memory and latency percentiles of a step, by names with their units."""
    step = stepped.measurements[name]
    found: dict[str, float | int | str | None] = {}
    if len(step.samples):
        middle = statistics.median(step.samples.seconds)
        found["throughput_images_per_second"] = float(f"{stepped.entry.batch / middle:.4g}")
        found["peak_nbytes"] = step.peak_nbytes
    if stepped.latencies.get(name):
        found |= percentiles(stepped.latencies[name])
    if name == AS_BUILT and (best := fastest_alone(stepped)) is not None:
        found["fastest_pooling"], found["pooling_nbytes"] = (
            best,
            sum(4 * int(np.prod(pool.shape)) for pool in stepped.described.pools),
        )
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float | int | str | None]:
    """{'latency_p50_seconds': ..., 'latency_p99.9_seconds': ..., 'latency_calls': 3000}."""
    values = np.percentile(seconds, PERCENTILES)
    named = {
        f"latency_p{percentile:g}_seconds": float(f"{value:.4g}")
        for percentile, value in zip(PERCENTILES, values, strict=True)
    }
    return {**named, "latency_calls": len(seconds)}


def fastest_alone(stepped: Stepped) -> str | None:
    """The op and implementation whose pooling alone took least, where every pool is of one op."""
    times = {
        name.removeprefix(ALONE): statistics.median(m.samples.seconds)
        for name, m in stepped.measurements.items()
        if name.startswith(ALONE) and name != ALONE + AS_BUILT and len(m.samples)
        if m.status == "ok"
    }
    if not times or len({pool.op for pool in stepped.described.pools}) != 1:
        return None
    return min(times, key=lambda name: times[name])


IMAGE = (96, 96, 3)
TEXTBOOK = Source(kind="textbook")
HEAD_IMAGE = (224, 224, 3)
# The implementations that differ in kind, not every variant of each: in a step the rest could not be told apart.
PLACED = {
    "depth_max_pool": (
        "reshape-reduce_max", "lambda-max_pool", "max_pool2d-view", "transpose-reduce_max", "keras-stock",
        "layer-depth_max_pool",
    ),
    "global_avg_pool": (
        "layer-global_avg_pool", "lambda-reduce_mean", "avg_pool2d", "mean-of-means",
    ),
}  # fmt: skip
COMPILED = {
    "depth_max_pool": ("reshape-reduce_max", "lambda-max_pool", "layer-depth_max_pool"),
    "global_avg_pool": ("layer-global_avg_pool", "lambda-reduce_mean"),
}


def _head(name: str, direction: str, batch: int, **fields: Any) -> Entry:
    source = Source(kind="head", name=name, image=HEAD_IMAGE)
    return Entry(
        name=f"{name}{HEAD}",
        source=source,
        direction=direction,
        batch=batch,
        candidates=PLACED,
        **fields,
    )


def _whole(name: str, direction: str, **fields: Any) -> Entry:
    source = Source(kind="application", name=name, image=IMAGE)
    return Entry(
        name=name,
        source=source,
        direction=direction,
        batch=4,
        in_place=False,
        candidates=PLACED,
        **fields,
    )


def default_entries() -> list[Entry]:
    """The races of `nox -s networks`: at most six minutes on two cores."""
    textbook = [
        Entry(
            name="textbook", source=TEXTBOOK, direction=direction, batch=32, mode=mode,
            candidates=placed, budget_seconds=6.0,
            # To compile a whole step for each implementation takes longer than all of the other races.
            in_place=mode == "graph",
        )
        for direction, mode, placed in (
            ("forward", "graph", PLACED), ("training", "graph", PLACED), ("forward", "xla", COMPILED)
        )
    ]  # fmt: skip
    heads = [
        entry
        for name in zoo.APPLICATIONS
        for entry in (
            _head(name, "forward", 1, latency_calls=2000, budget_seconds=1.0),
            _head(name, "forward", 8, budget_seconds=1.0),
            _head(name, "forward", 64, budget_seconds=2.0),
            _head(name, "training", 32, budget_seconds=2.0),
        )
    ]
    whole = [
        _whole(name, direction)
        for name in zoo.APPLICATIONS
        for direction in ("forward", "training")
    ]
    return textbook + heads + whole


def quick_entries() -> list[Entry]:
    """One network and one head: half a minute."""
    return [
        Entry(
            name="textbook", source=TEXTBOOK, direction="training", batch=16, candidates=COMPILED
        ),
        _head("mobilenetv2", "forward", 8, budget_seconds=1.0),
    ]


ENTRIES: dict[str, Callable[[], list[Entry]]] = {"default": default_entries, "quick": quick_entries}


def entries_of(sweep: str) -> list[Entry]:
    """The races of a sweep; one that has none of its own takes the default."""
    return ENTRIES.get(sweep, default_entries)()


def safe_label(label: str) -> str:
    """A label in letters that a test's id may have."""
    return re.sub(r"[^A-Za-z0-9._-]", ".", label)


class _BenchFleet:
    """The workers of a run, for races that the run does not know."""

    def __init__(self, bench: Run, setting: WorkerSpec) -> None:
        self._bench = bench
        self._setting = setting

    def worker(self, process: int) -> WorkerLike:
        return self._bench.worker(self._setting, process)


def run_entry(entry: Entry, bench: Run, *, checks_only: bool = False) -> list[ModelResult]:
    """Race an entry in a run and journal its records; those that a resumed run holds are read back.

    A network that cannot be loaded at all is one record with the reason.
    """
    fleet = _BenchFleet(bench, WorkerSpec(threads=entry.threads))
    plan = bench.options.plan
    try:
        if checks_only:
            return network_records(check_network(entry, fleet.worker(0), plan))
        fleet.worker(entry.processes - 1)
        bench.journal()
        if done := [record for record in bench.networks if _is_of(record, entry)]:
            return done
        records = network_records(race_network(entry, fleet, plan))
    except WorkerFailure as failure:
        records = [_unloaded(entry, failure)]
    for record in records:
        bench.append(record)
    return records


def _is_of(record: ModelResult, entry: Entry) -> bool:
    keys = (record.model, record.direction, record.mode, record.batch)
    return keys == (entry.name, _direction(entry), entry.mode, entry.batch)


def _unloaded(entry: Entry, failure: WorkerFailure) -> ModelResult:
    return ModelResult(
        model=entry.name,
        op=ALL_POOLING,
        candidate=AS_BUILT,
        direction=_direction(entry),
        mode=entry.mode,
        batch=entry.batch,
        status=failure.status,
        reason=failure.reason,
        baseline=AS_BUILT,
    )


def _direction(entry: Entry) -> str:
    return entry.direction
