"""An op of one line and three candidates that need no framework: for the tests of the Ray cluster."""

from poolbench import Op, Sweep, TensorSpec, Tolerance, candidate, register, shape_axis

register(
    Op(
        name="doubling",
        reference=lambda case, x: 2 * x,
        axes=(shape_axis("shape", (1, 8, 8, 3)),),
        inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
        tolerance=lambda case: Tolerance(relative=1e-6, absolute=1e-6),
        baseline="add",
        sweeps={"default": Sweep()},
    )
)


@candidate(op="doubling", name="add", backends=("numpy",))
def add(case):
    """X plus itself."""
    return lambda x: x + x


@candidate(op="doubling", name="triple", backends=("numpy",))
def triple(case):
    """A wrong answer."""
    return lambda x: x * 3


@candidate(op="doubling", name="lost", backends=("numpy",))
def lost(case):
    """An error."""

    def call(x):
        raise ValueError("not today")

    return call
