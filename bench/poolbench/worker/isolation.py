"""Process-wide state that a candidate must leave unchanged, because other candidates share the process.

Snapshots are taken before and after each candidate. Each entry of the tables reads one value; a difference
is reported by its name. TensorFlow and Keras are read only if they are already loaded.
"""

from __future__ import annotations

import contextlib
import gc
import operator
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

from poolbench.machine.info import relevant_settings

FUNCTIONS = "shared functions"
OWN_THREADS = "poolbench-"  # prefix of the names of the harness's threads
THREADS = "threads that stay"
PROCESSES = "processes that stay"
GRACE_SECONDS = 0.2


def _affinity() -> Any:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def child_processes() -> set[int]:
    """Return the children of this process; none if the system does not list them."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            found.update(map(int, path.read_text().split()))
    return found


# Modules whose functions candidates share, and those that time and check them.
SHARED = (
    "time", "gc", "numpy", "numpy.linalg", "tensorflow", "tensorflow.math", "tensorflow.nn", "keras.ops",
    "keras.layers", "jax.numpy", "jax.lax", "jax.nn", "torch", "torch.nn.functional",
    "poolbench.worker.timing", "poolbench.worker.check", "poolbench.worker.again",
)  # fmt: skip


def shared_modules() -> dict[str, dict[str, Any]]:
    """Return a copy of what the modules hold that are loaded, by the modules' names."""
    return {name: dict(held) for name, held in _held_by_modules().items()}


def _held_by_modules() -> dict[str, dict[str, Any]]:
    found = {}
    for name in SHARED:
        root, *rest = name.split(".")
        module: Any = sys.modules.get(root)
        for part in rest:  # TensorFlow's modules have other names than they are reached by
            module = getattr(module, "__dict__", {}).get(part)
        found[name] = getattr(module, "__dict__", {})
    return found


def _replaced(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Describe functions that are other ones now, in at most one line; a module may be loaded late."""
    names = [
        f"{module}.{name}"
        for module, functions in before.items()
        for name, function in functions.items()
        if after[module].get(name, function) is not function
        and callable(function)
        and not isinstance(function, types.ModuleType)
    ]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"it replaced {names[0]}{more}"] if names else []


PROCESS: dict[str, Callable[[], Any]] = {
    "numpy.geterr": np.geterr,
    "working directory": os.getcwd,
    "environment variables": relevant_settings,
    "processor affinity": _affinity,
    "priority": lambda: os.getpriority(os.PRIO_PROCESS, 0),
    "gc.isenabled": gc.isenabled,
    "gc.get_threshold": gc.get_threshold,
    "signal handlers": lambda: {
        int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()
    },
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
    """Return every fact by name; one that cannot be read is left out."""
    return dict(_facts({**PROCESS, **_framework_facts()}))


def _framework_facts() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name, table in FRAMEWORKS.items():
        with contextlib.suppress(Exception):  # half loaded: no candidate has changed it yet
            if (module := sys.modules.get(name)) is not None:
                found |= table(module)
    return found


def _facts(table: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    for name, fact in table.items():
        with contextlib.suppress(Exception):  # another version of the framework lacks it
            yield name, fact()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Describe the differences; threads and processes only if there are more of them."""
    found = []
    for name, old in before.items():
        new = after.get(name, old)
        if name in (THREADS, PROCESSES):
            if more := len(set(new) - set(old)):
                found.append(f"it left {more} {name}")
        elif name == FUNCTIONS:
            found += _replaced(old, new)
        elif new != old:
            found.append(f"it changed {name}{_values(old, new)}")
    return found


def _values(old: Any, new: Any) -> str:
    text = f" from {old!r} to {new!r}"
    return text if len(text) <= 80 else ""


def left_behind(before: Mapping[str, Any], *, grace_seconds: float = GRACE_SECONDS) -> str:
    """Describe what changed since `before`; empty if nothing did. Waits briefly for threads that are exiting."""
    found = changes(before, read())
    if found:
        time.sleep(grace_seconds)
        found = changes(before, read())
    return "; ".join(found)


class Watch:
    """Sees after each block whether a candidate's calls changed what others share.

    Args:
        settings: as read when the case was opened; a change that was found is entered.
    """

    # Read after every block: a microsecond.
    FACTS: Mapping[str, Callable[[], Any]] = {
        THREADS: lambda: sum(
            not thread.name.startswith(OWN_THREADS) for thread in threading.enumerate()
        ),
        "time.perf_counter": lambda: time.perf_counter,
        "numpy.geterr": np.geterr,
        "gc.isenabled": gc.isenabled,
    }

    def __init__(self, settings: dict[str, Any]) -> None:
        self._seen = {name: fact() for name, fact in self.FACTS.items()}
        self._settings = settings

    def changed(self, *, all_shared: bool) -> str:
        """Return what changed since the last time, in one line; '' if nothing.

        Args:
            all_shared: whether to compare the frameworks' settings and functions too, as after a
                block of a user's candidate: it takes a tenth of a millisecond.
        """
        found = self._changed_shared() if all_shared else []
        seen = {name: fact() for name, fact in self.FACTS.items()}
        before, self._seen = self._seen, seen
        for name, old in before.items() if seen != before else ():
            if name == THREADS:
                found += [f"it left {seen[name] - old} {name}"] if seen[name] > old else []
            elif seen[name] != old:
                found.append(f"it replaced {name}" if callable(old) else f"it changed {name}")
        return "; ".join(dict.fromkeys(found))

    def _changed_shared(self) -> list[str]:
        """Describe changes of settings and functions; the next candidate is not their cause."""
        shared = dict(_facts(_framework_facts()))
        found = changes(
            {name: self._settings.get(name, new) for name, new in shared.items()}, shared
        )
        before, held = self._settings.get(FUNCTIONS, {}), _held_by_modules()
        if not all(
            len(held[name]) == len(old)
            and all(map(operator.is_, held[name].values(), old.values()))
            for name, old in before.items()
        ):
            shared[FUNCTIONS] = shared_modules()
            found += _replaced(before, shared[FUNCTIONS])
        self._settings |= shared
        return found
