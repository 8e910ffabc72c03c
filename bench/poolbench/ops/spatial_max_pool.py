"""Spatial max pooling: the maximum over square windows, (N, H, W, C) -> (N, rows, columns, C).

`padding='same'` pads both ends with the lowest value, as TensorFlow does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import (
    Case,
    KnownFailure,
    Op,
    Sweep,
    choice_axis,
    product,
    register,
    size_axis,
    ties_within,
)
from poolbench.ops import shared
from poolbench.ops.shared import channels_last, code_candidate, function_snippet, spatial_axes

Array = np.ndarray[Any, Any]
OP = "spatial_max_pool"
BASE = {"shape": (8, 56, 56, 96), "window": 2, "stride": 2, "padding": "valid"}
NATIVE, SLICES = "max_pool2d", "slices-maximum"
FUNCTOOLS = "functools\nimport tensorflow as tf"
MAIN = (NATIVE, "layer-max_pool2d", "reshape-reduce_max", SLICES, "separable")


def unique_gradient(case: Case) -> bool:
    """Exclude gradients of overlapping windows whose elements tie: more than one is right."""
    ties = case.dtype in ("float16", "bfloat16") or case.distribution == "relu"
    return not (case.direction == "training" and case.window > case.stride and ties)


BOTH, XLA = {"mode": ["graph", "xla"]}, {"mode": ["xla"], "direction": ["training"]}
TRAINING = BOTH | {"direction": ["training"]}
EVERY = {"mode": ["eager", "graph", "xla"], "direction": ["forward", "training"]}
PADDINGS = {"window": [3], "padding": ["valid", "same"]}
DEFAULT = Sweep(base=BASE, rules=(unique_gradient,), parts=(
    product(**BOTH),
    product(candidates=MAIN, mode=["eager"]),
    product(candidates=MAIN, shape=[BASE["shape"], (1, 8, 8, 96)], **TRAINING),
    product(candidates=(NATIVE, SLICES, "separable"), **PADDINGS, **TRAINING),
    product(candidates=MAIN, dtype=["float16"], **XLA),
    product(candidates=MAIN, distribution=["relu"], **XLA),
    # Half-precision gradients of max_pool2d are wrong from a window of 256 elements on.
    product(candidates=MAIN[:3], window=[16], stride=[16], dtype=["float16"], **TRAINING),
))  # fmt: skip
QUICK = Sweep(base=BASE | {"shape": (8, 28, 28, 96)}, parts=product(**BOTH | TRAINING))
FULL = Sweep(base=BASE, rules=(unique_gradient,), parts=(
    product(
        shape=[(1, 8, 8, 96), (8, 28, 28, 96), (8, 56, 56, 96), (32, 56, 56, 96)],
        dtype=["float32", "float16", "bfloat16"], **EVERY,
    ),
    product(data_format=["channels_last", "channels_first"], **PADDINGS, **EVERY),
))  # fmt: skip


def layout(case: Case, size: int) -> tuple[int, int, int]:
    """Return (windows, elements padded before, after or, if negative, dropped) along an axis of this size."""
    same = case.padding == "same"
    count = -(-size // case.stride) if same else (size - case.window) // case.stride + 1
    missing = (count - 1) * case.stride + case.window - size
    before = max(missing, 0) // 2
    return count, before, missing - before


def windows(case: Case, a: Array, fill: float) -> tuple[Array, Array]:
    """Return two views of one padded copy of a, an array shaped as x: a, and its windows (..., k, k)."""
    widths, own, step = [(0, 0)] * 4, [slice(None)] * 4, [slice(None)] * 4
    for axis in spatial_axes(case):
        _, before, after = layout(case, a.shape[axis])
        widths[axis], step[axis] = (before, max(after, 0)), slice(None, None, case.stride)
        own[axis] = slice(before, before + a.shape[axis])
    wide = np.pad(a, widths, constant_values=fill)
    size, axes = (case.window, case.window), spatial_axes(case)
    every = np.lib.stride_tricks.sliding_window_view(wide, size, axes, writeable=True)
    return wide[tuple(own)], every[tuple(step)]


def reference(case: Case, x: Array) -> Array:
    """Return y, the maximum over each window."""
    y: Array = windows(case, x, -np.inf)[1].max((-2, -1))
    return y


def vjp(case: Case, dy: Array, x: Array) -> tuple[Array]:
    """Return dx: dy at each window's maximum, split equally among elements that tie for it."""
    _, every = windows(case, x, -np.inf)
    hit = every == every.max((-2, -1), keepdims=True)
    share = dy[..., None, None] / np.maximum(hit.sum((-2, -1), keepdims=True), 1) * hit
    dx, parts = windows(case, np.zeros(x.shape), 0)
    for i, j in np.ndindex(case.window, case.window):  # windows may overlap
        parts[..., i, j] += share[..., i, j]
    return (dx,)


