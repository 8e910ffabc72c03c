"""Checks on the frameworks besides TensorFlow that a candidate declares: values and gradients, in their usual mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from poolbench.core.candidate import BACKENDS
from poolbench.core.case import Case
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe
from poolbench.matrix.trial import Trial

OTHERS = {"jax": "JAX", "torch": "PyTorch"}
Ask = Callable[[Trial, Case], Finding]
# Key, title, question, and what is run.
ASKED: tuple[tuple[str, str, str, Ask], ...] = (
    ("forward", "values", "give the reference's values", trials.try_forward),
    ("gradient", "gradient", "give the reference's gradients", trials.try_gradient),
)


def on(backend: str, ask: Ask) -> Callable[[Trial], Finding]:
    """Return a check that runs in a worker of this backend, in its first mode."""
    mode = BACKENDS[backend][0]
    return lambda trial: ask(dataclasses.replace(trial, backend=backend), trial.case(mode=mode))


PROBES = tuple(
    SupportProbe(
        key=f"{key}-{backend}",
        title=f"{title}, {words}",
        group="backends",
        question=f"Does it {question} on Keras's {words} backend?",
        steps=(Step(run=on(backend, ask), process=backend),),
        accelerators=False,
    )
    for backend, words in OTHERS.items()
    for key, title, question, ask in ASKED
)
