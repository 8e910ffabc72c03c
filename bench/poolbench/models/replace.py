"""Replace a model's pooling by an implementation, for a race and in a written file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from poolbench.core.axes import Shape
from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import UsageError
from poolbench.core.registry import REGISTRY
from poolbench.models import config as files
from poolbench.models.find import Model, call_model, run_parts
from poolbench.models.foreign import custom_classes
from poolbench.models.pools import Pool
from poolbench.models.probe import identify
from poolbench.models.zoo import Source, register_layers, revive, substitutes
from poolbench.worker.check import compare as compare_arrays
from poolbench.worker.session import Session

Call = Callable[..., Any]


def build_call(candidate: Candidate, pool: Pool, case: Case) -> Call:
    """Return the candidate as an operation's call: x -> y, shaped as the pool's."""
    assert pool.form is not None
    build = candidate.build(case)
    layout, view = pool.form.layout(pool.given), pool.form.is_view(pool.given)

    def call(x: Any, *_: Any, **__: Any) -> Any:
        import tensorflow as tf

        y = build(tf.reshape(x, layout) if view else x)
        return y if tuple(y.shape) == pool.made else tf.reshape(y, pool.made)

    return call


def replacements(
    model: Model, wanted: Mapping[str, str], **fields: Any
) -> dict[int, tuple[Any, Call]]:
    """Return what `find.replaced` takes to have each op computed as wanted.

    The first operation of a sequence hands its input on to the last, which computes all of it; what lies between is
    left to the graph's dead-code elimination.

    Args:
        model: whose pools.
        wanted: op to candidate; an op that is not named stays as it is.
        fields: of the pools' cases: direction, mode, device, ...
    """
    by_shape: dict[int, dict[Shape, Call]] = {}
    ends: dict[int, tuple[Any, Any]] = {}
    for pool, parts in zip(model.pools, model.parts, strict=True):
        if pool.op not in wanted:
            continue
        candidate = REGISTRY.candidates[pool.op, wanted[pool.op]]
        calls = by_shape.setdefault(id(parts[-1]), {})
        ends[id(parts[-1])] = (parts[0], parts[-1])
        # A shared layer may be called on inputs of several shapes: a builder knows only one.
        calls[pool.given] = build_call(candidate, pool, pool.case(**fields))
    found: dict[int, tuple[Any, Call]] = {}
    for key, calls in by_shape.items():
        first, last = ends[key]
        source: list[Any] = []
        if first is not last:
            found[id(first)] = (first, partial(_hand_on, source, first.call))
        found[key] = (last, partial(_dispatch, calls, last.call, source))
    return found


def _hand_on(source: list[Any], call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    source[:] = [x]
    return call(x, *args, **kwargs)


def _dispatch(
    calls: Mapping[Shape, Call], original: Call, source: list[Any], x: Any, *args: Any, **kwargs: Any
) -> Any:  # fmt: skip
    given = source[0] if source else x
    call = calls.get(tuple(given.shape))
    return original(x, *args, **kwargs) if call is None else call(given)


def layer_of(candidate: Candidate, pool: Pool, original: Any, *, open_sizes: bool) -> Any | None:
    """Return the candidate as a Keras layer that can be saved and loaded in safe mode; None if it is none.

    It keeps the name, the dtype policy and the output shape of what it replaces.

    Args:
        candidate: of the pool's op.
        pool: that it replaces.
        original: the operation that it replaces.
        open_sizes: whether the model leaves sizes open, so that no layer may fix them.
    """
    import keras

    assert pool.form is not None
    built = candidate.build(pool.case())
    if not isinstance(built, keras.layers.Layer):
        return None
    entries = list(files.layer_entries(keras.saving.serialize_keras_object(built)))
    if not all(files.is_known(e, legacy=False, classes=frozenset()) for e in entries):
        return None
    if not isinstance(built, keras.Sequential):
        built = _fitted(built, pool, original)
        if not pool.form.is_view(pool.given):
            try:
                if tuple(built.compute_output_shape(pool.given)) == pool.made:
                    return built
            except ValueError:
                return None
    if open_sizes or pool.form.merged:
        return None
    return _wrapped(built, pool)


def _fitted(layer: Any, pool: Pool, original: Any) -> Any:
    """Return the layer with the name, the dtype policy and the kept dimensions of the original."""
    config = dict(layer.get_config())
    config["name"] = pool.layer
    policy = getattr(original, "dtype_policy", None)
    if policy is not None:
        config["dtype"] = policy
    if "keepdims" in config and len(pool.made) == len(pool.given):
        config["keepdims"] = True
    return type(layer).from_config(config)


def _wrapped(layer: Any, pool: Pool) -> Any:
    """Return the layer, or those of a Sequential model, between the reshapes that its form needs."""
    import keras

    assert pool.form is not None
    layers = [keras.Input(pool.given[1:], dtype=pool.dtype)]
    if pool.form.is_view(pool.given):
        layers.append(keras.layers.Reshape(pool.form.layout(pool.given)[1:], dtype=pool.dtype))
    layers += layer.layers if isinstance(layer, keras.Sequential) else [layer]
    wrapped = keras.Sequential(layers, name=pool.layer)
    if tuple(wrapped.output_shape[1:]) != pool.made[1:]:
        wrapped.add(keras.layers.Reshape(pool.made[1:], dtype=pool.dtype))
    return wrapped


def pastable(model: Model, pool: Pool, original: Any) -> dict[str, str]:
    """Return the candidates that can be written into the model instead of the pool, with what to write."""
    found = {}
    for name, candidate in REGISTRY.of(pool.op).items():
        if candidate.form == "layer" and candidate.builtin and "tensorflow" in candidate.backends:
            layer = layer_of(candidate, pool, original, open_sizes=has_open_sizes(model))
            if layer is not None:
                found[name] = source_text(layer)
    return found


def has_open_sizes(model: Model) -> bool:
    """Tell whether an input of the model leaves a size other than the batch open."""
    return any(None in spec.shape[1:] for spec in model.loaded.specs)


def source_text(layer: Any) -> str:
    """Return Python that makes the layer: 'DepthMaxPool2D(pool_size=3, name='dp')'."""
    import keras

    if isinstance(layer, keras.Sequential):
        inner = "".join(f"    {source_text(x)},\n" for x in layer.layers)
        return f"keras.Sequential([\n{inner}], name={layer.name!r})"
    kind = type(layer)
    config = layer.get_config()
    signature = inspect.signature(kind.__init__).parameters
    words = []
    for name, parameter in signature.items():
        value = config.get(name)
        value = tuple(value) if isinstance(value, list) else value
        if name in config and name not in ("name", "dtype") and value != parameter.default:
            if name == "strides" and value == config.get("pool_size"):
                continue
            if name == "data_format" and value == keras.config.image_data_format():
                continue
            words.append(f"{name}={value!r}")
    policy = layer.dtype_policy.name
    if policy != keras.config.dtype_policy().name:
        words.append(f"dtype={policy!r}")
    own = not kind.__module__.startswith("keras.")
    prefix = "" if own else "keras.layers."
    return f"{prefix}{kind.__name__}({', '.join([*words, f'name={layer.name!r}'])})"


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was written with replacements.

    Attributes:
        layers: names of what was replaced.
        inputs, gradients: the fewest inputs on which values and gradients of a replacement were compared.
        code: names of layers that still need code, so that safe mode does not load the file.
    """

    layers: tuple[str, ...]
    inputs: int
    gradients: int
    code: tuple[str, ...] = ()


