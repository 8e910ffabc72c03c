"""The implementations of depthwise max pooling that poolbench ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from poolbench import KERAS, Case, candidate
from poolbench.ops.depth_max_pool import snippets, variants
from poolbench.ops.depth_max_pool.op import kept, paddings, windows
from poolbench.ops.depth_max_pool.sweeps import OP
from poolbench.ops.shared import Builder, channel_axis, kernel_layout, known, narrow_window, sizes


def shipped(name: str, **options: Any) -> Callable[[Builder], Builder]:
    """Register a builder as a candidate; the code to paste is what its namesake in `snippets` returns."""

    def enter(build: Builder) -> Builder:
        snippet = getattr(snippets, build.__name__)
        return candidate(op=OP, name=name, snippet=snippet, **options)(build)

    return enter


def divides(case: Case) -> bool:
    """Tell whether the window divides the depth."""
    return bool(case.shape[-1] % case.pool_size == 0)


def on_cpu_without_xla(case: Case) -> bool:
    """Tell whether the native CPU kernel runs the case."""
    return bool(case.device.startswith("cpu") and case.mode != "xla")


# Documented failures of tf.nn.max_pool over the depth; tests/test_upstream.py tests each.
# fmt: off
NATIVE_FAILURES = (
    known("TensorFlow has no GPU kernel for depthwise max pooling without XLA.",
          lambda case: case.device.startswith("gpu") and case.mode != "xla",
          matches="only implemented for CPU devices|Depthwise max pooling", issue="tensorflow#636"),
    known("The CPU kernel takes channels_last only.",
          lambda case: on_cpu_without_xla(case) and case.data_format == "channels_first",
          matches="only supports NHWC on device type CPU"),
    known("The CPU kernel takes only a window that divides the depth.",
          lambda case: on_cpu_without_xla(case) and not divides(case), matches="evenly divide the input depth"),
    known("The CPU kernel has no gradient over the depth.",
          lambda case: on_cpu_without_xla(case) and case.direction == "training",
          matches="MaxPoolingGrad is not yet supported on the depth dimension"),
)
VERBATIM_FAILURE = known("The textbook's lower-case padding is refused: TensorFlow takes 'VALID' and 'SAME'.",
                         lambda _: True, matches="attr 'padding'|Value for attr 'padding'|padding")
POOL3D_FAILURES = (
    known("The CPU has no kernel for float16.",
          lambda case: on_cpu_without_xla(case) and case.dtype == "float16",
          matches="No OpKernel|Could not find device"),
    known("It takes no float64.", lambda case: case.dtype == "float64",
          matches="not in (the )?list of allowed values"),
    known("The CPU's kernel gives the whole gradient to every element within 1e-5 of the maximum.",
          lambda case: on_cpu_without_xla(case) and case.direction == "training",
          matches="dx is beyond the bound|sum of dx over a window", issue="tensorflow#51682"),
)
PINNED_FAILURE = known("The CPU kernel: no gradient over the depth, a dividing window and channels_last only.",
                       lambda case: (case.direction == "training" or not divides(case)
                                     or case.data_format == "channels_first"),
                       matches="MaxPoolingGrad is not yet supported|evenly divide the input depth|only supports NHWC")
# fmt: on


def _native(case: Case, padding: str | None = None) -> Callable[[Any], Any]:
    import tensorflow as tf

    k = case.pool_size
    window = (1, 1, 1, k) if case.data_format == "channels_last" else (1, k, 1, 1)
    layout = kernel_layout(case)
    padding = padding or str(case.padding).upper()

    def max_pool(x: Any) -> Any:
        return tf.nn.max_pool(x, ksize=window, strides=window, padding=padding, data_format=layout)

    return max_pool


# Cases are read when a candidate is built: reading one takes microseconds, which an eager call would pay.
def _fitting(case: Case) -> Callable[[Any], Any]:
    """Return a function that drops channels that fill no window ('valid'), or pads with the lowest value ('same')."""
    import tensorflow as tf

    count, before, after = windows(case)
    begin, size, widths = [0] * 4, [-1] * 4, paddings(case)
    size[channel_axis(case)] = count * case.pool_size
    if after < 0:
        return lambda x: tf.slice(x, begin, size)
    if before or after:
        return lambda x: tf.pad(x, widths, constant_values=tf.constant(-np.inf, x.dtype))
    return lambda x: x


def _shaping(case: Case, *channels: int) -> Callable[[Any], list[Any]]:
    """Return a function of x to its sizes with these in place of the channels."""
    axis = channel_axis(case)

    def shape_of(x: Any) -> list[Any]:
        shape = sizes(x)
        return [*shape[:axis], *channels, *shape[axis + 1 :]]

    return shape_of


@shipped("recipe-verbatim", form="layer", failures=(VERBATIM_FAILURE,), variants=variants.VERBATIM)
def recipe_verbatim(case: Case) -> Any:
    """The textbook Lambda verbatim, with padding="valid" in lower case."""
    import keras

    return keras.layers.Lambda(_native(case, padding=str(case.padding)), dtype=case.dtype)


@shipped("lambda-max_pool", form="layer", failures=NATIVE_FAILURES, variants=variants.NATIVE)
def lambda_max_pool(case: Case) -> Any:
    """The textbook implementation: a Lambda around tf.nn.max_pool."""
    import keras

    native = _native(case)
    # A real lambda, as in the textbook: its effect on saving and loading is part of the implementation.
    return keras.layers.Lambda(lambda x: native(x), dtype=case.dtype)  # noqa: PLW0108


@shipped("layer-max_pool", form="layer", failures=NATIVE_FAILURES, variants=variants.NATIVE)
def layer_max_pool(case: Case) -> Any:
    """A custom Keras layer around tf.nn.max_pool."""
    import keras

    native = _native(case)

    class MaxPool(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return native(x)

    return MaxPool(dtype=case.dtype)


@shipped("max_pool", failures=NATIVE_FAILURES, variants=variants.NATIVE)
def max_pool(case: Case) -> Any:
    """tf.nn.max_pool over the depth, without a layer."""
    return _native(case)


@shipped("reshape-reduce_max")
def reshape_reduce_max(case: Case) -> Any:
    """tf.reshape to (..., C/k, k), tf.reduce_max over the last axis."""
    import tensorflow as tf

    fit, grouped = _fitting(case), _shaping(case, windows(case)[0], case.pool_size)
    axis = channel_axis(case) + 1

    def reshape_max(x: Any) -> Any:
        x = fit(x)
        return tf.reduce_max(tf.reshape(x, grouped(x)), axis=axis)

    return reshape_max


@shipped("layer-reshape-reduce_max", form="layer")
def layer_reshape_reduce_max(case: Case) -> Any:
    """A custom Keras layer around reshape and reduce_max."""
    import keras

    function = reshape_reduce_max(case)

    class ReshapeMax(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return function(x)

    return ReshapeMax(dtype=case.dtype)


@shipped("slices-maximum", variants=variants.SLICES)
def slices_maximum(case: Case) -> Any:
    """tf.maximum over the k strided slices x[..., i::k]."""
    import functools

    import tensorflow as tf

    axis, k, fit = channel_axis(case), case.pool_size, _fitting(case)
    places = [
        tuple(slice(i, None, k) if j == axis else slice(None) for j in range(4)) for i in range(k)
    ]

    def maximum_of_slices(x: Any) -> Any:
        x = fit(x)
        return functools.reduce(tf.maximum, [x[place] for place in places])

    return maximum_of_slices


@shipped(
    "max_pool2d-view",
    failures=(narrow_window(lambda case: (case.pool_size,)),),
    variants=variants.POOL2D,
)
def max_pool2d_view(case: Case) -> Any:
    """tf.nn.max_pool2d with window (1, k) over the view (N, H*W, C, 1)."""
    import tensorflow as tf

    last = case.data_format == "channels_last"
    window = (1, case.pool_size) if last else (case.pool_size, 1)
    axis, padding = channel_axis(case), str(case.padding).upper()
    pooled = _shaping(case, windows(case)[0])

    def pool_view(x: Any) -> Any:
        shape = sizes(x)
        n, c = shape[0], shape[axis]
        view = tf.reshape(x, [n, -1, c, 1] if last else [n, c, -1, 1])
        return tf.reshape(tf.nn.max_pool2d(view, window, window, padding), pooled(x))

    return pool_view


@shipped("max_pool3d", failures=POOL3D_FAILURES, variants=variants.POOL3D)
def max_pool3d(case: Case) -> Any:
    """tf.nn.max_pool3d with window (1, 1, k) over x[..., None]."""
    import tensorflow as tf

    k = case.pool_size
    window = (1, 1, k) if case.data_format == "channels_last" else (k, 1, 1)
    padding = str(case.padding).upper()

    def pool3d(x: Any) -> Any:
        return tf.squeeze(tf.nn.max_pool3d(x[..., None], window, window, padding), -1)

    return pool3d


@shipped("transpose-reduce_max")
def transpose_reduce_max(case: Case) -> Any:
    """Transpose the windows to (k, E/k), reduce over the first axis, which compares whole vectors."""
    import tensorflow as tf

    if case.data_format == "channels_first":  # the windows are strided in this layout
        return reshape_reduce_max(case)
    fit, k, pooled = _fitting(case), case.pool_size, _shaping(case, windows(case)[0])

    def transpose_max(x: Any) -> Any:
        columns = tf.transpose(tf.reshape(fit(x), [-1, k]))
        return tf.reshape(tf.reduce_max(columns, axis=0), pooled(x))

    return transpose_max


@shipped("keras-ops", backends=KERAS)
def keras_ops(case: Case) -> Any:
    """keras.ops.reshape and keras.ops.max: any Keras backend."""
    import keras

    count, before, after = windows(case)
    axis, k = channel_axis(case), case.pool_size
    whole, widths = kept(case), paddings(case)

    def ops_max(x: Any) -> Any:
        if after < 0:
            x = x[whole]
        elif before or after:
            x = keras.ops.pad(x, widths, constant_values=-float("inf"))
        shape = list(keras.ops.shape(x))
        shape[axis : axis + 1] = [count, k]
        return keras.ops.max(keras.ops.reshape(x, shape), axis=axis + 1)

    return ops_max


@shipped("keras-stock", form="layer", backends=KERAS, variants=variants.STOCK)
def keras_stock(case: Case) -> Any:
    """Stock layers: Reshape, MaxPooling2D((1, k)), Reshape; reloads without custom code."""
    import keras

    _, h, w, c = case.shape
    count, k = windows(case)[0], case.pool_size
    last = case.data_format == "channels_last"
    window = (1, k) if last else (k, 1)
    computed = keras.dtype_policies.get(case.dtype).compute_dtype  # the dtype may be a mixed policy
    return keras.Sequential(
        [
            # Without it the model would take float32 and cast a float64 input down to it.
            keras.Input((h, w, c) if last else (c, h, w), dtype=computed),
            keras.layers.Reshape((h * w, c, 1) if last else (c, h * w, 1), dtype=case.dtype),
            keras.layers.MaxPooling2D(
                window, window, padding=case.padding, data_format="channels_last", dtype=case.dtype
            ),
            keras.layers.Reshape((h, w, count) if last else (count, h, w), dtype=case.dtype),
        ]
    )


@shipped("nested-jit-max_pool", variants=variants.NESTED_JIT)
def nested_jit_max_pool(case: Case) -> Any:
    """tf.nn.max_pool inside its own function with jit_compile=True, in every mode."""
    import tensorflow as tf

    return tf.function(_native(case), jit_compile=True)


@shipped("cpu-pinned-max_pool", failures=(PINNED_FAILURE,), variants=variants.PINNED)
def cpu_pinned_max_pool(case: Case) -> Any:
    """tf.nn.max_pool pinned to the CPU inside a GPU model, its transfers included."""
    import tensorflow as tf

    native = _native(case)

    def pinned(x: Any) -> Any:
        with tf.device("cpu:0"):
            return native(x)

    return pinned


@shipped("layer-depth_max_pool", backends=KERAS, form="layer", variants=variants.LAYER)
def layer_depth_max_pool(case: Case) -> Any:
    """poolbench.layers.DepthMaxPool2D, the reusable layer."""
    from poolbench.layers import DepthMaxPool2D

    return DepthMaxPool2D(
        case.pool_size,
        padding=case.padding,
        data_format=case.data_format,
        dtype=case.dtype,
    )
