"""Make a Keras layer of a candidate, as its user would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from poolbench.core.case import Case
from poolbench.matrix.trial import Trial


def as_layer(trial: Trial, case: Case, *, mixed: bool = False) -> Any:
    """Return the candidate if it is a Keras layer; a Lambda around it if it is a function.

    `mixed`: a layer gets the mixed policy of the case's dtype, by the name that Keras takes as a
    layer's dtype. A function sees the dtype alone, and its Lambda has the global policy.
    """
    import keras

    if mixed and trial.candidate.form == "layer":
        case = case.replace(dtype=f"mixed_{case.dtype}")
    built = trial.candidate.build(case)
    if isinstance(built, keras.layers.Layer):
        return built
    return keras.layers.Lambda(_as_global(built))


def _as_global(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a lambda that finds `function` among its globals, as a notebook's lambda finds its `tf`.

    Keras saves a lambda's code, defaults and closure; in a closure it would try to save the function.
    """
    names = {"candidate": function, "__name__": __name__}
    found: Callable[[Any], Any] = eval("lambda x: candidate(x)", names)  # noqa: S307 (a constant text)
    return found
