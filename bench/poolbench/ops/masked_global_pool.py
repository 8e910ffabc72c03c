"""Masked global pooling: the mean or maximum of the valid steps of each sequence; 0 where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import KERAS, Case, Op, Sweep, TensorSpec, choice_axis, product, register, shape_axis
from poolbench.ops.shared import MEANS, accumulator, function, implementation, known

OP = "masked_global_pool"
BASELINE, STOCK, LAYER = "where-reduce", "layer-stock", "layer-masked_global_pool"
# After a ReLU sums grow with their terms; below zero a maximum shows padding that counts.
MEAN = {"reduction": ["average"], "distribution": ["relu"]}
MAX = {"reduction": ["max"], "distribution": ["negative"]}
MAIN = (BASELINE, STOCK, LAYER, "matmul-weights", "multiply-reduce")
ALL = (*MAIN, "einsum", "multiply-mean", "ragged-boolean_mask")
OF_MAX = (BASELINE, STOCK, LAYER, "add-lowest", "multiply-reduce")
# Below 32 MiB: the C library returns a larger gradient to the system after each call, and every page of it faults.
SMALL, LONG, PRECISE = (32, 16, 128), (2, 8192, 256), (16, 3000, 128)
BOTH: dict[str, Any] = {"mode": ["graph", "xla"], "direction": ["forward", "training"]}
DEFAULT = Sweep(
    (
        product(candidates=ALL, mode=["graph"], **MEAN),
        product(candidates=MAIN[:4], **BOTH, **MEAN),
        product(candidates=MAIN[:4], mode=["graph", "xla"], direction=["training"], shape=[LONG], **MEAN),
        product(candidates=MAIN, mode=["eager"], shape=[SMALL], empty_row=["yes"], **MEAN),
        product(candidates=(*MAIN, ALL[7]), dtype=["float16"], shape=[PRECISE], **MEAN),
        product(candidates=OF_MAX, mode=["graph"], **MAX),
        product(candidates=OF_MAX[:4], direction=["training"], mode=["graph", "xla"], **MAX),
        product(candidates=(*OF_MAX[:4], ALL[7]), dtype=["float16"], shape=[PRECISE], empty_row=["yes"],
                mask_dtype=["float32"], padded_end=["pre"], data_format=["channels_first"], **MAX),
    )
)  # fmt: skip
BACKENDS = Sweep(
    product(candidates=MAIN[:3], mode=["eager", "graph", "xla"], direction=["forward", "training"],
            shape=[SMALL, (32, 256, 256)], **MEAN)
)  # fmt: skip
MATRIX = Sweep(
    (product(candidates=ALL), product(candidates=[OF_MAX[3]], reduction=["max"])),
    base={"shape": (6, 8, 5)},  # 240 values, which may all be distinct
)


def step_axis(case: Case) -> int:
    """Return the position of the steps."""
    return 1 if case.data_format == "channels_last" else 2


def inputs(case: Case) -> dict[str, TensorSpec]:
    """Return x, (N, T, C) or (N, C, T), and the mask of its valid steps, (N, T)."""
    n, steps, channels = case.shape

    def valid(generator: np.random.Generator, _: int) -> Any:
        lengths = generator.integers(max(1, steps // 4), steps, n, endpoint=True)
        lengths[-1] *= case.empty_row == "no"
        mask = np.arange(steps) < lengths[:, None]
        return mask if case.padded_end == "post" else mask[:, ::-1]

    shape = (n, steps, channels) if step_axis(case) == 1 else (n, channels, steps)
    negative: Any = lambda generator, count: -generator.random(count)  # noqa: E731 (one of the fills)
    fill = negative if case.distribution == "negative" else case.distribution
    mask = TensorSpec((n, steps), case.mask_dtype, fill=valid, differentiable=False)
    return {"x": TensorSpec(shape, case.dtype, fill=fill), "mask": mask}


def reference(case: Case, x: Any, mask: Any) -> Any:
    """Return y, (N, C)."""
    axis, valid = step_axis(case), np.expand_dims(mask != 0, 3 - step_axis(case))
    if case.reduction == "average":
        return np.where(valid, x, 0).sum(axis) / np.maximum(valid.sum(axis), 1)
    return np.where(valid.any(axis), np.where(valid, x, -np.inf).max(axis), 0)


def vjp(case: Case, dy: Any, x: Any, mask: Any) -> tuple[Any]:
    """Return dx: dy over the count of the valid steps, or over the count of the tied maxima."""
    axis, receives = step_axis(case), np.expand_dims(mask != 0, 3 - step_axis(case))
    if case.reduction == "max":
        receives = receives & (x == np.expand_dims(reference(case, x, mask), axis))
    share = np.expand_dims(dy, axis) / np.maximum(receives.sum(axis, keepdims=True), 1)
    return (np.where(receives, share, 0),)


register(
    Op(
        name=OP, title="Masked global pooling", inputs=inputs, reference=reference, vjp=vjp, builtin=True,
        by_example=True, further=True, baseline=BASELINE, also_compare_to=(STOCK, LAYER),
        sweeps={"default": DEFAULT, "backends": BACKENDS, "matrix": MATRIX},
        axes=(
            shape_axis("shape", (32, 256, 256), rank=3),  # (N, T, C) for every data format
            choice_axis("reduction", "average", "max"),
            choice_axis("mask_dtype", "bool", "int32", "float32", quiet=True),
            choice_axis("padded_end", "post", "pre", quiet=True),
            choice_axis("empty_row", "no", "yes", quiet=True),
            choice_axis("data_format", "channels_last", "channels_first", quiet=True),
            choice_axis("distribution", "normal", "relu", "negative", quiet=True),
        ),
    )
)  # fmt: skip

# Documented failures; tests/test_upstream.py tests each.
# fmt: off
HALF = known("It sums and counts the steps in the input's own 16 bits.",
             lambda c: c.reduction == "average" and c.dtype in ("float16", "bfloat16"), issue="tensorflow#57057")
EMPTY = known("A row without valid steps is 0/0.",
              lambda c: c.reduction == "average" and c.empty_row == "yes", issue="keras#18152")
LOWEST = known("A row without valid steps gives the value in place of the padding.", lambda c: c.empty_row == "yes")
MASK = known("GlobalMaxPooling1D ignores the mask.", lambda c: c.reduction == "max", issue="tensorflow#33260")
ZERO = known("The padding counts as 0, more than any negative value.", lambda c: c.reduction == "max")
STEPS = known("It divides by the number of all steps, not of the valid ones.", lambda _: True)
MAXIMA = known("It computes the maximum alone.", lambda c: c.reduction == "average")
INFINITE = known("-1e9 is -inf in float16, and 0 * -inf is NaN in every valid step.", lambda c: c.dtype == "float16")
SIZES = known("XLA needs sizes that are known before the call.",
              lambda c: c.mode == "xla", matches="(?i)compil|unsupported", issue="tensorflow#44904")
# fmt: on


@function(op=OP, name=BASELINE)
def where_reduce(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """tf.where, then a sum in float32 over at least one step, or a maximum; 0 for an empty row."""
    valid = tf.expand_dims(tf.cast(mask, tf.bool), 3 - step_axis(case))
    if case.reduction == "average":
        total = tf.reduce_sum(tf.where(valid, tf.cast(x, accumulator(case)), 0), step_axis(case))
        count = tf.reduce_sum(tf.cast(valid, total.dtype), step_axis(case))
        return tf.cast(total / tf.maximum(count, 1), x.dtype)
    y = tf.reduce_max(tf.where(valid, x, float("-inf")), step_axis(case))
    return tf.where(tf.reduce_any(valid, step_axis(case)), y, 0)


@implementation(op=OP, name=STOCK, form="layer", backends=KERAS, failures=(HALF, EMPTY, MASK))
def stock_layer(case: Case) -> Any:
    """keras.layers.GlobalAveragePooling1D with its mask, or GlobalMaxPooling1D, which has none."""
    import keras

    if case.reduction == "average":
        layer = keras.layers.GlobalAveragePooling1D(case.data_format, dtype=case.dtype)
        return lambda x, mask: layer(x, mask=mask)
    layer = keras.layers.GlobalMaxPooling1D(case.data_format, dtype=case.dtype)
    return lambda x, _: layer(x)


@implementation(op=OP, name=LAYER, form="layer", backends=KERAS)
def masked_layer(case: Case) -> Any:
    """poolbench.masked_pooling.MaskedGlobalPooling1D, the reusable layer."""
    from poolbench.masked_pooling import MaskedGlobalPooling1D

    layer = MaskedGlobalPooling1D(case.reduction, data_format=case.data_format, dtype=case.dtype)
    return lambda x, mask: layer(x, mask=mask)


@function(op=OP, name="multiply-reduce", failures=(HALF, EMPTY, ZERO))
def multiply_reduce(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """The sum of x * mask over that of the mask, in the input's own dtype; or its maximum."""
    mask = tf.expand_dims(tf.cast(mask, x.dtype), 3 - step_axis(case))
    if case.reduction == "average":
        return tf.reduce_sum(x * mask, step_axis(case)) / tf.reduce_sum(mask, step_axis(case))
    return tf.reduce_max(x * mask, step_axis(case))


