"""Backends: what runs a candidate. A backend's framework is imported when the backend starts."""

from __future__ import annotations

from poolbench.worker.backends.base import Array, Backend, Call, to_numpy
from poolbench.worker.backends.numpy import NumpyBackend
from poolbench.worker.backends.tensorflow import TensorFlowBackend

BACKENDS: dict[str, Backend] = {"numpy": NumpyBackend(), "tensorflow": TensorFlowBackend()}
# A Keras candidate is run by the framework below it.
BACKENDS["keras"] = BACKENDS["tensorflow"]

__all__ = ["BACKENDS", "Array", "Backend", "Call", "to_numpy"]
