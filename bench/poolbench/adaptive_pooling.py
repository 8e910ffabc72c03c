"""AdaptivePooling2D, a reusable Keras layer: copy this one file, it needs Keras and NumPy only.

It pools a map of any height and width to a fixed size. AdaptiveAveragePooling2D and AdaptiveMaxPooling2D
of Keras 3.15 return NaN on JAX, refuse unknown sizes on TensorFlow, and fail there for an output of 1.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

KINDS = ("average", "max")

# XLA vectorises an elementwise join of up to 16 parts of a window, but not a reduction over the window:
# 1.5 times as fast at 10 MB on a CPU.
PARTS = 16

# Below 32768 elements to start a compiled cluster costs more than it saves.
COMPILED_FROM = 2**15


@keras.saving.register_keras_serializable(package="poolbench")
class AdaptivePooling2D(keras.layers.Layer):  # type: ignore[misc]  # Keras is not typed
    """Average or maximum over the windows that divide a map, (N, H, W, C) -> (N, *output, C).

    Window i of n along an axis of size s begins at floor(i s / n) and ends before ceil((i + 1) s / n), as in
    PyTorch. Height and width may be unknown until the call, and smaller than the output. Averages of
    half precision are computed in float32. NaN in a window gives NaN. Tied maxima share the gradient, or where windows
    overlap it goes to the first of them.

    Args:
        output: height and width of the outputs; one number for both.
        kind: 'average' or 'max'.
        data_format: 'channels_last' or 'channels_first'; None: the Keras default.
        kwargs: passed to keras.layers.Layer.

    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(
        self,
        output: int | Sequence[int],
        kind: str = "average",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.output_size = _pair(output)
        self.kind = kind
        if kind not in KINDS:
            raise ValueError(f"kind must be one of 'average', 'max'; got {kind!r}")
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_last' or 'channels_first'; got {data_format!r}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def call(self, inputs: Any) -> Any:
        """Return the pooled inputs, of rank 4."""
        if self.kind == "average" and not keras.backend.is_float_dtype(inputs.dtype):
            inputs = keras.ops.cast(inputs, self.compute_dtype)
        arguments = (self.output_size, self.kind, self._first_axis)
        if keras.backend.backend() == "tensorflow":
            return _pool_tensorflow(inputs, *arguments)
        return pool_windows(inputs, *arguments)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the outputs."""
        axis = self._first_axis
        return (*input_shape[:axis], *self.output_size, *input_shape[axis + 2 :])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that create an equal layer."""
        return {
            **super().get_config(),
            "output": list(self.output_size),
            "kind": self.kind,
            "data_format": self.data_format,
        }

    @property
    def _first_axis(self) -> int:
        return 1 if self.data_format == "channels_last" else 2


def _pair(output: Any) -> tuple[int, int]:
    sizes = tuple(output) if isinstance(output, (list, tuple)) else (output, output)
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in sizes)
    if len(sizes) != 2 or not whole or min(sizes) < 1:
        raise ValueError(f"output must be one or two whole numbers from 1; got {output!r}")
    return int(sizes[0]), int(sizes[1])


def _add(parts: list[Any]) -> Any:
    return functools.reduce(operator.add, parts)


def _maximum(parts: list[Any]) -> Any:
    # Not ops.maximum, which loses a NaN on some backends.
    return functools.reduce(
        lambda best, other: keras.ops.where((other > best) | (other != other), other, best),  # noqa: PLR0124
        parts,
    )


def _largest(x: Any, axis: int) -> Any:
    y = keras.ops.max(x, axis, keepdims=True)
    if not keras.backend.is_float_dtype(y.dtype):
        return y
    # The maximum of XLA loses a NaN.
    lost = keras.ops.any(x != x, axis, keepdims=True)  # noqa: PLR0124
    return keras.ops.where(lost, float("nan"), y)


