"""Checks that results repeat bit for bit: over calls, over processes, and under op determinism."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import MODES, Step, SupportProbe, attempt, combine, in_modes
from poolbench.matrix.trial import Trial
from poolbench.worker.inputs import fill, numpy_dtype

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Large enough that kernels use all threads.
REPEAT_SHAPE = (8, 32, 32, 24)
CALLS = 3


def repeat_calls(trial: Trial) -> Finding:
    """Check that three calls on one input give the same bits, values and gradients, in each mode.

    A mode without a gradient is judged by its values.
    """
    return in_modes(trial, lambda mode: repeat_mode(trial, mode))


def repeat_mode(trial: Trial, mode: str) -> Finding:
    """Check repetition in one mode; the figure `digest` is a hash of the bits."""
    case = trial.case(mode=mode, shape=REPEAT_SHAPE)
    training = case.replace(direction="training")
    what = "values and gradient"
    found = attempt(trial, training, partial(repeat_case, trial, training))
    if found.state not in ("pass", "wrong"):
        what, found = "values (no gradient here)", repeat_case(trial, case)
    return msgspec.structs.replace(found, evidence=f"{what}: {found.evidence}")


def repeat_case(trial: Trial, case: Case) -> Finding:
    """Check repetition in one case."""
    from poolbench.worker.contender import outputs_of
    from poolbench.worker.session import bind

    inputs = random_inputs(trial, case)
    host = list(inputs)
    if case.direction == "training":
        host.append(trials.output_gradient(trial, case, inputs))
    with trials.on_device(trial):
        bound = bind(trial.candidate, case)
        tensors = [trials.tensor(trial, array) for array in host]
        digests = []
        for _ in range(CALLS):
            result = bound(*tensors)
            digests.append(digest(outputs_of(result)))
    if len(set(digests)) > 1:
        return Finding(state="wrong", evidence=f"{CALLS} calls gave {len(set(digests))} answers")
    return Finding(
        state="pass", evidence=f"{CALLS} calls gave the same bits", figures={"digest": digests[0]}
    )


def random_inputs(trial: Trial, case: Case) -> tuple[Array, ...]:
    """Return normal values: their sums depend on the order, which threads may change."""
    random = np.random.default_rng(4)
    return tuple(
        fill(random, spec)
        if callable(spec.fill)
        else random.standard_normal(spec.shape).astype(numpy_dtype(spec.dtype))
        for spec in trial.specs(case)
    )


def digest(arrays: Sequence[Array]) -> str:
    """Return a hash of the arrays' bits."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def same_digests(findings: Sequence[Finding]) -> Finding:
    """Compare the bits of two processes in every mode that ran in both."""
    first, second = (finding.figures for finding in findings)
    names = sorted({*first} & {*second})
    different = [name for name in names if first[name] != second[name]]
    if different:
        return Finding(state="wrong", evidence=f"two processes differ: {', '.join(different)}")
    return Finding(state="pass", evidence="two processes gave the same bits in every mode")


def digests(trial: Trial) -> Finding:
    """Return the digests of every mode that runs; other checks report the modes that do not."""
    found = {
        mode: attempt(trial, trial.case(mode=mode), partial(repeat_mode, trial, mode))
        for mode in MODES
    }
    running = {mode: finding for mode, finding in found.items() if finding.state == "pass"}
    return combine(running or found)


def under_determinism(mode: str) -> Callable[[Trial], Finding]:
    """Return a check of values, gradient and repetition under op determinism."""

    def probe(trial: Trial) -> Finding:
        found = trials.try_gradient(trial, trial.case(mode=mode))
        return repeat_mode(trial, mode) if found.state == "pass" else found

    return probe


PROBES = (
    SupportProbe(
        key="repeat-calls",
        title="same bits, three calls",
        group="repeats",
        question="Do three calls on one input give the same bits, in eager, graph and XLA?",
        steps=(Step(run=repeat_calls),),
    ),
    SupportProbe(
        key="repeat-processes",
        title="same bits, two processes",
        group="repeats",
        question="Do two processes give the same bits, in every mode that runs?",
        steps=(Step(run=digests), Step(run=digests, process="other")),
        judge=same_digests,
    ),
    *(
        SupportProbe(
            key=f"determinism-{mode}",
            title=f"op determinism, {name}",
            group="repeats",
            question="Under tf.config.experimental.enable_op_determinism, are values and gradient "
            f"right and the same again in {name} mode?",
            steps=(Step(run=under_determinism(mode), process="deterministic"),),
        )
        for mode, name in (("graph", "graph"), ("xla", "XLA"))
    ),
)
