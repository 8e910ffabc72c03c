"""Global average pooling: the mean of each feature map, (N, H, W, C) -> (N, C)."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, Op, TensorSpec, Traffic, register
from poolbench.ops.global_avg_pool.sweeps import (
    ALSO_COMPARE_TO,
    BASELINE,
    IN_COMPILED_MODELS,
    IN_MODELS,
    OP,
    SWEEPS,
)
from poolbench.ops.shared import IMAGE_AXES, image_spec, spatial_axes

Array = np.ndarray[Any, Any]


def inputs(case: Case) -> dict[str, TensorSpec]:
    """Return x, the images."""
    return {"x": image_spec(case)}


def reference(case: Case, x: Array) -> Array:
    """Return y, the mean over height and width."""
    y: Array = x.mean(axis=spatial_axes(case))
    return y


def vjp(case: Case, dy: Array, x: Array) -> tuple[Array]:
    """Return dx: each dy spread evenly over its feature map."""
    axes = spatial_axes(case)
    count = np.prod([x.shape[axis] for axis in axes])
    return (np.broadcast_to(np.expand_dims(dy, axes) / count, x.shape),)


def traffic(case: Case) -> Traffic:
    """Return the fewest bytes of a call: forward it reads x and writes y; training reads dy, writes y and dx."""
    x = image_spec(case).nbytes
    y = x // (case.shape[1] * case.shape[2])
    if case.direction == "forward":
        return Traffic(read_nbytes=x, written_nbytes=y)
    return Traffic(read_nbytes=x + y, written_nbytes=x + y)


register(
    Op(
        name=OP,
        title="Global average pooling",
        axes=IMAGE_AXES,
        inputs=inputs,
        reference=reference,
        vjp=vjp,
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
