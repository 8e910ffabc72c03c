"""Adaptive pooling: the mean or maximum of windows that divide a map, (N, H, W, C) -> (N, output, output, C).

Window i along an axis of size s begins at floor(i s / output) and ends before ceil((i + 1) s / output), as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import KERAS, Case, Op, Sweep, TensorSpec, choice_axis, product, register, size_axis
from poolbench.ops.shared import IMAGE_AXES, MEANS, NARROW_SUM, function, implementation, known

OP = "adaptive_pool"
BASELINE, STOCK, LAYER = "slices-by_axis", "layer-stock", "layer-adaptive_pool"
MEAN = {"reduction": ["average"], "distribution": ["relu"]}
MAX = {"reduction": ["max"], "distribution": ["normal"]}
MAIN = (BASELINE, STOCK, LAYER, "pool2d-strides", "reshape-reduce", "matmul-weights")
ALL = (*MAIN, "pool2d-same", "slices-by_window", "resize-area", "cumsum")
OF_MAX = (*MAIN[:5], *ALL[6:8])
BOTH: dict[str, Any] = {"mode": ["graph", "xla"], "direction": ["forward", "training"]}
DEFAULT = Sweep(
    (
        product(candidates=ALL, mode=["graph"], output=[5, 7], **MEAN),
        product(candidates=MAIN[:5], **BOTH, output=[7], **MEAN),
        product(candidates=(*MAIN[:3], MAIN[5]), mode=["xla"], direction=["training"], output=[5], **MEAN),
        product(candidates=OF_MAX, mode=["graph"], output=[7], **MAX),
        product(candidates=OF_MAX[:4], mode=["graph", "xla"], direction=["training"], output=[7], **MAX),
        product(candidates=OF_MAX, direction=["training"], output=[7], shape=[(32, 4, 4, 96)], **MAX),
        product(candidates=MAIN, output=[1], dtype=["float16"], shape=[(8, 112, 112, 64)], **MEAN),
        product(candidates=OF_MAX[:4], mode=["eager"], output=[1], **MAX),  # the stock layer may die
    ),
    base={"shape": (32, 28, 28, 96)}, rules=(lambda c: c.reduction == "average" or c.direction == "forward" or not (
        c.dtype.endswith("16") or c.distribution == "relu"),),  # of maxima that tie, more than one gradient is right
)  # fmt: skip
BACKENDS = Sweep(
    product(candidates=MAIN[:3], mode=["eager", "graph", "xla"], direction=["forward", "training"],
            shape=[(1, 14, 14, 96), (8, 28, 28, 96)], **MEAN)
)  # fmt: skip
MATRIX = Sweep(product(candidates=ALL, output=[2]), base={"shape": (2, 4, 5, 6)})


def windows(case: Case, axis: int) -> list[tuple[int, int]]:
    """Return the begin and end of each window along height (0) or width (1)."""
    size, count = case.shape[1 + axis], case.output
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def divides(case: Case) -> bool:
    """Tell whether all windows have the same size and do not overlap."""
    return all(size % case.output == 0 for size in case.shape[1:3])


def inputs(case: Case) -> dict[str, TensorSpec]:
    """Return x, the maps."""
    return {"x": TensorSpec(case.shape, case.dtype, fill=case.distribution)}


def reference(case: Case, x: Any) -> Any:
    """Return y, by height and then by width: windows are rectangles."""
    reduce = np.mean if case.reduction == "average" else np.max
    for axis in (0, 1):
        before = (slice(None),) * (1 + axis)
        x = np.stack(
            [reduce(x[(*before, slice(*w))], axis=1 + axis) for w in windows(case, axis)], 1 + axis
        )
    return x


def vjp(case: Case, dy: Any, x: Any) -> tuple[Any]:
    """Return dx, the sum over the windows of an element; tied maxima share equally."""
    y, dx = reference(case, x), np.zeros_like(x)
    for i, rows in enumerate(windows(case, 0)):
        for j, columns in enumerate(windows(case, 1)):
            places = (slice(None), slice(*rows), slice(*columns))
            top, share = y[:, i : i + 1, j : j + 1], dy[:, i : i + 1, j : j + 1]
            hits = (x[places] == top) | (case.reduction == "average")
            dx[places] += hits * share / np.maximum(hits.sum((1, 2), keepdims=True), 1)
    return (dx,)


register(
    Op(
        name=OP, title="Adaptive pooling", inputs=inputs, reference=reference, vjp=vjp, builtin=True,
        by_example=True, further=True, baseline=BASELINE, also_compare_to=(STOCK, LAYER),
        sweeps={"default": DEFAULT, "backends": BACKENDS, "matrix": MATRIX},
        axes=(*IMAGE_AXES[::2], choice_axis("reduction", "average", "max"), size_axis("output", 7, prefix="to")),
    )
)  # fmt: skip

# Documented failures; tests/test_upstream.py tests each.
# fmt: off
CRASH = known("oneDNN's max pooling divides by zero where the window is wider than the map.",
              lambda c: c.reduction == "max" and c.output == 1, matches="SIGFPE", issue="tensorflow#125509")
NEGATIVE = known("The stock layer pools with too wide a window.", lambda c: c.output == 1 and c.mode != "eager",
                 matches="Negative dimension|wider|output", issue="keras#21820")
FAILS = (CRASH, NEGATIVE, NARROW_SUM)  # not on JAX, where its windows are wrong (tests/test_upstream.py)
STRIDES = known("Computed strides give other windows where the size does not divide.",
                lambda c: not divides(c), matches="beyond the bound|shape|stride|> 0")
UNEQUAL = known("Only windows of one size are a view.", lambda c: not divides(c), matches="(?i)reshape|dimension|size")
AREA = known("Windows of an area count their edges in part.", lambda c: not divides(c))
UNTRAINED = known("It has no gradient.", lambda c: c.direction == "training", matches="(?i)gradient|None")
NO_XLA = known("XLA has no kernel for ResizeArea.", lambda c: c.mode == "xla", matches="(?i)compil|unsupported")
LOSSY = known("Differences of large sums lose the digits of a window.", lambda _: True)
# fmt: on


@function(op=OP, name=BASELINE)
def slices_by_axis(case: Case, tf: Any, x: Any) -> Any:
    """The reduction of slices of the height, then of slices of the width."""
    reduce = tf.reduce_mean if case.reduction == "average" else tf.reduce_max
    o, h, w = case.output, x.shape[1], x.shape[2]
    rows = [x[:, i * h // o : -(-(i + 1) * h // o)] for i in range(o)]
    x = tf.stack([reduce(row, 1) for row in rows], 1)
    columns = [x[:, :, i * w // o : -(-(i + 1) * w // o)] for i in range(o)]
    return tf.stack([reduce(column, 2) for column in columns], 2)


@implementation(op=OP, name=STOCK, form="layer", backends=("tensorflow", "torch"), failures=FAILS)
def stock_layer(case: Case) -> Any:
    """keras.layers.AdaptiveAveragePooling2D or AdaptiveMaxPooling2D."""
    import keras

    if case.reduction == "average":
        return keras.layers.AdaptiveAveragePooling2D(case.output, dtype=case.dtype)
    return keras.layers.AdaptiveMaxPooling2D(case.output, dtype=case.dtype)


@implementation(op=OP, name=LAYER, form="layer", backends=KERAS)
def adaptive_layer(case: Case) -> Any:
    """poolbench.adaptive_pooling.AdaptivePooling2D, the reusable layer."""
    from poolbench.adaptive_pooling import AdaptivePooling2D

    return AdaptivePooling2D(case.output, case.reduction, dtype=case.dtype)


@function(op=OP, name="pool2d-strides", failures=(STRIDES, NARROW_SUM))
def pool2d_strides(case: Case, tf: Any, x: Any) -> Any:
    """tf.nn.avg_pool2d or max_pool2d with strides of size // output and the window that is left."""
    pool2d = tf.nn.avg_pool2d if case.reduction == "average" else tf.nn.max_pool2d
    strides = [size // case.output for size in x.shape[1:3]]
    window = [x.shape[1 + i] - (case.output - 1) * stride for i, stride in enumerate(strides)]
    return pool2d(x, window, strides, "VALID")


@function(op=OP, name="pool2d-same", failures=(STRIDES, NARROW_SUM))
def pool2d_same(case: Case, tf: Any, x: Any) -> Any:
    """tf.nn.avg_pool2d or max_pool2d with padding SAME and strides of size / output, rounded up."""
    pool2d = tf.nn.avg_pool2d if case.reduction == "average" else tf.nn.max_pool2d
    window = [-(-size // case.output) for size in x.shape[1:3]]
    return pool2d(x, window, window, "SAME")


@function(op=OP, name="reshape-reduce", failures=(UNEQUAL, NARROW_SUM))
def reshape_reduce(case: Case, tf: Any, x: Any) -> Any:
    """A view of windows of one size, reduced."""
    reduce = tf.reduce_mean if case.reduction == "average" else tf.reduce_max
    n, h, w, c = x.shape
    sizes = (n, case.output, h // case.output, case.output, w // case.output, c)
    return reduce(tf.reshape(x, sizes), (2, 4))


@function(op=OP, name="slices-by_window", failures=(NARROW_SUM,))
def slices_by_window(case: Case, tf: Any, x: Any) -> Any:
    """The reduction of each window by a slice of its own."""
    reduce = tf.reduce_mean if case.reduction == "average" else tf.reduce_max
    o, h, w = case.output, x.shape[1], x.shape[2]
    rows = [x[:, i * h // o : -(-(i + 1) * h // o)] for i in range(o)]
    parts = [row[:, :, i * w // o : -(-(i + 1) * w // o)] for row in rows for i in range(o)]
    y = tf.stack([reduce(part, (1, 2)) for part in parts], 1)
    return tf.reshape(y, (-1, o, o, x.shape[3]))


@function(op=OP, name="matmul-weights", failures=(MEANS,))
def matmul_weights(case: Case, tf: Any, x: Any) -> Any:
    """Two products with the matrices of the windows' weights."""
    for equation, axis in (("oh,nhwc->nowc", 1), ("ow,nhwc->nhoc", 2)):
        i, s = tf.range(case.output)[:, None], tf.range(x.shape[axis])
        inside = (s * case.output < (i + 1) * len(s)) & ((s + 1) * case.output > i * len(s))
        weights = tf.cast(inside, x.dtype)
        x = tf.einsum(equation, weights / tf.reduce_sum(weights, 1, keepdims=True), x)
    return x


@function(op=OP, name="resize-area", failures=(AREA, UNTRAINED, NO_XLA, MEANS))
def resize_area(case: Case, tf: Any, x: Any) -> Any:
    """tf.image.resize by area."""
    return tf.cast(tf.image.resize(x, (case.output, case.output), method="area"), x.dtype)


@function(op=OP, name="cumsum", failures=(LOSSY, MEANS))
def cumsum(case: Case, tf: Any, x: Any) -> Any:
    """Differences of sums over all rows and columns before."""
    sums = tf.pad(tf.cumsum(tf.cumsum(x, 1), 2), [[0, 0], [1, 0], [1, 0], [0, 0]])
    o, h, w, i = case.output, x.shape[1], x.shape[2], tf.range(case.output)
    top, left, bottom, right = i * h // o, i * w // o, -(-(i + 1) * h // o), -(-(i + 1) * w // o)
    rows = tf.gather(sums, bottom, axis=1) - tf.gather(sums, top, axis=1)
    total = tf.gather(rows, right, axis=2) - tf.gather(rows, left, axis=2)
    return total / tf.cast((bottom - top)[:, None, None] * (right - left)[:, None], x.dtype)
