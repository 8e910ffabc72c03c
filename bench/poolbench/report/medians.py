"""Medians of a measurement's samples."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from poolbench.core.records import Samples

Floats = np.ndarray[Any, np.dtype[np.float64]]
AT_ONCE = 1024  # samples in an array
Indices = np.ndarray[Any, np.dtype[np.intp]]


def middle_of(values: np.ndarray[Any, Any]) -> Floats:
    """Return medians along the last axis; np.median takes ten times as long for a few values."""
    ordered, count = np.sort(values, axis=-1), values.shape[-1]
    return np.asarray((ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2)


def median(values: np.ndarray[Any, Any]) -> float:
    """Return the median of a few values; nan of none."""
    return statistics.median(values.tolist()) if len(values) else math.nan


def all_process_medians(some: Sequence[Samples]) -> list[Floats]:
    """Return `process_medians` of each, in one array operation for all of one layout."""
    found: list[Floats] = [np.empty(0)] * len(some)
    alike: dict[tuple[int, ...], list[int]] = {}
    for at, samples in enumerate(some):
        alike.setdefault(samples.process, []).append(at)
    for process, places in alike.items():
        parts = _process_parts(process)
        for start in range(0, len(places) if parts else 0, AT_ONCE):
            rows = places[start : start + AT_ONCE]
            seconds = np.array([some[at].seconds for at in rows], dtype=float)
            if len({len(part) for part in parts}) == 1:
                medians = middle_of(seconds[:, np.array(parts)])
            else:
                medians = np.stack([middle_of(seconds[:, part]) for part in parts], axis=-1)
            for at, row in zip(rows, medians, strict=True):
                found[at] = row
    return found


def process_medians(samples: Samples) -> Floats:
    """Return one median per process, in seconds per call, shape (processes,)."""
    return all_process_medians([samples])[0]


@functools.lru_cache(maxsize=256)
def _process_parts(process: tuple[int, ...]) -> list[Indices]:
    """Return the positions of each process's blocks; measurements of one race share them."""
    numbers = np.array(process)
    return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
