"""Medians of a measurement's samples."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import numpy as np

from poolbench.core.records import Samples

Floats = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.intp]]


def middle_of(values: np.ndarray[Any, Any]) -> Floats:
    """Return medians along the last axis; np.median takes ten times as long for a few values."""
    ordered, count = np.sort(values, axis=-1), values.shape[-1]
    return np.asarray((ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2)


def median(values: np.ndarray[Any, Any]) -> float:
    """Return the median of a few values; nan of none."""
    return statistics.median(values.tolist()) if len(values) else math.nan


def process_medians(samples: Samples) -> Floats:
    """Return one median per process, in seconds per call, shape (processes,)."""
    seconds = np.array(samples.seconds, dtype=float)
    if not len(seconds):
        return seconds
    parts = _process_parts(samples.process)
    if len({len(part) for part in parts}) == 1:
        return middle_of(seconds[np.array(parts)])
    return np.array([middle_of(seconds[part]) for part in parts])


@functools.lru_cache(maxsize=256)
def _process_parts(process: tuple[int, ...]) -> list[Indices]:
    """Return the positions of each process's blocks; measurements of one race share them."""
    numbers = np.array(process)
    return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
