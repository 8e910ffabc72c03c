"""Depthwise max pooling: the maximum over each k neighbouring channels.

`padding='valid'` drops the channels that do not fill a window; `'same'` pads both ends with the lowest
value, half of the missing channels before and the rest after, as TensorFlow's SAME does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.core.candidate import KnownFailure, Op, Tolerance, candidate, register
from poolbench.core.case import Case, Shape, Sweep, make_case, product, zipped
from poolbench.ops.shared import channel_axis, sizes

if TYPE_CHECKING:
    from poolbench.core.candidate import Array

OP = "depth_max_pool"


def windows(case: Case) -> tuple[int, int, int]:
    """(number of windows, channels padded before, channels padded after or, if negative, dropped)."""
    channels, k = case.shape[-1], case.pool_size or 1
    if case.padding != "same":
        return channels // k, 0, channels // k * k - channels
    count = -(-channels // k)
    missing = count * k - channels
    return count, missing // 2, missing - missing // 2


def _window_slices(x: Array, case: Case) -> list[Array]:
    """k arrays shaped as y: the first elements of all windows, the second ones, and so on."""
    count, before, after = windows(case)
    k, axis = case.pool_size or 1, channel_axis(case)
    if before or after > 0:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, max(after, 0))
        x = np.pad(x, widths, constant_values=-np.inf)
    rows = np.moveaxis(x, axis, -1)[..., : count * k]
    return [np.moveaxis(rows[..., i::k], -1, axis) for i in range(k)]


def reference(x: Array, case: Case) -> Array:
    """y, the maximum over each window."""
    slices = _window_slices(x, case)
    y = slices[0].copy()
    for part in slices[1:]:
        np.maximum(y, part, out=y)
    return y


def gradient(x: Array, dy: Array, case: Case) -> Array:
    """dx: dy at each window's maximum, split equally among elements that tie for it."""
    slices = _window_slices(x, case)
    y = reference(x, case)
    hits = [part == y for part in slices]
    shares = dy / np.maximum(sum(hit.astype(np.float64) for hit in hits), 1.0)
    return _scatter([hit * shares for hit in hits], x.shape, case)


def _scatter(parts: Sequence[Array], shape: tuple[int, ...], case: Case) -> Array:
    """An array of x's shape from k arrays shaped as y; what lies in the padding is lost."""
    count, before, _ = windows(case)
    k, axis = case.pool_size or 1, channel_axis(case)
    channels = shape[axis]
    first = np.moveaxis(parts[0], axis, -1)
    padded = np.zeros((*first.shape[:-1], max(count * k, before + channels)))
    for i, part in enumerate(parts):
        padded[..., i : count * k : k] = np.moveaxis(part, axis, -1)
    return np.ascontiguousarray(np.moveaxis(padded[..., before : before + channels], -1, axis))


def window_sum(a: Array, case: Case) -> Array:
    """The sum over each window of an array shaped as x."""
    count, before, after = windows(case)
    axis = channel_axis(case)
    widths = [(0, 0)] * a.ndim
    widths[axis] = (before, max(after, 0))
    padded = np.moveaxis(np.pad(a, widths), axis, -1)[..., : count * (case.pool_size or 1)]
    return np.moveaxis(padded.reshape(*padded.shape[:-1], count, -1).sum(-1), -1, axis)


def bounds(case: Case) -> Tolerance:
    """A maximum is one of its elements: nothing may be rounded."""
    del case
    return Tolerance(relative=0.0, absolute=0.0, reason="a maximum is one of its elements")


def divides(case: Case) -> bool:
    """Whether the window divides the depth."""
    return case.shape[-1] % (case.pool_size or 1) == 0


def on_cpu_without_xla(case: Case) -> bool:
    """Whether the native CPU kernel runs the case."""
    return case.device.startswith("cpu") and case.mode != "xla"


# What tf.nn.max_pool over the depth is documented to refuse; tests/test_upstream.py tries each.
NATIVE_FAILURES = (
    KnownFailure(
        when=lambda case: case.device.startswith("gpu") and case.mode != "xla",
        matches="only implemented for CPU devices|Depthwise max pooling",
        reason="TensorFlow has no GPU kernel for depthwise max pooling outside XLA.",
        issue="tensorflow#636",
    ),
    KnownFailure(
        when=lambda case: on_cpu_without_xla(case) and case.data_format == "channels_first",
        matches="only supports NHWC on device type CPU",
        reason="The CPU kernel takes channels_last only.",
    ),
    KnownFailure(
        when=lambda case: on_cpu_without_xla(case) and not divides(case),
        matches="evenly divide the input depth",
        reason="The CPU kernel takes only a window that divides the depth.",
    ),
    KnownFailure(
        when=lambda case: on_cpu_without_xla(case) and case.direction == "training",
        matches="MaxPoolingGrad is not yet supported on the depth dimension",
        reason="The CPU kernel has no gradient over the depth.",
    ),
)
VERBATIM_FAILURE = KnownFailure(
    when=lambda _: True,
    matches="attr 'padding'|Value for attr 'padding'|padding",
    reason="The book's lower-case padding is refused: TensorFlow takes 'VALID' and 'SAME'.",
)