WINDOW_AXES = (size_axis("window", 2, prefix="w"), size_axis("stride", 2, prefix="s"))
register(Op(
    name=OP,
    title="Spatial max pooling",
    axes=(*shared.IMAGE_AXES, *WINDOW_AXES, choice_axis("padding", "valid", "same")),
    inputs=lambda case: {"x": shared.image_spec(case)},
    reference=reference, vjp=vjp, tolerance=shared.no_error,
    check_gradient=ties_within(lambda a, case: windows(case, a, 0)[1].sum((-2, -1))),
    baseline=NATIVE, also_compare_to=("layer-max_pool2d",),
    sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL},
    builtin=True,
))  # fmt: skip
NATIVE_FAILURES = (
    shared.CHANNELS_LAST_ONLY, shared.narrow_window(lambda case: (case.window, case.window))
)  # fmt: skip
DISJOINT_ONLY = KnownFailure(
    when=lambda case: case.window != case.stride, matches="do not overlap",
    reason="A reshape shows only windows that do not overlap.",
)  # fmt: skip
ZERO_PADDING = KnownFailure(
    when=lambda case: case.padding == "same", matches="beyond the bound",
    reason="It pads with zero, which is larger than the maximum of a negative window.",
)  # fmt: skip


def fit(case: Case) -> list[str]:
    """Return the line that drops or pads the rows and columns that fill no window, if one is needed."""
    widths, cut = [[0, 0]] * 4, [":"] * 4
    for axis, size in zip(spatial_axes(case), case.shape[1:3], strict=True):
        _, before, after = layout(case, size)
        widths[axis], cut[axis] = [before, max(after, 0)], f":{after}" if after < 0 else ":"
    if any(map(any, widths)):
        return [f'x = tf.pad(x, {widths}, constant_values=float("-inf"))']
    return [f"x = x[{', '.join(cut)}]"] if cut != [":"] * 4 else []


def part(case: Case, index: str, axis: int) -> str:
    """Return the index of one element of every window along an axis."""
    end = f" {index} - {case.window - 1} or None " if case.window != case.stride else ""
    return f"{':, ' * axis}{index}:{end}:{case.stride}"


@code_candidate(OP, NATIVE, failures=NATIVE_FAILURES)
def max_pool2d(case: Case) -> str:
    """tf.nn.max_pool2d."""
    words = f'{case.window}, {case.stride}, "{str(case.padding).upper()}"'
    layout = "" if channels_last(case) else ', "NCHW"'
    return function_snippet(f"return tf.nn.max_pool2d(x, {words}{layout})")


@code_candidate(OP, "layer-max_pool2d", form="layer", framework="keras", failures=NATIVE_FAILURES)
def layer_max_pool2d(case: Case) -> str:
    """keras.layers.MaxPooling2D."""
    words = [f'{case.window}, {case.stride}, "{case.padding}"', *shared.layer_words(case)]
    return f"import keras\n\npool = keras.layers.MaxPooling2D({', '.join(words)})\n"


@code_candidate(OP, "reshape-reduce_max", failures=(DISJOINT_ONLY,))
def reshape_reduce_max(case: Case) -> str:
    """tf.reshape to (N, rows, k, columns, k, C), tf.reduce_max over both k."""
    if case.window != case.stride:
        raise ValueError("reshape-reduce_max takes windows that do not overlap")
    k, last = case.window, channels_last(case)
    view = f"h // {k}, {k}, w // {k}, {k}"
    return function_snippet(
        *fit(case),
        f"{'h, w, c' if last else 'c, h, w'} = x.shape[1:]",
        f"windows = tf.reshape(x, (-1, {f'{view}, c' if last else f'c, {view}'}))",
        f"return tf.reduce_max(windows, axis={(2, 4) if last else (3, 5)})",
    )


@code_candidate(OP, SLICES)
def slices_maximum(case: Case) -> str:
    """tf.maximum over the k * k strided slices x[:, i::k, j::k]."""
    place = f"{part(case, 'i', spatial_axes(case)[0])}, {part(case, 'j', 0)}"
    loops = " ".join(f"for {index} in range({case.window})" for index in "ij")
    lines = [f"slices = [x[{place}] {loops}]", "return functools.reduce(tf.maximum, slices)"]
    return function_snippet(*fit(case), *lines, imports=FUNCTOOLS)


@code_candidate(OP, "separable")
def separable(case: Case) -> str:
    """tf.maximum over k slices of rows, then over k slices of columns."""
    lines = [
        f"x = functools.reduce(tf.maximum, [x[{part(case, 'i', axis)}] for i in range({case.window})])"
        for axis in spatial_axes(case)
    ]
    return function_snippet(*fit(case), *lines, "return x", imports=FUNCTOOLS)


@code_candidate(OP, "patches", failures=(shared.CHANNELS_LAST_ONLY, ZERO_PADDING))
def patches(case: Case) -> str:
    """tf.image.extract_patches, tf.reduce_max over each patch."""
    if not channels_last(case):
        raise ValueError("tf.image.extract_patches only supports NHWC")
    k, s = case.window, case.stride
    sizes = f'(1, {k}, {k}, 1), (1, {s}, {s}, 1), (1, 1, 1, 1), "{str(case.padding).upper()}"'
    return function_snippet(
        f"y = tf.image.extract_patches(x, {sizes})",
        f"windows = tf.reshape(y, (-1, *y.shape[1:3], {k * k}, x.shape[3]))",
        "return tf.reduce_max(windows, axis=3)",
    )
