"""Global average pooling: one mean a feature map and instance, (N, H, W, C) -> (N, C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.core.candidate import KnownFailure, Op, candidate, register
from poolbench.core.case import Case, Shape, Sweep, make_case, product, zipped
from poolbench.ops.shared import channel_axis, sizes, spatial_axes

if TYPE_CHECKING:
    from poolbench.core.candidate import Array

OP = "global_avg_pool"


def reference(x: Array, case: Case) -> Array:
    """y, the mean over height and width."""
    y: Array = x.mean(axis=spatial_axes(case))
    return y


def gradient(x: Array, dy: Array, case: Case) -> Array:
    """dx: each dy spread evenly over its feature map."""
    axes = spatial_axes(case)
    count = np.prod([x.shape[axis] for axis in axes])
    return np.broadcast_to(np.expand_dims(dy, axes) / count, x.shape)


def narrow(case: Case) -> bool:
    """Whether a sum in the case's own dtype loses digits."""
    return case.dtype in ("float16", "bfloat16")


# A sum in half precision stops growing when its terms fall below its last digit.
NARROW_SUM = (
    KnownFailure(
        when=narrow,
        matches="beyond the bound|not finite",
        reason="It accumulates in the input's own 16 bits, and large sums lose their small terms.",
    ),
)


# TensorFloat-32, which TensorFlow allows as it comes: an H100 was seen to use it for some shapes and not for others.
NARROW_PRODUCT = KnownFailure(
    when=lambda case: case.device.startswith("gpu") and case.dtype == "float32",
    matches="beyond the bound",
    reason="NVIDIA's matrix units round a float32 product's factors to ten bits (TensorFloat-32).",
)


@candidate(op=OP, name="layer-global_avg_pool", form="layer", framework="keras")
def layer_global_avg_pool(case: Case) -> Any:
    """keras.layers.GlobalAveragePooling2D."""
    import keras

    return keras.layers.GlobalAveragePooling2D(data_format=case.data_format, dtype=case.dtype)


@candidate(op=OP, name="lambda-reduce_mean", form="layer", framework="keras", failures=NARROW_SUM)
def lambda_reduce_mean(case: Case) -> Any:
    """The book's recipe: a Lambda around tf.reduce_mean."""
    import keras
    import tensorflow as tf

    axes = list(spatial_axes(case))
    return keras.layers.Lambda(lambda x: tf.reduce_mean(x, axis=axes), dtype=case.dtype)


@candidate(op=OP, name="reduce_mean", failures=NARROW_SUM)
def reduce_mean(case: Case) -> Any:
    """tf.reduce_mean over height and width, bare."""
    import tensorflow as tf

    axes = list(spatial_axes(case))

    def mean(x: Any) -> Any:
        return tf.reduce_mean(x, axis=axes)

    return mean


@candidate(op=OP, name="reduce_mean-float32")
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
    failures=(
        *NARROW_SUM,
        KnownFailure(
            when=lambda case: (
                case.device.startswith("cpu") and case.data_format == "channels_first"
            ),
            matches="only supports NHWC|NHWC tensor format|NCHW",
            reason="The CPU kernel takes channels_last only.",
        ),
    ),
)
def avg_pool2d(case: Case) -> Any:
    """tf.nn.avg_pool2d with the full window."""
    import tensorflow as tf

    layout = "NHWC" if case.data_format == "channels_last" else "NCHW"
    axes = list(spatial_axes(case))

    def pool_all(x: Any) -> Any:
        window = [x.shape[axis] for axis in axes]
        return tf.squeeze(tf.nn.avg_pool2d(x, window, window, "VALID", data_format=layout), axes)

    return pool_all


@candidate(op=OP, name="mean-of-means", failures=NARROW_SUM)
def mean_of_means(case: Case) -> Any:
    """The mean over the width, then over the height."""
    import tensorflow as tf

    height, width = spatial_axes(case)

    def two_means(x: Any) -> Any:
        return tf.reduce_mean(tf.reduce_mean(x, axis=width), axis=height)

    return two_means


@candidate(op=OP, name="einsum", failures=NARROW_SUM)
def einsum(case: Case) -> Any:
    """tf.einsum('nhwc->nc') over the number of pixels."""
    import tensorflow as tf

    equation = "nhwc->nc" if case.data_format == "channels_last" else "nchw->nc"
    height, width = spatial_axes(case)

    def sum_over_count(x: Any) -> Any:
        shape = sizes(x)
        return tf.einsum(equation, x) / tf.cast(shape[height] * shape[width], x.dtype)

    return sum_over_count


@candidate(op=OP, name="matmul-ones", failures=(*NARROW_SUM, NARROW_PRODUCT))
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


@candidate(op=OP, name="keras-ops", framework="keras")
def keras_ops(case: Case) -> Any:
    """keras.ops.mean: any Keras backend."""
    import keras

    axes = spatial_axes(case)

    def ops_mean(x: Any) -> Any:
        return keras.ops.mean(x, axis=axes)

    return ops_mean


