"""Code to paste for each implementation of depthwise max pooling; each defines `pool`, x -> y."""

from __future__ import annotations

from poolbench import Case
from poolbench.ops.depth_max_pool.op import paddings, windows
from poolbench.ops.shared import channel_axis, channels_last

TF = "import tensorflow as tf\n\n"
KERAS = "import keras\nimport tensorflow as tf\n\n"


def _dtype(case: Case) -> str:
    return "" if case.dtype == "float32" else f'dtype="{case.dtype}"'


def _window(case: Case) -> str:
    k = case.pool_size
    return f"window = {(1, 1, 1, k) if channels_last(case) else (1, k, 1, 1)}"


def _native(case: Case, padding: str = "") -> str:
    layout = "" if channels_last(case) else ', data_format="NCHW"'
    return f'tf.nn.max_pool(x, window, window, padding="{padding or str(case.padding).upper()}"{layout})'


def _fit(case: Case, module: str = "tf") -> list[str]:
    """Return the lines that drop or pad the channels that fill no window."""
    count, before, after = windows(case)
    whole = count * case.pool_size
    if after < 0:
        return [f"x = x[..., :{whole}]" if channels_last(case) else f"x = x[:, :{whole}]"]
    if before or after:
        widths = [list(pair) for pair in paddings(case)]
        return [f'x = {module}.pad(x, {widths}, constant_values=float("-inf"))']
    return []


def _shape(case: Case, *channels: int) -> tuple[int, ...]:
    """Return the sizes of an image with these in place of the channels."""
    space = case.shape[1:3]
    return (*space, *channels) if channels_last(case) else (*channels, *space)


def _grouped(case: Case) -> tuple[tuple[int, ...], int]:
    """Return the shape with the channels as (windows, k), and the axis of k."""
    return (-1, *_shape(case, windows(case)[0], case.pool_size)), channel_axis(case) + 1


def _pooled(case: Case) -> tuple[int, ...]:
    return (-1, *_shape(case, windows(case)[0]))


def _function(*lines: str, indent: str = "    ", head: str = "def pool(x):") -> str:
    return "\n".join([head, *(indent + line for line in lines)]) + "\n"


def _layer(case: Case, *lines: str) -> str:
    body = _function(
        *lines,
        indent=" " * 8,
        head="class DepthMaxPool(keras.layers.Layer):\n    def call(self, x):",
    )
    return f"{KERAS}{body}\npool = DepthMaxPool({_dtype(case)})\n"


def _reduced(case: Case) -> str:
    shape, axis = _grouped(case)
    return f"return tf.reduce_max(tf.reshape(x, {shape}), axis={axis})"


def _lambda(case: Case, padding: str = "") -> str:
    ending = f", {_dtype(case)}" if _dtype(case) else ""
    return f"{KERAS}{_window(case)}\npool = keras.layers.Lambda(\n    lambda x: {_native(case, padding)}{ending}\n)\n"


def recipe_verbatim(case: Case) -> str:
    """Return a Lambda with the padding in lower case."""
    return _lambda(case, str(case.padding))


def lambda_max_pool(case: Case) -> str:
    """Return a Lambda around tf.nn.max_pool."""
    return _lambda(case)


def layer_max_pool(case: Case) -> str:
    """Return a layer around tf.nn.max_pool."""
    return _layer(case, _window(case), f"return {_native(case)}")


def max_pool(case: Case) -> str:
    """Return a call of tf.nn.max_pool."""
    return TF + _function(_window(case), f"return {_native(case)}")


def reshape_reduce_max(case: Case) -> str:
    """Return reshape and reduce_max."""
    return TF + _function(*_fit(case), _reduced(case))


def layer_reshape_reduce_max(case: Case) -> str:
    """Return a layer around reshape and reduce_max."""
    return _layer(case, *_fit(case), _reduced(case))


