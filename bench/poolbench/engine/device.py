"""Measure a race on a GPU by the device's own clock, and its energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poolbench.core.errors import WorkerFailure
from poolbench.engine.recorder import ContenderRecord
from poolbench.engine.recovery import RaceWorkers
from poolbench.worker import timing, trace

# The device's own clock needs no long blocks: only launches are noisy.
DEVICE_ROUNDS, DEVICE_CALLS = 2, 10


def time_on_device(
    workers: RaceWorkers,
    records: Sequence[ContenderRecord],
    shuffled: Callable[[Sequence[ContenderRecord]], list[ContenderRecord]],
    place: tuple[int, int],
) -> None:
    """Time rounds by the device's own clock, every contender once in each, in a new order.

    A call from Python takes longer to launch than a GPU needs for it, so that wall time tells candidates
    apart only where they are slow. A recording that fails leaves its samples out: the profiler may not
    be allowed here, and the race has been run.

    Args:
        workers: with the case open in them.
        records: the contenders that still run; their device columns grow.
        shuffled: returns contenders in a new random order.
        place: numbers of the process and of the allocation.
    """
    for spec in dict.fromkeys(record.worker for record in records):
        mine = [record for record in records if record.worker == spec]
        order = [(number, record) for number in range(DEVICE_ROUNDS) for record in shuffled(mine)]
        names = [record.task_name for _, record in order]
        try:
            found = workers.call(spec, trace.time_on_device, names, DEVICE_CALLS)
        except WorkerFailure as failure:
            if failure.lost:
                workers.reopen(spec)
            continue
        for (number, record), seconds in zip(order, found, strict=True):
            if seconds is not None:
                row = (*place, number, DEVICE_CALLS, float(f"{seconds:.6g}"), 0)
                record.device_columns.append(row)


def measure_energy(workers: RaceWorkers, records: Sequence[ContenderRecord]) -> None:
    """Measure the joules per call of every candidate; a task that fails leaves its figure out."""
    for record in records:
        try:
            record.energy_joules = workers.call(
                record.worker, timing.measure_energy, record.task_name
            )
        except WorkerFailure as failure:  # noqa: PERF203 (each candidate's is its own)
            if failure.lost:
                workers.reopen(record.worker)
