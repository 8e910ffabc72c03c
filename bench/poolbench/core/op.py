"""Op: an operation, its inputs and axes, its reference implementation, and where it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poolbench.core.axes import STANDARD, Axis
from poolbench.core.case import Case, make_case
from poolbench.core.sweep import Sweep

Array = np.ndarray[Any, Any]
Fill = Callable[[np.random.Generator, int], Array]


def itemsize(dtype: str) -> int:
    """Return the bytes of one element; NumPy alone does not know bfloat16."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One input of an op.

    Attributes:
        shape: of any rank, in memory order.
        dtype: name of a NumPy dtype, or 'bfloat16'.
        fill: 'normal', 'relu' (half zeros), 'uniform' in [0, 1), 'integers' from 0 to 99, or a function of
            (generator, count) that returns `count` values.
        differentiable: whether training computes its gradient.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    fill: str | Fill = "normal"
    differentiable: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the input."""
        return int(np.prod(self.shape, dtype=np.int64)) * itemsize(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The allowed error of an output: |y - reference| <= absolute + relative * |reference|."""

    relative: float
    absolute: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The fewest bytes that one call must read and write."""

    read_nbytes: int
    written_nbytes: int


@dataclass(frozen=True)
class GradientCheck:
    """The comparison of a gradient with the reference: exact, or within windows whose elements tie.

    Attributes:
        window_sum: (array shaped as the input, case) -> array shaped as y, the sum over each window; None: the
            gradient is unique.
    """

    window_sum: Callable[[Array, Case], Array] | None = None


exact = GradientCheck()


def ties_within(window_sum: Callable[[Array, Case], Array]) -> GradientCheck:
    """Return a check that allows any split of a window's gradient among tied elements."""
    return GradientCheck(window_sum)


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation: its inputs, its reference, and the sweeps in which its candidates compete.

    Candidates take the inputs as positional arguments in declared order. In training they also take the gradient
    of the output, last, and return (y, the gradient of each differentiable input).

    Attributes:
        name: 'row_max'.
        title: for headings: 'Depthwise max pooling'.
        axes: its own axes; the standard ones come with the harness.
        inputs: case -> TensorSpec by name, any number of any rank.
        reference: (case, *inputs in float64) -> y in float64.
        vjp: (case, gradient of y, *inputs in float64) -> the gradient of each differentiable input; None: the op
            is measured forward only.
        check_gradient: `exact`, or `ties_within(window_sum)`.
        tolerance: case -> Tolerance; None: the default of the dtype.
        by_example: whether the reference and its gradient take each example, along the first axis of every input, by
            itself: they are then computed in parts, in a fraction of the memory and time.
        traffic: case -> Traffic; None: the bytes of all inputs and outputs.
        baseline: the candidate that ratios are taken to.
        also_compare_to: further candidates that the report shows ratios to, the textbook's first.
        in_models: the candidates that are placed in whole models, where variants of one could not be told apart.
        in_compiled_models: the same where each costs the compilation of a whole step.
        sweeps: 'default', 'quick', 'full', 'gpu'; 'default' is required. The base of a sweep 'selftest' is the case
            that the self-test measures. The support matrix takes its small case from a sweep 'matrix',
            else from 'quick'.
        file: the file that registers it.
        builtin: whether it ships with the package.
        further: whether it is measured only where it is named, or in the sweep 'full'.
    """

    name: str
    title: str = ""
    axes: tuple[Axis[Any], ...] = ()
    inputs: Callable[[Case], Mapping[str, TensorSpec]]
    reference: Callable[..., Array]
    vjp: Callable[..., tuple[Array, ...]] | None = None
    check_gradient: GradientCheck = exact
    tolerance: Callable[[Case], Tolerance] | None = None
    by_example: bool = False
    traffic: Callable[[Case], Traffic] | None = None
    baseline: str
    also_compare_to: tuple[str, ...] = ()
    in_models: tuple[str, ...] = ()
    in_compiled_models: tuple[str, ...] = ()
    sweeps: Mapping[str, Sweep]
    file: str = ""
    builtin: bool = False
    further: bool = False

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names of all axes: its own, then the standard ones."""
        return (*(axis.name for axis in self.axes), *STANDARD)

    @property
    def textbook(self) -> str:
        """The textbook's candidate, for a column of its own; '' if there is none."""
        return self.also_compare_to[0] if self.also_compare_to else ""

    def sweep(self, name: str) -> Sweep:
        """Return the sweep of this name, or the default one where the op has none of that name."""
        return (self.sweeps.get(name) or self.sweeps["default"]).for_op(self.name)

    def make_case(self, **values: object) -> Case:
        """Return a complete case: the default sweep's base with these values."""
        return make_case(op=self.name, **(self.sweep("default").base_case.axes | values))

    def traffic_of(self, case: Case) -> Traffic:
        """Return the fewest bytes that one call must move: as declared, or those of all inputs and outputs."""
        if self.traffic is not None:
            return self.traffic(case)
        specs = self.inputs(case)
        read = sum(spec.nbytes for spec in specs.values())
        written = self.output_size(case) * itemsize(case.dtype)
        if case.direction == "forward":
            return Traffic(read_nbytes=read, written_nbytes=written)
        gradients = sum(spec.nbytes for spec in specs.values() if spec.differentiable)
        return Traffic(read_nbytes=read + written, written_nbytes=written + gradients)

    def output_size(self, case: Case) -> int:
        """Return the number of elements of y, as the reference computes it."""
        return int(np.prod(self.output_shape(case), dtype=np.int64))

    def output_shape(self, case: Case) -> tuple[int, ...]:
        """Return the shape of y, as the reference computes it from broadcast zeros, which take no memory."""
        zeros = (
            np.broadcast_to(reference_zero(s.dtype), s.shape) for s in self.inputs(case).values()
        )
        return tuple(np.shape(self.reference(case, *zeros)))


def reference_zero(dtype: str) -> Any:
    """Return a zero of the type in which the reference computes: float64, or the integers' own."""
    return np.float64(0) if "float" in dtype else np.dtype(dtype).type(0)
