"""What a run will take and what it will resolve, said before it starts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from poolbench.core.case import Case
from poolbench.core.errors import StoreError
from poolbench.core.plan import PROBES
from poolbench.core.records import Measurement
from poolbench.core.registry import input_nbytes
from poolbench.engine.race import Plan
from poolbench.machine.info import machine_facts
from poolbench.machine.nvml import is_gpu
from poolbench.store.journal import StoredRun, read_header, read_run
from poolbench.store.runs import runs_newest_first

START_SECONDS = 2.5  # of a worker beside others
OPEN_SECONDS = 0.06  # of a contender: trace, first call, check
OPEN_BYTES_PER_SECOND = 2e9
# On a GPU: compiling takes longer, each allocation is recorded, and each candidate's energy is counted once.
GPU_OPEN_SECONDS, GPU_RECORD_SECONDS, GPU_ENERGY_SECONDS = 0.12, 0.3, 0.2


def predict_seconds(cases: Mapping[Case, tuple[str, ...]], plan: Plan) -> float:
    """What the races will take: starting workers, then for each race its opening and its rounds."""
    settings = len({case.threads for case in cases})
    seconds = settings * plan.processes * START_SECONDS
    for case, names in cases.items():
        on_gpu = is_gpu(case.device)
        opening = GPU_OPEN_SECONDS if on_gpu else OPEN_SECONDS
        contender = opening + input_nbytes(case) / OPEN_BYTES_PER_SECOND
        if on_gpu:
            seconds += plan.processes * plan.allocations * GPU_RECORD_SECONDS
            seconds += len(names) * GPU_ENERGY_SECONDS
        seconds += plan.budget_seconds + plan.processes * (len(names) + len(PROBES)) * contender
    return seconds


def resolution_text(results: Path, plan: Plan) -> str:
    """What races of the plan will tell apart here, by the newest run that this machine has made."""
    machine = machine_facts()
    for folder in runs_newest_first(results, reference=True):
        try:
            if read_header(folder).environment.machine != machine:
                continue
            run = read_run(folder)
        except StoreError:  # a run that cannot be read tells nothing; who reads it is told why
            continue
        half_width = resolution_of(run, plan)
        if half_width is not None:
            return (
                f"resolves about {half_width:.1%} (half-width of the 95% interval of a ratio, "
                f"reckoned from {run.path.name})"
            )
    return "what it resolves is not known before this machine's first run"


def resolution_of(run: StoredRun, plan: Plan) -> float | None:
    """The median half-width that the plan would have had in the run; None if the run cannot tell."""
    from poolbench.stats.estimate import components  # SciPy takes as long to load as all else here

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
    """Times that the inputs were allocated in each process."""
    return max(measurement.samples.allocation, default=0) + 1
