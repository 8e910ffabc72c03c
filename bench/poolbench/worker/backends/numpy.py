"""NumPy backend: no modes, no gradients, host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program
from poolbench.worker.backends.base import Array, Call


class NumpyBackend:
    """Backend of candidates that are NumPy functions, called directly."""

    name = "numpy"

    def start(self, spec: WorkerSpec) -> None:
        """Do nothing: NumPy is already imported."""

    def devices(self) -> dict[str, str]:
        """Return the one device."""
        return {"cpu:0": "CPU"}

    def on(self, device: str) -> contextlib.AbstractContextManager[Any]:  # noqa: ARG002
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:  # noqa: ARG002
        """Return copies."""
        return tuple(array.copy() for array in arrays)

    copy = put

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write the array into the value's memory."""
        np.copyto(value, array)
        return True

    def compile(self, function: Call, mode: str) -> Call:  # noqa: ARG002 (a mode is a framework's)
        """Return the function itself."""
        return function

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Raise an error: NumPy has no gradients."""
        raise NotImplementedError("a NumPy candidate has no gradient")

    def convert(self, call: Call, arguments: Sequence[Any]) -> bool:  # noqa: ARG002
        """Return False: nothing is traced."""
        return False

    def synchronize(self, device: str) -> None:
        """Do nothing: a call has finished when it returns."""

    def device_of(self, value: Any) -> str:  # noqa: ARG002
        """Return the host."""
        return "cpu:0"

    def peak_nbytes(self, step: Callable[[], None], device: str) -> int | None:  # noqa: ARG002
        """Return None: NumPy does not count memory."""
        return None

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:  # noqa: ARG002
        """Return a function that touches this many bytes of host memory."""
        words = np.ones(nbytes // 8, np.int64)

        def evict() -> None:
            np.add(words, 1, out=words)

        return evict

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:  # noqa: ARG002
        """Return no calls besides those of the host."""
        return {}

    def settings(self, mode: str, device: str) -> dict[str, str]:  # noqa: ARG002
        """Return none: NumPy has none that affect these calls."""
        return {}

    def program(self, call: Call, arguments: Sequence[Any], mode: str) -> Program | None:  # noqa: ARG002
        """Return None: nothing is compiled."""
        return None

    def identity(self, mode: str) -> Call:  # noqa: ARG002
        """Return a function that makes a view."""
        return lambda value: value[...]

    def clear(self) -> None:
        """Do nothing: nothing is cached."""