def slices_maximum(case: Case) -> str:
    """Return the maximum over strided slices."""
    k = case.pool_size
    part = f"x[..., i::{k}]" if channels_last(case) else f"x[:, i::{k}]"
    return "import functools\n" + TF + _function(
        *_fit(case), f"return functools.reduce(tf.maximum, [{part} for i in range({k})])"
    )  # fmt: skip


def max_pool2d_view(case: Case) -> str:
    """Return max_pool2d over a view of the channels."""
    _, h, w, c = case.shape
    k, last = case.pool_size, channels_last(case)
    view = f"(-1, {h * w}, {c}, 1)" if last else f"(-1, {c}, {h * w}, 1)"
    window = f"(1, {k})" if last else f"({k}, 1)"
    return TF + _function(
        f"view = tf.reshape(x, {view})",
        f'y = tf.nn.max_pool2d(view, {window}, {window}, "{str(case.padding).upper()}")',
        f"return tf.reshape(y, {_pooled(case)})",
    )


def max_pool3d(case: Case) -> str:
    """Return max_pool3d over x[..., None]."""
    window = f"(1, 1, {case.pool_size})" if channels_last(case) else f"({case.pool_size}, 1, 1)"
    return TF + _function(
        f'y = tf.nn.max_pool3d(x[..., None], {window}, {window}, "{str(case.padding).upper()}")',
        "return tf.squeeze(y, -1)",
    )


def transpose_reduce_max(case: Case) -> str:
    """Return transposed windows, reduced over the first axis."""
    if not channels_last(case):
        return reshape_reduce_max(case)
    return TF + _function(
        *_fit(case),
        f"columns = tf.transpose(tf.reshape(x, (-1, {case.pool_size})))",
        f"return tf.reshape(tf.reduce_max(columns, axis=0), {_pooled(case)})",
    )


def keras_ops(case: Case) -> str:
    """Return keras.ops.reshape and keras.ops.max."""
    shape, axis = _grouped(case)
    return "import keras\n\n" + _function(
        *_fit(case, "keras.ops"),
        f"return keras.ops.max(keras.ops.reshape(x, {shape}), axis={axis})",
    )


def keras_stock(case: Case) -> str:
    """Return stock layers."""
    _, h, w, c = case.shape
    k, last = case.pool_size, channels_last(case)
    view = (h * w, c, 1) if last else (c, h * w, 1)
    window = (1, k) if last else (k, 1)
    ending = f", {_dtype(case)}" if _dtype(case) else ""
    return (
        "import keras\n\npool = keras.Sequential([\n"
        f"    keras.Input({_shape(case, c)}{ending}),\n"
        f"    keras.layers.Reshape({view}{ending}),\n"
        f'    keras.layers.MaxPooling2D({window}, padding="{case.padding}", data_format="channels_last"{ending}),\n'
        f"    keras.layers.Reshape({_pooled(case)[1:]}{ending}),\n"
        "])\n"
    )


def nested_jit_max_pool(case: Case) -> str:
    """Return a compiled function of its own."""
    head = "@tf.function(jit_compile=True)\ndef pool(x):"
    return TF + _function(_window(case), f"return {_native(case)}", head=head)


def cpu_pinned_max_pool(case: Case) -> str:
    """Return tf.nn.max_pool on the CPU."""
    return TF + _function(_window(case), 'with tf.device("cpu:0"):', f"    return {_native(case)}")


def layer_depth_max_pool(case: Case) -> str:
    """Return the layer of this package."""
    words = [str(case.pool_size), f'padding="{case.padding}"']
    words += [] if channels_last(case) else ['data_format="channels_first"']
    words += [_dtype(case)] if _dtype(case) else []
    return (
        "# One file: bench/poolbench/layers.py may be copied.\n"
        "from poolbench.layers import DepthMaxPool2D\n\n"
        f"pool = DepthMaxPool2D({', '.join(words)})\n"
    )
