"""Generalised mean pooling (GeM): mean(max(x, 1e-6) ** p) ** (1 / p) of each feature map, (N, H, W, C) -> (N, C).

`exponent='constant'` has p = 3; with `'learned'` p is an input of shape (1,), with a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from poolbench import Case, Op, Sweep, TensorSpec, choice_axis, product, register
from poolbench.ops.shared import (
    CHANNELS_LAST_ONLY,
    IMAGE_AXES,
    NARROW_SUM,
    accumulator,
    function,
    image_spec,
    implementation,
    kernel_layout,
    known,
    spatial_axes,
)

OP = "gem_pool"
P, LEAST = 3.0, 1e-6
SHAPE = (8, 56, 56, 96)
BASE = {"shape": SHAPE, "distribution": "relu"}
BASELINE, LAYER = "pow-float32", "layer-gem_pool"
NARROW = (BASELINE, LAYER, "pow", "avg_pool2d", "scaled")

DEFAULT = Sweep(
    base=BASE,
    parts=(
        product(mode=["eager", "graph", "xla"]),
        product(mode=["graph", "xla"], direction=["training"]),
        product(mode=["graph", "xla"], direction=["training"], exponent=["learned"]),
        product(candidates=NARROW, mode=["graph", "xla"], dtype=["float16"]),
        product(candidates=(BASELINE, LAYER, "no-clip"), distribution=["normal"]),
        product(mode=["graph"], shape=[(1, 7, 7, 2048)]),
    ),
)
QUICK = Sweep(
    base=BASE | {"shape": (8, 28, 28, 96)},
    parts=product(mode=["graph", "xla"], exponent=["constant", "learned"]),
)
FULL = Sweep(
    base=BASE,
    parts=(
        product(
            shape=[SHAPE, (1, 7, 7, 2048), (32, 14, 14, 512)],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
            exponent=["constant", "learned"],
        ),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
    ),
)


def inputs(case: Case) -> dict[str, TensorSpec]:
    """Return x, the images, and p where it is learned."""
    learned = {"p": TensorSpec((1,), case.dtype, fill=lambda _, count: np.full(count, P))}
    return {"x": image_spec(case)} | (learned if case.exponent == "learned" else {})


def powers(case: Case, x: Any, p: Any) -> tuple[Any, Any]:
    """Return clipped x, and the mean of its p-th power with height and width of 1."""
    z = np.maximum(x, LEAST)
    return z, (z**p).mean(axis=spatial_axes(case), keepdims=True)


def reference(case: Case, x: Any, p: Any = P) -> Any:
    """Return y, the generalised mean over height and width."""
    with np.errstate(divide="ignore"):  # its shape is asked for with a p of zero
        return powers(case, x, p)[1].squeeze(spatial_axes(case)) ** (1 / p)


def vjp(case: Case, dy: Any, x: Any, p: Any = P) -> tuple[Any, ...]:
    """Return dx, and dp where p is learned."""
    axes = spatial_axes(case)
    z, mean = powers(case, x, p)
    scale = np.expand_dims(dy, axes) * mean ** (1 / p) / mean
    dx = scale * z ** (p - 1) * (x > LEAST) / (x.shape[axes[0]] * x.shape[axes[1]])
    logs = (z**p * np.log(z)).mean(axis=axes, keepdims=True)
    dp = scale * (logs / p - mean * np.log(mean) / p**2)
    return (dx, dp.sum().reshape(1)) if case.exponent == "learned" else (dx,)


register(
    Op(
        name=OP, title="Generalised mean pooling", inputs=inputs, reference=reference, vjp=vjp, builtin=True,
        axes=(*IMAGE_AXES, choice_axis("exponent", "constant", "learned", quiet=True)),
        further=True, baseline=BASELINE, also_compare_to=("pow", LAYER),
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
    )
)  # fmt: skip

NEGATIVE = known(
    "Without a least value the root of a negative mean is NaN.",
    lambda case: case.distribution == "normal",
)
CONSTANT = known(
    "It multiplies for one value of p.",
    lambda case: case.exponent == "learned",
    matches="needs a constant p",
)


@function(op=OP, name=BASELINE)
def pow_float32(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """Powers, mean and root in float32, cast back."""
    p = tf.cast(p, accumulator(case)) if case.exponent == "learned" else p
    powers = tf.maximum(tf.cast(x, accumulator(case)), 1e-6) ** p
    return tf.cast(tf.reduce_mean(powers, spatial_axes(case)) ** (1 / p), x.dtype)


@function(op=OP, name="pow", failures=(NARROW_SUM,))
def pow_narrow(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """Powers, mean and root in the dtype of the input."""
    return tf.reduce_mean(tf.maximum(x, 1e-6) ** p, spatial_axes(case)) ** (1 / p)


@function(op=OP, name="no-clip", failures=(NARROW_SUM, NEGATIVE))
def no_clip(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """Powers, mean and root without a least value."""
    return tf.reduce_mean(x**p, spatial_axes(case)) ** (1 / p)


@function(op=OP, name="avg_pool2d", failures=(NARROW_SUM, CHANNELS_LAST_ONLY))
def avg_pool2d(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """tf.nn.avg_pool2d of the powers with a window over the whole image."""
    powers, window = tf.maximum(x, 1e-6) ** p, [x.shape[i] for i in spatial_axes(case)]
    y = tf.nn.avg_pool2d(powers, window, 1, "VALID", kernel_layout(case))
    return tf.squeeze(y, spatial_axes(case)) ** (1 / p)


@function(op=OP, name="scaled", failures=(NARROW_SUM,))
def scaled(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """The mean of powers of x over its maximum, which cannot overflow."""
    x = tf.maximum(x, 1e-6)
    largest = tf.stop_gradient(tf.reduce_max(x, spatial_axes(case), keepdims=True))
    y = tf.reduce_mean((x / largest) ** p, spatial_axes(case)) ** (1 / p)
    return y * tf.squeeze(largest, spatial_axes(case))


@function(op=OP, name="logsumexp-float32")
def logsumexp_float32(case: Case, tf: Any, x: Any, p: Any = 3.0) -> Any:
    """tf.reduce_logsumexp of p log(x) in float32: neither overflow nor underflow."""
    p = tf.cast(p, accumulator(case)) if case.exponent == "learned" else p
    logs = tf.math.log(tf.maximum(tf.cast(x, accumulator(case)), 1e-6))
    total = tf.reduce_logsumexp(p * logs, spatial_axes(case)) - math.log(
        case.shape[1] * case.shape[2]
    )
    return tf.cast(tf.exp(total / p), x.dtype)


@function(op=OP, name="cube-float32", failures=(CONSTANT,))
def cube_float32(case: Case, tf: Any, x: Any, *_: Any) -> Any:
    """x * x * x instead of a power, for a constant p of 3, in float32."""
    if case.exponent == "learned":
        raise ValueError("it needs a constant p")
    z = tf.maximum(tf.cast(x, accumulator(case)), 1e-6)
    return tf.cast(tf.reduce_mean(z * z * z, spatial_axes(case)) ** (1 / 3), x.dtype)


@implementation(op=OP, name=LAYER, form="layer")
def gem_layer(case: Case) -> Any:
    """poolbench.gem_pooling.GeMPooling2D, the reusable layer; a learned p is its weight."""
    from poolbench.gem_pooling import GeMPooling2D

    learned = case.exponent == "learned"
    layer = GeMPooling2D(3.0, learned, case.data_format, dtype=case.dtype)
    layer.build(image_spec(case).shape)
    return (lambda x, p: layer.stateless_call([p], [], x)[0]) if learned else layer