def pool_windows(
    x: Any,
    output: tuple[int, int],
    kind: str,
    first_axis: int,
    parts: int = 1,
    add: Callable[[list[Any]], Any] = _add,
) -> Any:
    """Return the average or maximum of each window of x, of rank 4.

    At most `parts` parts of a window are joined elementwise before a reduction; `add` sums a list of arrays.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    # The maximum needs it too: its gradient divides by the number of tied elements.
    y = keras.ops.cast(x, "float32") if dtype in ("float16", "bfloat16") else x
    average = kind == "average"
    total = functools.partial(keras.ops.sum, keepdims=True)
    join, reduce = (add, total) if average else (_maximum, _largest)
    for axis, count in enumerate(output, first_axis):
        size = y.shape[axis]
        if size is not None and size % count == 0:
            y = _pool_equal(y, axis, count, parts, join, reduce)
            y = y / (size // count) if average else y
        else:
            # Grappler merges nested sums to one without the mark: 2.8x of the stock layer, and 7x in one part.
            windows = _pool_unequal(y, axis, count, 1 if average else parts, join, reduce)
            y = keras.ops.concatenate(
                [w / keras.ops.cast(n, w.dtype) if average else w for w, n in windows], axis
            )
    return keras.ops.cast(y, dtype)


def _pool_equal(
    x: Any, axis: int, count: int, parts: int, join: Callable[..., Any], reduce: Callable[..., Any]
) -> Any:
    """Return the reduction of windows of one size, which are a view of x."""
    shape = list(keras.ops.shape(x))
    window = shape[axis] // count
    parts = max(n for n in range(1, parts + 1) if window % n == 0)
    # Not a sixth axis for the parts: TensorFlow Lite slices up to five.
    view = keras.ops.reshape(x, (*shape[:axis], count, window, *shape[axis + 1 :]))
    before, size = (slice(None),) * (axis + 1), window // parts
    joined = join([view[(*before, slice(i * size, (i + 1) * size))] for i in range(parts)])
    return keras.ops.squeeze(reduce(joined, axis=axis + 1), axis + 1)


def _pool_unequal(
    x: Any, axis: int, count: int, parts: int, join: Callable[..., Any], reduce: Callable[..., Any]
) -> list[tuple[Any, Any]]:
    """Return the reduction of each window, with length 1 along the axis, and the size of the window."""
    size = keras.ops.shape(x)[axis]
    bounds = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    before = (slice(None),) * axis
    if x.shape[axis] is None:
        return [(reduce(x[(*before, slice(i, j))], axis=axis), j - i) for i, j in bounds]
    # Windows overlap by at most one element. They share disjoint pieces of x, so that the gradient is one
    # concatenation in the order of x and not a sum of padded windows.
    cuts = sorted({end for window in bounds for end in window})
    pieces = keras.ops.split(x, cuts[1:-1], axis) if len(cuts) > 2 else [x]
    pieces = [
        join([piece[(*before, slice(i, i + 1))] for i in range(piece.shape[axis])])
        if piece.shape[axis] <= parts
        else reduce(piece, axis=axis)
        for piece in pieces
    ]
    return [(join(pieces[cuts.index(i) : cuts.index(j)]), j - i) for i, j in bounds]


def _pool_tensorflow(x: Any, output: tuple[int, int], kind: str, first_axis: int) -> Any:
    """Return pool_windows of a TensorFlow tensor by the fastest right implementation for its size."""
    import tensorflow as tf

    sizes = tuple(x.shape[first_axis : first_axis + 2])
    if None in sizes:  # plain operations: XLA would compile again for every size
        return pool_windows(x, output, kind, first_axis)
    eager = tf.executing_eagerly()
    equal = all(size % count == 0 for size, count in zip(sizes, output, strict=True))
    # One operation: 2.4x as fast on 3136 elements, right in float32. None for the maximum: it hides NaN.
    if eager and equal and kind == "average" and first_axis == 1 and x.dtype == tf.float32:
        window = [size // count for size, count in zip(sizes, output, strict=True)]
        return tf.nn.avg_pool2d(x, window, window, "VALID")
    pool = _for_tensorflow(output, kind, first_axis)
    return _traced(pool, sizes)(x) if eager else pool(x)


@functools.lru_cache(maxsize=256)
def _traced(pool: Callable[[Any], Any], sizes: tuple[int, int]) -> Callable[[Any], Any]:  # noqa: ARG001
    """Return a function of pool for maps of one size: one trace serves every batch size, not every map."""
    import tensorflow as tf

    traced: Callable[[Any], Any] = tf.function(pool, reduce_retracing=True)
    return traced


@functools.cache
def _for_tensorflow(output: tuple[int, int], kind: str, first_axis: int) -> Callable[[Any], Any]:
    """Return pool_windows as operations that XLA compiles, forward and backward.

    The operations are marked for the compiler, not compiled here, so that a graph of them can be exported.
    """
    import tensorflow as tf

    def plan(x: Any) -> tuple[Any, int]:
        """Return the scope of the compiler and the parts to join."""
        size = x.shape.num_elements()
        if size is not None and size < COMPILED_FROM:
            return contextlib.nullcontext(), 1
        return tf.xla.experimental.jit_scope(), PARTS

    def pool(x: Any) -> Any:
        def gradient(dy: Any) -> Any:
            # Pooled again without the parts: the gradient of a slice pads it to the size of x.
            with plan(x)[0], tf.GradientTape() as tape:
                tape.watch(x)
                y = pool_windows(x, output, kind, first_axis)
            with plan(x)[0]:
                return tape.gradient(y, x, dy)

        scope, parts = plan(x)
        with scope:
            # Grappler merges a chain of additions to an AddN without the mark; it leaves an AddN as it is.
            return pool_windows(x, output, kind, first_axis, parts, tf.add_n), gradient

    differentiable: Callable[[Any], Any] = tf.custom_gradient(pool)
    return differentiable
