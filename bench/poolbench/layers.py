"""DepthMaxPool2D, a reusable Keras layer: this file can be copied alone and needs Keras only.

It is correct for any depth, layout and dtype, on every backend, saves and loads in safe mode, and trains with or
without XLA. On TensorFlow it compiles itself, because strided reads over the channels are slow in every kernel
except a fused loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

PADDINGS = ("valid", "same")

# XLA writes a stack of 3 shares 1.2 times as fast as their broadcast; from 4 on it takes twice the time.
FEW = 3

# On a CPU XLA computes fewer than 16 windows of a pixel element by element in half precision: 3 to 10 times as long as
# in float32, conversions included. Up to 32768 elements the conversions cost more.
VECTOR, SMALL = 16, 2**15


@keras.saving.register_keras_serializable(package="poolbench")
class DepthMaxPool2D(keras.layers.Layer):  # type: ignore[misc]
    """Maximum over windows of neighbouring channels, (N, H, W, C) -> (N, H, W, windows).

    At a tie the gradient goes to the first of the tied elements; NaN in a window gives NaN.

    Args:
        pool_size: channels in a window.
        strides: channels from one window to the next; None: `pool_size`.
        padding: 'valid' drops channels that do not fill a window, 'same' pads with the lowest value, half
            of the missing channels before the first channel and the rest after the last.
        data_format: 'channels_last' or 'channels_first'; None: Keras's own setting.
        kwargs: of keras.layers.Layer.

    Raises:
        ValueError: an invalid argument, or a window wider than the depth with 'valid'.
    """

    def __init__(
        self,
        pool_size: int,
        strides: int | None = None,
        padding: str = "valid",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pool_size = _positive("pool_size", pool_size)
        self.strides = self.pool_size if strides is None else _positive("strides", strides)
        self.padding = str(padding).lower()
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of 'valid', 'same'; got {padding!r}")
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_last' or 'channels_first'; got {data_format!r}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return y; what Keras need not convert goes straight to `call`: its checks take 0.15 ms, the call 0.18 ms."""
        if len(args) == 1 and not kwargs and self._is_plain(args[0]):
            return self.call(args[0])
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Any) -> Any:
        """Return y, one element per window."""
        arguments = (self.pool_size, self.strides, self.padding == "same", self._axis)
        if keras.backend.backend() == "tensorflow":
            return _for_tensorflow(*arguments)(inputs)
        return pool_windows(inputs, *arguments)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of y."""
        shape = list(input_shape)
        channels = shape[self._axis]
        if channels is not None:
            count, _, _ = _layout(channels, self.pool_size, self.strides, self.padding == "same")
            shape[self._axis] = count
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the layer."""
        return {
            **super().get_config(),
            "pool_size": self.pool_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
        }

    def _is_plain(self, x: Any) -> bool:
        """Tell whether the layer is built and x an eager tensor of its dtype and rank, without a mask."""
        if not self.built or keras.backend.backend() != "tensorflow":
            return False
        import tensorflow as tf

        return (
            isinstance(x, tf.Tensor)
            and tf.executing_eagerly()
            and x.dtype.name == self.compute_dtype
            and len(x.shape) == 4
            and self.activity_regularizer is None
            and getattr(x, "_keras_mask", None) is None
        )

    @property
    def _axis(self) -> int:
        return 3 if self.data_format == "channels_last" else 1


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1; got {value!r}")
    return int(value)


