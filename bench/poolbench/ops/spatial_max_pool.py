"""Spatial max pooling: the maximum over square windows, (N, H, W, C) -> (N, rows, columns, C); TensorFlow's padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, Op, Sweep, choice_axis, product, register, size_axis, ties_within
from poolbench.ops.shared import (
    CHANNELS_LAST_ONLY,
    IMAGE_AXES,
    channels_last,
    function,
    image_spec,
    implementation,
    kernel_layout,
    known,
    narrow_window,
    no_error,
    spatial_axes,
)

OP = "spatial_max_pool"
BASE = {"shape": (8, 56, 56, 96), "window": 2, "stride": 2, "padding": "valid"}
NATIVE, STOCK, SLICES = "max_pool2d", "layer-max_pool2d", "slices-maximum"
MAIN = (NATIVE, STOCK, "reshape-reduce_max", SLICES, "separable")


def unique_gradient(case: Case) -> bool:
    """Exclude gradients of overlapping windows whose elements tie: more than one is right."""
    ties = case.dtype in ("float16", "bfloat16") or case.distribution == "relu"
    return not (case.direction == "training" and case.window > case.stride and ties)


EVERY: dict[str, Any] = {"mode": ["eager", "graph", "xla"], "direction": ["forward", "training"]}
BOTH: dict[str, Any] = {"mode": ["graph", "xla"]}
XLA, TRAINING = ({"mode": m, "direction": ["training"]} for m in (["xla"], BOTH["mode"]))
PADDINGS: dict[str, Any] = {"window": [3], "padding": ["valid", "same"]}
SHAPES = ((1, 8, 8, 96), (8, 28, 28, 96), (8, 56, 56, 96), (32, 56, 56, 96))
# A window lies within the image.
RULES = (lambda c: c.padding == "same" or c.window <= min(c.shape[1:3]), unique_gradient)
DEFAULT = Sweep(base=BASE, rules=RULES, parts=(
    product(**BOTH),
    product(candidates=MAIN, mode=["eager"]),
    product(candidates=MAIN, shape=[SHAPES[0], SHAPES[2]], **TRAINING),
    product(candidates=(NATIVE, SLICES, "separable"), **PADDINGS, **TRAINING),
    product(candidates=MAIN, dtype=["float16"], **XLA),
    product(candidates=MAIN, distribution=["relu"], **XLA),
    # Half-precision gradients of max_pool2d are wrong from a window of 256 elements on.
    product(candidates=MAIN[:3], window=[16], stride=[16], dtype=["float16"], **TRAINING),
))  # fmt: skip
QUICK = Sweep(base=BASE | {"shape": SHAPES[1]}, rules=RULES, parts=product(**BOTH | TRAINING))
FULL = Sweep(base=BASE, rules=RULES, parts=(
    product(shape=SHAPES, dtype=["float32", "float16", "bfloat16"], **EVERY),
    product(data_format=["channels_last", "channels_first"], **PADDINGS, **EVERY),
))  # fmt: skip


def layout(case: Case, size: int) -> tuple[int, int, int]:
    """Return (windows, elements padded before, after or, if negative, dropped) along an axis of this size."""
    same = case.padding == "same"
    count = -(-size // case.stride) if same else (size - case.window) // case.stride + 1
    missing = (count - 1) * case.stride + case.window - size
    before = max(missing, 0) // 2
    return count, before, missing - before


def windows(case: Case, a: Any, fill: float) -> tuple[Any, Any]:
    """Return two views of one padded copy of a, an array shaped as x: a, and its windows (..., k, k)."""
    widths, own, step = [(0, 0)] * 4, [slice(None)] * 4, [slice(None)] * 4
    for axis in spatial_axes(case):
        _, before, after = layout(case, a.shape[axis])
        widths[axis], step[axis] = (before, max(after, 0)), slice(None, None, case.stride)
        own[axis] = slice(before, before + a.shape[axis])
    wide = np.pad(a, widths, constant_values=fill)
    every = np.lib.stride_tricks.sliding_window_view(
        wide, (case.window, case.window), spatial_axes(case), writeable=True
    )
    return wide[tuple(own)], every[tuple(step)]


def reference(case: Case, x: Any) -> Any:
    """Return y, the maximum over each window."""
    return windows(case, x, -np.inf)[1].max((-2, -1))


def vjp(case: Case, dy: Any, x: Any) -> tuple[Any]:
    """Return dx: dy at each window's maximum, split equally among elements that tie for it."""
    _, every = windows(case, x, -np.inf)
    hit = every == every.max((-2, -1), keepdims=True)
    share = dy[..., None, None] / np.maximum(hit.sum((-2, -1), keepdims=True), 1) * hit
    dx, parts = windows(case, np.zeros(x.shape), 0)
    for i, j in np.ndindex(case.window, case.window):  # windows may overlap
        parts[..., i, j] += share[..., i, j]
    return (dx,)


