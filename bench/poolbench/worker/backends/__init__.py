"""Backends run candidates. A backend imports its framework when it starts."""

from __future__ import annotations

from poolbench.worker.backends.base import Array, Backend, Call, to_numpy
from poolbench.worker.backends.numpy import NumpyBackend
from poolbench.worker.backends.tensorflow import TensorFlowBackend

BACKENDS: dict[str, Backend] = {"numpy": NumpyBackend(), "tensorflow": TensorFlowBackend()}
# The framework below Keras runs a Keras candidate.
BACKENDS["keras"] = BACKENDS["tensorflow"]

__all__ = ["BACKENDS", "Array", "Backend", "Call", "to_numpy"]
