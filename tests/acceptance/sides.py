"""Race base against head where the difference is known: none, or a slowdown by a share of a call.

`python tests/acceptance sides [equal] [slowed]` writes results/reference-sides/sides.json. Equal sides race over the
quick and the default sweep, once beside a process that keeps a core half busy. Each slowed race is a job of its own,
and every fifth one gets new workers, which are started before.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from poolbench.core.case import case_label
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY, load_builtin, load_candidates
from poolbench.engine.contenders import worker_spec
from poolbench.engine.pool import WorkerPool
from poolbench.engine.side_by_side import PROCESSES, Job, merge, run_job, start_workers
from poolbench.engine.sides import Side
from poolbench.machine.info import collect_environment
from poolbench.machine.limits import total_memory_nbytes
from poolbench.pytest_plugin import planned_cases, racing
from poolbench.stats.side_by_side import Report, SideBySide

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "results" / "reference-sides" / "sides.json"
SLOWED = ROOT / "tests" / "candidates" / "slowed_by_share.py"
OPS = ("depth_max_pool", "global_avg_pool")
SECONDS_A_PAIR = 6.0
RACES_A_POOL = 5
# Share of a call, races, and the longest time of each.
SLOWDOWNS = ((0.10, 40, 15.0), (0.05, 40, 30.0), (0.03, 20, 60.0))
HALF_BUSY = """
import time
while True:
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        pass
    time.sleep(0.05)
"""


@contextlib.contextmanager
def half_busy_core(wanted: bool) -> Iterator[None]:
    """Keep a core half busy from another process."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", HALF_BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def worker_pool() -> Iterator[WorkerPool]:
    """Provide workers that know the candidate which can be slowed."""
    pool = WorkerPool((SLOWED,), total_memory_nbytes() * 3 // 4)
    try:
        yield pool
    finally:
        pool.close()


def make_job(pairs: Any, seconds: float, *, share: float = 0.0) -> Job:
    """Return the race of the working tree with itself, its head slowed by a share; equal sides also race base with base."""
    slowed = (("POOLBENCH_SLOWED", str(share)),) if share else ()
    return Job(
        base=Side(title="base", worker=WorkerSpec()),
        head=Side(title="head", worker=WorkerSpec(environment=slowed)),
        pairs=tuple(pairs), budget_seconds=seconds, control_every=0 if share else 2, seed=time.time_ns() % 2**31,
    )  # fmt: skip


def judge(found: Sequence[SideBySide], **facts: Any) -> dict[str, Any]:
    """Return the counts of the verdicts on what has an interval, and how wide the intervals are."""
    found = [one for one in found if one.wall.low is not None]
    widths = [one.wall.half_width for one in found]
    return {
        **facts, "comparisons": len(found), "verdicts": Counter(one.verdict for one in found),
        "false": [f"{one.candidate} {case_label(one.case)} {one.verdict} {one.wall.ratio:.3f}"
                  for one in found if one.verdict in ("SLOWER", "FASTER") or one.difference],
        "median_half_width": statistics.median(widths) if widths else None,
        "median_ratio": statistics.median(one.wall.ratio for one in found) if found else None,
    }  # fmt: skip


def equal() -> Iterator[tuple[str, dict[str, Any]]]:
    """Race equal sides in every pair of the quick and the default sweep, each second one beside a busy core."""
    pairs = [
        (planned.case, name)
        for sweep in ("quick", "default")
        for op in OPS
        for planned in planned_cases(REGISTRY.ops[op], sweep, {})
        for name in racing(REGISTRY.ops[op], planned)
        if name != "slowed-reduce_mean"
    ]
    for busy in (False, True):
        some = pairs[int(busy) :: 2]
        with half_busy_core(busy), worker_pool() as pool:
            report = run_job(make_job(some, SECONDS_A_PAIR * len(some)), pool, say=lambda _: None)
        name = "equal beside a half busy core" if busy else "equal"
        yield name, judge([*report.heads, *report.controls], seconds=report.seconds)


def slowed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Race a candidate with itself slowed by each share; each race is a job."""
    case = REGISTRY.ops["global_avg_pool"].sweep("quick").base_case.replace(mode="eager")
    for share, races, limit in SLOWDOWNS:
        found: list[SideBySide] = []
        seconds: list[float] = []
        for _ in range(0, races, RACES_A_POOL):
            with worker_pool() as pool:
                for report in _races(pool, (case, "slowed-reduce_mean"), limit, share):
                    found += report.heads
                    seconds.append(report.seconds)
            yield (
                f"waits {share:.0%} of a call",
                judge(found, limit=limit, median_seconds=statistics.median(seconds), longest_seconds=max(seconds)),
            )  # fmt: skip


def _races(pool: WorkerPool, pair: Any, limit: float, share: float) -> Iterator[Report]:
    """Start the workers, then run the jobs that share them."""
    job = make_job([pair], limit, share=share)
    kind = worker_spec(pair[0], "tensorflow")
    start_workers(
        pool, {side.title: merge(side.worker, kind) for side in (job.base, job.head)}, PROCESSES
    )
    for _ in range(RACES_A_POOL):
        yield run_job(make_job([pair], limit, share=share), pool, say=lambda _: None)


def main(arguments: list[str]) -> int:
    """Run the races that are named, or all; keep the results of the others."""
    load_builtin()
    load_candidates(str(SLOWED))
    stored = json.loads(STORED.read_bytes()) if STORED.exists() else {}
    stored["machine"] = collect_environment({}).machine
    for kind in (slowed, equal):
        if arguments and kind.__name__ not in arguments:
            continue
        for name, result in kind():
            stored[name] = result
            STORED.parent.mkdir(parents=True, exist_ok=True)
            STORED.write_text(json.dumps(stored, indent=1) + "\n")
            print(name, json.dumps(result), flush=True)
    return 0