OWN_AXES = (size_axis("window", 2, prefix="w"), size_axis("stride", 2, prefix="s"))
register(Op(
    name=OP, title="Spatial max pooling", axes=(*IMAGE_AXES, *OWN_AXES, choice_axis("padding", "valid", "same")),
    inputs=lambda case: {"x": image_spec(case)},
    reference=reference, vjp=vjp, tolerance=no_error, builtin=True,
    check_gradient=ties_within(lambda a, case: windows(case, a, 0)[1].sum((-2, -1))),
    further=True, baseline=NATIVE, also_compare_to=(STOCK,), sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
))  # fmt: skip
NATIVE_FAILURES = (CHANNELS_LAST_ONLY, narrow_window(lambda case: (case.window, case.window)))
DISJOINT_ONLY = known("A reshape shows only windows that do not overlap.",
                      lambda case: case.window != case.stride, matches="do not overlap")  # fmt: skip
CONVOLVED = known("In a convolution 0 * -inf is NaN.", lambda c: c.mode == "xla" and c.padding == "same")  # fmt: skip


def paddings(case: Case) -> list[list[int]]:
    """Return the elements to pad before and after each axis."""
    height, width = ([max(n, 0) for n in layout(case, size)[1:]] for size in case.shape[1:3])
    none = [0, 0]
    return [none, height, width, none] if channels_last(case) else [none, none, height, width]


@function(op=OP, name=NATIVE, failures=NATIVE_FAILURES)
def max_pool2d(case: Case, tf: Any, x: Any) -> Any:
    """tf.nn.max_pool2d."""
    words = case.window, case.stride, case.padding.upper(), kernel_layout(case)
    return tf.nn.max_pool2d(x, *words)


@implementation(op=OP, name=STOCK, form="layer", failures=NATIVE_FAILURES)
def layer_max_pool2d(case: Case) -> Any:
    """keras.layers.MaxPooling2D."""
    import keras

    return keras.layers.MaxPooling2D(
        case.window, case.stride, case.padding, case.data_format, dtype=case.dtype
    )


@function(op=OP, name="reshape-reduce_max", failures=(DISJOINT_ONLY,))
def reshape_reduce_max(case: Case, tf: Any, x: Any) -> Any:
    """tf.reshape to (N, rows, k, columns, k, C), tf.reduce_max over both k."""
    if case.window != case.stride:
        raise ValueError("reshape-reduce_max takes windows that do not overlap")
    if case.padding == "same":
        x = tf.pad(x, paddings(case), constant_values=float("-inf"))
    if channels_last(case):
        h, w, c = x.shape[1] // case.window, x.shape[2] // case.window, x.shape[3]
        x = x[:, : h * case.window, : w * case.window]
        return tf.reduce_max(tf.reshape(x, (-1, h, case.window, w, case.window, c)), (2, 4))
    c, h, w = x.shape[1], x.shape[2] // case.window, x.shape[3] // case.window
    x = x[:, :, : h * case.window, : w * case.window]
    return tf.reduce_max(tf.reshape(x, (-1, c, h, case.window, w, case.window)), (3, 5))


@function(op=OP, name=SLICES)
def slices_maximum(case: Case, tf: Any, x: Any) -> Any:
    """tf.maximum over the k * k strided slices x[:, i::k, j::k]."""
    import functools

    if case.padding == "same":
        x = tf.pad(x, paddings(case), constant_values=float("-inf"))
    spans = [slice(i, i - case.window + 1 or None, case.stride) for i in range(case.window)]
    if channels_last(case):
        return functools.reduce(tf.maximum, [x[:, i, j] for i in spans for j in spans])
    return functools.reduce(tf.maximum, [x[..., i, j] for i in spans for j in spans])


@function(op=OP, name="separable")
def separable(case: Case, tf: Any, x: Any) -> Any:
    """tf.maximum over k slices of rows, then over k slices of columns."""
    import functools

    if case.padding == "same":
        x = tf.pad(x, paddings(case), constant_values=float("-inf"))
    spans = [slice(i, i - case.window + 1 or None, case.stride) for i in range(case.window)]
    if channels_last(case):
        x = functools.reduce(tf.maximum, [x[:, i] for i in spans])
        return functools.reduce(tf.maximum, [x[:, :, i] for i in spans])
    x = functools.reduce(tf.maximum, [x[:, :, i] for i in spans])
    return functools.reduce(tf.maximum, [x[..., i] for i in spans])


@function(op=OP, name="patches", failures=(CHANNELS_LAST_ONLY, CONVOLVED))
def patches(case: Case, tf: Any, x: Any) -> Any:
    """tf.image.extract_patches, which pads with zero, tf.reduce_max over each patch."""
    if not channels_last(case):
        raise ValueError("tf.image.extract_patches only supports NHWC")
    if case.padding == "same":
        x = tf.pad(x, paddings(case), constant_values=float("-inf"))
    size, step = (1, case.window, case.window, 1), (1, case.stride, case.stride, 1)
    every = tf.image.extract_patches(x, size, step, (1, 1, 1, 1), "VALID")
    every = tf.reshape(every, (-1, *every.shape[1:3], case.window**2, x.shape[3]))
    return tf.reduce_max(every, 3)
