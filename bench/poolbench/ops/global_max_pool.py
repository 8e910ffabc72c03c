"""Global max pooling: the maximum of each feature map, (N, T, C) or (N, H, W, C) -> (N, C)."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, Op, Sweep, product, register, shape_axis, ties_within
from poolbench.ops import shared
from poolbench.ops.shared import channels_last, code_candidate, function_snippet, spatial_axes

Array = np.ndarray[Any, Any]
OP = "global_max_pool"
SHAPE, SMALL, SEQUENCE = (8, 56, 56, 96), (1, 7, 7, 2048), (32, 512, 256)
MAIN = ("layer-global_max_pool", "reduce_max", "max_pool2d", "max-of-maxes", "joined-reduce_max")

DEFAULT = Sweep(
    base={"shape": SHAPE},
    parts=(
        product(mode=["eager", "graph", "xla"]),
        product(candidates=MAIN, direction=["training"], mode=["graph", "xla"]),
        product(candidates=MAIN, mode=["graph", "xla"], shape=[SMALL, SEQUENCE]),
        product(candidates=MAIN, direction=["training"], dtype=["float16"], mode=["graph", "xla"]),
        product(candidates=MAIN, direction=["training"], distribution=["relu"]),
    ),
)
QUICK = Sweep(base={"shape": (8, 28, 28, 96)}, parts=product(mode=["graph", "xla"]))
FULL = Sweep(
    base={"shape": SHAPE},
    parts=(
        product(
            shape=[SHAPE, (32, 56, 56, 96), SMALL, (32, 7, 7, 2048), SEQUENCE],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
        ),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
        product(mode=["eager", "graph", "xla"], threads=[1]),
    ),
)


def reference(case: Case, x: Array) -> Array:
    """Return y, the maximum over all positions."""
    y: Array = x.max(axis=spatial_axes(case))
    return y


def vjp(case: Case, dy: Array, x: Array) -> tuple[Array]:
    """Return dx: dy at each map's maximum, split equally among elements that tie for it."""
    axes = spatial_axes(case)
    hit = x == x.max(axis=axes, keepdims=True)
    return (hit * np.expand_dims(dy, axes) / np.maximum(hit.sum(axis=axes, keepdims=True), 1),)


register(
    Op(
        name=OP,
        title="Global max pooling",
        axes=(shape_axis("shape", SHAPE), *shared.IMAGE_AXES[1:]),
        inputs=lambda case: {"x": shared.image_spec(case)},
        reference=reference,
        vjp=vjp,
        check_gradient=ties_within(lambda a, case: a.sum(axis=spatial_axes(case))),
        tolerance=shared.no_error,
        baseline=MAIN[0],
        also_compare_to=("reduce_max",),
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
        builtin=True,
    )
)


@code_candidate(OP, "layer-global_max_pool", form="layer", framework="keras")
def layer_global_max_pool(case: Case) -> str:
    """keras.layers.GlobalMaxPooling1D or 2D."""
    name = f"GlobalMaxPooling{len(case.shape) - 2}D"
    return f"import keras\n\npool = keras.layers.{name}({', '.join(shared.layer_words(case))})\n"


@code_candidate(OP, "reduce_max")
def reduce_max(case: Case) -> str:
    """tf.reduce_max over all positions."""
    return function_snippet(f"return tf.reduce_max(x, axis={spatial_axes(case)})")


@code_candidate(
    OP,
    "max_pool2d",
    failures=(shared.CHANNELS_LAST_ONLY, shared.narrow_window(lambda case: case.shape[1:-1])),
)
def max_pool2d(case: Case) -> str:
    """tf.nn.max_pool2d with a window over the whole map."""
    first = 1 if channels_last(case) else 2
    layout = "" if channels_last(case) else ', "NCHW"'
    return function_snippet(
        *([f"x = tf.expand_dims(x, {first})"] if len(case.shape) == 3 else []),
        f"window = x.shape[{first}:{first + 2}]",
        f'y = tf.nn.max_pool2d(x, window, window, "VALID"{layout})',
        f"return tf.squeeze(y, {(first, first + 1)})",
    )


@code_candidate(OP, "max-of-maxes")
def max_of_maxes(case: Case) -> str:
    """The maximum along one axis after the other, the last first."""
    lines = [f"x = tf.reduce_max(x, axis={axis})" for axis in reversed(spatial_axes(case))]
    return function_snippet(*lines, "return x")


@code_candidate(OP, "joined-reduce_max")
def joined_reduce_max(case: Case) -> str:
    """tf.maximum of up to 16 equal parts of the map, then tf.reduce_max."""
    axes = spatial_axes(case)
    parts = max(n for n in range(1, 17) if case.shape[1] % n == 0)
    return function_snippet(
        f"parts = tf.split(x, {parts}, axis={axes[0]})",
        f"return tf.reduce_max(functools.reduce(tf.maximum, parts), axis={axes})",
        imports="functools\nimport tensorflow as tf",
    )


@code_candidate(OP, "keras-ops", framework="keras")
def keras_ops(case: Case) -> str:
    """keras.ops.max: any Keras backend."""
    return function_snippet(f"return keras.ops.max(x, axis={spatial_axes(case)})", imports="keras")
