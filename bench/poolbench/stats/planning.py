"""Predict the duration and the resolution of a run before it starts."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poolbench.core.case import Case
from poolbench.core.errors import StoreError
from poolbench.core.plan import PROBES, Plan
from poolbench.core.records import Measurement, Samples
from poolbench.core.registry import input_nbytes
from poolbench.machine.info import machine_facts
from poolbench.machine.nvml import is_gpu
from poolbench.stats.estimate import (
    interquartile_mean,
    log_ratios,
    process_values,
    quantile,
    to_cube,
)
from poolbench.store.journal import StoredRun, read_header, read_run
from poolbench.store.runs import runs_newest_first

MIDMEAN_VARIANCE = 1.2  # variance of an interquartile mean over that of a mean, normal noise
START_SECONDS = 2.5  # start of a worker beside others
# Of a contender: trace, compilation, first call; other modes: OPEN. Means of 474 contenders of seven ops; forward in
# graph mode of those of a default run.
OPEN_SECONDS = {
    "forward": {"graph": 0.06, "xla": 0.15},
    "training": {"graph": 0.2, "xla": 0.5},
}
OPEN = 0.04
OPEN_BYTES_PER_SECOND = 2e9
# On a GPU: compiling takes longer, each allocation is recorded, and each candidate's energy is counted once.
GPU_OPEN_SECONDS, GPU_RECORD_SECONDS, GPU_ENERGY_SECONDS = 0.12, 0.3, 0.2


def predict_seconds(cases: Mapping[Case, tuple[str, ...]], plan: Plan) -> float:
    """Predict the seconds of the races: start of workers, then opening and rounds of each race."""
    settings = len({case.threads for case in cases})
    seconds = settings * plan.processes * START_SECONDS
    for case, names in cases.items():
        on_gpu = is_gpu(case.device)
        usual = OPEN_SECONDS.get(case.direction, {}).get(case.mode, OPEN)
        opening = GPU_OPEN_SECONDS if on_gpu else usual
        contender = opening + input_nbytes(case) / OPEN_BYTES_PER_SECOND
        if on_gpu:
            seconds += plan.processes * plan.allocations * GPU_RECORD_SECONDS
            seconds += len(names) * GPU_ENERGY_SECONDS
        seconds += plan.budget_seconds + plan.processes * (len(names) + len(PROBES)) * contender
    return seconds


def resolution_text(results: Path, plan: Plan) -> str:
    """Describe the differences that the plan will resolve here, from the newest run of this machine."""
    machine = machine_facts()
    for folder in runs_newest_first(results, reference=True):
        try:
            if read_header(folder).environment.machine != machine:
                continue
            run = read_run(folder)
        except StoreError:  # an unreadable run is skipped; reading it by name reports the reason
            continue
        half_width = resolution_of(run, plan)
        if half_width is not None:
            return (
                f"resolves about {half_width:.1%} (half-width of the 95% interval of a ratio, "
                f"reckoned from {run.path.name})"
            )
    return "what it resolves is not known before this machine's first run"


def resolution_of(run: StoredRun, plan: Plan) -> float | None:
    """Return the median half-width that the plan would have had in the run; None if unknown."""
    budget, processes = (run.header.options.get(name) for name in ("budget_seconds", "processes"))
    if not isinstance(budget, (int, float)) or not isinstance(processes, int) or budget <= 0:
        return None
    timed = {(m.case, m.candidate): m for m in run.measurements if m.status == "ok"}
    found = []
    for m in timed.values():
        baseline = timed.get((m.case, m.baseline))
        if m.kind != "candidate" or m.stopped_early or baseline is None or baseline is m:
            continue
        seen = components(m.samples, baseline.samples)
        if seen is None:
            continue
        more = plan.budget_seconds / plan.processes / plan.allocations
        less = budget / processes / allocations_of(m)
        found.append(
            seen.half_width(
                processes=plan.processes,
                allocations=plan.allocations,
                rounds=min(plan.rounds, max(1.0, seen.rounds * more / less)),
            )
        )
    return statistics.median(found) if found else None


def allocations_of(measurement: Measurement) -> int:
    """Return the number of input allocations per process."""
    return max(measurement.samples.allocation, default=0) + 1


@dataclass(frozen=True, kw_only=True)
class Components:
    """Standard deviations of the log ratio at the three levels; `rounds`: in an allocation."""

    process: float
    allocation: float
    round: float
    rounds: float

    def half_width(self, *, processes: int, allocations: int, rounds: float) -> float:
        """Return the expected relative half width, given the number of repetitions at each level."""
        return resolution(
            process=self.process,
            allocation=self.allocation,
            round=self.round,
            processes=processes,
            allocations=allocations,
            rounds=rounds,
        )


def resolution(
    *,
    process: float,
    allocation: float,
    round: float,  # noqa: A002 - the level's name
    processes: int,
    allocations: int,
    rounds: float,
) -> float:
    """Return the expected relative half width from the standard deviations of the log at the three levels."""
    if processes < 2:
        return math.inf
    per_process = process**2 + MIDMEAN_VARIANCE * (allocation**2 + round**2 / rounds) / allocations
    reach = float(quantile(0.95, processes - 1)) * math.sqrt(per_process / processes)
    return math.expm1(reach)


def pace(half_width: float, precision: float, *, done: int, processes: int) -> float:
    """Return the factor on the rounds of each remaining process that reaches `precision`; inf: out of reach.

    Args:
        half_width: expected of all `processes` with unchanged rounds; it falls with the root of the rounds.
        precision: requested half-width.
        done: processes that have run.
        processes: total number.
    """
    if half_width <= 0:
        return 0.0
    # In units of a process's variance so far: the total allowed, less that of the finished processes.
    left = processes * (precision / half_width) ** 2 - done
    return (processes - done) / left if left > 0 else math.inf


def components(candidate: Samples, baseline: Samples) -> Components | None:
    """Return the variation of a log ratio at each level; None if a level was not repeated."""
    cube = to_cube(log_ratios(candidate, baseline))
    if min(cube.shape) < 2:
        return None
    rounds = float(np.mean(np.sum(~np.isnan(cube), axis=-1)))
    values = interquartile_mean(cube)
    with warnings.catch_warnings():
        # An allocation of one round has no variance: nan.
        warnings.simplefilter("ignore", RuntimeWarning)
        round_variance = float(np.nanmean(np.nanvar(cube, axis=-1, ddof=1)))
        within = float(np.nanmean(np.nanvar(values, axis=-1, ddof=1)))
        between = float(np.nanvar(process_values(cube), ddof=1))
    # A level's own variance is the excess over the variance of the levels below it.
    allocation_variance = max(0.0, within - MIDMEAN_VARIANCE * round_variance / rounds)
    below = MIDMEAN_VARIANCE * (allocation_variance + round_variance / rounds) / cube.shape[1]
    process_variance = max(0.0, between - below)
    found = Components(
        process=math.sqrt(process_variance),
        allocation=math.sqrt(allocation_variance),
        round=math.sqrt(round_variance),
        rounds=rounds,
    )
    return None if math.isnan(sum((found.process, found.allocation, found.round))) else found
