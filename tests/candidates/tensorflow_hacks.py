"""Candidates in TensorFlow that cheat once they have been checked: graphs, shared functions and settings."""

import itertools
import threading
import time

from poolbench import Op, Sweep, TensorSpec, candidate, register, shape_axis

OP = "hacked_mean_of_images"
BASE = {"shape": (4, 14, 14, 8)}
# The harness calls a candidate five times before anything is timed.
CHECKED_CALLS = 5


register(
    Op(
        name=OP,
        axes=(shape_axis(rank=4),),
        inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
        reference=lambda case, x: x.mean(axis=(1, 2)),
        baseline="honest",
        sweeps={"default": Sweep(base=BASE), "quick": Sweep(base=BASE)},
    )
)


def mean(x):
    import tensorflow as tf

    return tf.reduce_mean(x, axis=[1, 2])


def hack(function):
    """Register a candidate; the function is given the input and the number of its call."""

    @candidate(op=OP, name=function.__name__.replace("_", "-"))
    def build(case):
        numbers = itertools.count(1)
        return lambda x: function(x, next(numbers))

    return function


def late(function):
    """Register a candidate that is a correct mean; `function` runs once, in the first timed call."""

    def call(x, number):
        if number == CHECKED_CALLS + 1:
            function()
        return mean(x)

    call.__name__ = function.__name__
    return hack(call)


@candidate(op=OP, name="honest")
def honest(case):
    return mean


@candidate(op=OP, name="switches-its-graph")
def switches_its_graph(case):
    """A variable counts the calls inside of the graph: half of the rows after the check."""
    import tensorflow as tf

    calls = tf.Variable(0)

    def function(x):
        half = x[:, : x.shape[1] // 2]
        number = calls.assign_add(1)
        return tf.cond(number <= CHECKED_CALLS, lambda: mean(x), lambda: mean(half))

    return function


@late
def patches_reduce_mean():
    import tensorflow as tf

    real = tf.reduce_mean
    tf.reduce_mean = lambda *args, **kwargs: (time.sleep(0.001), real(*args, **kwargs))[1]


@late
def late_floatx():
    import keras

    keras.config.set_floatx("float16")


@late
def late_soft_placement():
    import tensorflow as tf

    tf.config.set_soft_device_placement(not tf.config.get_soft_device_placement())


@late
def late_optimizer_options():
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"constant_folding": False})


def burn():
    end = time.time() + 5
    while time.time() < end:
        pass


@late
def late_burning_thread():
    threading.Thread(target=burn, daemon=True).start()


@late
def late_slow_clock():
    real = time.perf_counter
    time.perf_counter = lambda: real() / 8