def _native(case: Case, padding: str | None = None) -> Callable[[Any], Any]:
    import tensorflow as tf

    k = case.pool_size
    window = (1, 1, 1, k) if case.data_format == "channels_last" else (1, k, 1, 1)
    layout = "NHWC" if case.data_format == "channels_last" else "NCHW"
    padding = padding or str(case.padding).upper()

    def max_pool(x: Any) -> Any:
        return tf.nn.max_pool(x, ksize=window, strides=window, padding=padding, data_format=layout)

    return max_pool


def _fitted(x: Any, case: Case) -> Any:
    """x with the channels that fill no window dropped ('valid') or padded with the lowest ('same')."""
    import tensorflow as tf

    count, before, after = windows(case)
    axis, k = channel_axis(case), case.pool_size or 1
    if after < 0:
        begin, size = [0] * 4, [-1] * 4
        size[axis] = count * k
        return tf.slice(x, begin, size)
    if before or after:
        paddings = [[0, 0]] * 4
        paddings[axis] = [before, after]
        return tf.pad(x, paddings, constant_values=tf.constant(-np.inf, x.dtype))
    return x


def _grouped_shape(x: Any, case: Case) -> list[Any]:
    """The sizes of x with the channels as (windows, k)."""
    shape, axis = sizes(x), channel_axis(case)
    return [*shape[:axis], windows(case)[0], case.pool_size, *shape[axis + 1 :]]


def _pooled_shape(x: Any, case: Case) -> list[Any]:
    shape = sizes(x)
    shape[channel_axis(case)] = windows(case)[0]
    return shape


@candidate(
    op=OP, name="recipe-verbatim", form="layer", framework="keras", failures=(VERBATIM_FAILURE,)
)
def recipe_verbatim(case: Case) -> Any:
    """The book's Lambda to the letter, padding="valid" in lower case."""
    import keras

    return keras.layers.Lambda(_native(case, padding=str(case.padding)), dtype=case.dtype)


@candidate(op=OP, name="lambda-max_pool", form="layer", framework="keras", failures=NATIVE_FAILURES)
def lambda_max_pool(case: Case) -> Any:
    """The book's recipe: a Lambda around tf.nn.max_pool."""
    import keras

    native = _native(case)
    # A real lambda, as in the book: what it does to saving and loading is part of the recipe.
    return keras.layers.Lambda(lambda x: native(x), dtype=case.dtype)  # noqa: PLW0108


