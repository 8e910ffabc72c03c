"""Generalised mean pooling (GeM): mean(max(x, 1e-6) ** p) ** (1 / p) of each feature map, (N, H, W, C) -> (N, C).

`exponent='constant'` has p = 3; with `'learned'` p is an input of shape (1,), with a gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, KnownFailure, Op, Sweep, TensorSpec, choice_axis, product, register
from poolbench.ops import shared
from poolbench.ops.shared import channels_last, code_candidate, function_snippet, spatial_axes

Array = np.ndarray[Any, Any]
OP = "gem_pool"
P, LEAST = 3.0, 1e-6
BASE = {"shape": (8, 56, 56, 96), "distribution": "relu"}
BASELINE = "pow-float32"
NARROW = (BASELINE, "pow", "avg_pool2d", "scaled")

DEFAULT = Sweep(
    base=BASE,
    parts=(
        product(mode=["eager", "graph", "xla"]),
        product(mode=["graph", "xla"], direction=["training"]),
        product(mode=["graph", "xla"], direction=["training"], exponent=["learned"]),
        product(candidates=NARROW, mode=["graph", "xla"], dtype=["float16"]),
        product(candidates=(BASELINE, "no-clip"), distribution=["normal"]),
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
            shape=[BASE["shape"], (1, 7, 7, 2048), (32, 14, 14, 512)],
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
    return {"x": shared.image_spec(case)} | (learned if case.exponent == "learned" else {})


def powers(case: Case, x: Array, p: Array) -> tuple[Array, Array]:
    """Return clipped x, and the mean of its p-th power with height and width of 1."""
    z = np.maximum(x, LEAST)
    return z, (z**p).mean(axis=spatial_axes(case), keepdims=True)


def reference(case: Case, x: Array, p: Array | float = P) -> Array:
    """Return y, the generalised mean over height and width."""
    y: Array = powers(case, x, p)[1].squeeze(spatial_axes(case)) ** (1 / p)
    return y


def vjp(case: Case, dy: Array, x: Array, p: Array | float = P) -> tuple[Array, ...]:
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
        name=OP,
        title="Generalised mean pooling",
        axes=(*shared.IMAGE_AXES, choice_axis("exponent", "constant", "learned", quiet=True)),
        inputs=inputs,
        reference=reference,
        vjp=vjp,
        baseline=BASELINE,
        also_compare_to=("pow",),
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
        builtin=True,
    )
)

NEGATIVE = KnownFailure(
    when=lambda case: case.distribution == "normal",
    matches="not finite|beyond the bound",
    reason="Without a least value the root of a negative mean is NaN.",
)


LEARNED = KnownFailure(
    when=lambda case: case.exponent == "learned",
    matches="needs a constant p",
    reason="It multiplies for one value of p.",
)


def gem(case: Case, *lines: str, cast: str = "") -> str:
    """Return the code of `pool`; the lines may use p, a constant or an input that is cast."""
    if case.exponent == "constant":
        return function_snippet(f"p = {P}", *lines)
    first = [f"p = tf.cast(p, {cast})"] if cast else []
    return function_snippet(*first, *lines).replace("def pool(x)", "def pool(x, p)")


def mean(case: Case, powers: str) -> str:
    """Return the code of a mean over height and width."""
    return f"tf.reduce_mean({powers}, axis={spatial_axes(case)})"


def wide(case: Case) -> str:
    """Return the dtype in which half precision is computed."""
    return f"tf.{'float64' if case.dtype == 'float64' else 'float32'}"


@code_candidate(OP, BASELINE)
def pow_float32(case: Case) -> str:
    """Powers, mean and root in float32, cast back."""
    return gem(
        case,
        f"powers = tf.maximum(tf.cast(x, {wide(case)}), {LEAST}) ** p",
        f"return tf.cast({mean(case, 'powers')} ** (1 / p), x.dtype)",
        cast=wide(case),
    )


@code_candidate(OP, "pow", failures=(shared.NARROW_SUM,))
def pow_narrow(case: Case) -> str:
    """Powers, mean and root in the dtype of the input."""
    return gem(case, f"return {mean(case, f'tf.maximum(x, {LEAST}) ** p')} ** (1 / p)")


@code_candidate(OP, "no-clip", failures=(shared.NARROW_SUM, NEGATIVE))
def no_clip(case: Case) -> str:
    """Powers, mean and root without a least value."""
    return gem(case, f"return {mean(case, 'x ** p')} ** (1 / p)")


@code_candidate(OP, "avg_pool2d", failures=(shared.NARROW_SUM, shared.CHANNELS_LAST_ONLY))
def avg_pool2d(case: Case) -> str:
    """tf.nn.avg_pool2d of the powers with a window over the whole image."""
    window = "x.shape[1:3]" if channels_last(case) else "x.shape[2:4]"
    layout = "" if channels_last(case) else ', "NCHW"'
    return gem(
        case,
        f"powers = tf.maximum(x, {LEAST}) ** p",
        f'y = tf.nn.avg_pool2d(powers, {window}, 1, "VALID"{layout})',
        f"return tf.squeeze(y, {spatial_axes(case)}) ** (1 / p)",
    )


@code_candidate(OP, "scaled", failures=(shared.NARROW_SUM,))
def scaled(case: Case) -> str:
    """The mean of powers of x over its maximum, which cannot overflow."""
    return gem(
        case,
        f"x = tf.maximum(x, {LEAST})",
        f"largest = tf.stop_gradient(tf.reduce_max(x, axis={spatial_axes(case)}, keepdims=True))",
        f"y = {mean(case, '(x / largest) ** p')} ** (1 / p)",
        f"return y * tf.squeeze(largest, {spatial_axes(case)})",
    )


@code_candidate(OP, "log-exp")
def log_exp(case: Case) -> str:
    """tf.reduce_logsumexp of p log(x) in float32: neither overflow nor underflow."""
    count = case.shape[1] * case.shape[2]
    return gem(
        case,
        f"logs = p * tf.math.log(tf.maximum(tf.cast(x, {wide(case)}), {LEAST}))",
        f"total = tf.reduce_logsumexp(logs, axis={spatial_axes(case)}) - tf.math.log({float(count)})",
        "return tf.cast(tf.exp(total / p), x.dtype)",
        cast=wide(case),
    )


@code_candidate(OP, "cube-float32", failures=(LEARNED,))
def cube_float32(case: Case) -> str:
    """x * x * x instead of a power, for a constant p of 3, in float32."""
    if case.exponent == "learned":
        raise ValueError("cube-float32 needs a constant p")
    return gem(
        case,
        f"x32 = tf.maximum(tf.cast(x, {wide(case)}), {LEAST})",
        f"return tf.cast({mean(case, 'x32 * x32 * x32')} ** (1 / p), x.dtype)",
    )
