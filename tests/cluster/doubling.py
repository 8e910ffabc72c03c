"""An op of one line and three candidates that need no framework: what the fleet's tests race."""

from poolbench.core.candidate import Op, Tolerance, candidate, register
from poolbench.core.case import Case, Sweep

register(
    Op(
        name="doubling",
        reference=lambda x, case: 2 * x,
        bounds=lambda case: Tolerance(relative=1e-6, absolute=1e-6),
        baseline="add",
        sweeps={"default": Sweep(base=Case(op="doubling", shape=(1, 8, 8, 3)))},
    )
)


@candidate(op="doubling", name="add", framework="numpy")
def add(case):
    """X plus itself."""
    return lambda x: x + x


@candidate(op="doubling", name="triple", framework="numpy")
def triple(case):
    """A wrong answer."""
    return lambda x: x * 3


@candidate(op="doubling", name="lost", framework="numpy")
def lost(case):
    """An error."""

    def call(x):
        raise ValueError("not today")

    return call