@candidate(op=OP, name="layer-max_pool", form="layer", framework="keras", failures=NATIVE_FAILURES)
def layer_max_pool(case: Case) -> Any:
    """A custom Keras layer around tf.nn.max_pool."""
    import keras

    native = _native(case)

    class MaxPool(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return native(x)

    return MaxPool(dtype=case.dtype)


@candidate(op=OP, name="max_pool", failures=NATIVE_FAILURES)
def max_pool(case: Case) -> Any:
    """tf.nn.max_pool over the depth, bare."""
    return _native(case)


@candidate(op=OP, name="reshape-reduce_max")
def reshape_reduce_max(case: Case) -> Any:
    """tf.reshape to (..., C/k, k), tf.reduce_max over the last axis."""
    import tensorflow as tf

    def reshape_max(x: Any) -> Any:
        x = _fitted(x, case)
        return tf.reduce_max(tf.reshape(x, _grouped_shape(x, case)), axis=channel_axis(case) + 1)

    return reshape_max


@candidate(op=OP, name="layer-reshape-reduce_max", form="layer", framework="keras")
def layer_reshape_reduce_max(case: Case) -> Any:
    """A custom Keras layer around reshape and reduce_max."""
    import keras

    function = reshape_reduce_max(case)

    class ReshapeMax(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return function(x)

    return ReshapeMax(dtype=case.dtype)


@candidate(op=OP, name="slices-maximum")
def slices_maximum(case: Case) -> Any:
    """tf.maximum over the k strided slices x[..., i::k]."""
    import functools

    import tensorflow as tf

    axis, k = channel_axis(case), case.pool_size or 1

    def maximum_of_slices(x: Any) -> Any:
        x = _fitted(x, case)
        slices = [
            x[tuple(slice(i, None, k) if j == axis else slice(None) for j in range(4))]
            for i in range(k)
        ]
        return functools.reduce(tf.maximum, slices)

    return maximum_of_slices


@candidate(op=OP, name="max_pool2d-view")
def max_pool2d_view(case: Case) -> Any:
    """tf.nn.max_pool2d with window (1, k) over the view (N, H*W, C, 1)."""
    import tensorflow as tf

    last = case.data_format == "channels_last"
    window = (1, case.pool_size) if last else (case.pool_size, 1)

    def pool_view(x: Any) -> Any:
        n, *_ = shape = sizes(x)
        c = shape[channel_axis(case)]
        view = tf.reshape(x, [n, -1, c, 1] if last else [n, c, -1, 1])
        y = tf.nn.max_pool2d(view, window, window, str(case.padding).upper())
        return tf.reshape(y, _pooled_shape(x, case))

    return pool_view


@candidate(op=OP, name="max_pool3d")
def max_pool3d(case: Case) -> Any:
    """tf.nn.max_pool3d with window (1, 1, k) over x[..., None]."""
    import tensorflow as tf

    k = case.pool_size
    window = (1, 1, k) if case.data_format == "channels_last" else (k, 1, 1)

    def pool3d(x: Any) -> Any:
        y = tf.nn.max_pool3d(x[..., None], window, window, str(case.padding).upper())
        return tf.squeeze(y, -1)

    return pool3d


@candidate(op=OP, name="transpose-reduce_max")
def transpose_reduce_max(case: Case) -> Any:
    """Transpose the windows to (k, E/k), reduce over the first axis: whole vectors are compared."""
    import tensorflow as tf

    def transpose_max(x: Any) -> Any:
        x = _fitted(x, case)
        if case.data_format == "channels_first":  # the windows are strided already
            return tf.reduce_max(tf.reshape(x, _grouped_shape(x, case)), axis=2)
        columns = tf.transpose(tf.reshape(x, [-1, case.pool_size]))
        return tf.reshape(tf.reduce_max(columns, axis=0), _pooled_shape(x, case))

    return transpose_max


@candidate(op=OP, name="keras-ops", framework="keras")
def keras_ops(case: Case) -> Any:
    """keras.ops.reshape and keras.ops.max: any Keras backend."""
    import keras

    def ops_max(x: Any) -> Any:
        x = _fitted(x, case)
        return keras.ops.max(
            keras.ops.reshape(x, _grouped_shape(x, case)), axis=channel_axis(case) + 1
        )

    return ops_max


@candidate(op=OP, name="keras-stock", form="layer", framework="keras")
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


@candidate(op=OP, name="nested-jit-max_pool")
def nested_jit_max_pool(case: Case) -> Any:
    """tf.nn.max_pool inside a function of its own with jit_compile=True, whatever is around it."""
    import tensorflow as tf

    return tf.function(_native(case), jit_compile=True)


@candidate(
    op=OP,
    name="cpu-pinned-max_pool",
    failures=(
        KnownFailure(
            when=lambda case: case.direction == "training" or not divides(case),
            matches="MaxPoolingGrad is not yet supported|evenly divide the input depth",
            reason="The CPU kernel has no gradient over the depth and needs a dividing window.",
        ),
    ),
)
def cpu_pinned_max_pool(case: Case) -> Any:
    """tf.nn.max_pool pinned to the CPU inside a GPU model, its transfers included."""
    import tensorflow as tf

    native = _native(case)

    def pinned(x: Any) -> Any:
        with tf.device("cpu:0"):
            return native(x)

    return pinned


@candidate(op=OP, name="layer-depth_max_pool", form="layer", framework="keras")
def layer_depth_max_pool(case: Case) -> Any:
    """poolbench.layers.DepthMaxPool2D: the layer to take away."""
    from poolbench.layers import DepthMaxPool2D

    return DepthMaxPool2D(
        case.pool_size or 1,
        padding=case.padding or "valid",
        data_format=case.data_format,
        dtype=case.dtype,
    )


# Small enough for many rounds in a few seconds on two cores, too large for a core's own cache.
BASE = make_case(op=OP, shape=(8, 56, 56, 96), pool_size=3, padding="valid")
GPU_BASE = make_case(op=OP, shape=(32, 56, 56, 96), pool_size=3, padding="valid")
BATCH: Shape = GPU_BASE.shape
SMALL: Shape = (1, 8, 8, 96)
SHAPES: tuple[Shape, ...] = (SMALL, (1, 56, 56, 96), (32, 14, 14, 512), (32, 28, 28, 256))
LARGEST: Shape = (32, 112, 112, 96)

BASELINE = "reshape-reduce_max"
TAKE_AWAY = "layer-depth_max_pool"
LAMBDA = "lambda-max_pool"
# Outside XLA each is a kernel of its own; under XLA most become the same fused loop.
RIVALS = (BASELINE, LAMBDA, TAKE_AWAY, "transpose-reduce_max", "max_pool2d-view", "keras-stock")
EVERYONE = (
    *RIVALS, "max_pool", "layer-max_pool", "layer-reshape-reduce_max", "slices-maximum",
    "max_pool3d", "keras-ops", "nested-jit-max_pool", "recipe-verbatim",
)  # fmt: skip
XLA_RIVALS = (BASELINE, LAMBDA, TAKE_AWAY, "max_pool2d-view")


def fits(case: Case) -> bool:
    """The window is within the depth."""
    return (case.pool_size or 1) <= case.shape[-1]


def trainable_size(case: Case) -> bool:
    """The largest shape is forward only: its gradients take seconds to compile and to run."""
    return case.direction == "forward" or case.shape != LARGEST


RULES = (fits, trainable_size)

DEFAULT = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(candidates=EVERYONE, mode=["graph"]),
        product(candidates=[*RIVALS, "max_pool"], mode=["eager"]),
        product(candidates=[*XLA_RIVALS, "slices-maximum", "transpose-reduce_max"], mode=["xla"]),
        product(candidates=RIVALS, direction=["training"], mode=["graph"]),
        product(candidates=XLA_RIVALS, direction=["training"], mode=["xla"]),
        product(candidates=RIVALS[:4], mode=["graph"], shape=SHAPES),
        product(candidates=RIVALS[:4], mode=["eager"], shape=[SMALL]),
        product(candidates=RIVALS[:3], mode=["graph", "xla"], shape=[LARGEST]),
        product(candidates=RIVALS[:4], pool_size=[2, 4, 8, 16]),
        product(candidates=[*RIVALS[:4], "keras-stock"], pool_size=[5], padding=["valid", "same"]),
        product(candidates=RIVALS[:3], padding=["same"]),
        product(candidates=RIVALS[:4], dtype=["float16"]),
        product(candidates=RIVALS[:4], direction=["training"], distribution=["relu"]),
        product(candidates=RIVALS[:5], threads=[1]),
    ),
)  # fmt: skip
QUICK = Sweep(
    base=make_case(op=OP, shape=(8, 28, 28, 96), pool_size=3, padding="valid"),
    parts=(
        product(candidates=RIVALS[:5], mode=["graph"]),
        product(candidates=XLA_RIVALS[:3], mode=["xla"]),
        product(candidates=RIVALS[:3], direction=["training"]),
    ),
)
FULL = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(
            shape=[*SHAPES, BASE.shape, BATCH, LARGEST, (8, 28, 28, 96), (128, 7, 7, 2048)],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
            pool_size=[2, 3, 4, 8, 16],
            padding=["valid", "same"],
        ),
        product(mode=["eager", "graph", "xla"], dtype=["float64"]),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
        product(mode=["graph", "xla"], cache=["cold"]),
        product(mode=["eager", "graph", "xla"], threads=[1]),
        zipped(
            shape=[(1, 427, 640, 3), (1, 8, 8, 1), (8, 31, 17, 17), (1, 256, 256, 32)],
            pool_size=[3, 1, 17, 4],
        ),
    ),
)
# What tells most comes first: time on a GPU is dear, and a run that is ended early is a run.
GPU = Sweep(
    base=GPU_BASE,
    rules=RULES,
    parts=(
        product(
            candidates=[*RIVALS, "max_pool", "cpu-pinned-max_pool", "nested-jit-max_pool"],
            mode=["graph", "eager"],
        ),
        product(candidates=XLA_RIVALS, mode=["xla"]),
        product(candidates=RIVALS, mode=["graph", "xla"], direction=["training"]),
        product(candidates=RIVALS, mode=["graph", "xla"], dtype=["float16", "bfloat16"]),
        product(candidates=RIVALS, mode=["graph"], shape=[LARGEST, *SHAPES]),
        product(candidates=RIVALS, mode=["graph"], pool_size=[2, 8, 16]),
        product(candidates=RIVALS, mode=["graph"], cache=["cold"]),
        product(candidates=XLA_RIVALS, mode=["xla"], cache=["cold"]),
        product(candidates=XLA_RIVALS, mode=["xla"], shape=[LARGEST]),
        product(candidates=RIVALS, mode=["eager"], dtype=["float16", "bfloat16"]),
        product(candidates=RIVALS, mode=["graph", "xla"], direction=["training"], dtype=["float16"]),
    ),
)  # fmt: skip

register(
    Op(
        name=OP,
        title="Depthwise max pooling",
        reference=reference,
        gradient=gradient,
        window_sum=window_sum,
        bounds=bounds,
        baseline=BASELINE,
        recipe=LAMBDA,
        sweeps={"default": DEFAULT, "quick": QUICK, "full": FULL, "gpu": GPU},
        builtin=True,
    )
)