@function(op=OP, name="multiply-mean", failures=(STEPS,))
def multiply_mean(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """The mean of x * mask."""
    mask = tf.expand_dims(tf.cast(mask, x.dtype), 3 - step_axis(case))
    return tf.reduce_mean(x * mask, step_axis(case))


@function(op=OP, name="matmul-weights", failures=(HALF, EMPTY, MEANS))
def matmul_weights(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """A row of mask / count times the (T, C) matrix of each sequence."""
    weights = tf.cast(mask, x.dtype) / tf.reduce_sum(tf.cast(mask, x.dtype), 1, keepdims=True)
    return tf.squeeze(tf.matmul(weights[:, None], x, transpose_b=step_axis(case) == 2), 1)


@function(op=OP, name="einsum", failures=(HALF, EMPTY, MEANS))
def einsum(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """tf.einsum of the mask and x, over the count."""
    mask = tf.cast(mask, x.dtype)
    total = tf.einsum("nt,ntc->nc" if step_axis(case) == 1 else "nt,nct->nc", mask, x)
    return total / tf.reduce_sum(mask, 1, keepdims=True)


@function(op=OP, name="add-lowest", failures=(MAXIMA, INFINITE, LOWEST))
def add_lowest(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """The maximum of x + (1 - mask) * -1e9."""
    mask = tf.expand_dims(tf.cast(mask, x.dtype), 3 - step_axis(case))
    return tf.reduce_max(x + (1 - mask) * -1e9, step_axis(case))


@function(op=OP, name="ragged-boolean_mask", failures=(SIZES, HALF, EMPTY, LOWEST))
def ragged_boolean_mask(case: Case, tf: Any, x: Any, mask: Any) -> Any:
    """tf.ragged.boolean_mask, then a reduction of the ragged tensor."""
    steps = x if step_axis(case) == 1 else tf.transpose(x, (0, 2, 1))
    ragged = tf.ragged.boolean_mask(steps, tf.cast(mask, tf.bool))
    return tf.reduce_mean(ragged, 1) if case.reduction == "average" else tf.reduce_max(ragged, 1)
