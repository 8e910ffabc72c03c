"""NumPy backend: no modes, no gradients, host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from poolbench.worker.backends.base import Array, Backend, Call


class NumpyBackend(Backend):
    """Backend of candidates that are NumPy functions, called directly."""

    name = "numpy"

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:  # noqa: ARG002
        """Return copies."""
        return tuple(array.copy() for array in arrays)

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write the array into the value's memory."""
        np.copyto(value, array)
        return True

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Return a function that touches this many bytes of host memory."""
        words = np.ones(nbytes // 8, np.int64)

        def evict() -> None:
            np.add(words, 1, out=words)

        return evict

    def identity(self, mode: str) -> Call:  # noqa: ARG002
        """Return a function that makes a view."""
        return lambda value: value[...]
