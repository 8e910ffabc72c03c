"""The contenders of a race by name, and the kind of worker that each runs in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from poolbench.core.candidate import Candidate, split_contender
from poolbench.core.case import Case
from poolbench.core.plan import Contender, WorkerSpec
from poolbench.core.records import Measurement
from poolbench.core.registry import REGISTRY


def contenders_of(
    case: Case, names: Sequence[str], logical_devices: int = 1
) -> tuple[Contender, ...]:
    """Return the contenders of these names; those without a backend's name share one kind of worker."""
    parts = [split_contender(name) for name in names]
    several = any(label for _, label in parts)
    entries = [REGISTRY.candidates[case.op, name] for name, label in parts if not label]
    usual = backend_of(entries)
    return tuple(
        Contender(
            candidate=name,
            label=label,
            worker=worker_spec(case, label or usual, logical_devices, ALIKE if several else ()),
        )
        for name, label in parts
    )


# TensorFlow uses oneDNN on some processors only unless told to, PyTorch on all.
ALIKE = (("TF_ENABLE_ONEDNN_OPTS", os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")),)


def worker_spec(
    case: Case,
    backend: str,
    logical_devices: int = 1,
    environment: tuple[tuple[str, str], ...] = (),
) -> WorkerSpec:
    """Return the kind of worker that runs a case.

    Args:
        case: its threads and its device must be fixed when the process starts.
        backend: the framework that it imports.
        logical_devices: minimum number, so that one kind of worker serves as many cases as possible.
        environment: variables that are set before anything is imported.
    """
    return WorkerSpec(
        threads=case.threads,
        logical_devices=max(logical_cpus(case), logical_devices),
        backend=backend,
        environment=environment,
    )


def logical_cpus(case: Case) -> int:
    """Return the number of logical devices of the CPU that a case needs."""
    kind, _, index = case.device.partition(":")
    return int(index) + 1 if kind == "cpu" and index.isdigit() else 1


def backend_of(candidates: Sequence[Candidate]) -> str:
    """Return the backend of a worker that runs all of these candidates: NumPy's need no framework."""
    return "tensorflow" if any(e.backends != ("numpy",) for e in candidates) else "numpy"


def settings_lines(
    measurements: Iterable[Measurement], told: set[tuple[str, str]]
) -> Iterator[str]:
    """Yield the settings of each backend and mode that is not in `told`, where several backends race."""
    measurements = tuple(measurements)
    if not any(split_contender(m.candidate)[1] for m in measurements):
        return
    for m in measurements:
        key = (split_contender(m.candidate)[1] or "tensorflow", m.case.mode)
        if m.settings and key not in told:
            told.add(key)
            yield f"{', '.join(key)}: {', '.join(f'{k} {v}' for k, v in m.settings.items())}"
