"""Whole models in a worker: built or read, their pooling layers found, a implementation put in place.

TensorFlow and Keras live here, inside functions. A implementation is put in place by replacing the `call` of
a layer object while a step is traced: the model stays one, with one set of weights, whether Sequential,
functional, nested or subclassed, and every step that is raced is traced from it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.axes import Shape
from poolbench.core.candidate import Candidate
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError
from poolbench.core.registry import REGISTRY

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

Call = Callable[..., Any]
DEPTH, GLOBAL = "depth_max_pool", "global_avg_pool"
APPLICATIONS = {
    "resnet50": "ResNet50",
    "mobilenetv2": "MobileNetV2",
    "efficientnetb0": "EfficientNetB0",
}


class Mend(msgspec.Struct, frozen=True, kw_only=True):
    """A layer of a file that Keras will not load, and what it is replaced by.

    Attributes:
        layer: its name.
        op: what it spells.
        pool_size: window along the depth; None for a global pool.
        implementation: the candidate that the layer was; '' where that is not known.
    """

    layer: str
    op: str
    pool_size: int | None = None
    candidate: str = ""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, as plain data that a worker can be sent.

    Attributes:
        kind: a key of `BUILDERS`: 'textbook', 'head', 'application' or 'file'.
        name: of the keras.applications network, or the file's path.
        image: (H, W, C) for what the model leaves open, and of an application; None: the model's own.
        mends: layers of the file that are replaced before it is loaded (see poolbench.models.advise).
    """

    kind: str
    name: str = ""
    image: tuple[int, int, int] | None = None
    mends: tuple[Mend, ...] = ()

    @property
    def original(self) -> dict[str, str]:
        """Layer name to the implementation that it had before it was mended."""
        return {mend.layer: mend.candidate for mend in self.mends if mend.candidate}


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a pooling layer in a model.

    Attributes:
        layer: the layer's name.
        kind: its class.
        op: the op that it spells.
        shape: (N, H, W, C) of its input.
        dtype: of its input.
        data_format: as in Case.
        pool_size: window along the depth; None for a global pool.
        padding: as in Case; None for a global pool.
        keepdims: whether a global pool keeps H and W as 1.
    """

    layer: str
    kind: str
    op: str
    shape: Shape
    dtype: str = "float32"
    data_format: str = "channels_last"
    pool_size: int | None = None
    padding: str | None = None
    keepdims: bool = False

    def case(self, **fields: Any) -> Case:
        """The op's case that this call is."""
        return make_case(
            op=self.op,
            shape=self.shape,
            dtype=self.dtype,
            data_format=self.data_format,
            pool_size=self.pool_size,
            padding=self.padding,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and what a symbolic run of it on inputs of fixed sizes told.

    Attributes:
        model: the Keras model.
        shapes: of its inputs, with the batch size.
        pools: the calls of its pooling layers, in the order of the run.
        macs: multiplications and additions of its dense and convolutional layers in one forward call.
        layers: the layer object of each pool.
    """

    model: Any
    shapes: tuple[Shape, ...]
    pools: tuple[Pool, ...] = ()
    layers: tuple[Any, ...] = field(default=(), repr=False)
    macs: float = 0.0

    def of(self, op: str) -> list[int]:
        """Places of the op's pools in `pools`."""
        return [i for i, pool in enumerate(self.pools) if pool.op == op]


def build_textbook(source: Source) -> Any:
    """Convolutions with ReLU and pooling, the image smaller and deeper; a depth pool; a dense head.

    (N, 32, 32, 3) unless the source says otherwise, to 10 classes.
    """
    import keras

    from poolbench.layers import DepthMaxPool2D

    layers = keras.layers
    convolve = partial(layers.Conv2D, kernel_size=3, padding="same", activation="relu")
    return keras.Sequential(
        [
            keras.Input(source.image or (32, 32, 3)),
            layers.Conv2D(48, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            convolve(96),
            convolve(96),
            DepthMaxPool2D(3, name="depth_pool"),
            layers.MaxPooling2D(),
            convolve(192),
            layers.GlobalAveragePooling2D(name="global_pool"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def build_application(source: Source) -> Any:
    """A keras.applications network with random weights; nothing is downloaded."""
    import keras

    build = getattr(keras.applications, APPLICATIONS[source.name])
    return build(weights=None, input_shape=source.image)


@cache
def _head_config(name: str, image: tuple[int, int, int] | None) -> tuple[type[Any], dict[str, Any]]:
    # The network is built once a process for its head's sake: a head is raced in many cases.
    import keras

    network = build_application(Source(kind="application", name=name, image=image))
    places = [i for i, x in enumerate(network.layers) if _known(x) is not None]
    first = network.layers[places[-1]]
    head = keras.Model(first.input, network.output)
    return type(head), head.get_config()


def build_head(source: Source) -> Any:
    """The head of a network: from the last global pool's input to the classes."""
    kind, config = _head_config(source.name, source.image)
    return kind.from_config(copy.deepcopy(config))  # Keras writes into what it is given


def read_file(source: Source) -> Any:
    """A user's model, mended, read in safe mode; of custom objects only poolbench.layers is known."""
    import keras

    import poolbench.layers

    assert poolbench.layers is not None  # registered by the import
    if not source.mends:
        return keras.saving.load_model(source.name, compile=False, safe_mode=True)
    with tempfile.TemporaryDirectory(prefix="poolbench-") as folder:
        path = Path(folder) / "mended.keras"
        write_mended(Path(source.name), path, source.mends)
        return keras.saving.load_model(path, compile=False, safe_mode=True)


def write_mended(path: Path, target: Path, mends: Sequence[Mend]) -> None:
    """Copy a .keras file with the layers of `mends` replaced; weights stay, for pools have none."""
    by_name = {mend.layer: mend for mend in mends}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            if member == "config.json":
                config = json.loads(data)
                for entry in layer_entries(config):
                    mend = by_name.get(entry["config"].get("name", ""))
                    if mend is not None:
                        entry.update(mended_entry(mend))
                data = json.dumps(config).encode()
            new.writestr(member, data)


def layer_entries(config: Any) -> Iterator[dict[str, Any]]:
    """Every serialised layer in a model's config.json, nested ones too, in order."""
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        return
    yield config
    layers = config["config"].get("layers")
    for entry in layers if isinstance(layers, list) else ():
        yield from layer_entries(entry)


def mended_entry(mend: Mend) -> dict[str, Any]:
    """The serialised layer that takes a mended one's place: what `advice` says to write."""
    import keras

    from poolbench.layers import DepthMaxPool2D

    layer = (
        keras.layers.GlobalAveragePooling2D(name=mend.layer)
        if mend.op == GLOBAL
        else DepthMaxPool2D(mend.pool_size or 1, name=mend.layer)
    )
    entry = keras.saving.serialize_keras_object(layer)
    return {key: entry[key] for key in ("module", "class_name", "config", "registered_name")}


BUILDERS: dict[str, Callable[[Source], Any]] = {
    "textbook": build_textbook,
    "application": build_application,
    "head": build_head,
    "file": read_file,
}


def load(source: Source, batch: int) -> Model:
    """The source's model with its sizes fixed and its pooling layers found.

    Raises:
        UsageError: an input leaves sizes open that `--input` does not give.
    """
    import keras

    keras.utils.set_random_seed(0)  # one initialisation in every process: outputs can be compared
    model = BUILDERS[source.kind](source)
    image = None if source.kind == "head" else source.image  # there it is the whole network's
    shapes = tuple(fix_shape(tensor.shape, batch, image) for tensor in model.inputs)
    return find_pools(model, shapes)


def fix_shape(shape: Sequence[int | None], batch: int, image: Shape | None) -> Shape:
    """An input's shape with the batch size, and open sizes taken from `image`.

    Raises:
        UsageError: sizes stay open, or `image` contradicts one that is given.
    """
    own = tuple(shape)[1:]
    wanted = image if image is not None and len(image) == len(own) else own
    for size, other in zip(own, wanted, strict=True):
        if size is not None and size != other:
            raise UsageError(
                f"the model takes {_sizes(own)}; --input {_sizes(wanted)} does not fit it"
            )
    if any(size is None for size in wanted):
        raise UsageError(
            f"the model's input {_sizes(own)} leaves sizes open; give them: --input 224x224x3"
        )
    return (batch, *(int(size) for size in wanted if size is not None))


def _sizes(shape: Sequence[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def flatten(model: Any) -> Iterator[Any]:
    """Every layer of a model, nested ones too, each once."""
    seen: set[int] = set()
    for layer in model._flatten_layers(include_self=False):  # noqa: SLF001 (Keras has no public one)
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a known layer is: its op and what of the op's axes it fixes."""

    op: str
    data_format: str = "channels_last"
    pool_size: int | None = None
    padding: str | None = None
    keepdims: bool = False


def _known(layer: Any) -> _Known | None:
    """What the layer spells, if it is a pooling layer that we know."""
    import keras

    from poolbench.layers import DepthMaxPool2D

    if isinstance(layer, DepthMaxPool2D):
        if layer.strides != layer.pool_size:
            return None  # windows that overlap: another op
        return _Known(
            op=DEPTH,
            pool_size=layer.pool_size,
            padding=layer.padding,
            data_format=getattr(layer, "data_format", "channels_last"),
        )
    if isinstance(layer, keras.layers.GlobalAveragePooling2D):
        return _Known(op=GLOBAL, data_format=layer.data_format, keepdims=layer.keepdims)
    return None


def find_pools(model: Any, shapes: tuple[Shape, ...]) -> Model:
    """The model with its pools, as a trace of it on inputs of these shapes calls them."""
    known = {id(layer): (layer, what) for layer in flatten(model) if (what := _known(layer))}
    calls: list[tuple[Any, Pool]] = []

    def watch(layer: Any, what: _Known, call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((layer, _pool(layer, what, x)))
        return call(x, *args, **kwargs)

    macs = [0.0]

    def count(layer: Any, call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        if y.shape.rank:  # each output value takes one kernel column of one filter
            column = layer.kernel.shape[: 2 if "Depthwise" in type(layer).__name__ else -1]
            macs[0] += float(np.prod(column)) * float(np.prod(y.shape))
        return y

    watchers = {
        id(layer): (layer, partial(watch, layer, what, layer.call))
        for layer, what in known.values()
    } | {
        id(layer): (layer, partial(count, layer, layer.call))
        for layer in flatten(model)
        if getattr(layer, "kernel", None) is not None and id(layer) not in known
    }
    with replaced(watchers):
        trace(partial(call_model, model, training=False), model, shapes)
    return Model(
        model=model,
        shapes=shapes,
        pools=tuple(pool for _, pool in calls),
        layers=tuple(layer for layer, _ in calls),
        macs=macs[0],
    )


def _pool(layer: Any, what: _Known, x: Any) -> Pool:
    n, *sizes = (int(size) for size in x.shape)
    if what.data_format == "channels_first":
        sizes = [*sizes[1:], sizes[0]]
    return Pool(
        layer=layer.name,
        kind=type(layer).__name__,
        op=what.op,
        shape=(n, *sizes),
        dtype=x.dtype.name,
        data_format=what.data_format,
        pool_size=what.pool_size,
        padding=what.padding,
        keepdims=what.keepdims,
    )


def trace(function: Call, model: Any, shapes: Sequence[Shape]) -> Any:
    """The function's graph on inputs of these shapes, nothing run."""
    import tensorflow as tf

    specs = [
        tf.TensorSpec(shape, tensor.dtype)
        for shape, tensor in zip(shapes, model.inputs, strict=True)
    ]
    return tf.function(function).get_concrete_function(*specs)


def call_model(model: Any, *inputs: Any, training: bool) -> tuple[Any, ...]:
    """The model's outputs, flat."""
    import keras

    # A Sequential model has no `input` before it was called; it takes one tensor as it is.
    single = isinstance(model, keras.Sequential)
    given = inputs[0] if single else keras.tree.pack_sequence_as(model.input, list(inputs))
    return tuple(keras.tree.flatten(model(given, training=training)))


@contextlib.contextmanager
def replaced(calls: Mapping[int, tuple[Any, Call]]) -> Iterator[None]:
    """While it lasts, these layers are called so; `calls` is id(layer) to layer and call."""
    for layer, call in calls.values():
        # Past Keras' __setattr__, which would track what it finds inside.
        layer.__dict__["call"] = call
    try:
        yield
    finally:
        for layer, _ in calls.values():
            layer.__dict__.pop("call", None)


def spell(candidate: Candidate, pool: Pool, case: Case) -> Call:
    """The candidate as a layer's call: x -> y, shaped as that layer's."""
    build = candidate.build(case)

    def call(x: Any, *_: Any, **__: Any) -> Any:
        import tensorflow as tf

        y = build(x)
        return tf.reshape(y, keep_shape(pool)) if pool.keepdims else y

    return call


def keep_shape(pool: Pool) -> Shape:
    """Shape of a global pool's output that keeps H and W as 1."""
    n, _, _, c = pool.shape
    return (n, 1, 1, c) if pool.data_format == "channels_last" else (n, c, 1, 1)


def candidates(
    model: Model, wanted: Mapping[str, str], original: Mapping[str, str], **fields: Any
) -> dict[int, tuple[Any, Call]]:
    """What `replaced` takes, to have each op spelled as wanted and mended layers as they were.

    Args:
        model: whose pools.
        wanted: op to implementation; an op that is not named stays as it is.
        original: layer name to the implementation it had before it was mended.
        fields: of the pools' cases: direction, mode, device, ...
    """
    found: dict[int, tuple[Any, dict[Shape, Call]]] = {}
    for pool, layer in zip(model.pools, model.layers, strict=True):
        name = wanted.get(pool.op) or original.get(pool.layer)
        if name is None:
            continue
        candidate = REGISTRY.candidates[pool.op, name]
        by_shape = found.setdefault(id(layer), (layer, {}))[1]
        # A shared layer may be called on inputs of several shapes: a builder knows only one.
        by_shape[input_shape(pool)] = spell(candidate, pool, pool.case(**fields))
    return {key: (layer, partial(_dispatch, calls)) for key, (layer, calls) in found.items()}


def input_shape(pool: Pool) -> Shape:
    """Shape of the pool's input as it lies in memory."""
    n, h, w, c = pool.shape
    return (n, h, w, c) if pool.data_format == "channels_last" else (n, c, h, w)


def _dispatch(calls: Mapping[Shape, Call], x: Any, *args: Any, **kwargs: Any) -> Any:
    return calls[tuple(x.shape)](x, *args, **kwargs)


def make_inputs(model: Model, seed: int) -> tuple[Array, ...]:
    """Inputs of the model: a tiled random block in [0, 1), as pixels are after scaling."""
    generator = np.random.default_rng(seed)
    return tuple(
        np.resize(generator.random(65537), shape).astype(tensor.dtype)
        for shape, tensor in zip(model.shapes, model.model.inputs, strict=True)
    )


def pool_inputs(model: Model, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """What each pool gets when the model is run on these inputs."""
    import tensorflow as tf

    found: list[Any] = []

    def watch(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(x)
        return call(x, *args, **kwargs)

    def run(*given: Any) -> list[Any]:
        found.clear()
        call_model(model.model, *given, training=False)
        return list(found)

    watchers = {id(layer): (layer, partial(watch, layer.call)) for layer in model.layers}
    with replaced(watchers):
        return tuple(x.numpy() for x in tf.function(run)(*map(tf.constant, inputs)))


def make_step(model: Model, direction: str) -> Call:
    """One step of the model: forward inputs -> outputs; training also updates the weights.

    The training step is forward, backward and an SGD update at a learning rate of zero: all of the
    work is done and the weights stay, so that a thousand steps are alike. The loss is the outputs' mean
    square, for a user's model does not tell its own; it costs nothing beside the rest. It returns the
    outputs and the gradient of the first weight, to which all of the backward pass leads.
    """
    return {"forward": make_inference, "training": make_training}[direction](model)


def make_inference(model: Model) -> Call:
    """Inputs -> outputs."""

    def inference(*inputs: Any) -> tuple[Any, ...]:
        return call_model(model.model, *inputs, training=False)

    return inference


def make_training(model: Model) -> Call:
    """Inputs -> outputs and the first weight's gradient, having updated the weights."""
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.0)
    variables = model.model.trainable_variables
    optimizer.build(variables)

    def training(*inputs: Any) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            outputs = call_model(model.model, *inputs, training=True)
            loss = tf.add_n([tf.reduce_mean(tf.cast(y, tf.float32) ** 2) for y in outputs])
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        optimizer.apply_gradients(pairs)
        return (*outputs, tf.convert_to_tensor(pairs[0][0]))

    return training


def make_alone(
    model: Model, places: Sequence[int], calls: Sequence[Call], copies: int, direction: str
) -> Call:
    """The pools at `places` alone, one after another, each `copies` times on inputs of its own.

    Takes the inputs of pool 0, copy 0, 1, ..., of pool 1, ..., then, in training, as many dy in the
    same order; returns every y, then every dx.
    """
    import tensorflow as tf

    count = len(places) * copies

    def alone(*arguments: Any) -> tuple[Any, ...]:
        outputs: list[Any] = []
        gradients: list[Any] = []
        last: list[Any] = []
        for i, x in enumerate(arguments[:count]):
            # One after another, as in a network: side by side they would share the cores.
            with tf.control_dependencies(last), tf.GradientTape() as tape:
                if direction == "training":
                    tape.watch(x)
                y = calls[i // copies](x)
            outputs.append(y)
            last = [y]
            if direction == "training":
                with tf.control_dependencies(last):
                    dx = tape.gradient(y, x, output_gradients=arguments[count + i])
                if dx is None:
                    raise TypeError(f"no gradient through {model.pools[places[i // copies]].layer}")
                gradients.append(dx)
                last = [dx]
        return (*outputs, *gradients)

    return alone
