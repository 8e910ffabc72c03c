"""What the implementations of both ops share: where the axes are, and sizes that may be unknown when traced."""

from __future__ import annotations

from typing import Any

from poolbench.core.case import Case


def channel_axis(case: Case) -> int:
    """Where the channels are: last, or second."""
    return 3 if case.data_format == "channels_last" else 1


def spatial_axes(case: Case) -> tuple[int, int]:
    """Where height and width are."""
    return (1, 2) if case.data_format == "channels_last" else (2, 3)


def sizes(x: Any) -> list[Any]:
    """The sizes of a tensor; a number where it is known when traced, else a scalar tensor."""
    import tensorflow as tf

    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]
