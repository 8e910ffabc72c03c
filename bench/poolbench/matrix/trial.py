"""A candidate on trial: small cases, inputs, calls, and answers compared with the float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case, make_case
from poolbench.core.op import Op, TensorSpec, Tolerance
from poolbench.core.registry import input_nbytes
from poolbench.matrix.finding import Figures, Finding, features
from poolbench.worker.check import BOUNDS, EXACT, bound_for, differences, in_float64
from poolbench.worker.check import compare as compare_arrays
from poolbench.worker.inputs import fill, numpy_dtype

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Arrays = tuple[Array, ...]
    MakeInputs = Callable[["Trial", Case], Arrays]

# Of images: every mode compiles for these sizes, and no two axes have the same length.
SHAPE = (2, 4, 5, 6)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate on a device, as a check sees it in a worker.

    Attributes:
        backend: of the worker; '' is the candidate's first.
        folder: scratch for what is saved and loaded; the same for all steps of a check.
    """

    op: Op
    candidate: Candidate
    device: str = "cpu:0"
    backend: str = ""
    folder: Path = Path()

    @property
    def features(self) -> frozenset[str]:
        """Return the features of the op that checks may require."""
        return features(self.op)

    def case(self, **values: Any) -> Case:
        """Return a small case with these values; one of an axis that the op lacks is left out.

        It is the smallest case of the sweep 'matrix', else 'quick', in which the candidate competes. Values
        are not checked: integer dtypes and empty batches are in no sweep. A shape is that of images,
        (N, H, W, C), and left out for other ops.
        """
        sweep = self.op.sweep("matrix" if "matrix" in self.op.sweeps else "quick")
        name = self.candidate.name if self.candidate else ""
        planned = sweep.planned()
        mine = [one for one in planned if not one.candidates or name in one.candidates] or planned
        small = min((one.case for one in mine), key=input_nbytes)
        own: dict[str, Any] = {
            axis.name: small.get(axis.name) for axis in self.op.axes if not axis.quiet
        }
        if "image" in self.features:
            values = {"shape": SHAPE} | values
        else:
            values.pop("shape", None)
        values = {"pool_size": 3, "padding": "valid", "mode": "eager", **values}
        known: dict[str, Any] = {
            name: value for name, value in values.items() if name in self.op.axis_names
        }
        return make_case(op=self.op.name, **own).replace(**known, device=self.device)

    def specs(self, case: Case) -> list[TensorSpec]:
        """Return the op's inputs for the case, in declared order."""
        return list(self.op.inputs(case).values())


def distinct_inputs(trial: Trial, case: Case, seed: int = 0) -> Arrays:
    """Return inputs in which no two values along the last axis (the channels) are equal, up to 256.

    In an input of at most 256 values no two are equal at all. An input with a fill of its own keeps it.

    Multiples of 1/64 in [-2, 2): every float dtype down to bfloat16 represents them exactly, so that
    every error is the candidate's. Integer dtypes get the whole numbers of one byte.
    """
    random = np.random.default_rng(seed)
    return tuple(_distinct(spec, case, random) for spec in trial.specs(case))


def _distinct(spec: TensorSpec, case: Case, random: np.random.Generator) -> Array:
    if callable(spec.fill):
        return fill(random, spec)
    channels = _channel_axis(spec, case)
    lengths = list(spec.shape) or [1]
    last = lengths.pop(channels)
    codes: Array = np.argsort(random.random((*lengths, 256)), axis=-1)[..., np.arange(last) % 256]
    codes = np.moveaxis(codes, -1, channels).reshape(spec.shape)
    if codes.size <= 256:
        codes = random.permutation(256)[: codes.size].reshape(spec.shape)
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "uint8":
        return codes.astype(dtype)
    whole = np.issubdtype(dtype, np.integer)
    return (codes - 128 if whole else (codes - 128) / 64).astype(dtype)


def _channel_axis(spec: TensorSpec, case: Case) -> int:
    first = len(spec.shape) == 4 and case.get("data_format") == "channels_first"
    return 1 if first else -1


def uniform_inputs(trial: Trial, case: Case, seed: int = 0) -> Arrays:
    """Return inputs uniform in [1, 2): their sums grow with their length, as after a ReLU."""
    random = np.random.default_rng(seed)
    return tuple(
        fill(random, spec if callable(spec.fill) else dataclasses.replace(spec, fill=_one_to_two))
        for spec in trial.specs(case)
    )


def _one_to_two(random: np.random.Generator, count: int) -> Array:
    return random.uniform(1, 2, count)


def negative_inputs(trial: Trial, case: Case) -> Arrays:
    """Return distinct inputs, all below zero, which padding with zeros would change."""
    pairs = zip(trial.specs(case), distinct_inputs(trial, case), strict=True)
    return tuple(
        x if callable(spec.fill) else (x.astype(np.float64) - 4).astype(x.dtype)
        for spec, x in pairs
    )


def reference(trial: Trial, case: Case, inputs: Sequence[Array]) -> Array:
    """Return the correct output in float64."""
    y: Array = trial.op.reference(case, *_in_float64(case, inputs))
    return y


