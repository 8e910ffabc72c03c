"""Steps of a model, and its isolated pooling, as a worker opens and checks them.

A training step is forward, backward and an SGD update at a learning rate of zero: all of the work is done and the
weights stay, so that a thousand steps are alike. The loss is the outputs' mean square, because a file does not tell the
user's own; it costs nothing beside the rest.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from poolbench.core.case import Case
from poolbench.core.errors import UsageError, one_line, printable, status_of
from poolbench.core.records import Accuracy
from poolbench.core.registry import REGISTRY
from poolbench.models import zoo
from poolbench.models.config import fill_shapes
from poolbench.models.find import Model, call_model, find_pools, replaced, run_parts
from poolbench.models.pools import Pool
from poolbench.models.replace import build_call, compare, replacements
from poolbench.models.zoo import Source
from poolbench.worker.check import BOUNDS, Verdict, bound_for
from poolbench.worker.check import compare as compare_arrays
from poolbench.worker.contender import OpenedContender, open_call
from poolbench.worker.inputs import BLOCK_LENGTH, numpy_dtype
from poolbench.worker.session import Opened, Session, close_case, hold
from poolbench.worker.timing import time_block

Array = np.ndarray[Any, Any]
Call = Callable[..., Any]
ORIGINAL = "original"
ISOLATED = "isolated:"
# Calls of pools that one call of isolated pooling runs at least, so that entering TensorFlow costs little of it.
ISOLATED_CALLS = 16
ISOLATED_NBYTES = 96 << 20
# Rounding differences of a pool grow through the layers that follow it and through the whole backward pass.
GROWTH = {"forward": 1.0, "training": 10.0}
LATENCY_CHUNK = 50


@dataclass
class _Opened:
    """The model that is open in this process."""

    model: Model
    case: Case
    inputs: int
    copies: int
    reference: dict[str, tuple[Array, ...]] = field(default_factory=dict)


def load(source: Source, batch: int) -> Model:
    """Return the source's model with its sizes fixed and its pooling found."""
    loaded = zoo.load(source)
    # The image of a head is that of its whole model; the head receives the last feature map.
    return find_pools(loaded, fill_shapes(loaded.specs, source.inputs, batch), source.forms)


def make_inputs(model: Model, seed: int) -> tuple[Array, ...]:
    """Return inputs of the model: floats in [0, 1), as pixels are after scaling; integers over all of their range."""
    generator = np.random.default_rng(seed)
    limits = [
        int(layer.input_dim) for layer in zoo.flatten(model.model) if hasattr(layer, "input_dim")
    ]
    found = []
    for shape, spec in zip(model.shapes, model.loaded.specs, strict=True):
        if spec.dtype == "bool":
            block: Array = generator.integers(0, 2, BLOCK_LENGTH).astype(bool)
        elif "int" in spec.dtype:
            info = np.iinfo(spec.dtype)
            # Words of an embedding have numbers of their own.
            low, high = int(info.min), int(info.max) + 1
            if limits:
                low, high = 0, min(*limits, high)
            block = generator.integers(low, high, BLOCK_LENGTH, dtype=spec.dtype)
        elif "float" in spec.dtype:
            block = generator.random(BLOCK_LENGTH).astype(numpy_dtype(spec.dtype))
        else:
            raise UsageError(f"the input `{spec.name}` takes {spec.dtype}, of which none is made here")  # fmt: skip
        found.append(np.resize(block, shape))
    return tuple(found)


def pool_input(pool: Pool, seed: int) -> Array:
    """Return an input of a pool: random values, half of them zeros, as after a ReLU."""
    block = np.maximum(np.random.default_rng(seed).standard_normal(BLOCK_LENGTH), 0.0)
    return np.resize(block, pool.given).astype(numpy_dtype(pool.dtype))


