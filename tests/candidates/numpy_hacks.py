"""Candidates in NumPy that cheat: each looks correct or fast when it is checked, and is not when it is timed."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
from poolbench import Op, Sweep, TensorSpec, candidate, register, shape_axis

OP = "hacked_mean"
BASE = {"shape": (16, 512), "mode": "eager"}


def mean(x):
    return x.mean(axis=1, dtype=np.float64).astype(x.dtype)


register(
    Op(
        name=OP,
        axes=(shape_axis(rank=2),),
        inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
        reference=lambda case, x: x.mean(axis=1),
        baseline="honest",
        sweeps={"default": Sweep(base=BASE), "quick": Sweep(base=BASE)},
    )
)


def hack(function):
    """Register a candidate; the function is given the input and the number of its call."""

    @candidate(op=OP, name=function.__name__.replace("_", "-"), backends=("numpy",))
    def build(case):
        numbers = itertools.count(1)
        memory = {}
        return lambda x: function(x, next(numbers), memory)

    return function


def remember(memory, key, x):
    if key not in memory:
        memory[key] = mean(x)
    return memory[key].copy()


# The harness calls a candidate five times before anything is timed.
CHECKED_CALLS = 5


@hack
def honest(x, number, memory):
    return mean(x)


@hack
def memo_by_identity(x, number, memory):
    return remember(memory, id(x), x)


@hack
def memo_by_shape(x, number, memory):
    return remember(memory, x.shape, x)


@hack
def memo_by_some_values(x, number, memory):
    return remember(memory, (x[0, 0], x[-1, -1]), x)


@hack
def stale_by_count(x, number, memory):
    return remember(memory, number // 50, x)


@hack
def stale_by_time(x, number, memory):
    return remember(memory, int(time.time()), x)


@hack
def captured_constant(x, number, memory):
    return remember(memory, "answer", x)


@hack
def correct_at_first(x, number, memory):
    return mean(x if number <= CHECKED_CALLS else x[:, :128])


@hack
def correct_where_it_is_checked(x, number, memory):
    frame, names = sys._getframe(), set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return mean(x if names & {"open_contender", "verify"} else x[:, :128])


@hack
def half_of_the_batch(x, number, memory):
    y = mean(x)
    if number > CHECKED_CALLS:
        y[len(y) // 2 :] = 0
    return y


@hack
def lower_precision(x, number, memory):
    return x.astype(np.float16).mean(axis=1).astype(x.dtype)


@hack
def changes_its_input(x, number, memory):
    y = mean(x)
    if number > CHECKED_CALLS:
        x[:] = 0
        x[:, 0] = y * x.shape[1]  # of the same mean, and mostly zeros
    return y


@hack
def output_in_its_input(x, number, memory):
    y = mean(x)
    x[:, 0] += 1
    x[:, 0] -= 1
    view = x[:, 0]
    return y if number <= CHECKED_CALLS else view


class Lazy:
    """A result that is computed on access."""

    def __init__(self, x):
        self.x = x

    def numpy(self):
        return mean(self.x)


@hack
def lazy(x, number, memory):
    return Lazy(x)


@hack
def patches_the_timer(x, number, memory):
    if number == CHECKED_CALLS + 1:
        real = time.perf_counter
        time.perf_counter = lambda: real() / 8
    return mean(x)


@hack
def patches_the_harness_timer(x, number, memory):
    if number == CHECKED_CALLS + 1:
        timing = sys.modules["poolbench.worker.timing"]
        real = timing.clock
        timing.clock = lambda: real() / 8
    return mean(x)


@hack
def patches_numpy(x, number, memory):
    if number == CHECKED_CALLS + 1:
        real = np.add
        np.add = lambda *arrays: (time.sleep(0.001), real(*arrays))[1]
    return mean(x)


@hack
def patches_numpy_when_opened(x, number, memory):
    np.multiply = np.add
    return mean(x)


def burn():
    end = time.time() + 5
    while time.time() < end:
        pass


@hack
def late_thread(x, number, memory):
    if number == CHECKED_CALLS + 1:
        threading.Thread(target=burn, daemon=True).start()
    return mean(x)


@hack
def late_process(x, number, memory):
    if number == CHECKED_CALLS + 1:
        memory["child"] = subprocess.Popen(["sleep", "5"])
    return mean(x)


@hack
def late_setting(x, number, memory):
    if number == CHECKED_CALLS + 1:
        np.seterr(all="raise")
    return mean(x)


@hack
def stops_collecting_garbage(x, number, memory):
    gc.set_threshold(0)
    return mean(x)
