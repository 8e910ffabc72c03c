"""Find the pooling of a model: trace it once, then identify by values what each part computes.

A part is a layer, an operation of keras.ops in a functional graph, a weightless nested model, or a sequence of up to
four operations that follow each other. TensorFlow and Keras are imported inside functions: this runs in a worker.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from poolbench.core.axes import Shape
from poolbench.models.config import fixed_batch
from poolbench.models.pools import Pool, pool_key, title_of
from poolbench.models.probe import Finding, Form, identify
from poolbench.models.zoo import Loaded, flatten

Call = Callable[..., Any]
MAX_STRETCH = 4
# Limit on the sequences tried in a model of many weightless layers.
MAX_STRETCHES = 24
# Keras's own pooling layers, which a shipped op may not cover.
KERAS_POOLING = re.compile(r"(Global|Adaptive)?(Max|Average)(Pooling)[123]D")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A call in a trace.

    Attributes:
        operation: the layer or operation.
        given, made: shapes of its only input and output; () where it has others.
        dtype: of its input.
        source, result: identities of these tensors in the trace.
        parent: place of the call that this one is part of; -1: none.
        last: place of the last call within this one.
    """

    operation: Any
    given: Shape = ()
    made: Shape = ()
    dtype: str = ""
    source: int = 0
    result: int = 0
    parent: int = -1
    last: int = -1


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and its trace on inputs of fixed sizes.

    Attributes:
        loaded: the Keras model and its inputs.
        shapes: of its inputs, with the batch size.
        pools: its pooling calls, in the order of the trace.
        parts: the operations of each pool, one but for a sequence.
        macs: multiplications and additions of its dense and convolutional layers in one forward call.
        notes: what layers of the user's code are, where they are no pool.
    """

    loaded: Loaded
    shapes: tuple[Shape, ...]
    pools: tuple[Pool, ...] = ()
    parts: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)
    macs: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The Keras model."""
        return self.loaded.model


@contextlib.contextmanager
def replaced(calls: Mapping[int, tuple[Any, Call]]) -> Iterator[None]:
    """Replace the calls of these operations inside the context.

    Args:
        calls: id of an operation to the operation and its call.
    """
    for operation, call in calls.values():
        # Past Keras's __setattr__, which would track what it finds inside.
        operation.__dict__["call"] = call
    try:
        yield
    finally:
        for operation, _ in calls.values():
            operation.__dict__.pop("call", None)


def call_model(model: Any, *inputs: Any, training: bool) -> tuple[Any, ...]:
    """Return the model's outputs, flat."""
    import keras

    # A Sequential model has no `input` before it was called; it takes one tensor as it is.
    structured = len(inputs) > 1 or not isinstance(model, keras.Sequential)
    structure = getattr(model, "input", None) if structured else None
    given = inputs[0] if structure is None else keras.tree.pack_sequence_as(structure, list(inputs))
    return tuple(keras.tree.flatten(model(given, training=training)))


def find_pools(
    loaded: Loaded, shapes: tuple[Shape, ...], forms: Mapping[str, Form] | None = None
) -> Model:
    """Return the model with its pools, as a trace of it on inputs of these shapes calls them.

    Args:
        loaded: the model.
        shapes: of its inputs.
        forms: what its pools are, by `Pool.key`, if that has been established; nothing is run then.
    """
    parts, macs = trace_parts(loaded, shapes)
    findings = _Findings(loaded, forms)
    found: dict[int, tuple[Pool, tuple[Any, ...]]] = {}
    covered: set[int] = set()
    singles = [(place,) for place in range(len(parts))]
    for spans, pool_of in (
        (singles, findings.pool_of),
        (sequences(parts, covered), findings.pool_of),
        (singles, _other_pool),
    ):
        for places in spans:
            some = [parts[place] for place in places]
            if covered.isdisjoint(places) and (pool := pool_of(some)):
                found[places[0]] = pool, tuple(part.operation for part in some)
                for place in places:
                    covered.update(range(place, parts[place].last + 1))
    pools = [found[place] for place in sorted(found)]
    return Model(
        loaded=loaded,
        shapes=shapes,
        pools=tuple(pool for pool, _ in pools),
        parts=tuple(operations for _, operations in pools),
        macs=macs,
        notes=findings.notes,
    )