# Post-ReLU inputs are what these layers see; they also show a sum that loses terms, which normal
# inputs, whose sums stay near zero, hide.
BASE = make_case(op=OP, shape=(8, 56, 56, 96), distribution="relu")
GPU_BASE = make_case(op=OP, shape=(32, 56, 56, 96), distribution="relu")
BATCH: Shape = GPU_BASE.shape
HEADS: tuple[Shape, ...] = ((1, 7, 7, 2048), (32, 7, 7, 2048), (32, 14, 14, 672), (1, 56, 56, 96))
LARGEST: Shape = (32, 112, 112, 96)
SMALL: Shape = HEADS[0]

BASELINE = "layer-global_avg_pool"
LAMBDA = "lambda-reduce_mean"
RIVALS = (BASELINE, LAMBDA, "avg_pool2d", "mean-of-means", "matmul-ones")
EVERYONE = (*RIVALS, "reduce_mean", "reduce_mean-float32", "einsum", "keras-ops")
XLA_RIVALS = (BASELINE, LAMBDA, "avg_pool2d", "matmul-ones")


def trainable_size(case: Case) -> bool:
    """The largest shape is forward only: its gradients take seconds to compile and to run."""
    return case.direction == "forward" or case.shape != LARGEST


RULES = (trainable_size,)

DEFAULT = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(candidates=EVERYONE, mode=["graph"]),
        product(candidates=[*RIVALS, "reduce_mean"], mode=["eager"]),
        product(candidates=[*XLA_RIVALS, "einsum", "mean-of-means"], mode=["xla"]),
        product(candidates=RIVALS, direction=["training"], mode=["graph"]),
        product(candidates=XLA_RIVALS, direction=["training"], mode=["xla"]),
        product(candidates=RIVALS, mode=["graph"], shape=HEADS),
        product(candidates=[*RIVALS[:4], "reduce_mean"], mode=["eager"], shape=[SMALL]),
        product(candidates=RIVALS[:4], mode=["graph"], shape=[LARGEST]),
        product(
            candidates=[BASELINE, LAMBDA, "reduce_mean-float32", "avg_pool2d", "mean-of-means"],
            dtype=["float16"],
            shape=[(32, 7, 7, 2048), (8, 56, 56, 96), (8, 112, 112, 96)],
        ),
        product(candidates=RIVALS, threads=[1]),
    ),
)
QUICK = Sweep(
    base=make_case(op=OP, shape=(8, 28, 28, 96), distribution="relu"),
    parts=(
        product(candidates=RIVALS, mode=["graph"]),
        product(candidates=XLA_RIVALS[:3], mode=["xla"]),
        product(candidates=RIVALS[:3], direction=["training"]),
    ),
)
FULL = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(
            shape=[
                *HEADS, BASE.shape, BATCH, LARGEST, (8, 8, 8, 1536), (32, 10, 10, 2048),
                (8, 11, 11, 4032), (32, 28, 28, 240), (128, 7, 7, 512),
            ],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
        ),
        product(mode=["eager", "graph", "xla"], dtype=["float64"]),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
        product(mode=["graph", "xla"], cache=["cold"]),
        product(mode=["graph", "xla"], distribution=["normal"]),
        product(mode=["eager", "graph", "xla"], threads=[1]),
        zipped(shape=[(1, 256, 256, 32), (8, 31, 17, 17), (8, 9, 9, 1)], mode=["graph"] * 3),
    ),
)  # fmt: skip
# What tells most comes first: time on a GPU is dear, and a run that is ended early is a run.
GPU = Sweep(
    base=GPU_BASE,
    rules=RULES,
    parts=(
        product(candidates=EVERYONE, mode=["graph", "eager"]),
        product(candidates=XLA_RIVALS, mode=["xla"]),
        # The cast of the float16 layer moves 10 bytes an element against reduce_mean's 2; XLA erases it.
        product(candidates=RIVALS, mode=["graph", "xla"], dtype=["float16", "bfloat16"]),
        # reduce_mean over NHWC changes its kernel where H*W / (N*C) crosses 16: between these two.
        product(candidates=RIVALS, mode=["graph"], shape=[(12, 112, 112, 64), (13, 112, 112, 64)]),
        product(candidates=RIVALS, mode=["graph", "xla"], direction=["training"]),
        product(candidates=RIVALS, mode=["graph"], shape=[LARGEST, *HEADS]),
        product(candidates=RIVALS, mode=["graph"], cache=["cold"]),
        product(candidates=XLA_RIVALS, mode=["xla"], cache=["cold"]),
        product(candidates=XLA_RIVALS, mode=["xla"], shape=[LARGEST]),
        product(candidates=RIVALS, mode=["eager"], dtype=["float16", "bfloat16"]),
    ),
)  # fmt: skip

register(
    Op(
        name=OP,
        title="Global average pooling",
        reference=reference,
        gradient=gradient,
        baseline=BASELINE,
        recipe=LAMBDA,
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL, "gpu": GPU},
        builtin=True,
    )
)
