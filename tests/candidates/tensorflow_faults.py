"""A user's op in TensorFlow: one candidate of each kind of fault."""

import ctypes
import os
import time

import numpy as np
import pytest
from poolbench import Op, Sweep, TensorSpec, candidate, register, shape_axis, size_axis

OP = "faulty_tensorflow_pool"
BASE = {"shape": (2, 8, 8, 12)}


def pool(x, case):
    n, h, w, c = x.shape
    return x.reshape(n, h, w, c // case.pool_size, case.pool_size).max(-1)


register(
    Op(
        name=OP,
        axes=(shape_axis(rank=4), size_axis("pool_size", 3)),
        inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
        reference=lambda case, x: pool(x, case),
        baseline="base",
        sweeps={"default": Sweep(base=BASE), "quick": Sweep(base=BASE)},
    )
)


def reshaped(case):
    import tensorflow as tf

    def call(x):
        n, h, w, c = x.shape
        return tf.reduce_max(tf.reshape(x, [n, h, w, c // 3, 3]), -1)

    return call


@candidate(op=OP, name="base")
def base(case):
    return reshaped(case)


@candidate(op=OP, name="transposed")
def transposed(case):
    import tensorflow as tf

    def call(x):
        n, h, w, c = x.shape
        return tf.reshape(tf.reduce_max(tf.transpose(tf.reshape(x, [-1, 3])), 0), [n, h, w, c // 3])

    return call


def faulty(fault):
    """A candidate that has TensorFlow call `fault` while the op runs."""

    def build(case):
        import tensorflow as tf

        right = reshaped(case)

        def call(x):
            def run(value):
                fault()
                return value

            x = tf.ensure_shape(tf.numpy_function(run, [x], tf.float32), x.shape)
            return right(x)

        return call

    return build


def grow():
    import tensorflow as tf

    held = []
    while True:
        held.append(tf.ones([8 << 20]) + 1)


FAULTS = {
    "abort": os.abort,
    "segv": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), 9),
    "hang": lambda: time.sleep(600),
    "grow": grow,
    "leave": lambda: os._exit(7),
}
for _name, _fault in FAULTS.items():
    candidate(op=OP, name=_name)(faulty(_fault))


@candidate(op=OP, name="invalid")
def invalid(case):
    import tensorflow as tf

    return lambda x: tf.nn.max_pool(x, (1, 1, 1, 5), (1, 1, 1, 5), padding="VALID")


@candidate(op=OP, name="allocator")
def allocator(case):
    """More than any allocator has: TensorFlow's own out-of-memory error, on the host."""
    import tensorflow as tf

    right = reshaped(case)
    return lambda x: right(x) + tf.reduce_sum(tf.random.uniform([1 << 23, 1 << 23]))


@candidate(op=OP, name="loop")
def loop(case):
    import tensorflow as tf

    right = reshaped(case)
    return lambda x: right(tf.while_loop(lambda _: True, lambda y: (y * 1.0,), (x,))[0])


@candidate(op=OP, name="nan")
def nan(case):
    right = reshaped(case)
    return lambda x: right(x) * np.nan


@candidate(op=OP, name="shape")
def shape(case):
    right = reshaped(case)
    return lambda x: right(x)[..., :-1]


@candidate(op=OP, name="state")
def state(case):
    import keras
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    keras.config.set_floatx("float16")
    return reshaped(case)


@pytest.mark.poolbench(op=OP)
def test_faulty_tensorflow_pool(poolbench):
    poolbench.replay()
