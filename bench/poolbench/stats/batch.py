"""Estimates of many pairs of samples, in few array operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np

from poolbench.core.records import Samples
from poolbench.stats.estimate import (
    Array,
    Estimate,
    estimate,
    from_errors,
    mean_and_error,
    process_values,
)

_Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# By id of samples, which are kept so that the id stays theirs: where their blocks are and the logs of their
# seconds as (process, allocation, round); None if they need a look of their own.
Logs = dict[int, tuple[Samples, tuple[_Place, Array] | None]]
_AT_ONCE = 1024  # pairs or samples in an array: some megabytes


def estimate_all(
    pairs: Iterable[tuple[Samples, Samples]], *, confidence: float = 0.95, logs: Logs | None = None
) -> list[Estimate]:
    """Estimate each pair (candidate, baseline), in one array operation for all pairs of one layout.

    Pairs whose blocks are complete, clean and in the same places share an array; the others go one
    by one. A run of twenty thousand measurements takes seconds instead of minutes. Calls that share `logs`
    compute those of each samples once.
    """
    pairs = list(pairs)
    logs = {} if logs is None else logs
    _take_logs((one for pair in pairs for one in pair), logs)
    found: list[Estimate | None] = [None] * len(pairs)
    alike: dict[_Place, list[tuple[int, Array, Array]]] = {}
    for place, (one, other) in enumerate(pairs):
        above, below = logs[id(one)][1], logs[id(other)][1]
        if above is not None and below is not None and above[0] == below[0]:
            alike.setdefault(above[0], []).append((place, above[1], below[1]))
        else:
            found[place] = estimate(one, other, confidence=confidence)
    for rows in alike.values():
        for start in range(0, len(rows), _AT_ONCE):
            at, left, right = zip(*rows[start : start + _AT_ONCE], strict=True)
            mean, error, degrees = mean_and_error(process_values(np.stack(left) - np.stack(right)))
            counts = [degrees + 1] * len(at)
            same = from_errors(mean, error, np.full(len(at), degrees), counts, confidence)
            for place, known in zip(at, same, strict=True):
                found[place] = known
    return [one for one in found if one is not None]


def _take_logs(some: Iterable[Samples], logs: Logs) -> None:
    """Compute the logs of samples whose blocks are complete, clean and finite, all of a layout in one array."""
    alike: dict[_Place, list[Samples]] = {}
    for one in some:
        if id(one) not in logs:
            logs[id(one)] = one, None
            if len(one) and not any(one.contended):
                alike.setdefault((one.process, one.allocation, one.round), []).append(one)
    for where, rows in alike.items():
        if (layout := _layout(where)) is None:
            continue
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            with np.errstate(divide="ignore", invalid="ignore"):
                cubes = np.log(np.array([one.seconds for one in part])[:, layout[1]])
            # The sum of the logs is finite only if the seconds of every block are finite and positive.
            whole = np.isfinite(cubes.sum(axis=1))
            cubes = cubes.reshape(-1, *layout[0])
            for one, cube, fine in zip(part, cubes, whole.tolist(), strict=True):
                if fine:
                    logs[id(one)] = one, (where, cube)


@functools.lru_cache(maxsize=256)
def _layout(where: _Place) -> tuple[tuple[int, ...], Array] | None:
    """Return the shape of the cube of blocks at these positions, and their order in it; None if it is incomplete."""
    axes = [np.unique(np.array(axis), return_inverse=True) for axis in where]
    shape = tuple(len(labels) for labels, _ in axes)
    at = np.ravel_multi_index([index for _, index in axes], shape)
    complete = len(at) == math.prod(shape) and len(np.unique(at)) == len(at)
    return (shape, np.argsort(at)) if complete else None