def write(
    model: Model, source: Source, chosen: Mapping[str, str], target: Path, inputs: Sequence[Any]
) -> Written:
    """Write the model with the chosen candidates in place, and compare its predictions.

    Args:
        model: that was loaded.
        source: where from.
        chosen: op to candidate.
        target: a .keras file.
        inputs: to predict on.

    Raises:
        UsageError: nothing can be replaced, or the result is not equal.
    """
    import keras

    saved = keras.saving.serialize_keras_object(model.model)
    done: dict[str, tuple[int, int]] = {}
    for pool, parts in zip(model.pools, model.parts, strict=True):
        if pool.op not in chosen or pool.layer in done:
            continue
        candidate = REGISTRY.candidates[pool.op, chosen[pool.op]]
        layer = layer_of(candidate, pool, parts[-1], open_sizes=has_open_sizes(model))
        if layer is None:
            continue
        proof = identify(partial(run_parts, [layer]), pool.given, pool.dtype)
        if proof.form != pool.form or not (proof.gradients or REGISTRY.ops[pool.op].vjp is None):
            raise UsageError(
                f"the replacement of `{files.clean(pool.layer)}` is not equal to it: {proof.note}"
            )
        entry = keras.saving.serialize_keras_object(layer)
        if _swap(saved, [part.name for part in parts], entry):
            done[pool.layer] = (proof.inputs, proof.gradients)
    if not done:
        raise UsageError("no layer of the model's config can be replaced; change its code instead")
    classes = custom_classes(source.custom)
    left = files.find_unknown(saved, classes=frozenset(classes))
    objects = {**classes, **substitutes(saved, source, [])}
    new = revive(saved, objects, [], [layer for layer in left if layer.kind == "Lambda"])
    new.set_weights(model.model.get_weights())
    difference = compare(predict(model.model, inputs), predict(new, inputs))
    narrow = any(pool.dtype in ("float16", "bfloat16") for pool in model.pools)
    if not difference <= (2e-2 if narrow else 1e-4):
        raise UsageError(
            f"the model with the replacement predicts otherwise, by {difference:.2g} of the largest "
            "value; it is not written"
        )
    new.save(target)
    code = [layer.name for layer in left] + [name for name in model.loaded.code if name not in done]
    return Written(
        layers=tuple(done),
        inputs=min(found[0] for found in done.values()),
        gradients=min(found[1] for found in done.values()),
        code=tuple(dict.fromkeys(code)),
    )


