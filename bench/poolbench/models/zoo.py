"""Load or build a model in a worker: from a file, from keras.applications, or as the textbook model.

Code of a file runs only where `Source.trust` allows it. A layer that needs code is otherwise replaced by a stand-in
of the same output shape, so that the layers that are known can still be found.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.candidate import OWN_LAYERS
from poolbench.core.errors import UsageError
from poolbench.models import config as files
from poolbench.models.config import InputOption, InputSpec, Unknown
from poolbench.models.foreign import TrustedLambda, custom_classes, make_stand_in
from poolbench.models.probe import Form

APPLICATIONS = {
    "resnet50": "ResNet50",
    "mobilenetv2": "MobileNetV2",
    "efficientnetb0": "EfficientNetB0",
}
# The registered names under which the loader finds what takes a layer's place.
STAND_IN, TRUSTED = "poolbench>StandIn", "poolbench>TrustedLambda"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A model's source as plain data for a worker.

    Attributes:
        kind: a key of `BUILDERS`: 'textbook', 'head', 'application' or 'file'.
        name: of the keras.applications network, or the file's path.
        image: (H, W, C) of an application or the textbook's model; None: the model's own.
        inputs: sizes that the file leaves open.
        trust: whether Lambdas of the file may run.
        custom: Python files with the classes that the file needs.
        forms: what its pools are, by `Pool.key`, where that has been established; None: it has not.
    """

    kind: str
    name: str = ""
    image: tuple[int, int, int] | None = None
    inputs: tuple[InputOption, ...] = ()
    trust: bool = False
    custom: tuple[str, ...] = ()
    forms: dict[str, Form] | None = None


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A model in this process.

    Attributes:
        model: the Keras model.
        state: its variables and their values as they were loaded; a training step changes moving averages and seeds.
        specs: of its inputs.
        unknown: the layers that stand-ins replace; the model then does not compute what the file's does.
        code: names of the Lambdas that run by `trust`, and of the user's own layers.
    """

    model: Any
    specs: tuple[InputSpec, ...]
    unknown: tuple[Unknown, ...] = ()
    code: tuple[str, ...] = ()
    state: tuple[tuple[Any, Any], ...] = ()

    def reset(self) -> None:
        """Give the model the state in which it was loaded."""
        for variable, value in self.state:
            variable.assign(value)


def build_textbook(source: Source) -> Any:
    """Build convolutions with ReLU and pooling, a depthwise pool and a dense head.

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
    """Build a keras.applications network with random weights; nothing is downloaded."""
    import keras

    build = getattr(keras.applications, APPLICATIONS[source.name])
    return build(weights=None, input_shape=source.image)


