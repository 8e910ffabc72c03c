"""A user's op in NumPy with one candidate per kind of fault.

`pytest tests/candidates/numpy_faults.py -k "base or fast or slow or segv"` races one of them.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from poolbench import Op, Sweep, TensorSpec, candidate, product, register, shape_axis, size_axis

OP = "faulty_pool"
BASE = {"shape": (4, 16, 16, 12), "mode": "eager"}
SIZES = tuple((4, 16, 16, 12 * size) for size in range(1, 9))


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
        sweeps={
            "default": Sweep(base=BASE),
            "quick": Sweep(base=BASE),
            "full": Sweep(base=BASE, parts=(product(shape=SIZES),)),
        },
    )
)


def numpy_candidate(name):
    return candidate(op=OP, name=name, backends=("numpy",))


def repeated(times, case):
    """The right answer in `times` times the time."""

    def call(x):
        for _ in range(times):
            y = pool(x, case)
        return y

    return call


@numpy_candidate("base")
def base(case):
    return repeated(4, case)


@numpy_candidate("fast")
def fast(case):
    return repeated(1, case)


@numpy_candidate("slow")
def slow(case):
    return repeated(12, case)


def faulty(fault):
    """A candidate that does `fault` at its first call and would be right otherwise."""

    def build(case):
        def call(x):
            fault()
            return pool(x, case)

        return call

    return build


def kill_itself(number):
    print("last words")
    os.kill(os.getpid(), number)
    time.sleep(600)


def raise_error():
    print("last words")
    raise ValueError("<script>alert(1)</script>\n../../etc/passwd")


def loop():
    print("last words")
    while True:
        pass


def grow():
    held = []
    while True:
        held.append(np.ones(4 << 20))


def flood():
    for _ in range(100):
        os.write(1, b"x" * (1 << 20))
    raise RuntimeError("after the flood")


def leave_thread():
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def leave_program():
    subprocess.Popen(["sleep", "600"], start_new_session=True)


def change_state():
    np.seterr(all="raise")
    os.chdir("/")


def close_descriptors():
    os.closerange(3, 200)


FAULTS = {
    "raise": raise_error,
    "segv": lambda: kill_itself(signal.SIGSEGV),
    "abort": os.abort,
    "kill": lambda: kill_itself(signal.SIGKILL),
    "memory": grow,
    "loop": loop,
    "sysexit": lambda: sys.exit("enough"),
    "leave": lambda: os._exit(0),
    "flood": flood,
    "thread": leave_thread,
    "program": leave_program,
    "state": change_state,
    "descriptors": close_descriptors,
}
for _name, _fault in FAULTS.items():
    numpy_candidate(_name)(faulty(_fault))


@numpy_candidate("nan")
def nan(case):
    return lambda x: np.full_like(pool(x, case), np.nan)


@numpy_candidate("shape")
def shape(case):
    return lambda x: pool(x, case)[..., :-1]


@numpy_candidate("none")
def none(case):
    return lambda x: None


@numpy_candidate("late")
def late(case):
    """Right at first, and a crash once it is raced."""
    calls = iter(range(30))

    def call(x):
        if next(calls, None) is None:
            os.abort()
        return pool(x, case)

    return call


@pytest.mark.poolbench(op=OP)
def test_faulty_pool(poolbench):
    poolbench.replay()