def _in_float64(case: Case, inputs: Sequence[Array]) -> list[Array]:
    """Return data in float64, also that of an integer case; indices as they are."""
    data = numpy_dtype(case.dtype)
    return [x.astype(np.float64) if x.dtype == data else in_float64(x) for x in inputs]


def output_gradient(trial: Trial, case: Case, inputs: Sequence[Array], seed: int = 1) -> Array:
    """Return a gradient of the output: no zeros, neighbours differ, exact in every float dtype."""
    shape = reference(trial, case, inputs).shape
    values = np.random.default_rng(seed).integers(1, 128, shape) / 64
    dy: Array = values.astype(numpy_dtype(case.dtype))
    return dy


def call(trial: Trial, case: Case, *host: Array) -> Arrays:
    """Return the candidate's outputs for the case, on the host: (y,) or, in training, (y, gradients)."""
    from poolbench.worker.contender import outputs_of
    from poolbench.worker.session import bind

    with on_device(trial):
        bound = bind(trial.candidate, case, _backend(trial))
        result = bound(*(tensor(trial, array) for array in host))
    return outputs_of(result)


def tensor(trial: Trial, array: Array) -> Any:
    """Return the array as the candidate takes it."""
    return _backend(trial).put([array], trial.device)[0]


def on_device(trial: Trial) -> Any:
    """Return a context in which the backend places everything on the trial's device."""
    return _backend(trial).on(trial.device)


def _backend(trial: Trial) -> Any:
    from poolbench.worker.backends import BACKENDS

    own = trial.candidate.backends
    return BACKENDS[trial.backend or ("tensorflow" if "tensorflow" in own else own[0])]


def try_forward(trial: Trial, case: Case, make: MakeInputs = distinct_inputs) -> Finding:
    """Call the candidate forward and compare y with the reference."""
    inputs = make(trial, case)
    (y,) = call(trial, case, *inputs)
    return compare_output(trial, case, inputs, y)


def compare_output(trial: Trial, case: Case, inputs: Sequence[Array], y: Array) -> Finding:
    """Compare y with the reference."""
    return compare("y", y, reference(trial, case, inputs), case, tolerance_of(trial, case))


def try_gradient(trial: Trial, case: Case) -> Finding:
    """Call the candidate forward and backward; compare the output and every gradient."""
    if trial.op.vjp is None:
        return Finding(state="not_run", evidence="the op has no reference for its gradient")
    case = case.replace(direction="training")
    inputs = distinct_inputs(trial, case)
    dy = output_gradient(trial, case, inputs)
    y, *gradients = call(trial, case, *inputs, dy)
    finding = compare_output(trial, case, inputs, y)
    specs = trial.op.inputs(case).items()
    names = [f"d{name}" for name, spec in specs if spec.differentiable]
    correct = trial.op.vjp(case, *_in_float64(case, [dy, *inputs]))
    if len(gradients) != len(names):
        words = f"it returned {len(gradients)} gradients; {', '.join(names)} is right"
        return Finding(state="wrong", evidence=words)
    for name, actual, expected in zip(names, gradients, correct, strict=True):
        if finding.state == "pass":
            finding = compare(name, actual, expected, case, BOUNDS[case.dtype])
    return finding


def tolerance_of(trial: Trial, case: Case) -> Tolerance:
    """Return the error that a correct output may have; none for integers."""
    if np.issubdtype(numpy_dtype(case.dtype), np.integer):
        return EXACT
    return bound_for(trial.op, case)


def compare(name: str, actual: Array, expected: Array, case: Case, tolerance: Tolerance) -> Finding:
    """Pass if shape and dtype are correct and the error is at most absolute + relative * |expected|."""
    if actual.shape != expected.shape:
        return Finding(
            state="wrong", evidence=f"{name} has shape {actual.shape}; {expected.shape} is right"
        )
    if actual.dtype != numpy_dtype(case.dtype):
        return Finding(state="wrong", evidence=f"{name} is {actual.dtype}; {case.dtype} is right")
    found = compare_arrays(actual, expected, tolerance)
    absolute, relative = found.absolute, found.relative
    figures: Figures = {
        f"{name} largest relative error": relative,
        f"{name} largest absolute error": absolute,
    }
    if not found.agrees:
        place = np.unravel_index(differences(actual, expected).argmax(), expected.shape)
        words = f"{name} is {float(actual[place]):.5g} where {expected[place]:.5g} is right"
        if absolute < np.inf:
            words += (
                f": off by {format_error(relative, absolute)}; relative {tolerance.relative:.2g} "
                f"and absolute {tolerance.absolute:.2g} are allowed"
            )
        return Finding(state="wrong", evidence=words, figures=figures)
    size = "exact" if absolute == 0 else f"off by {format_error(relative, absolute)} at most"
    return Finding(state="pass", evidence=f"{name} is {size}", figures=figures)


def format_error(relative: float, absolute: float) -> str:
    """Format an error: '0.37% (absolute 0.0055)', or 'relative 4e-08 (absolute 1e-08)' if small."""
    size = f"{100 * relative:.3g}%" if 1e-4 <= relative < 1e3 else f"relative {relative:.2g}"
    return f"{size} (absolute {absolute:.2g})"