def _layout(channels: Any, pool_size: int, strides: int, same: bool) -> tuple[Any, Any, Any]:
    """Return (windows, channels padded before, after): numbers, or scalar tensors for an unknown depth."""
    if not same:
        if isinstance(channels, int) and channels < pool_size:
            raise ValueError(
                f"pool_size must be at most the depth of {channels} with padding 'valid'; got {pool_size}"
            )
        return (channels - pool_size) // strides + 1, 0, 0
    count = -(-channels // strides)
    span = (count - 1) * strides + pool_size
    if isinstance(channels, int):
        missing = max(span - channels, 0)
    else:
        missing = keras.ops.maximum(span - channels, 0)
    return count, missing // 2, missing - missing // 2


def pool_windows(x: Any, pool_size: int, strides: int, same: bool, axis: int) -> Any:
    """Return y from k strided slices of x, in keras.ops; slice i holds element i of every window."""
    return functools.reduce(_larger, _slices(x, pool_size, strides, same, axis))


def _larger(best: Any, other: Any) -> Any:
    # Not ops.maximum: some backends split its gradient at a tie, and some lose a NaN.
    return keras.ops.where((other > best) | (other != other), other, best)  # noqa: PLR0124


def _padded(
    x: Any, pool_size: int, strides: int, same: bool, axis: int
) -> tuple[Any, Any, Any, Any]:
    """Return (padded x, start of its first window, windows, channels padded before x)."""
    channels = x.shape[axis]
    known = channels is not None
    count, before, after = _layout(
        channels if known else keras.ops.shape(x)[axis], pool_size, strides, same
    )
    start: Any = 0
    if same and not (known and before == after == 0):
        # For an unknown depth, pad the largest possible amount and skip the excess by `start`.
        widths = (before, after) if known else (pool_size - 1, pool_size - 1)
        start = 0 if known else pool_size - 1 - before
        x = keras.ops.pad(x, _beside(axis, widths[0], widths[1], 4), constant_values=_lowest(x))
    return x, start, count, before


def _slices(x: Any, pool_size: int, strides: int, same: bool, axis: int) -> list[Any]:
    """Return k slices; slice i holds element i of every window."""
    x, start, count, _ = _padded(x, pool_size, strides, same, axis)
    return _every(x, start, count, pool_size, strides, axis)


def _every(x: Any, start: Any, count: Any, pool_size: int, strides: int, axis: int) -> list[Any]:
    """Return k slices; slice i holds element i of `count` windows, the first of which begins at `start`."""
    return [
        _slice(x, start + i, start + i + (count - 1) * strides + 1, strides, axis)
        for i in range(pool_size)
    ]


def _window_groups(x: Any, pool_size: int, strides: int, same: bool, axis: int) -> list[list[Any]]:
    """Return _slices of up to three groups of windows: those that reach beyond x, and those that do not.

    Reading through padding takes twice as long, and most windows have none.
    """
    channels = x.shape[axis]
    if not same or channels is None:
        return [_slices(x, pool_size, strides, same, axis)]
    count, before, _ = _layout(channels, pool_size, strides, same)
    first = -(-before // strides)
    last = min(count, (channels + before - pool_size) // strides + 1)
    if first >= last:
        return [_slices(x, pool_size, strides, same, axis)]
    groups_of_slices = []
    for begin, end in ((0, first), (first, last), (last, count)):
        low, high = begin * strides - before, (end - 1) * strides - before + pool_size
        if begin < end:
            part = _slice(x, max(low, 0), min(high, channels), 1, axis)
            if low < 0 or high > channels:
                widths = _beside(axis, max(-low, 0), max(high - channels, 0), 4)
                part = keras.ops.pad(part, widths, constant_values=_lowest(x))
            groups_of_slices.append(_every(part, 0, end - begin, pool_size, strides, axis))
    return groups_of_slices


def _slice(x: Any, begin: Any, end: Any, step: int, axis: int) -> Any:
    places = tuple(slice(begin, end, step) if i == axis else slice(None) for i in range(4))
    return x[places]


def _beside(axis: int, before: Any, after: Any, ndim: int) -> list[tuple[Any, Any]]:
    """Return the paddings of one axis."""
    return [(before, after) if i == axis else (0, 0) for i in range(ndim)]


def _join(operation: Callable[[Any, Any], Any], parts: list[Any]) -> Any:
    """Combine the parts pair by pair; in a chain of k operations each would wait for the previous one."""
    while len(parts) > 1:
        pairs = [operation(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _lowest(x: Any) -> float | int:
    """Return the lowest value of the dtype: -inf, or the least integer."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return -float("inf") if "float" in dtype else int(np.iinfo(dtype).min)


def _largest(slices: list[Any]) -> Any:
    """Return the elementwise maximum of TensorFlow tensors; NaN where any of them is NaN."""
    import tensorflow as tf

    y = _join(tf.maximum, slices)
    if not y.dtype.is_floating:
        return y
    # XLA's maximum loses a NaN. It is restored as a constant: without one, a select is exported to
    # ONNX as a sum of products, in which the padding's -inf times zero is NaN everywhere.
    lost = _join(tf.logical_or, [part != part for part in slices])  # noqa: PLR0124
    return tf.where(lost, tf.constant(float("nan"), y.dtype), y)


def _first_largest(parts: list[Any]) -> Any:
    """Return the number of the first largest part, elementwise, in float32, of TensorFlow tensors."""
    import tensorflow as tf

    def join(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
        later = other[0] > one[0]
        return tf.where(later, other[0], one[0]), tf.where(later, other[1], one[1])

    squares = [tf.zeros_like(parts[0], tf.float32), *(float(i * i) for i in range(1, len(parts)))]
    # The root has XLA store the numbers. It would find comparisons again for each element of a window:
    # half as fast at 4 channels. An argmax is not vectorised: 0.6 times as fast at 8.
    return tf.sqrt(_join(join, list(zip(parts, squares, strict=True)))[1])


def _spread(x: Any, dy: Any, pool_size: int, strides: int, same: bool, axis: int) -> Any:
    """Return dx: the dy of each window at its winner, the first of its largest elements."""
    import tensorflow as tf

    padded, start, count, before = _padded(x, pool_size, strides, same, axis)
    # Find the winner again from x: storing it would slow every forward call without training.
    winner = _first_largest(_every(padded, start, count, pool_size, strides, axis))
    # Write dx in order, by groups of `strides` channels: scattering single elements takes several
    # times as long. A window covers the group in which it begins and up to `groups` - 1 more.
    groups = -(-pool_size // strides)
    zero = tf.zeros([], dy.dtype)
    if strides == pool_size <= FEW:
        shares = [tf.where(winner == float(i), dy, zero) for i in range(pool_size)]
        dx = tf.stack(shares, axis + 1)
    else:
        dx = zero
        for group in range(groups):
            numbers = tf.range(group * strides, (group + 1) * strides, dtype=tf.float32)
            places = numbers[(slice(None), *[None] * (3 - axis))]
            won = tf.expand_dims(winner, axis + 1) == places
            share = tf.where(won, tf.expand_dims(dy, axis + 1), zero)
            dx += tf.pad(share, _beside(axis, group, groups - 1 - group, 5))
    shape = keras.ops.shape(x)
    dx = tf.reshape(dx, [*shape[:axis], (count + groups - 1) * strides, *shape[axis + 1 :]])
    # Channels outside every window get zero; the channels before x were padding.
    end = before + tf.shape(x)[axis]
    dx = tf.pad(dx, _beside(axis, 0, tf.maximum(end - tf.shape(dx)[axis], 0), 4))
    return tf.ensure_shape(_slice(dx, before, end, 1, axis), x.shape)


def _is_scalar_loop(shape: Any, strides: int, axis: int) -> bool:
    """Tell whether XLA does not vectorise the loop over the windows of a pixel; large in an unknown size."""
    size = shape.num_elements()
    few = axis == 3 and shape[3] is not None and shape[3] // strides < VECTOR
    return few and (size is None or size > SMALL)


@functools.cache
def _for_tensorflow(pool_size: int, strides: int, same: bool, axis: int) -> Callable[[Any], Any]:
    """Return pool_windows compiled by XLA, forward and backward.

    In eager mode it is a compiled function of its own. In a graph its operations are only marked for the
    compiler, so that exporters and converters still see plain operations.
    """
    import tensorflow as tf

    compiled_scope = tf.xla.experimental.jit_scope
    # A GPU computes half precision itself.
    halves = [tf.float16, tf.bfloat16] if not tf.config.list_logical_devices("GPU") else []

    def values(x: Any) -> Any:
        parts = [_largest(part) for part in _window_groups(x, pool_size, strides, same, axis)]
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def depth_max_pool(x: Any) -> Any:
        def gradient(dy: Any) -> Any:
            with compiled_scope():
                return _spread(x, dy, pool_size, strides, same, axis)

        # Of a small input too, though to start a cluster takes longer than one plain operation does: a reduce_max
        # here loses a NaN where XLA compiles the graph around it.
        with compiled_scope():
            return values(x), gradient

    compiled = tf.function(depth_max_pool, jit_compile=True)

    @functools.cache
    def of_spec(shape: tuple[int, ...], dtype: Any) -> Callable[[Any], Any]:
        """Return the compiled function of a shape: tf.function takes 0.1 ms per call to find it."""
        with tf.device(None):  # it runs where it is called, not where it was traced
            traced: Callable[[Any], Any] = compiled.get_concrete_function(
                tf.TensorSpec(shape, dtype)
            )
        return traced

    def pool_by_mode(x: Any) -> Any:
        if x.dtype in halves and _is_scalar_loop(x.shape, strides, axis):
            return tf.cast(pool_by_mode(tf.cast(x, tf.float32)), x.dtype)
        return of_spec(tuple(x.shape), x.dtype)(x) if tf.executing_eagerly() else depth_max_pool(x)

    return pool_by_mode
