"""The implementations of global average pooling that poolbench ships."""

from __future__ import annotations

from typing import Any

from poolbench import KERAS, Case, KnownFailure, candidate
from poolbench.ops.global_avg_pool import snippets
from poolbench.ops.global_avg_pool.sweeps import OP
from poolbench.ops.shared import (
    CHANNELS_LAST_ONLY,
    NARROW_SUM,
    channel_axis,
    kernel_layout,
    sizes,
    spatial_axes,
)

# keras.ops.mean computes in the type that Keras promotes to, which on these backends is at most float32.
DEMOTED = KnownFailure(
    when=lambda case: case.dtype == "float64",
    matches="beyond the bound",
    reason="On JAX and PyTorch keras.ops.mean computes float64 in float32.",
)


# TensorFlow enables TensorFloat-32 by default; an H100 used it for some shapes only.
NARROW_PRODUCT = KnownFailure(
    when=lambda case: case.device.startswith("gpu") and case.dtype == "float32",
    matches="beyond the bound",
    reason="NVIDIA's matrix units round a float32 product's factors to ten bits (TensorFloat-32).",
)


@candidate(
    op=OP,
    name="layer-global_avg_pool",
    backends=KERAS,
    form="layer",
    failures=(DEMOTED,),
    snippet=snippets.layer_global_avg_pool,
)
def layer_global_avg_pool(case: Case) -> Any:
    """keras.layers.GlobalAveragePooling2D."""
    import keras

    return keras.layers.GlobalAveragePooling2D(data_format=case.data_format, dtype=case.dtype)


@candidate(
    op=OP,
    name="lambda-reduce_mean",
    form="layer",
    failures=(NARROW_SUM,),
    snippet=snippets.lambda_reduce_mean,
)
def lambda_reduce_mean(case: Case) -> Any:
    """The textbook implementation: a Lambda around tf.reduce_mean."""
    import keras
    import tensorflow as tf

    axes = list(spatial_axes(case))
    return keras.layers.Lambda(lambda x: tf.reduce_mean(x, axis=axes), dtype=case.dtype)


@candidate(op=OP, name="reduce_mean", failures=(NARROW_SUM,), snippet=snippets.reduce_mean)
def reduce_mean(case: Case) -> Any:
    """tf.reduce_mean over height and width, without a layer."""
    import tensorflow as tf

    axes = list(spatial_axes(case))

    def mean(x: Any) -> Any:
        return tf.reduce_mean(x, axis=axes)

    return mean


@candidate(op=OP, name="reduce_mean-float32", snippet=snippets.reduce_mean_float32)
def reduce_mean_float32(case: Case) -> Any:
    """tf.reduce_mean of x cast to float32 (float64 stays), cast back."""
    import tensorflow as tf

    axes = list(spatial_axes(case))
    wide = tf.float64 if case.dtype == "float64" else tf.float32

    def mean_in_float32(x: Any) -> Any:
        return tf.cast(tf.reduce_mean(tf.cast(x, wide), axis=axes), x.dtype)

    return mean_in_float32


@candidate(
    op=OP,
    name="avg_pool2d",
    failures=(NARROW_SUM, CHANNELS_LAST_ONLY),
    snippet=snippets.avg_pool2d,
)
def avg_pool2d(case: Case) -> Any:
    """tf.nn.avg_pool2d with the full window."""
    import tensorflow as tf

    layout = kernel_layout(case)
    axes = list(spatial_axes(case))

    def pool_all(x: Any) -> Any:
        window = [x.shape[axis] for axis in axes]
        return tf.squeeze(tf.nn.avg_pool2d(x, window, window, "VALID", data_format=layout), axes)

    return pool_all


@candidate(
    op=OP,
    name="keras-stock",
    backends=KERAS,
    form="layer",
    failures=(NARROW_SUM, CHANNELS_LAST_ONLY),
    snippet=snippets.keras_stock,
)
def keras_stock(case: Case) -> Any:
    """Return stock layers: AveragePooling2D over the whole image, Reshape."""
    import keras

    _, h, w, c = case.shape
    computed = keras.dtype_policies.get(case.dtype).compute_dtype  # the dtype may be a mixed policy
    given = (h, w, c) if case.data_format == "channels_last" else (c, h, w)
    pool = keras.layers.AveragePooling2D((h, w), data_format=case.data_format, dtype=case.dtype)
    reshape = keras.layers.Reshape((c,), dtype=case.dtype)
    return keras.Sequential([keras.Input(given, dtype=computed), pool, reshape])


@candidate(op=OP, name="mean-of-means", failures=(NARROW_SUM,), snippet=snippets.mean_of_means)
def mean_of_means(case: Case) -> Any:
    """The mean over the width, then over the height."""
    import tensorflow as tf

    height, width = spatial_axes(case)

    def two_means(x: Any) -> Any:
        return tf.reduce_mean(tf.reduce_mean(x, axis=width), axis=height)

    return two_means


@candidate(op=OP, name="einsum", failures=(NARROW_SUM,), snippet=snippets.einsum)
def einsum(case: Case) -> Any:
    """tf.einsum('nhwc->nc') over the number of pixels."""
    import tensorflow as tf

    equation = "nhwc->nc" if case.data_format == "channels_last" else "nchw->nc"
    height, width = spatial_axes(case)

    def sum_over_count(x: Any) -> Any:
        shape = sizes(x)
        return tf.einsum(equation, x) / tf.cast(shape[height] * shape[width], x.dtype)

    return sum_over_count


@candidate(
    op=OP, name="matmul-ones", failures=(NARROW_SUM, NARROW_PRODUCT), snippet=snippets.matmul_ones
)
def matmul_ones(case: Case) -> Any:
    """A row of 1/(H*W) times the (H*W, C) matrix of each instance."""
    import tensorflow as tf

    last = case.data_format == "channels_last"

    def weighted_sum(x: Any) -> Any:
        shape = sizes(x)
        n, c = shape[0], shape[channel_axis(case)]
        height, width = (shape[axis] for axis in spatial_axes(case))
        count = height * width
        flat = tf.reshape(x, [n, count, c] if last else [n, c, count])
        weights = tf.fill([1, count], tf.constant(1, x.dtype) / tf.cast(count, x.dtype))
        product = tf.linalg.matmul(weights, flat, transpose_b=not last)
        return tf.squeeze(product, axis=1)

    return weighted_sum


@candidate(op=OP, name="keras-ops", backends=KERAS, failures=(DEMOTED,), snippet=snippets.keras_ops)
def keras_ops(case: Case) -> Any:
    """keras.ops.mean: any Keras backend."""
    import keras

    axes = spatial_axes(case)

    def ops_mean(x: Any) -> Any:
        return keras.ops.mean(x, axis=axes)

    return ops_mean
