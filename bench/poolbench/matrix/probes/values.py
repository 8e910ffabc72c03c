"""Checks of special values: NaN, -inf, all negative, and ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.core.op import Tolerance
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Figures, Finding
from poolbench.matrix.probe import Step, SupportProbe, in_modes
from poolbench.matrix.trial import Trial
from poolbench.worker.check import Answers, compare, tie_rule

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

NAN = float("nan")
NAN_GROUPS = ((1, NAN, 3), (NAN, NAN, NAN), (NAN, 1, 2), (1, 2, NAN))
SHARES = Tolerance(relative=0.0, absolute=1e-3)
TIE_RULES = {
    "split": "split equally", "first": "first", "last": "last", "one": "one of them", "other": "some other rule"
}  # fmt: skip
NAN_ISSUE = "tensorflow#125965"


def nan_inputs(trial: Trial, case: Case) -> tuple[Array, ...]:
    """Return inputs with NaN in the first pixel of images, or in the first value of other inputs."""
    first, *rest = trials.negative_inputs(trial, case)
    if "image" in trial.features:
        first[0, 0, 0, :] = np.concatenate([np.asarray(group, first.dtype) for group in NAN_GROUPS])
    else:
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
        if found.state == "pass":
            words = "NaN comes out, and nowhere else"
            return msgspec.structs.replace(found, evidence=words, figures={})
        words = nan_words(trial, of_mode, inputs, y)
        # The issue is about maxima that lose a NaN.
        issue = NAN_ISSUE if words and "ties" in trial.features else ""
        return msgspec.structs.replace(
            found, evidence=words or found.evidence, figures={}, issue=issue
        )

    return in_modes(trial, ask)


def nan_words(trial: Trial, case: Case, inputs: tuple[Array, ...], y: Array) -> str:
    """Return '[1n3] -> 3, [nnn] -> n, ...' or, without windows, how many NaN came out."""
    expected = trials.reference(trial, case, inputs)
    if y.shape != expected.shape:
        return f"y has shape {y.shape}; {expected.shape} is right"
    if "pool_size" not in trial.features:
        came, right = int(np.isnan(y).sum()), int(np.isnan(expected).sum())
        return f"{came} NaN came out, {right} is right" if came != right else ""
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
    """Check the gradient of ties in one mode: the first input has three values, which tie in most windows."""
    case = trial.case(mode=mode, direction="training")
    first, *rest = trials.distinct_inputs(trial, case)
    few = np.random.default_rng(0).integers(1, 4, first.shape).astype(first.dtype)
    inputs = (few, *rest)
    inputs = (*inputs, trials.output_gradient(trial, case, inputs))
    _, dx, *_ = trials.call(trial, case, *inputs)
    answers = Answers(op=trial.op, case=case, inputs=inputs)
    return judge_ties(answers, dx.astype(np.float64))


def judge_ties(answers: Answers, dx: Array) -> Finding:
    """Compare the gradient of the first input, whose elements tie, with the right ones."""
    window_sum = answers.op.check_gradient.window_sum
    assert window_sum is not None
    dy = answers.inputs[-1]
    split, weight = (answers.spread(one)[0] for one in (dy, np.ones_like(dy)))
    whole = np.divide(split, weight, out=np.zeros_like(split), where=weight > 0)
    each = compare(dx, whole, SHARES).agrees
    rule = "all of it to every tied value" if each else TIE_RULES[tie_rule(answers, dx)]
    figures: Figures = {"rule": rule}
    if (dx[weight == 0] != 0).any():
        words = f"{rule}; some of the gradient goes to values below the maximum"
        return Finding(state="wrong", evidence=words, figures=figures)
    sums, right = window_sum(dx, answers.case), window_sum(split, answers.case)
    shares = np.divide(sums, right, out=np.ones_like(sums), where=right != 0)
    if np.abs(shares - 1).max() > 1e-5:
        words = f"{rule}; it sums to {shares.flat[np.abs(shares - 1).argmax()]:.3g} of what came in"
        return Finding(state="wrong", evidence=words, figures=figures)
    return Finding(state="pass", evidence=f"{rule}, sums to one", figures=figures)


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
             requires=("ties",)),
)  # fmt: skip
