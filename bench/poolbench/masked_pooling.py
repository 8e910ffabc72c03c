"""MaskedGlobalPooling1D, a reusable Keras layer: copy this one file, it needs Keras and NumPy only.

It pools the valid steps of padded sequences. GlobalMaxPooling1D ignores a mask. GlobalAveragePooling1D
sums in half precision on a CPU, and returns NaN for a sequence without valid steps.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

KINDS = ("average", "max")

# XLA does not vectorise a reduction of masked steps. It vectorises an elementwise join of 16 chunks of the
# sequence, which leaves a reduction of a sixteenth of the steps: 2 to 7 times as fast at 20 MB on a CPU.
CHUNKS = 16

# Below 32768 elements to start a compiled cluster costs more than it saves (0.88x at 256 elements).
COMPILED_FROM = 2**15


@keras.saving.register_keras_serializable(package="poolbench")
class MaskedGlobalPooling1D(keras.layers.Layer):  # type: ignore[misc]  # Keras is not typed
    """Average or maximum over the valid steps of each sequence, (N, T, C) -> (N, C).

    The mask (N, T) is the `mask` argument of the call or the mask that Keras attached to the inputs; a step
    is valid where it is not 0. A sequence without valid steps gives 0 and a gradient of 0. Values in
    the padding never count, NaN and infinity included. NaN in a valid step gives NaN. Averages of half
    precision are computed in float32. Tied maxima share the gradient equally. The layer passes no mask on.

    Args:
        kind: 'average' or 'max'.
        keepdims: whether to keep the step axis with length 1.
        data_format: 'channels_last' for (N, T, C) or 'channels_first' for (N, C, T); None: the Keras default.
        kwargs: passed to keras.layers.Layer.

    Raises:
        ValueError: an unknown `kind` or `data_format`, or a mask whose shape is not (N, T).
    """

    def __init__(
        self,
        kind: str = "average",
        keepdims: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        if kind not in KINDS:
            raise ValueError(f"kind must be one of 'average', 'max'; got {kind!r}")
        self.keepdims = keepdims
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_last' or 'channels_first'; got {data_format!r}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Return the pooled inputs, (N, C), or of rank 3 with `keepdims`."""
        ops = keras.ops
        steps = ops.shape(inputs)[self._axis]
        if mask is None:
            mask = ops.ones((ops.shape(inputs)[0], steps), "bool")
        elif not _fits(mask.shape, (inputs.shape[0], inputs.shape[self._axis])):
            raise ValueError(
                f"mask must have the shape (N, T) of inputs {tuple(inputs.shape)}; got {tuple(mask.shape)}"
            )
        if self.kind == "average" and not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, self.compute_dtype)
        if keras.backend.backend() == "tensorflow":
            y = _for_tensorflow(self.kind, self._axis)(inputs, mask)
        else:
            y = pool_steps(inputs, mask, self.kind, self._axis)
        return ops.expand_dims(y, self._axis) if self.keepdims else y

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """Return no mask: the outputs have no steps."""

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the outputs."""
        kept = (1,) if self.keepdims else ()
        return (*input_shape[: self._axis], *kept, *input_shape[self._axis + 1 :])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that create an equal layer."""
        return {
            **super().get_config(),
            "kind": self.kind,
            "keepdims": self.keepdims,
            "data_format": self.data_format,
        }

    @property
    def _axis(self) -> int:
        return 1 if self.data_format == "channels_last" else 2


