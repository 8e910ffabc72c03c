"""Compare a candidate's outputs and gradients with the float64 reference. NumPy only."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.core.op import Op, Tolerance
from poolbench.core.records import Accuracy, Status
from poolbench.worker.inputs import numpy_dtype

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Beside a tie's shares, of a half or less, the error of any dtype is small.
TIE = Tolerance(relative=2e-2, absolute=1e-6)
EXACT = Tolerance(relative=0.0, absolute=0.0)
# If nearly all expected values were zero, a candidate that returns zeros would pass.
LEAST_NONZERO = 0.05
# Values that are compared at a time: temporary arrays of so many stay in a core's cache.
CHUNK = 1 << 15
# Values of examples that the reference takes at a time: memory that is used again costs nothing, while
# first touching new memory on a virtual machine can take longer than the arithmetic on it.
PART = 1 << 18

BOUNDS = {
    "float64": Tolerance(relative=1e-12, absolute=1e-13, reason="a thousand roundings of 1e-16"),
    "float32": Tolerance(
        relative=1e-5, absolute=1e-6, reason="sums of up to 10,000 terms in float32"
    ),
    "float16": Tolerance(
        relative=2e-3, absolute=2e-4, reason="two roundings to half (1e-3); a sum in half is beyond"
    ),
    "bfloat16": Tolerance(
        relative=1.6e-2,
        absolute=2e-3,
        reason="two roundings to 8 bits (8e-3); a sum in them is beyond",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a check: 'ok' or 'wrong', the reason in one line, and the errors found."""

    accuracy: Accuracy
    status: Status
    reason: str = ""


def in_float64(array: Array) -> Array:
    """Convert an input for the reference: to float64, integers unchanged."""
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)


def bound_for(op: Op, case: Case) -> Tolerance:
    """Return the tolerance of the case: the op's own, or the default of the dtype."""
    return op.tolerance(case) if op.tolerance is not None else BOUNDS[case.dtype]


def check(op: Op, case: Case, inputs: tuple[Array, ...], outputs: tuple[Array, ...]) -> Verdict:
    """Compare outputs, (y,) or (y, gradients), with the float64 reference."""
    return judge(Answers(op=op, case=case, inputs=inputs), outputs)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The reference's outputs for a case's inputs, computed once for all candidates.

    Attributes:
        op, case, inputs: what they are of.
        names_ties: whether a check says how a gradient is shared at a tie.
    """

    op: Op
    case: Case
    inputs: tuple[Array, ...]
    names_ties: bool = True

    @property
    def xs(self) -> tuple[Array, ...]:
        """Return the op's inputs."""
        return self.inputs if self.case.direction == "forward" else self.inputs[:-1]

    @functools.cached_property
    def y(self) -> Array:
        """Return the correct output."""
        return self._in_parts(lambda *xs: (self.op.reference(self.case, *xs),), *self.xs)[0]

    def spread(self, dy: Array) -> tuple[Array, ...]:
        """Return the correct gradients of the differentiable inputs for this gradient of y."""
        assert self.op.vjp is not None
        return self._in_parts(functools.partial(self.op.vjp, self.case), dy, *self.xs)

    def _in_parts(
        self, function: Callable[..., tuple[Array, ...]], *arrays: Array
    ) -> tuple[Array, ...]:
        """Call a function of arrays in float64, on some examples at a time where the op allows it."""
        parts = sum(array.size for array in arrays) // PART if self.op.by_example else 1
        parts = max(1, min(parts, len(arrays[0])))
        split = zip(*(np.array_split(array, parts) for array in arrays), strict=True)
        found = [function(*map(in_float64, part)) for part in split]
        return tuple(map(np.concatenate, zip(*found, strict=True))) if parts > 1 else found[0]

    @functools.cached_property
    def gradients(self) -> dict[str, Array]:
        """Return the correct gradients by name, 'dx' for the input x; split equally at a tie."""
        specs = self.op.inputs(self.case)
        names = [f"d{name}" for name, spec in specs.items() if spec.differentiable]
        return dict(zip(names, self.spread(self.inputs[-1]), strict=True))

    @functools.cached_property
    def tied(self) -> Array:
        """Return a mask of the elements of the first input that share their window's gradient with another."""
        weight = self.spread(np.ones_like(self.inputs[-1]))[0]
        return (weight > 0) & (weight < 1)

    @functools.cached_property
    def tie_rules(self) -> dict[str, Array]:
        """Return the gradient of the first input by the rule for a tie: 'split', 'first', 'last'."""
        x = in_float64(self.inputs[0])
        # A slope far below a float32's last digit breaks every tie and separates the first from the last.
        # It is no less than two float64s apart.
        largest = np.abs(x[np.isfinite(x)]).max(initial=0.0)
        step = max(1e-15 / max(1.0, x.size * 1e-6), 2 * np.spacing(largest))
        slope = np.arange(x.size, dtype=np.float64).reshape(x.shape) * step
        first, last = (
            Answers(op=self.op, case=self.case, inputs=(x + sign * slope, *self.inputs[1:]))
            for sign in (-1.0, 1.0)
        )
        rules = {"split": self, "first": first, "last": last}
        return {name: next(iter(one.gradients.values())) for name, one in rules.items()}


