"""Inputs for probes, calls of a candidate, and its answers held against the float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.core.case import Case
from poolbench.matrix.probe import Finding, Trial

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of this name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def distinct_input(case: Case, seed: int = 0) -> Array:
    """An x for a case, in its layout: within a pixel no two channels (of 256 at most) are equal.

    Whole multiples of 1/64 in [-2, 2): every dtype down to bfloat16 holds them exactly, so that
    what is wrong is the candidate's doing. Integer dtypes get the whole numbers of one byte.
    """
    n, h, w, c = case.shape
    random = np.random.default_rng(seed)
    codes: Array = np.argsort(random.random((n, h, w, 256)), axis=-1)[..., :c]
    values: Array
    if case.dtype == "uint8":
        values = codes
    elif np.issubdtype(numpy_dtype(case.dtype), np.integer):
        values = codes - 128
    else:
        values = (codes - 128) / 64
    return to_layout(values.astype(numpy_dtype(case.dtype)), case)


def uniform_input(case: Case, seed: int = 0) -> Array:
    """An x for a case, uniform in [1, 2): sums grow with their length, as they do after a ReLU."""
    values = np.random.default_rng(seed).uniform(1, 2, case.shape)
    return to_layout(values.astype(numpy_dtype(case.dtype)), case)


def to_layout(x: Array, case: Case) -> Array:
    """An (N, H, W, C) array in the case's data format."""
    return np.moveaxis(x, -1, 1).copy() if case.data_format == "channels_first" else x


def reference(trial: Trial, case: Case, x: Array) -> Array:
    """The right answer in float64."""
    y: Array = trial.op.reference(case, x.astype(np.float64))
    return y


def output_gradient(trial: Trial, case: Case, x: Array, seed: int = 1) -> Array:
    """A dy for the case: no zeros, no two equal neighbours, exact in every float dtype."""
    shape = reference(trial, case, x).shape
    values = np.random.default_rng(seed).integers(1, 128, shape) / 64
    dy: Array = values.astype(numpy_dtype(case.dtype))
    return dy


def call(trial: Trial, case: Case, *host: Array) -> tuple[Array, ...]:
    """The candidate's outputs for the case, on the host: (y,) or, training, (y, dx)."""
    from poolbench.worker.backends import to_numpy
    from poolbench.worker.session import bind

    with on_device(trial):
        bound = bind(trial.candidate, case)
        result = bound(*(tensor(trial, array) for array in host))
    results = result if isinstance(result, tuple) else (result,)
    return tuple(to_numpy(value) for value in results)


def tensor(trial: Trial, array: Array) -> Any:
    """The array as the candidate takes it."""
    if trial.candidate.framework == "numpy":
        return array
    import tensorflow as tf

    return tf.constant(array)


def on_device(trial: Trial) -> Any:
    """A context in which TensorFlow places everything on the trial's device."""
    if trial.candidate.framework == "numpy":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.device(trial.device)


def try_forward(
    trial: Trial, case: Case, make: Callable[[Case], Array] = distinct_input
) -> Finding:
    """Call the candidate forward and hold y against the reference."""
    x = make(case)
    (y,) = call(trial, case, x)
    return judge_forward(trial, case, x, y)


def judge_forward(trial: Trial, case: Case, x: Array, y: Array) -> Finding:
    """Whether y is right."""
    return judge_array("y", y, reference(trial, case, x), case, bound_of(trial, case))


def try_gradient(trial: Trial, case: Case) -> Finding:
    """Call the candidate forward and backward and hold both answers against the reference."""
    if trial.op.vjp is None:
        return Finding(state="not_run", evidence="the op has no reference for its gradient")
    case = case.replace(direction="training")
    x = distinct_input(case)
    dy = output_gradient(trial, case, x)
    y, dx = call(trial, case, x, dy)
    finding = judge_forward(trial, case, x, y)
    if finding.state != "pass":
        return finding
    expected = trial.op.vjp(case, dy.astype(np.float64), x.astype(np.float64))[0]
    from poolbench.worker.check import BOUNDS

    bound = BOUNDS[case.dtype]
    return judge_array("dx", dx, expected, case, (bound.relative, bound.absolute))


def bound_of(trial: Trial, case: Case) -> tuple[float, float]:
    """(relative, absolute) error that a right answer may have."""
    if np.issubdtype(numpy_dtype(case.dtype), np.integer):
        return 0.0, 0.0
    from poolbench.worker.check import bound_for

    bound = bound_for(trial.op, case)
    return bound.relative, bound.absolute


def judge_array(
    name: str,
    actual: Array,
    expected: Array,
    case: Case,
    bound: tuple[float, float],
    dtype: str | None = None,
) -> Finding:
    """Pass if shape and dtype are right and the error at most absolute + relative |expected|."""
    if actual.shape != expected.shape:
        return Finding(
            state="wrong", evidence=f"{name} has shape {actual.shape}; {expected.shape} is right"
        )
    wanted = dtype or case.dtype
    if actual.dtype != numpy_dtype(wanted):
        return Finding(state="wrong", evidence=f"{name} is {actual.dtype}; {wanted} is right")
    absolute, relative, excess = errors(actual.astype(np.float64), expected, bound)
    figures: dict[str, float | int | str | None] = {
        f"{name} largest relative error": relative,
        f"{name} largest absolute error": absolute,
    }
    words = f"{name} is off by {format_error(relative, absolute)} at most"
    if excess > 1:
        words = worst_words(name, actual.astype(np.float64), expected)
        limit = f"relative {bound[0]:.2g} and absolute {bound[1]:.2g} are allowed"
        if absolute < np.inf:
            words += f": off by {format_error(relative, absolute)}; {limit}"
        return Finding(state="wrong", evidence=words, figures=figures)
    exact = f"{name} is exact" if absolute == 0 else words
    return Finding(state="pass", evidence=exact, figures=figures)


def worst_words(name: str, actual: Array, expected: Array) -> str:
    """'y is -3.4e+38 where -inf is right', at the place of the largest error."""
    with np.errstate(all="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        error = np.where(np.isnan(actual) & np.isnan(expected), 0.0, error)
    worst = np.where(np.isnan(error), np.inf, error).argmax()
    place = np.unravel_index(worst, error.shape)
    return f"{name} is {actual[place]:.5g} where {expected[place]:.5g} is right"


def errors(
    actual: Array, expected: Array, bound: tuple[float, float]
) -> tuple[float, float, float]:
    """Largest absolute error, largest relative error, and largest error over what is allowed.

    Equal infinities and two NaN are no error; a NaN or an infinity in only one of them is infinite.
    """
    if actual.size == 0:
        return 0.0, 0.0, 0.0
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(all="ignore"):
        absolute = np.where(same, 0.0, np.abs(actual - expected))
        absolute = np.where(np.isnan(absolute), np.inf, absolute)
        relative = np.where(same, 0.0, absolute / np.abs(expected))
        relative = np.where(np.isnan(relative), np.inf, relative)
        allowed = bound[1] + bound[0] * np.abs(expected)
        excess = np.where(same, 0.0, absolute / allowed)
    excess = np.where(np.isnan(excess), np.inf, excess)
    return float(absolute.max()), float(relative.max()), float(excess.max())


def format_error(relative: float, absolute: float) -> str:
    """'0.37% (absolute 0.0055)', or 'relative 4e-08 (absolute 1e-08)' where that is small."""
    size = f"{100 * relative:.3g}%" if 1e-4 <= relative < 1e3 else f"relative {relative:.2g}"
    return f"{size} (absolute {absolute:.2g})"
