"""The implementations of global average pooling that poolbench ships."""

from __future__ import annotations

from typing import Any

from poolbench import KERAS, Case
from poolbench.ops.global_avg_pool.sweeps import OP
from poolbench.ops.shared import (
    CHANNELS_LAST_ONLY,
    NARROW_SUM,
    accumulator,
    channel_axis,
    function,
    image_spec,
    implementation,
    kernel_layout,
    known,
    sizes,
    spatial_axes,
)

# keras.ops.mean computes in the type that Keras promotes to, which on these backends is at most float32.
DEMOTED = known(
    "On JAX and PyTorch keras.ops.mean computes float64 in float32.",
    lambda case: case.dtype == "float64",
    matches="beyond the bound",
)
# TensorFlow enables TensorFloat-32 by default; an H100 used it for some shapes only.
NARROW_PRODUCT = known(
    "NVIDIA's matrix units round a float32 product's factors to ten bits (TensorFloat-32).",
    lambda case: case.device.startswith("gpu") and case.dtype == "float32",
    matches="beyond the bound",
)


@implementation(
    op=OP, name="layer-global_avg_pool", backends=KERAS, form="layer", failures=(DEMOTED,)
)
def layer_global_avg_pool(case: Case) -> Any:
    """keras.layers.GlobalAveragePooling2D."""
    import keras

    return keras.layers.GlobalAveragePooling2D(data_format=case.data_format, dtype=case.dtype)


@implementation(op=OP, name="lambda-reduce_mean", form="layer", failures=(NARROW_SUM,))
def lambda_reduce_mean(case: Case) -> Any:
    """The textbook implementation: a Lambda around tf.reduce_mean."""
    import keras
    import tensorflow as tf

    axes = spatial_axes(case)
    return keras.layers.Lambda(lambda x: tf.reduce_mean(x, axes), dtype=case.dtype)


@function(op=OP, name="reduce_mean", failures=(NARROW_SUM,))
def reduce_mean(case: Case, tf: Any, x: Any) -> Any:
    """tf.reduce_mean over height and width, without a layer."""
    return tf.reduce_mean(x, spatial_axes(case))


@function(op=OP, name="reduce_mean-float32")
def reduce_mean_float32(case: Case, tf: Any, x: Any) -> Any:
    """tf.reduce_mean of x cast to float32 (float64 stays), cast back."""
    return tf.cast(tf.reduce_mean(tf.cast(x, accumulator(case)), spatial_axes(case)), x.dtype)


@function(op=OP, name="avg_pool2d", failures=(NARROW_SUM, CHANNELS_LAST_ONLY))
def avg_pool2d(case: Case, tf: Any, x: Any) -> Any:
    """tf.nn.avg_pool2d with the full window."""
    window = [x.shape[axis] for axis in spatial_axes(case)]
    y = tf.nn.avg_pool2d(x, window, window, "VALID", kernel_layout(case))
    return tf.squeeze(y, spatial_axes(case))


@implementation(
    op=OP,
    name="keras-stock",
    backends=KERAS,
    form="layer",
    failures=(NARROW_SUM, CHANNELS_LAST_ONLY),
)
def keras_stock(case: Case) -> Any:
    """Return stock layers: AveragePooling2D over the whole image, Reshape."""
    import keras

    given = keras.Input(image_spec(case).shape[1:], dtype=_compute_dtype(case))
    pool = keras.layers.AveragePooling2D(
        case.shape[1:3], data_format=case.data_format, dtype=case.dtype
    )
    reshape = keras.layers.Reshape(case.shape[3:], dtype=case.dtype)
    return keras.Sequential([given, pool, reshape])


def _compute_dtype(case: Case) -> str:
    """Return the dtype that layers compute in: the case's may be a mixed policy."""
    import keras

    return str(keras.dtype_policies.get(case.dtype).compute_dtype)


@function(op=OP, name="mean-of-means", failures=(NARROW_SUM,))
def mean_of_means(case: Case, tf: Any, x: Any) -> Any:
    """The mean over the width, then over the height."""
    return tf.reduce_mean(tf.reduce_mean(x, spatial_axes(case)[1]), spatial_axes(case)[0])


@implementation(op=OP, name="einsum", failures=(NARROW_SUM,))
def einsum(case: Case) -> Any:
    """tf.einsum('nhwc->nc') over the number of pixels."""
    import tensorflow as tf

    equation = "nhwc->nc" if case.data_format == "channels_last" else "nchw->nc"
    height, width = spatial_axes(case)

    def sum_over_count(x: Any) -> Any:
        shape = sizes(x)
        return tf.einsum(equation, x) / tf.cast(shape[height] * shape[width], x.dtype)

    return sum_over_count


@implementation(op=OP, name="matmul-ones", failures=(NARROW_SUM, NARROW_PRODUCT))
def matmul_ones(case: Case) -> Any:
    """A row of 1/(H*W) times the (H*W, C) matrix of each instance."""
    import tensorflow as tf

    last = case.data_format == "channels_last"
    channels, (height, width) = channel_axis(case), spatial_axes(case)

    def weighted_sum(x: Any) -> Any:
        shape = sizes(x)
        n, c, count = shape[0], shape[channels], shape[height] * shape[width]
        flat = tf.reshape(x, [n, count, c] if last else [n, c, count])
        weights = tf.fill([1, count], tf.constant(1, x.dtype) / tf.cast(count, x.dtype))
        return tf.squeeze(tf.matmul(weights, flat, transpose_b=not last), axis=1)

    return weighted_sum


@implementation(op=OP, name="keras-ops", backends=KERAS, failures=(DEMOTED,))
def keras_ops(case: Case) -> Any:
    """keras.ops.mean: any Keras backend."""
    import keras

    axes = spatial_axes(case)
    return lambda x: keras.ops.mean(x, axis=axes)
