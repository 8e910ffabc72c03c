"""An op and candidates of it, one correct and the others incorrect in one way each, for the checks."""

import numpy as np
from poolbench import (
    Op,
    Sweep,
    TensorSpec,
    Tolerance,
    candidate,
    choice_axis,
    make_case,
    register,
    size_axis,
    ties_within,
)
from poolbench.ops.shared import IMAGE_AXES, image_spec

OP = "probed_depth_max"
DENSE = "probed_dense"


def padding_of(case):
    """(before, behind, outputs) along the depth, as TensorFlow defines `same`."""
    depth, k = case.shape[3], case.pool_size
    if case.padding == "valid":
        return 0, 0, depth // k
    outputs = -(-depth // k)
    total = outputs * k - depth
    return total // 2, total - total // 2, outputs


def windows(x, case, fill):
    """x as (..., outputs, k), channels last."""
    if case.data_format == "channels_first":
        x = np.moveaxis(x, 1, -1)
    before, behind, outputs = padding_of(case)
    x = x[..., : outputs * case.pool_size]
    x = np.pad(x, [(0, 0)] * 3 + [(before, behind)], constant_values=fill)
    return x.reshape(*x.shape[:-1], outputs, case.pool_size)


def in_layout(y, case):
    return np.moveaxis(y, -1, 1) if case.data_format == "channels_first" else y


def reference(case, x):
    return in_layout(windows(x, case, -np.inf).max(-1), case)


def window_sum(x, case):
    return in_layout(windows(x, case, 0).sum(-1), case)


def vjp(case, dy, x):
    before, _, _ = padding_of(case)
    groups = windows(x, case, -np.inf)
    tied = groups == groups.max(-1, keepdims=True)
    shares = tied / tied.sum(-1, keepdims=True) * dy[..., None]
    flat = shares.reshape(*shares.shape[:-2], shares.shape[-2] * shares.shape[-1])
    kept = flat[..., before : before + x.shape[-1]]
    return (np.pad(kept, [(0, 0)] * 3 + [(0, x.shape[-1] - kept.shape[-1])]),)


register(
    Op(
        name=OP,
        reference=reference,
        vjp=vjp,
        check_gradient=ties_within(window_sum),
        tolerance=lambda _: Tolerance(relative=1e-6, absolute=0.0),
        baseline="right",
        axes=(*IMAGE_AXES, size_axis("pool_size", 3), choice_axis("padding", "valid", "same")),
        inputs=lambda case: {"x": image_spec(case)},
        sweeps={"default": Sweep()},
    )
)


def pool(x, case, *, fill=None, before=None):
    """The right answer, with any shape: pad, reshape, reduce."""
    import tensorflow as tf

    if case.data_format == "channels_first":
        x = tf.transpose(x, [0, 2, 3, 1])
    k = case.pool_size
    depth = tf.shape(x)[3]
    if case.padding == "valid":
        x = x[..., : depth // k * k]
    else:
        total = -depth % k
        first = total // 2 if before is None else before
        lowest = -np.inf if x.dtype.is_floating else x.dtype.min
        lowest = tf.cast(lowest if fill is None else fill, x.dtype)
        x = tf.pad(x, [[0, 0], [0, 0], [0, 0], [first, total - first]], constant_values=lowest)
    shape = tf.shape(x)
    y = tf.reduce_max(tf.reshape(x, tf.stack([*tf.unstack(shape[:3]), shape[3] // k, k])), -1)
    return tf.transpose(y, [0, 3, 1, 2]) if case.data_format == "channels_first" else y


def with_nan(x, case):
    """The right answer, NaN included: XLA's maximum on the CPU does not keep them."""
    import tensorflow as tf

    y = pool(x, case)
    if not x.dtype.is_floating:
        return y
    seen = pool(tf.cast(tf.math.is_nan(x), x.dtype), case, fill=0.0) > 0
    return tf.where(seen, tf.constant(np.nan, x.dtype), y)


@candidate(op=OP, name="right")
def right(case):
    return lambda x: with_nan(x, case)


@candidate(op=OP, name="reduce_max")
def reduce_max(case):
    """Right, but for NaN under XLA."""
    return lambda x: pool(x, case)


@candidate(op=OP, name="maxout")
def maxout(case):
    """Groups of channels that lie apart."""
    import tensorflow as tf

    def build(x):
        n, h, w, c = x.shape
        return tf.reduce_max(tf.reshape(x, [n, h, w, case.pool_size, c // case.pool_size]), 3)

    return build


@candidate(op=OP, name="double-gradient")
def double_gradient(case):
    import tensorflow as tf

    @tf.custom_gradient
    def twice(x):
        return tf.identity(x), lambda dy: 2 * dy

    return lambda x: twice(pool(x, case))


@candidate(op=OP, name="every-tie")
def every_tie(case):
    """The whole gradient to each tied value."""
    import tensorflow as tf

    def build(x):
        n, h, w, c = x.shape

        @tf.custom_gradient
        def run(x):
            y = pool(x, case)
            groups = tf.reshape(x, [n, h, w, c // case.pool_size, case.pool_size])

            def back(dy):
                tied = tf.cast(groups == y[..., None], x.dtype)
                return tf.reshape(tied * dy[..., None], [n, h, w, c])

            return y, back

        return run(x)

    return build


@candidate(op=OP, name="differs-in-xla")
def differs_in_xla(case):
    return lambda x: pool(x, case) + (1 if case.mode == "xla" else 0)


@candidate(op=OP, name="random")
def random(case):
    import tensorflow as tf

    def call(x):
        y = pool(x, case)
        # Of each element its own: one factor for all is the same in three calls now and then.
        return y * (1 + 5e-7 * tf.random.uniform(tf.shape(y), dtype=y.dtype))

    return call


@candidate(op=OP, name="zero-padding")
def zero_padding(case):
    return lambda x: pool(x, case, fill=0.0)


@candidate(op=OP, name="pads-behind")
def pads_behind(case):
    return lambda x: pool(x, case, before=0)


@candidate(op=OP, name="keeps-tail")
def keeps_tail(case):

    return lambda x: pool(x, case.replace(padding="same"))


@candidate(op=OP, name="static")
def static(case):
    """The case's own shape, whatever comes in."""
    import tensorflow as tf

    n, h, w, c = (2, *case.shape[1:])
    k = case.pool_size
    return lambda x: tf.reduce_max(tf.reshape(x, [n, h, w, c // k, k]), -1)


@candidate(op=OP, name="last-axis")
def last_axis(case):
    """Ignores the layout."""

    return lambda x: pool(x, case.replace(data_format="channels_last"))


@candidate(op=OP, name="always-float32")
def always_float32(case):
    import tensorflow as tf

    return lambda x: tf.cast(pool(x, case), tf.float32)


@candidate(op=OP, name="through-float16")
def through_float16(case):
    import tensorflow as tf

    return lambda x: tf.cast(pool(tf.cast(x, tf.float16), case), x.dtype)


@candidate(op=OP, name="finite")
def finite(case):
    import tensorflow as tf

    return lambda x: tf.maximum(pool(x, case), x.dtype.min)


@candidate(op=OP, name="relu")
def relu(case):
    import tensorflow as tf

    return lambda x: tf.nn.relu(pool(x, case))


@candidate(op=OP, name="forgetful", form="layer")
def forgetful(case):
    """A layer that does not save its window."""
    return forgetful_class()(case.pool_size)


def forgetful_class():
    """The layer's class, registered at its first use: defining it loads Keras."""
    import keras

    found = keras.saving.get_registered_object("tests>Forgetful")
    if found is not None:
        return found

    @keras.saving.register_keras_serializable(package="tests")
    class Forgetful(keras.layers.Layer):
        def __init__(self, pool_size=2, **kwargs):
            super().__init__(**kwargs)
            self.pool_size = pool_size

        def call(self, x):
            return pool(x, make_case(op=OP, pool_size=self.pool_size, padding="valid"))

        def get_config(self):
            config = super().get_config()
            config.pop("pool_size", None)  # Keras adds an argument that it can serialise by itself
            return config

        def compute_output_shape(self, shape):
            return (*shape[:-1], shape[-1] // self.pool_size)

    return Forgetful


@candidate(op=OP, name="python")
def python(case):
    """Python code inside the graph: no file can hold it."""
    import tensorflow as tf

    def build(x):
        y = tf.numpy_function(lambda a: reference(a, case).astype(a.dtype), [x], x.dtype)
        return tf.ensure_shape(y, (*case.shape[:3], case.shape[3] // case.pool_size))

    return build


@candidate(op=OP, name="native")
def native(case):
    """TensorFlow's own op, which tf2onnx turns into nothing."""
    import tensorflow as tf

    k = case.pool_size
    return lambda x: tf.nn.max_pool(x, (1, 1, 1, k), (1, 1, 1, k), case.padding.upper())


register(
    Op(
        name=DENSE,
        axes=(size_axis("m", 3), size_axis("k", 5)),
        inputs=lambda c: {"x": TensorSpec((c.m, c.k), c.dtype), "w": TensorSpec((c.k,), c.dtype)},
        reference=lambda _, x, w: x @ w,
        vjp=lambda _, dy, x, w: (np.outer(dy, w), x.T @ dy),
        baseline="matvec",
        sweeps={"default": Sweep()},
    )
)


@candidate(op=DENSE, name="matvec")
def matvec(case):
    import tensorflow as tf

    return lambda x, w: tf.linalg.matvec(x, w)