def _other_pool(parts: Sequence[Part]) -> Pool | None:
    """Return a pooling layer of Keras that no shipped op covers; None if it is not one."""
    import keras

    part = parts[0]
    kind = type(part.operation)
    words = KERAS_POOLING.fullmatch(kind.__name__)
    if not words or not part.given or getattr(keras.layers, kind.__name__, None) is not kind:
        return None
    title = " ".join(filter(None, words.groups())).lower()
    window = getattr(part.operation, "pool_size", None)
    if isinstance(window, (tuple, list)):
        title += f" of {'x'.join(map(str, window))}"
    return Pool(
        names=(part.operation.name,), kind=kind.__name__, title=title, given=part.given,
        made=part.made, dtype=part.dtype,
    )  # fmt: skip


def trace_parts(loaded: Loaded, shapes: tuple[Shape, ...]) -> tuple[list[Part], float]:
    """Return the weightless calls of one symbolic run in their order, and its multiplications."""
    import keras
    import tensorflow as tf

    parts: list[Part] = []
    open_calls: list[int] = [-1]
    kept: list[Any] = []  # the trace's tensors, so that no identity is used twice
    macs = [0.0]

    def watch(operation: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
        place = len(parts)
        parts.append(Part(operation=operation, parent=open_calls[-1]))
        open_calls.append(place)
        try:
            y = call(*args, **kwargs)
        except Exception:
            # AdaptiveAveragePooling2D(1) runs in eager mode only; its position and shape are still known.
            if len(args) != 1 or not hasattr(operation, "compute_output_shape"):
                raise
            y = tf.zeros(operation.compute_output_shape(tuple(args[0].shape)), args[0].dtype)
        finally:
            open_calls.pop()
        tensors = [x for x in keras.tree.flatten((args, kwargs)) if tf.is_tensor(x)]
        parts[place] = Part(
            operation=operation,
            parent=open_calls[-1],
            last=len(parts) - 1,
            **(_ends(tensors[0], y) if len(tensors) == 1 and tf.is_tensor(y) else {}),
        )
        kept.extend((*tensors, y))
        return y

    def count(layer: Any, call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        if tf.is_tensor(y) and y.shape.rank:  # each value takes one kernel column of one filter
            column = layer.kernel.shape[: 2 if "Depthwise" in type(layer).__name__ else -1]
            macs[0] += float(math.prod(column)) * float(math.prod(int(n or 1) for n in y.shape))
        return y

    watchers: dict[int, tuple[Any, Call]] = {}
    for operation in flatten(loaded.model):
        if not getattr(operation, "weights", None):
            watchers[id(operation)] = (operation, partial(watch, operation, operation.call))
        elif getattr(operation, "kernel", None) is not None:
            watchers[id(operation)] = (operation, partial(count, operation, operation.call))
    specs = [
        tf.TensorSpec(shape, spec.dtype) for shape, spec in zip(shapes, loaded.specs, strict=True)
    ]
    with replaced(watchers):
        run = tf.function(partial(call_model, loaded.model, training=False))
        run.get_concrete_function(*specs)
    return parts, macs[0]


def _ends(x: Any, y: Any) -> dict[str, Any]:
    if not x.shape.rank or not y.shape.rank:
        return {}
    if None in tuple(x.shape) or None in tuple(y.shape)[1:]:
        return {}
    # A stand-in and a reshape to -1 lose the batch size in the trace; nothing else does.
    made = tuple(y.shape)
    made = (x.shape[0] if made[0] is None else made[0], *made[1:])
    return {
        "given": tuple(x.shape),
        "made": made,
        "dtype": x.dtype.name,
        "source": id(x),
        "result": id(y),
    }


def sequences(parts: Sequence[Part], covered: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield positions of consecutive calls that shrink a tensor, longest sequence first."""
    chains: list[tuple[int, ...]] = []
    for place, part in enumerate(parts):
        chain = [place]
        while len(chain) < MAX_STRETCH and part.given and place not in covered:
            last = parts[chain[-1]]
            siblings = (
                i for i in range(last.last + 1, len(parts)) if parts[i].parent == part.parent
            )
            following = next(siblings, -1)
            after = parts[following]
            if following in (-1, *covered) or not after.given or after.source != last.result:
                break
            chain.append(following)
            if len(part.given) >= 3 and math.prod(after.made) < math.prod(part.given):
                chains.append(tuple(chain))
    yield from sorted(chains, key=lambda chain: -len(chain))[:MAX_STRETCHES]


class _Findings:
    """Runs each part once per shape of its input, and caches the result."""

    def __init__(self, loaded: Loaded, forms: Mapping[str, Form] | None) -> None:
        self._forms = forms
        self._batch_is_open = fixed_batch(loaded.specs) is None
        self._code = frozenset(loaded.code)
        self._known: dict[tuple[Any, ...], Finding] = {}
        self.notes: dict[str, str] = {}

    def pool_of(self, parts: Sequence[Part]) -> Pool | None:
        """Return the pool that the parts are, one after another; None if they match no shipped op."""
        first, last = parts[0], parts[-1]
        if not first.given or any(type(part.operation).__name__ == "StandIn" for part in parts):
            return None
        own = len(parts) == 1 and first.operation.name in self._code
        if not own and (math.prod(last.made) >= math.prod(first.given) or len(first.given) < 3):
            return None
        names = tuple(part.operation.name for part in parts)
        key = (*(id(part.operation) for part in parts), first.given[1:], first.dtype)
        if key not in self._known:
            self._known[key] = self._establish(names, parts)
        found = self._known[key]
        if found.form is None or found.note.startswith("its gradient differs"):
            if own:
                self.notes[first.operation.name] = found.note or "no pooling"
            return None
        return Pool(
            names=names,
            kind=", ".join(type(part.operation).__name__ for part in parts),
            title=title_of(found.form, first.given, last.made),
            given=first.given,
            made=last.made,
            dtype=first.dtype,
            **msgspec.structs.asdict(found),
        )

    def _establish(self, names: tuple[str, ...], parts: Sequence[Part]) -> Finding:
        first = parts[0]
        if self._forms is not None:
            return Finding(form=self._forms.get(pool_key(names, first.given)))
        # Two instances: enough to detect a mixed batch, and quick to run.
        given = (2, *first.given[1:]) if self._batch_is_open else first.given
        # oneDNN kills the process on an eager maximum over more than the image (tensorflow#125509).
        eager = not any("Max" in type(part.operation).__name__ for part in parts)
        function = partial(run_parts, [part.operation for part in parts])
        own = not self._code.isdisjoint(names)
        found = identify(function, given, first.dtype, eager=eager, explains=own)
        if found.form is None:
            return found
        # A window that divides this image pools as an adaptive one does; at other sizes it does not.
        other = (given[0], *(size + 1 + i for i, size in enumerate(given[1:-1])), given[-1])
        elsewhere = identify(function, other, first.dtype, eager=eager, explains=False)
        if elsewhere.form == found.form or not elsewhere.inputs:
            return found
        return Finding(note="at other sizes it is another function")


def run_parts(operations: Sequence[Any], x: Any, training: bool) -> Any:
    """Apply operations to x, one after another."""
    import keras

    for operation in operations:
        layer = isinstance(operation, keras.layers.Layer)
        x = operation(x, training=training) if layer else operation(x)
    return x
