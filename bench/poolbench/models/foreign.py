"""Code that a model file needs: the user's classes, trusted Lambdas, and stand-ins for untrusted code."""

from __future__ import annotations

import base64
import binascii
import marshal
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poolbench.core.errors import UsageError
from poolbench.core.registry import load_module
from poolbench.models import config as files
from poolbench.models.config import OpenShape


def custom_classes(paths: tuple[str, ...]) -> dict[str, Any]:
    """Import the user's files and return the Keras classes that they define, by every name they go by.

    Raises:
        UsageError: a file cannot be imported.
    """
    import keras

    found: dict[str, Any] = {}
    for text in paths:
        path = Path(text)
        if path.suffix != ".py" or not path.is_file():
            raise UsageError(
                f"--custom takes a Python file; {files.clean(path.name)} is not readable as one"
            )
        name_of_module = f"poolbench_custom_{path.stem}"
        try:
            module = load_module(path, name_of_module)
        except Exception as error:  # noqa: BLE001 (the user's file may raise anything)
            raise UsageError(
                f"--custom {files.clean(path.name)} cannot be imported: {files.brief(error)}"
            ) from None
        for name, value in vars(module).items():
            if isinstance(value, (type, types.FunctionType)) and value.__module__ == name_of_module:
                found[name] = found[keras.saving.get_registered_name(value)] = value
    return found


def make_stand_in(shapes: Mapping[str, OpenShape]) -> type[Any]:
    """Return a class whose `from_config` makes a layer with the output shape in the file."""
    import keras

    class StandIn(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, output: OpenShape | None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.output_sizes = output

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            name = str(config.get("name", "unknown"))
            return cls(shapes.get(name), name=name)

        def compute_output_shape(self, input_shape: Any = None, **shapes: Any) -> OpenShape:
            first = tuple(input_shape or next(iter(shapes.values())))
            while isinstance(first[0], (tuple, list)):
                first = tuple(first[0])
            if self.output_sizes is None:
                return first
            return (first[0], *self.output_sizes[1:])

        def call(self, inputs: Any, *_: Any, **__: Any) -> Any:
            x = keras.tree.flatten(inputs)[0]
            if self.output_sizes is None:
                return x
            own = self.output_sizes[1:]
            known = [x.shape[i + 1] if i + 1 < len(x.shape) else 1 for i in range(len(own))]
            sizes = [a if b is None else b for a, b in zip(known, own, strict=True)]
            batch = keras.ops.shape(x)[0]
            return keras.ops.zeros((batch, *(size or 1 for size in sizes)), self.compute_dtype)

    return StandIn


class TrustedLambda:
    """Makes a Lambda of a file run: Keras's own loader gives its code no `tf`, `keras` or `np`."""

    @classmethod
    def from_config(cls, config: dict[str, Any], **_: Any) -> Any:
        import keras

        own: dict[str, Any] = {
            key: config[key] for key in ("name", "dtype", "arguments") if key in config
        }
        function = _function_of(config["function"])
        policy = own.get("dtype")
        if isinstance(policy, dict):
            own["dtype"] = keras.saving.deserialize_keras_object(policy)
        shape = config.get("output_shape")
        if isinstance(shape, list):
            own["output_shape"] = tuple(shape)
        return keras.layers.Lambda(function, **own)


def _function_of(saved: Any) -> Callable[..., Any]:
    """Return the function of a saved Lambda.

    Raises:
        UsageError: it is not Python code of this Python version.
    """
    import keras
    import tensorflow as tf

    if isinstance(saved, dict):
        saved = saved.get("config")
    if isinstance(saved, dict):
        saved = (saved.get("code"), saved.get("defaults"), saved.get("closure"))
    if not isinstance(saved, (list, tuple)) or len(saved) != 3 or not isinstance(saved[0], str):
        raise UsageError("a Lambda of a named function needs the file that defines it: --custom")
    text, defaults, closure = saved
    try:
        code = marshal.loads(base64.b64decode(text))  # noqa: S302 (only with --trust)
    except (binascii.Error, ValueError, EOFError, TypeError):
        raise UsageError("the code of a Lambda was written by another version of Python") from None
    names = {
        "tf": tf, "tensorflow": tf, "keras": keras, "np": np, "numpy": np, "ops": keras.ops,
        "layers": keras.layers, "K": keras.backend, "backend": keras.backend,
        "__builtins__": __builtins__,
    }  # fmt: skip
    cells = tuple(types.CellType(value) for value in closure or ())
    return types.FunctionType(code, names, "lambda", tuple(defaults or ()) or None, cells)
