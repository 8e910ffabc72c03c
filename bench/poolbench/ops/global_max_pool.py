"""Global max pooling: the maximum of each feature map, (N, T, C) or (N, H, W, C) -> (N, C)."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, Op, Sweep, product, register, shape_axis, ties_within
from poolbench.ops.shared import (
    CHANNELS_LAST_ONLY,
    IMAGE_AXES,
    function,
    image_spec,
    implementation,
    kernel_layout,
    narrow_window,
    no_error,
    spatial_axes,
)

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


def reference(case: Case, x: Any) -> Any:
    """Return y, the maximum over all positions."""
    return x.max(axis=spatial_axes(case))


def vjp(case: Case, dy: Any, x: Any) -> tuple[Any]:
    """Return dx: dy at each map's maximum, split equally among elements that tie for it."""
    axes = spatial_axes(case)
    hit = x == x.max(axis=axes, keepdims=True)
    return (hit * np.expand_dims(dy, axes) / np.maximum(hit.sum(axis=axes, keepdims=True), 1),)


register(
    Op(
        name=OP, title="Global max pooling", reference=reference, vjp=vjp, tolerance=no_error, builtin=True,
        by_example=True,
        axes=(shape_axis("shape", SHAPE), *IMAGE_AXES[1:]), inputs=lambda case: {"x": image_spec(case)},
        check_gradient=ties_within(lambda a, case: a.sum(axis=spatial_axes(case))),
        further=True, baseline=MAIN[0], also_compare_to=("reduce_max",),
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
    )
)  # fmt: skip


@implementation(op=OP, name=MAIN[0], form="layer")
def layer_global_max_pool(case: Case) -> Any:
    """keras.layers.GlobalMaxPooling1D or 2D."""
    import keras

    if len(case.shape) == 3:
        return keras.layers.GlobalMaxPooling1D(case.data_format, dtype=case.dtype)
    return keras.layers.GlobalMaxPooling2D(case.data_format, dtype=case.dtype)


@function(op=OP, name="reduce_max")
def reduce_max(case: Case, tf: Any, x: Any) -> Any:
    """tf.reduce_max over all positions."""
    return tf.reduce_max(x, spatial_axes(case))


FULL_WINDOW = (CHANNELS_LAST_ONLY, narrow_window(lambda case: case.shape[1:-1]))


@function(op=OP, name="max_pool2d", failures=FULL_WINDOW)
def max_pool2d(case: Case, tf: Any, x: Any) -> Any:
    """tf.nn.max_pool2d with a window over the whole map."""
    first = spatial_axes(case)[0]
    x = tf.expand_dims(x, first) if len(case.shape) == 3 else x
    window = x.shape[first : first + 2]
    y = tf.nn.max_pool2d(x, window, window, "VALID", kernel_layout(case))
    return tf.squeeze(y, (first, first + 1))


@function(op=OP, name="max-of-maxes")
def max_of_maxes(case: Case, tf: Any, x: Any) -> Any:
    """The maximum along the last axis, then along the first."""
    x = tf.reduce_max(x, spatial_axes(case)[-1])
    return tf.reduce_max(x, spatial_axes(case)[0]) if len(case.shape) == 4 else x


@function(op=OP, name="joined-reduce_max")
def joined_reduce_max(case: Case, tf: Any, x: Any) -> Any:
    """tf.maximum of up to 16 equal parts of the map, then tf.reduce_max."""
    import functools

    parts = tf.split(
        x, max(n for n in range(1, 17) if case.shape[1] % n == 0), spatial_axes(case)[0]
    )
    return tf.reduce_max(functools.reduce(tf.maximum, parts), spatial_axes(case))


@implementation(op=OP, name="keras-ops")
def keras_ops(case: Case) -> Any:
    """keras.ops.max: any Keras backend."""
    import keras

    axes = spatial_axes(case)
    return lambda x: keras.ops.max(x, axis=axes)