def _swap(saved: dict[str, Any], names: Sequence[str], entry: dict[str, Any]) -> bool:
    """Put a serialised layer in the place of the operations of these names, wherever they are."""
    for model in files.layer_entries(saved):
        inner = model["config"]
        if names[-1] == files.name_of(inner.get("layer") or {"config": {}}) and len(names) == 1:
            inner["layer"] = entry
            return True
        layers = inner.get("layers")
        if not isinstance(layers, list):
            continue
        own = [files.name_of(layer) for layer in layers]
        if not set(names) <= set(own):
            continue
        first, last = own.index(names[0]), own.index(names[-1])
        new = {**entry, "name": names[-1]}
        if "inbound_nodes" in layers[last]:  # functional: what lies between is left without a use
            # Without arguments that only the replaced operation took.
            new["inbound_nodes"] = [
                {**node, "kwargs": {}} if isinstance(node, dict) else node
                for node in layers[first]["inbound_nodes"]
            ]
            layers[last] = new
        else:
            layers[first : last + 1] = [new]
        return True
    return False


def predict(model: Any, inputs: Sequence[Any]) -> list[Any]:
    """Return a model's outputs on inputs, as arrays; in eager mode if graph mode fails."""
    import tensorflow as tf

    run = partial(call_model, model, training=False)
    arguments = [tf.constant(x) for x in inputs]
    try:
        found = tf.function(run)(*arguments)
    except (ValueError, tf.errors.OpError):
        found = run(*arguments)
    arrays = (np.asarray(y) for y in found)
    # NumPy's files do not hold a bfloat16.
    return [y.astype("float32") if str(y.dtype) == "bfloat16" else y for y in arrays]


def compare(ones: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the largest difference over the largest finite value; inf where shapes or infinities differ."""
    if len(ones) != len(others):
        return math.inf
    sizes = [float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) or 1.0 for one in ones]
    errors = [
        compare_arrays(other, one, size=size).relative
        for one, other, size in zip(ones, others, sizes, strict=True)
    ]
    return max(errors, default=0.0)


def check_written(session: Session, target: str, predictions: str) -> float:  # noqa: ARG001 (a task)
    """Load a written model in safe mode and return how far its predictions are from the saved ones."""
    import keras

    register_layers()
    with np.load(predictions) as kept:
        inputs = [kept[name] for name in kept.files if name.startswith("x")]
        expected = [kept[name] for name in kept.files if name.startswith("y")]
    model = keras.saving.load_model(target, compile=False, safe_mode=True)
    return compare(expected, predict(model, inputs))