def _fits(shape: Any, expected: tuple[int | None, ...]) -> bool:
    """Tell whether a shape is the expected one, as far as both are known."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _add(parts: list[Any]) -> Any:
    return functools.reduce(operator.add, parts)


def _maximum(parts: list[Any]) -> Any:
    # Not ops.maximum, which loses a NaN on some backends.
    return functools.reduce(
        lambda best, other: keras.ops.where((other > best) | (other != other), other, best),  # noqa: PLR0124
        parts,
    )


def _float32_at_least(x: Any) -> Any:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return keras.ops.cast(x, "float32") if dtype in ("float16", "bfloat16") else x


def _count(mask: Any, dtype: Any) -> Any:
    """Return the number of valid steps, (N, 1), at least 1."""
    return keras.ops.maximum(keras.ops.sum(keras.ops.cast(mask, dtype), 1, keepdims=True), 1)


def pool_steps(
    x: Any,
    mask: Any,
    kind: str,
    axis: int,
    chunks: int = 0,
    add: Callable[[list[Any]], Any] = _add,
) -> Any:
    """Return the average or maximum, (N, C), of the steps of x where the mask (N, T) is not 0.

    `chunks` equal parts of the sequence are joined elementwise before the reduction; `add` sums a list.
    """
    ops = keras.ops
    mask = ops.cast(mask, "bool")
    valid = ops.expand_dims(mask, 3 - axis)
    steps = ops.shape(x)[axis]
    neutral = 0 if kind == "average" else _lowest(x)

    def masked(places: Any) -> Any:
        return ops.where(valid[places], _float32_at_least(x[places]), neutral)

    if kind == "average":
        total = ops.sum(_joined(masked, steps, axis, chunks, add), axis)
        return ops.cast(total / _count(mask, total.dtype), x.dtype)
    joined = _joined(masked, steps, axis, chunks, _maximum)
    y = ops.max(joined, axis)
    if keras.backend.is_float_dtype(y.dtype):  # the maximum of XLA loses a NaN
        y = ops.where(ops.any(joined != joined, axis), float("nan"), y)  # noqa: PLR0124
    return ops.cast(ops.where(ops.any(mask, 1, keepdims=True), y, 0), x.dtype)


def _joined(
    read: Callable[[Any], Any],
    steps: Any,
    axis: int,
    chunks: int,
    join: Callable[[list[Any]], Any],
) -> Any:
    """Return the chunks of a sequence joined elementwise, and the steps that fill no chunk after them."""
    length = steps // chunks if chunks else 0

    def part(begin: Any, end: Any) -> Any:
        return read((slice(None),) * axis + (slice(begin, end),))

    rest = part(length * chunks, None)
    if isinstance(length, int) and length == 0:
        return rest
    whole = join([part(length * i, length * (i + 1)) for i in range(chunks)])
    if isinstance(length, int) and length * chunks == steps:
        return whole
    return keras.ops.concatenate([whole, rest], axis)


def _lowest(x: Any) -> float | int:
    """Return the value that never wins: -inf, or the least integer of the dtype."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return -float("inf") if "float" in dtype else int(np.iinfo(dtype).min)


@functools.cache
def _for_tensorflow(kind: str, axis: int) -> Callable[[Any, Any], Any]:
    """Return pool_steps as operations that XLA compiles, with a gradient that is one pass over x.

    The operations are marked for the compiler, not compiled here: a graph of them can be exported, and XLA
    stops to compile them where every batch has another number of steps.
    """
    import tensorflow as tf

    def plan(x: Any) -> tuple[Any, int]:
        """Return the scope of the compiler and the number of chunks."""
        size = x.shape.num_elements()
        if size is not None and size < COMPILED_FROM:
            return contextlib.nullcontext(), 0
        return tf.xla.experimental.jit_scope(), CHUNKS

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # TensorFlow is not typed
    def pool(x: Any, mask: Any) -> Any:
        scope, chunks = plan(x)

        def gradient(dy: Any) -> Any:
            with plan(x)[0]:
                return spread(x, tf.cast(mask, "bool"), dy, chunks), None

        with scope:
            # Grappler merges a chain of additions to an AddN without the mark; it leaves an AddN as it is.
            return pool_steps(x, mask, kind, axis, chunks, tf.add_n), gradient

    def spread(x: Any, mask: Any, dy: Any, chunks: int) -> Any:
        """Return dx: dy over the count of the valid steps, or over the count of the tied maxima."""
        receives = tf.expand_dims(mask, 3 - axis)
        wide = _float32_at_least(dy)
        if kind == "average":
            share = wide / _count(mask, wide.dtype)
        else:
            y = pool_steps(x, mask, kind, axis, chunks)
            largest = tf.expand_dims(y, axis)

            def tied(places: Any) -> Any:
                return tf.cast(receives[places] & (x[places] == largest), wide.dtype)

            ties = _joined(tied, keras.ops.shape(x)[axis], axis, chunks, tf.add_n)
            share = wide / tf.maximum(tf.reduce_sum(ties, axis), 1)
            receives &= x == largest
        share = tf.expand_dims(tf.cast(share, x.dtype), axis)
        return tf.where(receives, share, tf.zeros([], x.dtype))

    # One trace serves every number of steps: a trace takes longer than most calls.
    traced = tf.function(pool, reduce_retracing=True)

    def pool_by_mode(x: Any, mask: Any) -> Any:
        return traced(x, mask) if tf.executing_eagerly() else pool(x, mask)

    return pool_by_mode
