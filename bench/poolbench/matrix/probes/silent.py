"""A check for arguments that eager mode and XLA both accept but answer differently, without an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.core.candidate import Variant
from poolbench.core.case import Case
from poolbench.core.op import Tolerance
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, error_words
from poolbench.matrix.trial import Trial
from poolbench.worker.check import compare

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def silent(trial: Trial) -> Finding:
    """Check that eager mode and XLA agree wherever both answer; a difference is `wrong`."""
    differing, compared, refused = [], 0, 0
    for words, case in cases(trial).items():
        answers = [answer(trial, case, mode) for mode in ("eager", "xla")]
        if any(isinstance(found, str) for found in answers):
            refused += 1
            continue
        compared += 1
        if not alike(trial, case, *answers):  # type: ignore[arg-type]
            differing.append(f"{words}: {difference(*answers)}")  # type: ignore[arg-type]
    for variant in trial.candidate.variants:
        if variant.check != "silent":
            continue
        words_of = describe_variant(trial, variant)
        refused += words_of is None
        compared += words_of is not None
        if words_of:
            differing.append(words_of)
    tried = f"{compared} sets of arguments compared" + (
        f", {refused} refused with an error in one of the modes" if refused else ""
    )
    if differing:
        return Finding(state="wrong", evidence=f"{'; '.join(differing)} ({tried})")
    if not compared:
        return Finding(state="unsupported", evidence=f"nothing to compare: {tried}")
    return Finding(state="pass", evidence=f"eager and XLA agree ({tried})")


def cases(trial: Trial) -> dict[str, Case]:
    """Return the cases to try: depths that the window does not divide, or long sums in half precision."""
    if {"pool_size", "image"} <= trial.features:
        return {
            f"depth {depth}, window 3, {padding}": trial.case(
                shape=(2, 4, 5, depth), padding=padding
            )
            for depth, padding in ((6, "same"), (5, "valid"), (5, "same"), (4, "same"))
        }
    return {
        f"{dtype}, 56 by 56 values" if "image" in trial.features else dtype: trial.case(
            shape=(1, 56, 56, 6), dtype=dtype
        )
        for dtype in ("float16", "bfloat16", "float32")
    }


def answer(trial: Trial, case: Case, mode: str) -> Array | str:
    """Return the candidate's values in a mode as float64, or the text of its error."""
    of_mode = case.replace(mode=mode)
    try:
        (y,) = trials.call(trial, of_mode, *trials.uniform_inputs(trial, of_mode))
    except Exception as error:  # noqa: BLE001 (an error is not silent)
        return error_words(error)
    return y.astype(np.float64)


def alike(trial: Trial, case: Case, first: Array, second: Array) -> bool:
    """Return whether two answers agree within twice the tolerance."""
    one = trials.tolerance_of(trial, case)
    twice = Tolerance(relative=2 * one.relative, absolute=2 * one.absolute)
    return compare(first, second, twice).agrees


def difference(eager: Array, xla: Array) -> str:
    """Describe how two answers differ."""
    if eager.shape != xla.shape:
        return f"eager gives shape {eager.shape}, XLA {xla.shape}"
    return f"eager and XLA differ by up to {100 * compare(eager, xla).relative:.3g}%"


def describe_variant(trial: Trial, variant: Variant) -> str | None:
    """Describe the wrong answers to these arguments in eager mode or XLA; '' without one, None without any answer."""
    import tensorflow as tf

    (x,) = trials.distinct_inputs(trial, trial.case())
    right = variant.right(x)
    wrong, answered = [], False
    for mode in ("eager", "XLA"):
        function = variant.make()
        run = function if mode == "eager" else tf.function(function, jit_compile=True)
        try:
            with trials.on_device(trial):
                y = run(tf.constant(x)).numpy()
        except Exception:  # noqa: BLE001, S112 (an error is not silent)
            continue
        answered = True
        if y.shape == x.shape and np.array_equal(x, y):
            wrong.append(f"{mode} returns its input unchanged")
        elif y.shape != right.shape:
            wrong.append(f"{mode} gives shape {y.shape}, {right.shape} is right")
        elif not np.array_equal(y, right):
            wrong.append(f"{mode} gives wrong values")
    if not answered:
        return None
    return f"{variant.words}: {', '.join(wrong)}" if wrong else ""


PROBES = (
    SupportProbe(
        key="silent",
        title="eager and XLA agree",
        group="runs",
        question="Is there no argument that eager mode and XLA both take and answer differently, "
        "without an error?",
        steps=(Step(run=silent),),
    ),
)
