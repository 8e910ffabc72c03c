"""Code to paste for each implementation of global average pooling; each defines `pool`, x -> y."""

from __future__ import annotations

from poolbench import Case
from poolbench.ops.shared import spatial_axes

TF = "import tensorflow as tf\n\n"


def _last(case: Case) -> bool:
    return bool(case.data_format == "channels_last")


def _words(case: Case) -> list[str]:
    return [] if case.dtype == "float32" else [f'dtype="{case.dtype}"']


def _function(*lines: str) -> str:
    return TF + "\n".join(["def pool(x):", *(f"    {line}" for line in lines)]) + "\n"


def layer_global_avg_pool(case: Case) -> str:
    """Return the stock layer."""
    words = [*([] if _last(case) else ['data_format="channels_first"']), *_words(case)]
    return f"import keras\n\npool = keras.layers.GlobalAveragePooling2D({', '.join(words)})\n"


def lambda_reduce_mean(case: Case) -> str:
    """Return a Lambda around tf.reduce_mean."""
    words = ", ".join([f"lambda x: tf.reduce_mean(x, axis={spatial_axes(case)})", *_words(case)])
    return f"import keras\n{TF}pool = keras.layers.Lambda({words})\n"


def reduce_mean(case: Case) -> str:
    """Return a call of tf.reduce_mean."""
    return _function(f"return tf.reduce_mean(x, axis={spatial_axes(case)})")


def reduce_mean_float32(case: Case) -> str:
    """Return tf.reduce_mean in float32, cast back."""
    if case.dtype in ("float32", "float64"):
        return reduce_mean(case)
    return _function(
        f"wide = tf.reduce_mean(tf.cast(x, tf.float32), axis={spatial_axes(case)})",
        "return tf.cast(wide, x.dtype)",
    )


def avg_pool2d(case: Case) -> str:
    """Return tf.nn.avg_pool2d with the full window."""
    window = case.shape[1:3]
    layout = "" if _last(case) else ', data_format="NCHW"'
    return _function(
        f'y = tf.nn.avg_pool2d(x, {window}, {window}, "VALID"{layout})',
        f"return tf.squeeze(y, {spatial_axes(case)})",
    )


def keras_stock(case: Case) -> str:
    """Return stock layers: AveragePooling2D over the whole image, Reshape."""
    _, h, w, c = case.shape
    given = (h, w, c) if _last(case) else (c, h, w)
    layout = f'data_format="{case.data_format}"'
    dtype = f', dtype="{case.dtype}"' if case.dtype != "float32" else ""
    return (
        "import keras\n\npool = keras.Sequential([\n"
        f"    keras.Input({given}{dtype}),\n"
        f"    keras.layers.AveragePooling2D({(h, w)}, {layout}{dtype}),\n"
        f"    keras.layers.Reshape(({c},){dtype}),\n"
        "])\n"
    )


def mean_of_means(case: Case) -> str:
    """Return the mean over the width, then over the height."""
    height, width = spatial_axes(case)
    return _function(f"return tf.reduce_mean(tf.reduce_mean(x, axis={width}), axis={height})")


def einsum(case: Case) -> str:
    """Return a sum by tf.einsum over the number of pixels."""
    equation = "nhwc->nc" if _last(case) else "nchw->nc"
    return _function(f'return tf.einsum("{equation}", x) / {case.shape[1] * case.shape[2]}')


def matmul_ones(case: Case) -> str:
    """Return a product with a row of equal weights."""
    _, h, w, c = case.shape
    flat = f"(-1, {h * w}, {c})" if _last(case) else f"(-1, {c}, {h * w})"
    turned = "" if _last(case) else ", transpose_b=True"
    return _function(
        f"weights = tf.fill((1, {h * w}), tf.constant(1 / {h * w}, x.dtype))",
        f"flat = tf.reshape(x, {flat})",
        f"return tf.squeeze(tf.matmul(weights, flat{turned}), axis=1)",
    )


def keras_ops(case: Case) -> str:
    """Return keras.ops.mean."""
    return (
        f"import keras\n\ndef pool(x):\n    return keras.ops.mean(x, axis={spatial_axes(case)})\n"
    )
