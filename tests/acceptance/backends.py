"""Compare equal workers of one backend: the false verdicts and the resolution of races of several backends.

`python tests/acceptance backends [SECONDS]` writes results/reference-backends/aa.json. Each race has one candidate in
two workers of one kind, whose legs alternate as those of two backends do.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
from poolbench.core.candidate import KERAS
from poolbench.core.case import Case, case_label
from poolbench.core.plan import Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.registry import REGISTRY, load_builtin
from poolbench.engine.contenders import ALIKE
from poolbench.engine.pool import WorkerPool
from poolbench.engine.race import Race
from poolbench.engine.recovery import Tasks
from poolbench.stats.estimate import estimate
from poolbench.stats.verdict import verdict

STORED = Path(__file__).resolve().parents[2] / "results" / "reference-backends" / "aa.json"
MODES = {"tensorflow": "graph", "jax": "xla", "torch": "eager"}
PLAN = Plan(processes=4, budget_seconds=3.0)
MARGIN = 0.05
COPY = (("POOLBENCH_COPY", "1"),)  # no framework reads it: it makes a second worker of one kind


def cases_of(backend: str) -> list[Case]:
    """Return both ops at the smallest and the base shape, forward and training, in the backend's usual mode."""
    found = []
    for name in ("depth_max_pool", "global_avg_pool"):
        sweep = REGISTRY.ops[name].sweep("backends")
        found += [case for case in sweep.cases() if case.mode == MODES[backend]]
    return found


def race_twins(
    case: Case, names: list[str], backend: str, pool: WorkerPool
) -> list[dict[str, Any]]:
    """Race each candidate in two equal workers; return a comparison per candidate."""
    one = WorkerSpec(backend=backend, environment=ALIKE)
    twin = msgspec.structs.replace(one, environment=(*ALIKE, *COPY))
    contenders = tuple(
        Contender(candidate=name, worker=worker, label=label)
        for name in names
        for label, worker in (("a", one), ("b", twin))
    )
    spec = RaceSpec(case=case, contenders=contenders, baseline=contenders[0].name, plan=PLAN)
    race = Race(
        spec, [REGISTRY.candidates[case.op, name] for name in names], tasks=Tasks(probes=())
    )
    race.run(pool)
    found = []
    for name in names:
        a, b = (race.records[f"{name}@{label}"] for label in "ab")
        if a.status == b.status == "ok":
            ratio = estimate(b.samples("wall"), a.samples("wall"))
            found.append(
                {"backend": backend, "op": case.op, "case": case_label(case), "candidate": name,
                 "ratio": ratio.ratio, "low": ratio.ratio_low, "high": ratio.ratio_high,
                 "half_width": ratio.half_width, "verdict": verdict(ratio, MARGIN)}
            )  # fmt: skip
    return found


def main(arguments: list[str]) -> int:
    """Run the races until the time is over; return 1 if a comparison has a false verdict."""
    load_builtin()
    seconds = float(arguments[0]) if arguments else 170.0
    end = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    for number, backend in enumerate(KERAS):
        pool = WorkerPool()
        try:
            for case in cases_of(backend):
                left = end - time.monotonic()
                if left < seconds * (2 - number) / 3:
                    break
                names = [n for n, e in REGISTRY.of(case.op).items() if e.runs(backend, case.mode)]
                chosen = [n for n in names if "keras" in n or n.startswith("layer-d")][:3]
                found += race_twins(case, chosen, backend, pool)
                store(found)
        finally:
            pool.close()
    false = [one for one in found if one["verdict"] in ("FASTER", "SLOWER")]
    middle = statistics.median(one["half_width"] for one in found)
    print(f"{len(false)} false verdicts in {len(found)}; median half-width {middle:.1%}")
    return int(bool(false))


def store(found: list[dict[str, Any]]) -> None:
    """Write the comparisons so far."""
    STORED.parent.mkdir(parents=True, exist_ok=True)
    STORED.write_text(json.dumps({"margin": MARGIN, "comparisons": found}, indent=1) + "\n")
