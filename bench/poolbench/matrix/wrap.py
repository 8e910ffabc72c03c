"""A candidate as a Keras layer, as its user would make it one."""

from __future__ import annotations

from typing import Any

from poolbench.core.case import Case
from poolbench.matrix.probe import Trial

LAMBDA_WORDS = "wrapped in a keras.layers.Lambda"
_FUNCTIONS: list[Any] = []


def as_layer(trial: Trial, case: Case, *, mixed: bool = False) -> Any:
    """The candidate where it is a Keras layer; a function goes into a Lambda, as the book does.

    `mixed`: the layer gets the mixed policy of the case's dtype, by the name that Keras takes for
    a layer's dtype; a function sees the dtype alone, and its Lambda has the policy that is set.
    """
    import keras

    if mixed and trial.candidate.form == "layer":
        case = case.replace(dtype=f"mixed_{case.dtype}")
    built = trial.candidate.build(case)
    if isinstance(built, keras.layers.Layer):
        return built
    # By a global, as a notebook's lambda finds its `tf`: what a candidate's function closes over is
    # no business of Keras', which would try to save it.
    _FUNCTIONS.append(built)
    place = len(_FUNCTIONS) - 1
    return keras.layers.Lambda(lambda x, place=place: _FUNCTIONS[place](x))


def is_lambda(layer: Any) -> bool:
    """Whether the layer is a Lambda, the candidate's own or as_layer's."""
    import keras

    return isinstance(layer, keras.layers.Lambda)