def isolated_copies(pools: Sequence[Pool], scale: float = 1.0) -> int:
    """Return how often isolated pooling runs each pool: enough to outweigh one call into TensorFlow.

    `scale`: of the step's batch over the one at which the pools were found.
    """
    if not pools:
        return 0
    nbytes = round(scale * sum(4 * math.prod(pool.given) for pool in pools))
    return max(1, min(-(-ISOLATED_CALLS // len(pools)), ISOLATED_NBYTES // max(1, nbytes)))


def open_case(session: Session, case: Case, seed: int, *, source: Source) -> Opened:
    """Load the model and store its inputs, and those of its isolated pools."""
    close_case(session)
    model = load(source, case.batch)
    inputs = make_inputs(model, seed)
    copies = isolated_copies(model.pools)
    given = [pool_input(pool, i) for i, pool in enumerate(model.pools)]
    xs = [x.copy() for x in given for _ in range(copies)]
    dys: list[Array] = []
    if case.direction == "training":
        block = np.random.default_rng(seed).standard_normal(BLOCK_LENGTH)
        dys = [
            np.resize(block, pool.made).astype(x.dtype)
            for pool, x in zip(model.pools, given, strict=True)
            for _ in range(copies)
        ]
    session.extras["model"] = _Opened(model=model, case=case, inputs=len(inputs), copies=copies)
    return hold(session, case, (*inputs, *xs, *dys))


def parse_contender(name: str) -> dict[str, str]:
    """Return {'row_max': 'reduce_max'} from a contender's name; {} for original."""
    op, equals, candidate = name.removeprefix(ISOLATED).partition("=")
    return {op: candidate} if equals else {}


def open_contender(session: Session, name: str, check: bool) -> OpenedContender:
    """Build a contender, call it first, and compare what it returns with what the others return."""
    try:
        if name.startswith(ISOLATED):
            return _open_isolated(session, name, check=check)
        return _open_step(session, name, check=check)
    except Exception as error:  # noqa: BLE001 (what an implementation raises is a result)
        return OpenedContender(status=status_of(error), reason=cause_of(error))


def cause_of(error: Exception) -> str:
    """Return an error in one line; of an error in code that was being traced, the one that caused it."""
    cause = re.search(r"^\s+(\w*(?:Error|Exception): .+)$", str(error), re.MULTILINE)
    return printable(cause[1]) if cause else one_line(error)


def call_fields(case: Case) -> dict[str, Any]:
    """Return the axes of a model's case that its pools' cases share."""
    return {"direction": case.direction, "mode": case.mode}


def _in_mode(function: Call, mode: str) -> Call:
    import tensorflow as tf

    if mode == "eager":
        return function
    # Keras, too, traces without AutoGraph, which takes longer than the rest.
    compiled: Call = tf.function(function, jit_compile=mode == "xla", autograph=False)
    return compiled


def _open_step(session: Session, name: str, *, check: bool) -> OpenedContender:
    opened: _Opened = session.extras["model"]
    model, case = opened.model, opened.case
    calls = replacements(model, parse_contender(name), **call_fields(case))
    model.loaded.reset()  # the same dropout for the first step of every implementation

    def make() -> Call:
        step = STEPS[case.direction](model)

        def replaced_step(*inputs: Any) -> Any:
            with replaced(calls):
                return step(*inputs)

        return _in_mode(replaced_step, case.mode)

    values = -1 if case.direction == "training" else None  # the last output is the gradient
    return open_call(
        session,
        name,
        make,
        places=tuple(range(opened.inputs)),
        judge=partial(_judge, opened, "step", values) if check else None,
        calibrate=check,
        measure_peak=check,
    )


def _open_isolated(session: Session, name: str, *, check: bool) -> OpenedContender:
    opened: _Opened = session.extras["model"]
    case, model = opened.case, opened.model
    wanted = parse_contender(name)
    chosen = [i for i, pool in enumerate(model.pools) if not wanted or pool.op in wanted]
    calls: list[Call] = []
    for i in chosen:
        pool = model.pools[i]
        if pool.op in wanted:
            candidate = REGISTRY.candidates[pool.op, wanted[pool.op]]
            calls.append(build_call(candidate, pool, pool.case(**call_fields(case))))
        else:
            calls.append(partial(run_parts, model.parts[i], training=case.direction == "training"))
    base, total = opened.inputs, len(model.pools) * opened.copies
    xs = [base + i * opened.copies + copy for i in chosen for copy in range(opened.copies)]
    dys = [place + total for place in xs] if case.direction == "training" else []
    return open_call(
        session,
        name,
        partial(
            make_isolated, [model.pools[i].layer for i in chosen], calls, opened.copies, case.mode
        ),
        places=(*xs, *dys),
        # Values only: correct gradients may differ at ties, and `find` has compared them.
        judge=partial(_judge, opened, ",".join(map(str, chosen)), len(xs)) if check else None,
        calibrate=check,
    )


def _judge(opened: _Opened, key: str, values: int | None, outputs: tuple[Array, ...]) -> Verdict:
    """Compare a contender's outputs with those of the first of its kind that ran here.

    Args:
        opened: the model that is open.
        key: what may be compared with each other.
        values: how many of the outputs are values; what follows is the gradient, or for pooling
            alone not compared.
        outputs: of the first call.
    """
    compared = outputs if key == "step" else outputs[:values]
    reference = opened.reference.setdefault(key, compared)
    bounds = [step_bound(opened.model, direction) for direction in ("forward", "training")]
    count = len(compared[:values])
    errors = [
        compare([other], [mine]) / bounds[i >= count]
        for i, (mine, other) in enumerate(zip(compared, reference, strict=True))
    ]
    accuracy = Accuracy(
        worst=max(errors),
        max_relative=compare(reference[:count], compared[:count]),
        max_absolute=max(
            compare_arrays(mine, other).absolute
            for mine, other in zip(compared, reference, strict=True)
        ),
        bound=f"{bounds[0]:.2g} of the largest output, {bounds[1]:.2g} of the largest gradient",
    )
    if accuracy.worst <= 1:
        return Verdict(accuracy=accuracy, status="ok", reason="")
    reason = f"it differs from the original step by {accuracy.worst:.3g} times the bound ({accuracy.bound})"
    return Verdict(accuracy=accuracy, status="wrong", reason=reason)


def step_bound(model: Model, direction: str) -> float:
    """Return the allowed difference of two correct implementations, over the largest output (or gradient).

    The reference's relative bound of the pools, times what the layers behind a pool may make of it:
    two neighbours in float32 are not more than that apart when only the order of a sum differs.
    """
    # No less than the dtype's own: convolutions are not exact where the pool is.
    dtypes = {pool.dtype for pool in model.pools if pool.dtype in BOUNDS} | {"float32"}
    bounds = [bound_for(REGISTRY.ops[pool.op], pool.case()).relative for pool in model.pools if pool.op]  # fmt: skip
    return GROWTH[direction] * max([*bounds, *(BOUNDS[dtype].relative for dtype in dtypes)])


def time_calls(
    session: Session, source: Source, case: Case, seed: int, names: list[str], calls: int
) -> dict[str, list[float]]:
    """Return the seconds of each of `calls` single calls of each contender, in shuffled chunks.

    A call is timed from its start until the device has finished, one at a time, as a server with one
    client sees it.
    """
    open_case(session, case, seed, source=source)
    ready = [name for name in names if open_contender(session, name, False).status == "ok"]
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(-(-calls // LATENCY_CHUNK)):
        for name in generator.sample(ready, len(ready)):
            # The other candidate's caches are not this one's latency.
            time_block(session, name, 3, 1)
            seconds[name] += [time_block(session, name, 0, 1).seconds for _ in range(LATENCY_CHUNK)]
    close_case(session)
    return seconds


def make_inference(model: Model) -> Call:
    """Return inputs -> outputs."""

    def inference(*inputs: Any) -> tuple[Any, ...]:
        return call_model(model.model, *inputs, training=False)

    return inference


def make_training(model: Model) -> Call:
    """Return inputs -> outputs and the first weight's gradient, having updated the weights.

    To the first weight all of the backward pass leads.
    """
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.0)
    variables = model.model.trainable_variables
    optimizer.build(variables)

    def training(*inputs: Any) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            outputs = call_model(model.model, *inputs, training=True)
            floats = [y for y in outputs if y.dtype.is_floating]
            loss = tf.add_n([tf.reduce_mean(tf.cast(y, tf.float32) ** 2) for y in floats])
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        optimizer.apply_gradients(pairs)
        return (*outputs, tf.convert_to_tensor(pairs[0][0]))

    return training


STEPS: dict[str, Callable[[Model], Call]] = {"forward": make_inference, "training": make_training}


def make_isolated(names: Sequence[str], calls: Sequence[Call], copies: int, mode: str) -> Call:
    """Return a function of isolated pools, one after another, each `copies` times on inputs of its own.

    It takes the inputs of pool 0, copy 0, 1, ..., of pool 1, ..., then, in training, as many dy in the
    same order; it returns every y, then every dx.
    """
    import tensorflow as tf

    # Traced once for all copies, whose graphs TensorFlow puts inline: tracing each takes longer than the race.
    inner = "eager" if mode == "eager" else "graph"
    passes = [
        _in_mode(partial(_one_pass, name, call), inner)
        for name, call in zip(names, calls, strict=True)
    ]
    count = len(names) * copies

    def isolated(*arguments: Any) -> tuple[Any, ...]:
        done: list[Any] = []
        for i in range(count):
            # One after another, as in a model: side by side they would share the cores.
            with tf.control_dependencies(done[-1] if done else ()):
                done.append(passes[i // copies](*arguments[i::count]))
        return tuple(itertools.chain(*zip(*done, strict=True)))

    return _in_mode(isolated, mode)


def _one_pass(name: str, call: Call, x: Any, *dy: Any) -> tuple[Any, ...]:
    """Return (y,), and with dy (y, dx)."""
    import tensorflow as tf

    if not dy:
        return (call(x),)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(x)
    dx = tape.gradient(y, x, output_gradients=dy[0])
    if dx is None:
        raise TypeError(f"no gradient through {name}")
    return y, dx
