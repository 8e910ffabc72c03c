"""Values that break assumptions: NaN, -inf, nothing above zero, and ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.matrix import judge
from poolbench.matrix.probe import Finding, Step, SupportProbe, Trial, in_modes
from poolbench.matrix.probes.depth import negative_input

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

NAN = float("nan")
NAN_GROUPS = ((1, NAN, 3), (NAN, NAN, NAN), (NAN, 1, 2), (1, 2, NAN))
TIED_GROUPS = ((5, 5, 5), (5, 5, 1), (1, 5, 5), (5, 1, 5))
NAN_ISSUE = "tensorflow#125965"


def with_groups(case: Case, groups: tuple[tuple[float, ...], ...]) -> Array:
    """An x whose first pixel holds these groups along the depth; the rest is distinct and lower."""
    x = negative_input(case)
    x[0, 0, 0, :] = np.concatenate([np.asarray(group, x.dtype) for group in groups])
    return x


def not_a_number(trial: Trial) -> Finding:
    """Whether NaN comes out as NumPy has it and leaves the other groups alone, in each mode."""
    case = trial.case(shape=(2, 4, 5, 12))

    def ask(mode: str) -> Finding:
        of_mode = case.replace(mode=mode)
        x = with_groups(of_mode, NAN_GROUPS)
        (y,) = judge.call(trial, of_mode, x)
        found = judge.judge_forward(trial, of_mode, x, y)
        words = "NaN comes out, and nowhere else"
        if found.state != "pass":
            words = nan_words(trial, of_mode, x, y)
        return msgspec.structs.replace(found, evidence=words, figures={})

    found = in_modes(trial, ask)
    return msgspec.structs.replace(found, issue=NAN_ISSUE if found.state == "wrong" else "")


def nan_words(trial: Trial, case: Case, x: Array, y: Array) -> str:
    """'[1,n,3] -> 3, [n,n,n] -> n, ...' or, without windows, how many of the NaN came out."""
    expected = judge.reference(trial, case, x)
    if y.shape != expected.shape:
        return f"y has shape {y.shape}; {expected.shape} is right"
    if not trial.has_window:
        return f"{int(np.isnan(y).sum())} NaN came out, {int(np.isnan(expected).sum())} is right"
    names = ("".join("n" if v != v else f"{v:g}" for v in group) for group in NAN_GROUPS)  # noqa: PLR0124
    row = y[0, 0, 0].astype(np.float64)
    return ", ".join(f"[{n}] -> {v:.3g}" for n, v in zip(names, row, strict=True))


def minus_infinity(trial: Trial) -> Finding:
    """Whether windows of -inf alone give -inf, in each mode."""

    def make(case: Case) -> Array:
        x = negative_input(case)
        x[0] = -np.inf
        return x

    return in_modes(trial, lambda mode: judge.try_forward(trial, trial.case(mode=mode), make))


def all_negative(trial: Trial) -> Finding:
    """Whether values all below zero come out as they are, in each mode."""
    return in_modes(
        trial, lambda mode: judge.try_forward(trial, trial.case(mode=mode), negative_input)
    )


def tie(trial: Trial) -> Finding:
    """Where a tie's gradient goes, and whether it sums to one, in each mode that has a gradient."""
    return in_modes(trial, lambda mode: tie_in_mode(trial, mode))


def tie_in_mode(trial: Trial, mode: str) -> Finding:
    """The same in one mode."""
    if trial.op.check_gradient.window_sum is None:
        return Finding(state="not_run", evidence="the op's gradient is unique: nothing ties")
    case = trial.case(mode=mode, shape=(2, 4, 5, 12), direction="training")
    x = with_groups(case, TIED_GROUPS)
    dy = judge.output_gradient(trial, case, x)
    _, dx = judge.call(trial, case, x, dy)
    total = trial.op.check_gradient.window_sum(dx.astype(np.float64), case)
    largest = judge.reference(trial, case, x)
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
    """How the gradient of TIED_GROUPS was shared out, in words; `share` is (groups, window)."""
    tied = np.asarray(TIED_GROUPS) == 5
    index = np.arange(tied.shape[1])
    rules = {
        "first": index == tied.argmax(1)[:, None],
        "last": index == tied.shape[1] - 1 - tied[:, ::-1].argmax(1)[:, None],
        "split equally": tied / tied.sum(1, keepdims=True),
        "all of it to every tied value": tied,
    }
    for name, expected in rules.items():
        if np.allclose(share, expected, atol=1e-3):
            return name
    return "one of them" if ((share > 0.999) & tied).sum() == len(tied) else "some other rule"


def probe_of(
    key: str, title: str, question: str, run: Callable[[Trial], Finding], *, window: bool = False
) -> SupportProbe:
    """A probe of this group, asked in all three modes."""
    return SupportProbe(
        key=key,
        title=title,
        group="values",
        question=f"{question}, in eager, graph and XLA?",
        steps=(Step(run=run),),
        window=window,
    )


PROBES = (
    probe_of("nan", "NaN", "Does a NaN come out as NumPy has it", not_a_number),
    probe_of("minus-inf", "-inf", "Does a window of -inf alone give -inf", minus_infinity),
    probe_of("negative", "all negative", "Do windows below zero come out right", all_negative),
    probe_of("tie", "ties", "Does the gradient at a tie go to the tied values and sum to one", tie,
             window=True),
)  # fmt: skip