def build_head(source: Source) -> Any:
    """Build the head of a network: from the last global pool's input to the classes."""
    import keras

    network = build_application(source)
    pools = [x for x in network.layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    head = keras.Model(pools[-1].input, network.output)
    return type(head).from_config(head.get_config())


BUILDERS: dict[str, Callable[[Source], Any]] = {
    "textbook": build_textbook,
    "application": build_application,
    "head": build_head,
}


# The model that this process loaded last, by its source: it is described and raced several times.
_last: dict[Source, Loaded] = {}


def load(source: Source) -> Loaded:
    """Return the source's model in the state of its file.

    Raises:
        UsageError: the file cannot be loaded.
    """
    import keras

    key = msgspec.structs.replace(source, forms=None)
    if key not in _last:
        _last.clear()
        # One initialisation in every process: outputs can be compared.
        keras.utils.set_random_seed(0)
        if source.kind == "file":
            loaded = load_file(source)
        else:
            model = BUILDERS[source.kind](source)
            loaded = Loaded(model=model, specs=input_specs(model, {}))
        state = tuple((variable, variable.numpy()) for variable in loaded.model.variables)
        _last[key] = msgspec.structs.replace(loaded, state=state)
    _last[key].reset()
    return _last[key]


def load_file(source: Source) -> Loaded:
    """Return a user's model, with stand-ins for what needs code that may not run.

    Raises:
        UsageError: Keras cannot load it.
    """
    register_layers()
    path = Path(source.name)
    classes = custom_classes(source.custom)
    config = files.read_file(path)
    legacy = config is None or files.keras_version(path).startswith("2.")
    saved, shipped = config or read_h5_config(path), dict[str, Any]()
    if legacy:
        # The classes of an HDF5 file have no modules, but those of its dtypes have.
        saved, shipped = name_operations(as_legacy(saved) if config else saved)
    known = frozenset(classes) | shipped.keys() | (keras_classes() if legacy else frozenset())
    unknown = files.find_unknown(saved, legacy=legacy, classes=known)
    runs = [layer for layer in unknown if layer.kind == "Lambda" and source.trust]
    left = [layer for layer in unknown if layer not in runs]
    if root := next((layer for layer in left if layer.root), None):
        raise UsageError(
            f"{files.clean(path.name)} is a `{files.clean(root.kind)}`, a class of your own: "
            "give the file that defines it with --custom FILE"
        )
    objects = {**shipped, **classes, **substitutes(saved, source, left)}
    try:
        if legacy:
            # The loader of HDF5 files, which has no public name for a config by itself.
            from keras.src.legacy.saving.saving_utils import model_from_config

            model = model_from_config(copy.deepcopy(saved), custom_objects=objects)
        else:
            model = revive(saved, objects, left, runs)
        if not left:
            model.load_weights(str(path))
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 (what Keras raises on a file is not documented)
        raise UsageError(_refusal(path, saved, error)) from None
    code = [layer.name for layer in runs] + [
        files.name_of(entry)
        for entry in files.layer_entries(saved)
        if str(entry.get("class_name")) in classes and entry is not saved
    ]
    return Loaded(
        model=model,
        specs=input_specs(model, saved),
        unknown=tuple(left),
        code=tuple(dict.fromkeys(code)),
    )


def _refusal(path: Path, saved: Mapping[str, Any], error: BaseException) -> str:
    """Say in one line why Keras does not load a file, and what wrote it."""
    import keras

    name = files.clean(path.name)
    version = files.keras_version(path) or files.clean(saved.get("keras_version", ""), 20)
    if version.startswith(("1.", "2.")):
        return (
            f"{name} was written by Keras {version}, and Keras {keras.__version__} cannot load it "
            f"({files.brief(error)}); load it with TF_USE_LEGACY_KERAS=1 and tf_keras, and rebuild it in Keras 3"
        )
    # Keras writes HDF5 files of models with operations in them that it does not read.
    hint = "; save the model as .keras" if path.suffix in (".h5", ".hdf5") else ""
    return f"Keras {keras.__version__} cannot load {name}: {files.brief(error)}{hint}"


def as_legacy(value: Any) -> Any:
    """Return a config of Keras 2 as its HDF5 files have it, which Keras 3 reads."""
    if isinstance(value, list):
        return [as_legacy(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = ("module", "registered_name", "build_config", "compile_config")
    return {key: as_legacy(item) for key, item in value.items() if key not in dropped}


def name_operations(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a legacy config whose operations have names of their own, and Keras's classes that it does not find.

    Legacy files call `x + 3`, an operation, by the name of the layer Add; its config alone has no dtype. LayerScale is
    a layer of one of Keras's applications.
    """
    from keras.src.applications.convnext import LayerScale
    from keras.src.ops import math, nn, numpy

    saved, found = copy.deepcopy(saved), dict[str, Any](LayerScale=LayerScale)
    for entry in files.layer_entries(saved):
        kind = str(entry.get("class_name"))
        owner = next((module for module in (numpy, nn, math) if hasattr(module, kind)), None)
        if owner is not None and set(entry["config"]) == {"name"}:
            entry["class_name"] = f"operation>{kind}"
            found[entry["class_name"]] = getattr(owner, kind)
    return saved, found


def read_h5_config(path: Path) -> dict[str, Any]:
    """Return the config of a model in an HDF5 file, and which Keras wrote it.

    Raises:
        UsageError: the file holds no model.
    """
    import h5py

    name = files.clean(path.name)
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
            version = str(file.attrs.get("keras_version", ""))
            what = "weights only" if len(file) else "no model"
    except (OSError, ValueError, KeyError, RuntimeError):
        raise UsageError(f"{name} is a broken HDF5 file; {files.EXPECTED}") from None
    if text is None:
        raise UsageError(f"{name} holds {what}; {files.EXPECTED}")
    if len(text) > files.MAX_CONFIG_NBYTES:
        raise UsageError(f"{name} has a config of over {files.MAX_CONFIG_NBYTES} bytes")
    config = files.parse_config(text, name)
    return {**config, "keras_version": version}


def register_layers() -> None:
    """Register the reusable layers, so that Keras loads them in safe mode."""
    for module in OWN_LAYERS.values():
        importlib.import_module(module)


def keras_classes() -> frozenset[str]:
    """Return the names of Keras's layers and models, by which legacy files call them."""
    import keras

    found = {name for name in dir(keras.layers) if isinstance(getattr(keras.layers, name), type)}
    return frozenset(found | {"Model", "Functional", "Sequential", *OWN_LAYERS}) - {"Lambda"}


def substitutes(
    saved: dict[str, Any], source: Source, unknown: list[Unknown]
) -> dict[str, type[Any]]:
    """Return the classes that load in place of Lambdas and unknown classes, by their registered names."""
    stand_in = make_stand_in(files.consumed_shapes(saved))
    found: dict[str, type[Any]] = {TRUSTED: TrustedLambda, STAND_IN: stand_in}
    # Legacy files name a class only.
    found |= {layer.kind: stand_in for layer in unknown}
    if source.trust:
        found["Lambda"] = TrustedLambda
    return found


def revive(
    saved: dict[str, Any], objects: dict[str, Any], unknown: list[Unknown], runs: list[Unknown]
) -> Any:
    """Return the model of a config, unknown layers replaced by stand-ins and trusted Lambdas made to run."""
    import keras

    config = copy.deepcopy(saved)
    config.pop("compile_config", None)  # its loss may be code, and is not used
    registered = {(x.name, x.kind): STAND_IN for x in unknown} | {
        (x.name, x.kind): TRUSTED for x in runs
    }
    for entry in files.layer_entries(config):
        name = registered.get((files.name_of(entry), str(entry.get("class_name"))))
        if name is not None:
            entry.update(registered_name=name, module=None)
            entry.pop("build_config", None)
            entry["config"].setdefault("name", files.name_of(entry))
    return keras.saving.deserialize_keras_object(config, custom_objects=objects, safe_mode=True)


def input_specs(model: Any, saved: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """Return the model's inputs; of a subclassed model, as the file says that it was built.

    Raises:
        UsageError: neither tells them.
    """
    import keras

    if getattr(model, "inputs", None):
        return tuple(
            InputSpec(name=str(x.name), shape=tuple(x.shape), dtype=keras.backend.standardize_dtype(x.dtype))
            for x in model.inputs
        )  # fmt: skip
    shape = (saved.get("build_config") or {}).get("input_shape")
    if isinstance(shape, list) and shape and not isinstance(shape[0], (list, dict)):
        return (InputSpec(name="input", shape=tuple(shape)),)
    raise UsageError(
        "the model's inputs are not in the file; call it once on data before it is saved"
    )


def flatten(model: Any) -> list[Any]:
    """Return every layer of a model and every operation of its functional graphs, each once."""
    layers = [model, *model._flatten_layers(include_self=False)]  # noqa: SLF001 (Keras has no public one)
    found = {id(x): x for layer in layers for x in (layer, *getattr(layer, "_operations", ()))}
    del found[id(model)]
    return list(found.values())
