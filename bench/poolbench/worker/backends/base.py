"""What the harness asks of a framework, and what all of them do alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from poolbench.core.plan import WorkerSpec

Array = np.ndarray[Any, Any]
Call = Callable[..., Any]
FRAMEWORKS = ("tensorflow", "keras", "torch")


class Backend(Protocol):
    """A framework: how it starts, holds inputs, compiles, waits, and gives results back.

    Attributes:
        name: 'numpy', 'tensorflow'.
        modes: the modes in which it can call a function.
    """

    name: str
    modes: tuple[str, ...]

    def start(self, spec: WorkerSpec) -> None:
        """Import the framework with a process' settings, which hold until the process ends."""

    def devices(self) -> dict[str, str]:
        """Return the devices with a description: {'cpu:0': 'CPU', 'gpu:0': 'NVIDIA H100 ...'}."""

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return a context in which calls run on the device."""

    def put(self, arrays: Sequence[Array], device: str) -> tuple[Any, ...]:
        """Return the arrays as the device's own, in memory that nothing else has."""

    def copy(self, values: Sequence[Any], device: str) -> tuple[Any, ...]:
        """Return the values of a device in other memory."""

    def overwrite(self, value: Any, array: Array) -> bool:
        """Write the array into the value's own memory; False where that cannot be done."""

    def compile(self, function: Call, mode: str) -> Call:
        """Return the function as the mode calls it."""

    def vjp(self, function: Call, places: Sequence[int]) -> Call:
        """Return (inputs, dy) -> (y, the gradients of the inputs at these places)."""

    def convert(self, call: Call, arguments: Sequence[Any]) -> bool:
        """Do once per process what the first trace of a function costs; False where there is nothing."""

    def synchronize(self, device: str) -> None:
        """Return when the device has finished all that it was given."""

    def device_of(self, value: Any) -> str:
        """Return the device that holds a value: 'cpu:0'."""

    def peak_nbytes(self, step: Callable[[], None], device: str) -> int | None:
        """Return the peak of the device's memory during a step, above what was held; None: not counted."""

    def make_evict(self, device: str, nbytes: int) -> Callable[[], None]:
        """Return a function that reads and writes so many bytes of the device's memory and waits."""

    def bandwidth_probes(self, kind: str, device: str, count: int) -> dict[str, Call]:
        """Return calls by name that read ('read'), write or copy memory as fast as the framework can.

        Reading and copying calls take the case's first input; a writing one writes `count` float32.
        """

    def clear(self) -> None:
        """Let go of all that is cached for functions that were called."""


def to_numpy(value: Any) -> Array:
    """Return a result on the host, in its own dtype.

    Raises:
        TypeError: it is no array.
    """
    if value is None:
        raise TypeError("it returned None (a gradient that does not exist?)")
    framework = type(value).__module__.partition(".")[
        0
    ]  # an object of a candidate's own is no array
    array = value.numpy() if framework in FRAMEWORKS and hasattr(value, "numpy") else value
    if not isinstance(array, np.ndarray) and not np.isscalar(array):
        raise TypeError(f"it returned a {type(value).__name__}, not an array")
    return np.asarray(array)


def host_probes(
    work: Call, arrays: Sequence[Array], threads: int, pools: list[ThreadPoolExecutor]
) -> dict[str, Call]:
    """Return NumPy's ways to read or write, by one thread and by as many as the case has.

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
