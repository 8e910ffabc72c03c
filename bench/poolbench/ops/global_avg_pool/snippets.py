"""Code to paste of the implementations that read sizes when called; each defines `pool`, x -> y."""

from __future__ import annotations

from poolbench import Case

TF = "import tensorflow as tf\n\n"


def _last(case: Case) -> bool:
    return bool(case.data_format == "channels_last")


def _function(*lines: str) -> str:
    return TF + "\n".join(["def pool(x):", *(f"    {line}" for line in lines)]) + "\n"


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
