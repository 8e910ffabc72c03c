"""Checks of special values: NaN, -inf, all negative, and ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.core.op import Tolerance
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, in_modes
from poolbench.matrix.trial import Trial
from poolbench.worker.check import compare

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

NAN = float("nan")
NAN_GROUPS = ((1, NAN, 3), (NAN, NAN, NAN), (NAN, 1, 2), (1, 2, NAN))
SHARES = Tolerance(relative=0.0, absolute=1e-3)
TIED_GROUPS = ((5, 5, 5), (5, 5, 1), (1, 5, 5), (5, 1, 5))
NAN_ISSUE = "tensorflow#125965"


def with_groups(trial: Trial, case: Case, groups: tuple[tuple[float, ...], ...]) -> Array:
    """Return images whose first pixel holds these groups along the depth; the rest is distinct and lower."""
    (x,) = trials.negative_inputs(trial, case)
    x[0, 0, 0, :] = np.concatenate([np.asarray(group, x.dtype) for group in groups])
    return x


def nan_inputs(trial: Trial, case: Case) -> tuple[Array, ...]:
    """Return inputs with NaN in the first pixel of images, or in the first value of other inputs."""
    if "image" in trial.features:
        return (with_groups(trial, case, NAN_GROUPS),)
    first, *rest = trials.negative_inputs(trial, case)
    first.reshape(-1)[:1] = NAN
    return first, *rest


def not_a_number(trial: Trial) -> Finding:
    """Check that NaN comes out as in NumPy and leaves other values alone, in each mode."""
    case = trial.case(shape=(2, 4, 5, 12))

    def ask(mode: str) -> Finding:
        of_mode = case.replace(mode=mode)
        inputs = nan_inputs(trial, of_mode)
        (y,) = trials.call(trial, of_mode, *inputs)
        found = trials.compare_output(trial, of_mode, inputs, y)
        words = "NaN comes out, and nowhere else"
        if found.state != "pass":
            words = nan_words(trial, of_mode, inputs, y)
        return msgspec.structs.replace(found, evidence=words, figures={})

    found = in_modes(trial, ask)
    return msgspec.structs.replace(found, issue=NAN_ISSUE if found.state == "wrong" else "")


def nan_words(trial: Trial, case: Case, inputs: tuple[Array, ...], y: Array) -> str:
    """Return '[1n3] -> 3, [nnn] -> n, ...' or, without windows, how many NaN came out."""
    expected = trials.reference(trial, case, inputs)
    if y.shape != expected.shape:
        return f"y has shape {y.shape}; {expected.shape} is right"
    if "pool_size" not in trial.features:
        return f"{int(np.isnan(y).sum())} NaN came out, {int(np.isnan(expected).sum())} is right"
    names = ("".join("n" if v != v else f"{v:g}" for v in group) for group in NAN_GROUPS)  # noqa: PLR0124
    row = y[0, 0, 0].astype(np.float64)
    return ", ".join(f"[{n}] -> {v:.3g}" for n, v in zip(names, row, strict=True))


def minus_infinity(trial: Trial) -> Finding:
    """Check that windows of -inf alone give -inf, in each mode."""

    def make(trial: Trial, case: Case) -> tuple[Array, ...]:
        inputs = trials.negative_inputs(trial, case)
        inputs[0][:1] = -np.inf
        return inputs

    return in_modes(trial, lambda mode: trials.try_forward(trial, trial.case(mode=mode), make))


def all_negative(trial: Trial) -> Finding:
    """Check inputs that are all below zero, in each mode."""
    return in_modes(
        trial, lambda mode: trials.try_forward(trial, trial.case(mode=mode), trials.negative_inputs)
    )


def tie(trial: Trial) -> Finding:
    """Check that the gradient of a tie goes to tied values and sums to one, in each mode."""
    return in_modes(trial, lambda mode: tie_in_mode(trial, mode))


def tie_in_mode(trial: Trial, mode: str) -> Finding:
    """Check the gradient of ties in one mode."""
    if trial.op.check_gradient.window_sum is None:
        return Finding(state="not_run", evidence="the op's gradient is unique: nothing ties")
    case = trial.case(mode=mode, shape=(2, 4, 5, 12), direction="training")
    x = with_groups(trial, case, TIED_GROUPS)
    dy = trials.output_gradient(trial, case, (x,))
    _, dx = trials.call(trial, case, x, dy)
    total = trial.op.check_gradient.window_sum(dx.astype(np.float64), case)
    largest = trials.reference(trial, case, (x,))
    share = dx[0, 0, 0].reshape(len(TIED_GROUPS), -1) / dy[0, 0, 0][:, None].astype(np.float64)
    rule = tie_rule(share)
    figures: dict[str, float | int | str | None] = {"rule": rule}
    outside = (dx.reshape(*largest.shape, -1) != 0) & (
        x.reshape(*largest.shape, -1) < largest[..., None]
    )
    if outside.any():
        words = f"{rule}; some of the gradient goes to values below the maximum"
        return Finding(state="wrong", evidence=words, figures=figures)
    error = float(np.abs(total / dy - 1).max())
    if error > 1e-5:
        words = f"{rule}; it sums to {float((total / dy).max()):.3g} of what came in"
        return Finding(state="wrong", evidence=words, figures=figures)
    return Finding(state="pass", evidence=f"{rule}, sums to one", figures=figures)


def tie_rule(share: Array) -> str:
    """Describe how the gradient of TIED_GROUPS was shared; `share` has shape (groups, window)."""
    tied = np.asarray(TIED_GROUPS) == 5
    index = np.arange(tied.shape[1])
    rules = {
        "first": index == tied.argmax(1)[:, None],
        "last": index == tied.shape[1] - 1 - tied[:, ::-1].argmax(1)[:, None],
        "split equally": tied / tied.sum(1, keepdims=True),
        "all of it to every tied value": tied,
    }
    for name, expected in rules.items():
        if compare(share, expected.astype(np.float64), SHARES).agrees:
            return name
    return "one of them" if ((share > 0.999) & tied).sum() == len(tied) else "some other rule"


def probe_of(
    key: str,
    title: str,
    question: str,
    run: Callable[[Trial], Finding],
    *,
    requires: tuple[str, ...] = (),
) -> SupportProbe:
    """Return a check of this group, in all three modes."""
    return SupportProbe(
        key=key,
        title=title,
        group="values",
        question=f"{question}, in eager, graph and XLA?",
        steps=(Step(run=run),),
        requires=requires,
    )


PROBES = (
    probe_of("nan", "NaN", "Does a NaN come out as in NumPy", not_a_number),
    probe_of("minus-inf", "-inf", "Does a window of -inf alone give -inf", minus_infinity),
    probe_of("negative", "all negative", "Do windows below zero come out right", all_negative),
    probe_of("tie", "ties", "Does the gradient at a tie go to the tied values and sum to one", tie,
             requires=("pool_size", "image")),
)  # fmt: skip
