"""Is it the same again: bit for bit over calls and over processes, and under op determinism."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.matrix import judge
from poolbench.matrix.probe import (
    Finding,
    Step,
    SupportProbe,
    Trial,
    attempt,
    combine,
    in_modes,
)

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# Large enough that every kernel which shares its work among threads does so.
REPEAT_SHAPE = (8, 32, 32, 24)
CALLS = 3


def repeat_calls(trial: Trial) -> Finding:
    """Whether three calls on one input give the same bits, values and gradient, in each mode.

    A mode without a gradient is judged by its values; a mode that does not run at all says why.
    """
    return in_modes(trial, lambda mode: repeat_mode(trial, mode))


def repeat_mode(trial: Trial, mode: str) -> Finding:
    """The same in one mode; the figure `digest` is a hash of the bits."""
    case = trial.case(mode=mode, shape=REPEAT_SHAPE)
    training = case.replace(direction="training")
    what, found = (
        "values and gradient",
        attempt(trial, training, lambda: repeat_case(trial, training)),
    )
    if found.state not in ("pass", "wrong"):
        what, found = "values (no gradient here)", repeat_case(trial, case)
    return msgspec.structs.replace(found, evidence=f"{what}: {found.evidence}")


def repeat_case(trial: Trial, case: Case) -> Finding:
    """The same in one case."""
    from poolbench.worker.backends import to_numpy
    from poolbench.worker.session import bind

    x = random_input(case)
    host = [x]
    if case.direction == "training":
        host.append(judge.output_gradient(trial, case, x))
    with judge.on_device(trial):
        bound = bind(trial.candidate, case)
        tensors = [judge.tensor(trial, array) for array in host]
        digests = []
        for _ in range(CALLS):
            result = bound(*tensors)
            results = result if isinstance(result, tuple) else (result,)
            digests.append(digest([to_numpy(value) for value in results]))
    if len(set(digests)) > 1:
        return Finding(state="wrong", evidence=f"{CALLS} calls gave {len(set(digests))} answers")
    return Finding(
        state="pass", evidence=f"{CALLS} calls gave the same bits", figures={"digest": digests[0]}
    )


def random_input(case: Case) -> Array:
    """Normal values: sums of them depend on their order, which is what threads may change."""
    values: Array = np.random.default_rng(4).standard_normal(case.shape)
    return values.astype(judge.numpy_dtype(case.dtype))


def digest(arrays: Sequence[Array]) -> str:
    """A hash of the arrays' bits."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def same_digests(findings: Sequence[Finding]) -> Finding:
    """Whether two processes came to the same bits in every mode that ran in both."""
    first, second = (finding.figures for finding in findings)
    names = sorted({*first} & {*second})
    different = [name for name in names if first[name] != second[name]]
    if different:
        return Finding(state="wrong", evidence=f"two processes differ: {', '.join(different)}")
    return Finding(state="pass", evidence="two processes gave the same bits in every mode")


def digests(trial: Trial) -> Finding:
    """The digests of every mode that runs; a mode that does not is another probe's business."""
    found = {
        mode: attempt(trial, trial.case(mode=mode), lambda mode=mode: repeat_mode(trial, mode))  # type: ignore[misc]
        for mode in ("eager", "graph", "xla")
    }
    running = {mode: finding for mode, finding in found.items() if finding.state == "pass"}
    return combine(running) if len(running) > 1 else combine(found)


def under_determinism(mode: str) -> Callable[[Trial], Finding]:
    """A probe of values, gradient and repetition where op determinism is on."""

    def probe(trial: Trial) -> Finding:
        found = judge.try_gradient(trial, trial.case(mode=mode))
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
