"""Shared parts of the pooling ops: axes of an image, positions of its dimensions, and sizes unknown to tracing."""

from __future__ import annotations

from typing import Any

from poolbench import Case, TensorSpec, choice_axis, shape_axis

# shape is (N, H, W, C) for every data format.
IMAGE_AXES = (
    shape_axis("shape", (32, 56, 56, 96), rank=4),
    choice_axis("data_format", "channels_last", "channels_first", quiet=True),
    choice_axis("distribution", "normal", "relu", quiet=True),
)


def image_spec(case: Case) -> TensorSpec:
    """Return the images of a case as its data format lays them out."""
    n, h, w, c = case.shape
    shape = (n, h, w, c) if case.data_format == "channels_last" else (n, c, h, w)
    return TensorSpec(shape, case.dtype, fill=case.distribution)


def channel_axis(case: Case) -> int:
    """Return the position of the channels: last, or second."""
    return 3 if case.data_format == "channels_last" else 1


def spatial_axes(case: Case) -> tuple[int, int]:
    """Return the positions of height and width."""
    return (1, 2) if case.data_format == "channels_last" else (2, 3)


def sizes(x: Any) -> list[Any]:
    """Return the sizes of a tensor; a number where it is known when traced, else a scalar tensor."""
    import tensorflow as tf

    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]
