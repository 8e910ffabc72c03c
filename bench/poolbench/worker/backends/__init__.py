"""Backends run candidates. A backend imports its framework when it starts."""

from __future__ import annotations

from poolbench.worker.backends.base import Array, Backend, Call, to_numpy
from poolbench.worker.backends.jax import JaxBackend
from poolbench.worker.backends.numpy import NumpyBackend
from poolbench.worker.backends.tensorflow import TensorFlowBackend
from poolbench.worker.backends.torch import TorchBackend

BACKENDS: dict[str, Backend] = {
    "numpy": NumpyBackend(),
    "tensorflow": TensorFlowBackend(),
    "jax": JaxBackend(),
    "torch": TorchBackend(),
}

__all__ = ["BACKENDS", "Array", "Backend", "Call", "to_numpy"]
