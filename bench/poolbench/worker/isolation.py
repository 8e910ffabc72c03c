"""What a candidate may not change, for its other candidates share the process: read before and after it.

Each entry of the tables reads one fact; what differs afterwards is said by its name. TensorFlow and
Keras are read only where they are loaded already.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poolbench.machine import core_distance
from poolbench.machine.info import relevant_settings

FUNCTIONS = "shared functions"
OWN_THREADS = "poolbench-"  # how the names of the harness' threads begin
THREADS = "threads that stay"
PROCESSES = "processes that stay"
GRACE_SECONDS = 0.2
TASKS = Path("/proc/self/task")


def _affinity() -> Any:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _priority() -> Any:
    return os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else None


def _signal_handlers() -> Any:
    return {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()}


def child_processes(tasks: Path = TASKS) -> set[int]:
    """The children of this process; none where the system does not show them."""
    found: set[int] = set()
    for path in tasks.glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            found.update(map(int, path.read_text().split()))
    return found - core_distance.partners()


# Modules whose functions candidates share, and those that time and check them.
SHARED = (
    "time", "gc", "numpy", "numpy.linalg", "tensorflow", "tensorflow.math", "tensorflow.nn", "keras.ops",
    "keras.layers", "poolbench.worker.timing", "poolbench.worker.check", "poolbench.worker.again",
)  # fmt: skip


def shared_modules() -> dict[str, dict[str, Any]]:
    """Return what the modules hold that are loaded, by the modules' names."""
    found = {}
    for name in SHARED:
        root, *rest = name.split(".")
        module: Any = sys.modules.get(root)
        for part in rest:  # TensorFlow's modules have other names than they are reached by
            module = getattr(module, "__dict__", {}).get(part)
        found[name] = dict(getattr(module, "__dict__", {}))
    return found


def _replaced(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the names of functions that are other ones now; a module may be loaded late."""
    return [
        f"{module}.{name}"
        for module, functions in before.items()
        for name, function in functions.items()
        if after[module].get(name, function) is not function
        and callable(function)
        and not isinstance(function, types.ModuleType)
    ]


PROCESS: dict[str, Callable[[], Any]] = {
    "numpy.geterr": np.geterr,
    "working directory": os.getcwd,
    "environment variables": relevant_settings,
    "processor affinity": _affinity,
    "priority": _priority,
    "gc.isenabled": gc.isenabled,
    "gc.get_threshold": gc.get_threshold,
    "signal handlers": _signal_handlers,
    "sys.getrecursionlimit": sys.getrecursionlimit,
    "sys.getswitchinterval": sys.getswitchinterval,
    THREADS: lambda: {
        thread.ident for thread in threading.enumerate() if not thread.name.startswith(OWN_THREADS)
    },
    PROCESSES: child_processes,
    FUNCTIONS: shared_modules,
}


def _tensorflow(tf: Any) -> dict[str, Callable[[], Any]]:
    return {
        "tf.config.functions_run_eagerly": tf.config.functions_run_eagerly,
        "tf.executing_eagerly": tf.executing_eagerly,
        "tf.config.get_soft_device_placement": tf.config.get_soft_device_placement,
        "tf.config.optimizer.get_jit": tf.config.optimizer.get_jit,
        "tf.config.optimizer.get_experimental_options": (
            tf.config.optimizer.get_experimental_options
        ),
        "tf.config.experimental.get_synchronous_execution": (
            tf.config.experimental.get_synchronous_execution
        ),
        "tf.config.experimental.tensor_float_32_execution_enabled": (
            tf.config.experimental.tensor_float_32_execution_enabled
        ),
        "tf.config.experimental.enable_op_determinism": _op_determinism,
        "tf.experimental.numpy behaviour": lambda: hasattr(tf.Tensor, "reshape"),
    }


def _op_determinism() -> Any:
    # TensorFlow has no public way to ask.
    from tensorflow.python.framework import config

    return config.is_op_determinism_enabled()


def _keras(keras: Any) -> dict[str, Callable[[], Any]]:
    return {
        "keras.config.floatx": keras.config.floatx,
        "keras.config.epsilon": keras.config.epsilon,
        "keras.config.image_data_format": keras.config.image_data_format,
        "keras.config.dtype_policy": lambda: keras.config.dtype_policy().name,
    }


FRAMEWORKS = {"tensorflow": _tensorflow, "keras": _keras}


def read() -> dict[str, Any]:
    """Every fact by name; one that cannot be read is left out."""
    return dict(_facts())


def _facts() -> Iterator[tuple[str, Any]]:
    tables = [PROCESS]
    for name, table in FRAMEWORKS.items():
        module = sys.modules.get(name)
        with contextlib.suppress(Exception):  # half loaded: not yet anybody's to change
            if module is not None:
                tables.append(table(module))
    for table_of_facts in tables:
        for name, fact in table_of_facts.items():
            with contextlib.suppress(Exception):  # another version of the framework lacks it
                yield name, fact()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, in words; threads and processes only where there are more of them."""
    found = []
    for name, old in before.items():
        new = after.get(name, old)
        if name in (THREADS, PROCESSES):
            if more := len(set(new) - set(old)):
                found.append(f"it left {more} {name}")
        elif name == FUNCTIONS:
            if replaced := _replaced(old, new):
                others = f" and {len(replaced) - 1} more" if len(replaced) > 1 else ""
                found.append(f"it replaced {replaced[0]}{others}")
        elif new != old:
            found.append(f"it changed {name}{_values(old, new)}")
    return found


def _values(old: Any, new: Any) -> str:
    text = f" from {old!r} to {new!r}"
    return text if len(text) <= 80 else ""


def left_behind(before: Mapping[str, Any], *, grace_seconds: float = GRACE_SECONDS) -> str:
    """What changed since `before`, in one line; "" if nothing. Who is just leaving may leave."""
    found = changes(before, read())
    if found:
        time.sleep(grace_seconds)
        found = changes(before, read())
    return "; ".join(found)


class Watch:
    """Sees after each block whether a candidate's calls changed what can be read in a microsecond."""

    FACTS: Mapping[str, Callable[[], Any]] = {
        THREADS: lambda: sum(
            not thread.name.startswith(OWN_THREADS) for thread in threading.enumerate()
        ),
        "time.perf_counter": lambda: time.perf_counter,
        "numpy.geterr": np.geterr,
        "gc.isenabled": gc.isenabled,
    }

    def __init__(self) -> None:
        self._seen = {name: fact() for name, fact in self.FACTS.items()}

    def changed(self) -> str:
        """Return what changed since the last time, in one line; '' if nothing."""
        seen = {name: fact() for name, fact in self.FACTS.items()}
        if seen == self._seen:
            return ""
        before, self._seen = self._seen, seen
        found = []
        for name, old in before.items():
            if name == THREADS:
                found += [f"it left {seen[name] - old} {name}"] if seen[name] > old else []
            elif seen[name] != old:
                found.append(f"it replaced {name}" if callable(old) else f"it changed {name}")
        return "; ".join(found)
