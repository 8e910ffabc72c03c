"""GeMPooling2D, a reusable Keras layer: copy this one file, it needs Keras only.

It computes the generalised mean of each feature map in float32: 50 cubed is above the largest float16.
"""

from __future__ import annotations

from typing import Any

import keras

LEAST = 1e-6
# Up to this exponent the powers of 1e-6 and of a million are float32s.
SAFE, LARGEST = 6.0, 3e38


@keras.saving.register_keras_serializable(package="poolbench")
class GeMPooling2D(keras.layers.Layer):  # type: ignore[misc]  # Keras is not typed
    """Return mean(max(x, 1e-6) ** p) ** (1 / p) of each feature map, (N, H, W, C) -> (N, C).

    With p = 1 it is the average; with a large p it comes near the maximum. Values below 1e-6 count as 1e-6
    and get no gradient. Half precision is computed in float32.

    Args:
        p: the exponent, or its initial value where it is learned.
        learned: whether the exponent is a weight, of shape (1,).
        data_format: 'channels_last' or 'channels_first'; None: the Keras default.
        kwargs: passed to keras.layers.Layer.

    Raises:
        ValueError: an exponent that is not above 0, or an unknown `data_format`.
    """

    def __init__(
        self,
        p: float = 3.0,
        learned: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not p > 0:
            raise ValueError(f"p must be above 0; got {p!r}")
        self.p, self.learned = float(p), learned
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format must be 'channels_last' or 'channels_first'; got {data_format!r}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the exponent, which mixed precision must not round."""
        del input_shape
        if self.learned:
            start = keras.initializers.Constant(self.p)
            self.exponent = self.add_weight((1,), start, autocast=False, name="exponent")

    def call(self, inputs: Any) -> Any:
        """Return the pooled inputs, (N, C)."""
        ops, axes = keras.ops, (1, 2) if self.data_format == "channels_last" else (2, 3)
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        x = ops.maximum(ops.cast(inputs, wide), LEAST)
        scale: Any = 1.0
        if self.learned or self.p > SAFE:
            # The mean is homogeneous: a constant scale changes no gradient.
            scale = ops.minimum(ops.stop_gradient(ops.max(x, axes, keepdims=True)), LARGEST)
            x = x / scale
            scale = ops.squeeze(scale, axes)
        # The gradient of a power with an unknown exponent takes 4 times as long as that of exp and log.
        p = ops.cast(self.exponent, wide) if self.learned else self.p
        powers = ops.exp(p * ops.log(x)) if self.learned else x**p
        shape = ops.shape(x)
        # Not ops.mean, which is of float32 on some backends.
        mean = ops.sum(powers, axes) / ops.cast(shape[axes[0]] * shape[axes[1]], wide)
        return ops.cast(scale * mean ** (1 / p), self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the outputs."""
        return input_shape[0], input_shape[3 if self.data_format == "channels_last" else 1]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that create an equal layer."""
        own = {"p": self.p, "learned": self.learned, "data_format": self.data_format}
        return {**super().get_config(), **own}
