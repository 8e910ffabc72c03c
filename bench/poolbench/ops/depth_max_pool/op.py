"""Depthwise max pooling: the maximum over each k neighbouring channels.

`padding='valid'` drops the channels that do not fill a window; `'same'` pads both ends with the lowest
value, half of the missing channels before and the rest after, as TensorFlow's SAME does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poolbench import Case, Op, TensorSpec, Traffic, choice_axis, register, size_axis, ties_within
from poolbench.ops.depth_max_pool.sweeps import (
    ALSO_COMPARE_TO,
    BASELINE,
    IN_COMPILED_MODELS,
    IN_MODELS,
    OP,
    SWEEPS,
)
from poolbench.ops.shared import IMAGE_AXES, channel_axis, image_spec, no_error

Array = np.ndarray[Any, Any]


def windows(case: Case) -> tuple[int, int, int]:
    """Return (number of windows, channels padded before, channels padded after or, if negative, dropped)."""
    channels, k = case.shape[-1], case.pool_size
    if case.padding != "same":
        return channels // k, 0, channels // k * k - channels
    count = -(-channels // k)
    missing = count * k - channels
    return count, missing // 2, missing - missing // 2


def paddings(case: Case) -> list[tuple[int, int]]:
    """Return the padding of each axis of x: of the channels alone."""
    _, before, after = windows(case)
    axis = channel_axis(case)
    return [(before, max(after, 0)) if i == axis else (0, 0) for i in range(4)]


def kept(case: Case) -> tuple[slice, ...]:
    """Return the part of x whose channels fill the windows."""
    end, axis = windows(case)[0] * case.pool_size, channel_axis(case)
    return tuple(slice(end) if i == axis else slice(None) for i in range(4))


def _window_slices(x: Array, case: Case) -> list[Array]:
    """Return k arrays shaped as y: the first elements of all windows, the second ones, and so on."""
    count, before, after = windows(case)
    k, axis = case.pool_size, channel_axis(case)
    if before or after > 0:
        x = np.pad(x, paddings(case), constant_values=-np.inf)
    rows = np.moveaxis(x, axis, -1)[..., : count * k]
    return [np.moveaxis(rows[..., i::k], -1, axis) for i in range(k)]


def reference(case: Case, x: Array) -> Array:
    """Return y, the maximum over each window."""
    slices = _window_slices(x, case)
    y = slices[0].copy()
    for part in slices[1:]:
        np.maximum(y, part, out=y)
    return y


def vjp(case: Case, dy: Array, x: Array) -> tuple[Array]:
    """Return dx: dy at each window's maximum, split equally among elements that tie for it."""
    slices = _window_slices(x, case)
    y = reference(case, x)
    hits = [part == y for part in slices]
    shares = dy / np.maximum(sum(hit.astype(np.float64) for hit in hits), 1.0)
    return (_scatter([hit * shares for hit in hits], x.shape, case),)


def _scatter(parts: Sequence[Array], shape: tuple[int, ...], case: Case) -> Array:
    """Return an array of x's shape from k arrays shaped as y; values in the padding are dropped."""
    count, before, _ = windows(case)
    k, axis = case.pool_size, channel_axis(case)
    channels = shape[axis]
    first = np.moveaxis(parts[0], axis, -1)
    padded = np.zeros((*first.shape[:-1], max(count * k, before + channels)))
    for i, part in enumerate(parts):
        padded[..., i : count * k : k] = np.moveaxis(part, axis, -1)
    return np.ascontiguousarray(np.moveaxis(padded[..., before : before + channels], -1, axis))


def window_sum(a: Array, case: Case) -> Array:
    """Return the sum over each window of an array shaped as x."""
    count, axis = windows(case)[0], channel_axis(case)
    padded = np.moveaxis(np.pad(a, paddings(case))[kept(case)], axis, -1)
    return np.moveaxis(padded.reshape(*padded.shape[:-1], count, -1).sum(-1), -1, axis)


def inputs(case: Case) -> dict[str, TensorSpec]:
    """Return x, the images."""
    return {"x": image_spec(case)}


def traffic(case: Case) -> Traffic:
    """Return the fewest bytes of a call: forward it reads x and writes y; training also reads dy, writes dx."""
    x = image_spec(case).nbytes
    y = x // case.shape[-1] * windows(case)[0]
    if case.direction == "forward":
        return Traffic(read_nbytes=x, written_nbytes=y)
    return Traffic(read_nbytes=x + y, written_nbytes=x + y)


register(
    Op(
        name=OP,
        title="Depthwise max pooling",
        axes=(
            *IMAGE_AXES,
            size_axis("pool_size", 3, prefix="k"),
            choice_axis("padding", "valid", "same"),
        ),
        inputs=inputs,
        reference=reference,
        vjp=vjp,
        check_gradient=ties_within(window_sum),
        tolerance=no_error,
        by_example=True,
        traffic=traffic,
        baseline=BASELINE,
        also_compare_to=ALSO_COMPARE_TO,
        in_models=IN_MODELS,
        in_compiled_models=IN_COMPILED_MODELS,
        sweeps=SWEEPS,
        builtin=True,
    )
)
