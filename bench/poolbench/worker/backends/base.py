"""The interface of a framework, and the parts that all backends share."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program

Array = np.ndarray[Any, Any]
Call = Callable[..., Any]
FRAMEWORKS = ("tensorflow", "keras")


class Backend:
    """A framework: how it starts, holds inputs, compiles, waits, and gives results back.

    The defaults are those of a host framework whose calls have finished when they return.

    Attributes:
        name: 'numpy', 'tensorflow', 'jax', 'torch'; `core.candidate.BACKENDS` has its modes.
    """

    name: str

    def start(self, spec: WorkerSpec) -> None:
        """Import the framework with the settings of this process, which hold until it ends."""

    def devices(self) -> dict[str, str]:
        """Return the devices with a description: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""
        return {"cpu:0": "CPU"}

    def on(self, device: str) -> AbstractContextManager[Any]:  # noqa: ARG002 (an override's)
        """Return a context in which calls run on the device."""
        return contextlib.nullcontext()

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:
        """Copy the arrays to the device, into memory of their own."""
        raise NotImplementedError

    def copy(self, values: Sequence[Any], device: str) -> tuple[Any, ...]:
        """Copy values of a device into new memory."""
        return self.put(values, device)

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write the array into the value's own memory; return False if that is impossible."""
        raise NotImplementedError

    def compile(self, function: Call, mode: str) -> Call:  # noqa: ARG002
        """Compile the function for a mode."""
        return function

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Return (inputs, dy) -> (y, the gradients of the inputs at these places)."""
        raise NotImplementedError("a candidate of this backend has no gradient")

    def convert(self, call: Call, arguments: Sequence[Any]) -> None:
        """Do the once-per-process work of a first trace."""

    def synchronize(self, device: str) -> None:
        """Wait until the device has finished its work."""

    def device_of(self, value: Any) -> str:  # noqa: ARG002
        """Return the device that holds a value: 'cpu:0'."""
        return "cpu:0"

    def peak_nbytes(self, step: Callable[[], None], device: str) -> int | None:  # noqa: ARG002
        """Return the peak of the device's memory during a step, above the initial use; None: not counted."""
        return None

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:
        """Return a function that reads and writes this many bytes of the device's memory and waits."""
        raise NotImplementedError

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:  # noqa: ARG002
        """Return calls by name that read ('read'), write or copy memory as fast as the framework can.

        Reading and copying calls take the case's first input; a writing one writes `count` float32.
        NumPy's are there for every framework.
        """
        return {}

    def settings(self, mode: str, device: str) -> dict[str, str]:  # noqa: ARG002
        """Return the settings that affect times, read from the framework: threads, precision, oneDNN, ..."""
        return {}

    def program(self, call: Call, arguments: Sequence[Any], mode: str) -> Program | None:  # noqa: ARG002
        """Return what the framework's compiler or executor made of a call; None: it does not tell."""
        return None

    def identity(self, mode: str) -> Call:
        """Return the framework's cheapest call in a mode: it returns its argument, or a part of it."""
        raise NotImplementedError

    def clear(self) -> None:
        """Release everything cached for called functions."""


def to_numpy(value: Any) -> Array:
    """Return a result on the host, in its own dtype.

    Raises:
        TypeError: it is no array.
    """
    if value is None:
        raise TypeError("it returned None (a gradient that does not exist?)")
    framework = type(value).__module__.partition(".")[0]  # reject objects that are not arrays
    if framework == "torch" and hasattr(value, "detach"):
        return _torch_to_numpy(value.detach().cpu())
    if framework in ("jax", "jaxlib") and hasattr(value, "block_until_ready"):
        value = np.asarray(value)
    array = value.numpy() if framework in FRAMEWORKS and hasattr(value, "numpy") else value
    if not isinstance(array, np.ndarray) and not np.isscalar(array):
        raise TypeError(f"it returned a {type(value).__name__}, not an array")
    return np.asarray(array)


def _torch_to_numpy(tensor: Any) -> Array:
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    import ml_dtypes
    import torch

    return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)


def freeze() -> None:
    """Import Keras, which takes seconds, and exclude all that is loaded from garbage collection."""
    import keras  # noqa: F401 (the first candidate should not pay for it)

    gc.collect()
    gc.freeze()


def on_off(value: object) -> str:
    """Return a switch as text."""
    return "on" if value else "off"


def count_threads(name: str) -> int:
    """Return the number of this process' threads of a name; 0 where the system does not list them."""
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            count += path.read_text().strip() == name
    return count


def host_probes(
    work: Call, arrays: Sequence[Array], threads: int, pools: list[ThreadPoolExecutor]
) -> dict[str, Call]:
    """Return NumPy calls that read or write, with one thread and with the case's threads.

    One thread's call costs least, which counts where the input is small; several read more where it
    is large. They are Python's threads, which NumPy's loops let run side by side.
    """
    ways: dict[str, Call] = {"numpy": lambda _: work(*arrays)}
    threads = threads or os.cpu_count() or 1
    if threads > 1:
        parts = list(zip(*(np.array_split(array, threads) for array in arrays), strict=True))
        if not pools:
            pools.append(ThreadPoolExecutor(threads, thread_name_prefix="poolbench-probe"))
        pool = pools[0]
        ways["numpy-threads"] = lambda _: list(pool.map(lambda part: work(*part), parts))
    return ways
