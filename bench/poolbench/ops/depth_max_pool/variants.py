"""Calls of implementations of depthwise max pooling with strides, for the support matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from poolbench import Variant

Array = np.ndarray[Any, Any]
Call = Callable[[Any], Any]


def _overlapping(x: Array) -> Array:
    """Return the maximum over windows of 3 with a stride of 2 along the depth."""
    return np.stack([x[..., i : i + 3].max(-1) for i in range(0, x.shape[-1] - 2, 2)], axis=-1)


def _groups(x: Array) -> Array:
    """Return the maximum over groups of three along the depth."""
    y: Array = x.reshape(*x.shape[:-1], -1, 3).max(-1)
    return y


def _overlap(make: Callable[[], Call]) -> tuple[Variant, ...]:
    words = "a window of 3 with a stride of 2"
    return (Variant(check="overlap", words=words, make=make, right=_overlapping),)


def _max_pool(
    ksize: tuple[int, ...] = (1, 1, 1, 3),
    strides: tuple[int, ...] = (1, 1, 1, 2),
    padding: str = "VALID",
) -> Call:
    import tensorflow as tf

    return lambda x: tf.nn.max_pool(x, ksize, strides, padding)


def _with_argmax() -> Call:
    import tensorflow as tf

    return lambda x: tf.nn.max_pool_with_argmax(x, (1, 1, 1, 3), (1, 1, 1, 3), "VALID")[0]


def _nested_jit() -> Call:
    import tensorflow as tf

    run: Call = tf.function(_max_pool(), jit_compile=True)
    return run


def _slices() -> Call:
    import tensorflow as tf

    def maximum(x: Any) -> Any:
        windows = (x.shape[-1] - 3) // 2 + 1
        parts = [x[..., i : i + 2 * windows - 1 : 2] for i in range(3)]
        return functools.reduce(tf.maximum, parts)

    return maximum


def _pool2d() -> Call:
    import tensorflow as tf

    def pool(x: Any) -> Any:
        n, h, w, c = x.shape
        y = tf.nn.max_pool2d(tf.reshape(x, [n, h * w, c, 1]), (1, 3), (1, 2), "VALID")
        return tf.reshape(y, [n, h, w, y.shape[2]])

    return pool


def _stock() -> Call:
    import keras

    layers: Call = keras.Sequential(
        [
            keras.layers.Reshape((20, 9, 1)),
            keras.layers.MaxPooling2D((1, 3), (1, 2)),
            keras.layers.Reshape((4, 5, 4)),
        ]
    )
    return layers


def _pool3d() -> Call:
    import tensorflow as tf

    return lambda x: tf.nn.max_pool3d(x[..., None], (1, 1, 3), (1, 1, 2), "VALID")[..., 0]


def _layer() -> Call:
    from poolbench.layers import DepthMaxPool2D

    layer: Call = DepthMaxPool2D(pool_size=3, strides=2)
    return layer


VERBATIM = _overlap(lambda: _max_pool(padding="valid"))
PINNED = _overlap(_max_pool)
NATIVE = (
    *PINNED,
    Variant(
        check="silent",
        words="tf.nn.max_pool(ksize=(1, 1, 1, 3), strides=(1, 2, 2, 3))",
        make=lambda: _max_pool((1, 1, 1, 3), (1, 2, 2, 3)),
        right=lambda x: _groups(x)[:, ::2, ::2],
    ),
    Variant(
        check="silent",
        words="tf.nn.max_pool(ksize=(1, 1, 1, 1), strides=(1, 1, 1, 3))",
        make=lambda: _max_pool((1, 1, 1, 1), (1, 1, 1, 3)),
        right=lambda x: x[..., ::3],
    ),
    Variant(
        check="silent",
        words="tf.nn.max_pool_with_argmax(ksize=(1, 1, 1, 3), strides=(1, 1, 1, 3))",
        make=_with_argmax,
        right=_groups,
    ),
)
NESTED_JIT = _overlap(_nested_jit)
SLICES = _overlap(_slices)
POOL2D = _overlap(_pool2d)
POOL3D = _overlap(_pool3d)
STOCK = _overlap(_stock)
LAYER = _overlap(_layer)
