"""Checks of depths that the window does not divide and of overlapping windows, for pooling along the depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, in_modes
from poolbench.matrix.trial import Trial
from poolbench.worker.check import EXACT

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# With a window of 3, a depth of 5 is one short and is padded behind: groups {0,1,2},{3,4}. A depth of
# 4 is two short; `same` pads one before and one behind: groups {0,1},{2,3}.
ONE_SHORT = (2, 4, 5, 5)
TWO_SHORT = (2, 4, 5, 4)


def remainder(shape: tuple[int, ...], padding: str, words: str) -> Callable[[Trial], Finding]:
    """Return a check of a depth that the window does not divide, on negative values."""
    return lambda trial: in_modes(
        trial,
        lambda mode: describe_remainder(
            trial, trial.case(mode=mode, shape=shape, padding=padding), words
        ),
    )


def describe_remainder(trial: Trial, case: Case, words: str) -> Finding:
    """Compare y with the reference; describe how the tail was treated."""
    (x,) = trials.negative_inputs(trial, case)
    (y,) = trials.call(trial, case, x)
    finding = trials.compare_output(trial, case, (x,), y)
    if finding.state == "pass":
        return msgspec.structs.replace(finding, evidence=words)
    return msgspec.structs.replace(
        finding, evidence=f"{tail_words(trial, case, x, y)} ({finding.evidence})"
    )


def tail_words(trial: Trial, case: Case, x: Array, y: Array) -> str:
    """Describe how an incorrect answer treated a tail, as far as its values show it."""
    for padding, words in (("valid", "drops the tail"), ("same", "pads with the lowest value")):
        expected = trials.reference(trial, case.replace(padding=padding), (x,))
        if y.shape == expected.shape and np.array_equal(y.astype(np.float64), expected):
            return words
    if (y == 0).any():
        return "pads with zero"
    return "answers with values of other groups"


def remainder_gradient(trial: Trial) -> Finding:
    """Check the gradient where `same` pads, before and behind, in graph mode and with XLA."""

    def ask(mode: str) -> Finding:
        for shape in (ONE_SHORT, TWO_SHORT):
            found = trials.try_gradient(trial, trial.case(mode=mode, shape=shape, padding="same"))
            if found.state != "pass":
                return msgspec.structs.replace(
                    found, evidence=f"depth {shape[-1]}: {found.evidence}"
                )
        return found

    return in_modes(trial, ask, ("graph", "xla"))


def overlap(trial: Trial) -> Finding:
    """Check windows of 3 with a stride of 2, for implementations that take a stride."""
    variant = next((one for one in trial.candidate.variants if one.check == "overlap"), None)
    if variant is None:
        return Finding(
            state="not_run",
            evidence="this implementation takes no stride: its windows never overlap",
        )

    def ask(mode: str) -> Finding:
        import tensorflow as tf

        case = trial.case(mode=mode, shape=(2, 4, 5, 9))
        (x,) = trials.distinct_inputs(trial, case)
        build = variant.make()
        run = build if mode == "eager" else tf.function(build, jit_compile=mode == "xla" or None)
        with trials.on_device(trial):
            y = run(tf.constant(x)).numpy()
        return trials.compare("y", y, variant.right(x).astype(np.float64), case, EXACT)

    return in_modes(trial, ask)


_probe = partial(SupportProbe, group="depth", requires=("pool_size", "image"))
PROBES = (
    _probe(
        key="depth-remainder-valid",
        title="depth 5, window 3, valid",
        question="Where the window does not divide the depth, does padding valid drop the tail, "
        "in eager, graph and XLA?",
        steps=(Step(run=remainder(ONE_SHORT, "valid", "drops the tail")),),
    ),
    _probe(
        key="depth-remainder-same",
        title="depth 5, window 3, same",
        question="Where the window does not divide the depth, does padding same pad with the "
        "lowest value, in eager, graph and XLA? All values are negative: zero would show.",
        steps=(Step(run=remainder(ONE_SHORT, "same", "pads with the lowest value")),),
    ),
    _probe(
        key="padding-same",
        title="padding same by its definition",
        question="At depth 4 and window 3, does padding same put one value before and one behind, "
        "as TensorFlow defines it: groups {0,1} and {2,3}?",
        steps=(Step(run=remainder(TWO_SHORT, "same", "pads one before and one behind")),),
    ),
    _probe(
        key="remainder-gradient",
        title="gradient where same pads",
        question="Is the gradient right where padding same pads, in graph and XLA?",
        steps=(Step(run=remainder_gradient),),
    ),
    _probe(
        key="overlap",
        title="overlapping windows",
        question="Are windows of 3 with a stride of 2 right, in eager, graph and XLA?",
        steps=(Step(run=overlap),),
    ),
)
