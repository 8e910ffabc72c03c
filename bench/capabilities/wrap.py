"""A candidate as a Keras layer, as its user would make it one."""

from __future__ import annotations

from typing import Any

from bench.capabilities.probe import Trial
from bench.case import Case

LAMBDA_WORDS = "wrapped in a keras.layers.Lambda"


def as_layer(trial: Trial, case: Case) -> Any:
    """The candidate where it is a Keras layer; a function goes into a Lambda, as the book does."""
    import keras

    built = trial.candidate.build(case)
    return built if isinstance(built, keras.layers.Layer) else keras.layers.Lambda(built)


def is_lambda(layer: Any) -> bool:
    """Whether as_layer had to wrap."""
    import keras

    return isinstance(layer, keras.layers.Lambda)