def judge(answers: Answers, outputs: tuple[Array, ...]) -> Verdict:
    """Compare outputs, (y,) or (y, gradients), with the reference's outputs."""
    op, case = answers.op, answers.case
    bound = bound_for(op, case)
    value = _judge("y", outputs[0], answers.y, bound, case)
    accuracy = Accuracy(
        worst=value.worst,
        max_relative=value.relative,
        max_absolute=value.absolute,
        bound=f"relative {bound.relative:g}, absolute {bound.absolute:g}",
    )
    if case.direction == "forward" or value.reason:
        return _verdict(accuracy, value.reason)
    if op.vjp is None:
        return _verdict(
            accuracy, f"{op.name} has no reference for its gradient; race it forward only"
        )
    slope, tie = _judge_gradients(answers, outputs[1:])
    accuracy = msgspec.structs.replace(
        accuracy, worst=max(value.worst, slope.worst), gradient_worst=slope.worst, tie=tie
    )
    return _verdict(accuracy, slope.reason)


def _verdict(accuracy: Accuracy, reason: str) -> Verdict:
    return Verdict(accuracy=accuracy, status="wrong" if reason else "ok", reason=reason)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an array is from the expected one.

    Attributes:
        worst: largest error over the allowed error; the arrays agree up to 1.
        relative: largest error over the size of the expected value.
        absolute: largest error; inf for values that are not finite, and for unlike shapes.
        reason: why the array is wrong, in one line; '' where it was not asked, or is right.
    """

    worst: float = math.inf
    relative: float = math.inf
    absolute: float = math.inf
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Tell whether every value is within the allowed error."""
        return self.worst <= 1.0


def compare(
    actual: Array, expected: Array, bound: Tolerance = EXACT, *, size: Array | float | None = None
) -> Difference:
    """Compare two arrays: every comparison of values in the package is this one.

    Args:
        actual: one array. Equal infinities and two NaN are equal.
        expected: the other, of the same shape.
        bound: the allowed error is absolute + relative * size.
        size: of the values; None: |expected|.
    """
    if actual.shape != expected.shape:
        return Difference()
    sizes = [] if size is None else [np.broadcast_to(size, expected.shape).reshape(-1)]
    flat = actual.reshape(-1), expected.reshape(-1), *sizes
    worst = relative = absolute = 0.0
    for start in range(0, actual.size, CHUNK):
        got, wanted, *given = (array[start : start + CHUNK] for array in flat)
        error = differences(got, wanted)
        if not error.any():
            continue
        of = given[0] if given else np.abs(wanted)
        absolute = max(absolute, float(error.max()))
        relative = max(relative, _largest(error, of))
        with np.errstate(invalid="ignore"):  # no error is allowed beside an infinite value
            allowed = bound.absolute + bound.relative * of
        worst = max(worst, _largest(error, allowed))
    return Difference(worst=worst, relative=relative, absolute=absolute)


def _largest(error: Array, of: Array) -> float:
    """Return the largest error over its size; an infinite one is not small beside an infinite size."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(error, of, out=np.zeros_like(error), where=error > 0)
    largest = float(ratio.max())
    return math.inf if math.isnan(largest) else largest


def differences(actual: Array, expected: Array) -> Array:
    """Return |actual - expected|; 0 for equal infinities and two NaN, inf where only one is NaN."""
    with np.errstate(invalid="ignore"):
        error = np.subtract(actual, expected, dtype=np.float64, casting="unsafe")
        np.abs(error, out=error)
    if np.isfinite(error.max(initial=0.0)):
        return error
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def _judge(
    name: str,
    actual: Array,
    expected: Array,
    bound: Tolerance,
    case: Case,
    least_nonzero: float = LEAST_NONZERO,
) -> Difference:
    """Compare one output with the reference's, its shape and dtype too."""
    if actual.shape != expected.shape:
        return Difference(reason=f"{name} has shape {actual.shape}, expected {expected.shape}")
    if actual.dtype != numpy_dtype(case.dtype):
        return Difference(reason=f"{name} is {actual.dtype}, expected {case.dtype}")
    if np.count_nonzero(expected) < least_nonzero * expected.size:
        return Difference(
            reason=f"mistrusted: {name} is expected to be almost all zeros, which proves nothing"
        )
    return _explain(name, actual, expected, bound)


def _explain(name: str, actual: Array, expected: Array, bound: Tolerance) -> Difference:
    """Compare two arrays, and say why they differ."""
    found = compare(actual, expected, bound)
    if found.agrees:
        return found
    if odd := np.count_nonzero(~np.isfinite(actual)):
        return Difference(reason=f"{name} has {odd} values that are not finite")
    allowed = bound.absolute + bound.relative * np.abs(expected)
    beyond = np.count_nonzero(differences(actual, expected) > allowed)
    reason = (
        f"{name} is beyond the bound in {beyond} of {expected.size} values: error up to "
        f"{found.absolute:.3g} (relative {found.relative:.3g}), bound relative {bound.relative:g}, "
        f"absolute {bound.absolute:g}"
    )
    return replace(found, reason=reason)


def _judge_gradients(answers: Answers, actual: tuple[Array, ...]) -> tuple[Difference, str | None]:
    """Return the largest errors of the gradients, and the rule that the first follows at a tie."""
    expected = answers.gradients
    if len(actual) != len(expected):
        return Difference(
            reason=f"it returned {len(actual)} gradients, expected {', '.join(expected)}"
        ), None
    tie: str | None = "none"
    bound = BOUNDS[answers.case.dtype]
    pairs = list(zip(actual, expected.items(), strict=True))
    found: list[Difference] = []
    if answers.op.check_gradient.window_sum is not None:  # of the first input, which may tie
        first, tie = _judge_tied_gradient(answers, pairs.pop(0)[0])
        found.append(first)
    found += [
        _judge(name, array, correct, bound, answers.case, _least_nonzero(answers, correct))
        for array, (name, correct) in pairs
    ]
    wrong = [one for one in found if one.reason]
    return (wrong or [max(found, key=lambda one: one.worst)])[0], tie


def _least_nonzero(answers: Answers, gradient: Array) -> float:
    """Return the share of a gradient that must not be zero: one element of a window gets one."""
    return LEAST_NONZERO * min(1.0, answers.y.size / max(1, gradient.size))


def _judge_tied_gradient(answers: Answers, actual: Array) -> tuple[Difference, str | None]:
    """Return the errors of the first input's gradient, and the rule that it follows at a tie.

    Where no elements tie, dx is unique. Where they do, it may go to one of them or be shared, but what
    a window's elements get together is its dy: the whole to each is wrong.
    """
    case, (name, shared) = answers.case, next(iter(answers.gradients.items()))
    window_sum = answers.op.check_gradient.window_sum
    assert window_sum is not None
    bound = BOUNDS[case.dtype]
    if not answers.names_ties or not answers.tied.any():
        found = _judge(name, actual, shared, bound, case, _least_nonzero(answers, shared))
        if not found.reason or not answers.tied.any():
            return found, "none" if answers.names_ties else None
    if actual.shape != shared.shape or actual.dtype != numpy_dtype(case.dtype):
        return _judge(name, actual, shared, bound, case), None
    given = actual.astype(np.float64)
    if not np.isfinite(given).all():
        return Difference(reason=f"{name} has values that are not finite"), None
    unique = _explain(name, np.where(answers.tied, shared, given), shared, bound)
    # Not dy: a window without valid elements gets none of it.
    sums = window_sum(given, case), window_sum(shared, case)
    summed = _explain(f"the sum of {name} over a window", *sums, bound)
    worst = max(unique, summed, key=lambda found: found.worst)
    return worst, tie_rule(answers, given) if answers.names_ties else None


def tie_rule(answers: Answers, given: Array) -> str:
    """Return how tied elements share their gradient: 'split', 'first', 'last', 'one' or 'other'."""
    tied = answers.tied
    for name, expected in answers.tie_rules.items():
        if compare(given[tied], expected[tied], TIE).agrees:
            return name
    return "one" if np.count_nonzero(given[tied]) < np.count_nonzero(tied) else "other"
