"""Make the measurements of the acceptance checks: A/A races, with and without background load, and complete runs."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from poolbench.core.case import Case
from poolbench.core.errors import StoreError
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import Measurement, Samples, TimeBreakdown, is_right
from poolbench.core.registry import REGISTRY
from poolbench.engine.aa import (
    MARGIN,
    CopiesRace,
    Design,
    ProofError,
    race_copies,
    race_series,
)
from poolbench.engine.pool import WorkerPool
from poolbench.engine.process import Worker
from poolbench.report.compare import compare_runs
from poolbench.report.history import Agreement, agreements, prior_for, summarise
from poolbench.stats.estimate import estimate
from poolbench.stats.verdict import Comparison, compare_run
from poolbench.store.journal import StoredRun, read_run

from acceptance.loops import BIASES, measure_bias, measure_sleep

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results")
SUITES = ("suites/test_depth_max_pool.py", "suites/test_global_avg_pool.py")
PAIR_SECONDS = 10.0
QUICK_RUN_SECONDS = 600.0

# As in a default run: its plan and about as many candidates. Four A/A comparisons, one slowdown of 10%.
RACE = Design(plain=4, slowdowns=(0.10,))
TEN = Design(plain=9)
# One slowdown of 1%, with as many processes as fit into ten seconds per pair: at margin zero every
# further process narrows the interval.
PAIR = Design(
    plain=0,
    slowdowns=(0.01,),
    plan=Plan(processes=12, allocations=1, rounds=4000, budget_seconds=7.6),
)
# Under background load, three times the time is allowed.
BUSY_PAIR = replace(PAIR, plan=replace(PAIR.plan, budget_seconds=26.0))
# Processes differ: replace them after this many races, so that the checks cover the differences.
RACES_PER_POOL = 9


@dataclass(frozen=True, kw_only=True)
class Scale:
    """State how many measurements are made of each kind."""

    races: int
    tens: int
    pairs: int
    busy_races: int
    busy_tens: int
    busy_pairs: int
    turns: int
    quick_runs: int


SCALES = {
    "full": Scale(
        races=30,
        tens=20,
        pairs=30,
        busy_races=20,
        busy_tens=6,
        busy_pairs=10,
        turns=10,
        quick_runs=5,
    ),
    "quick": Scale(
        races=2, tens=1, pairs=2, busy_races=1, busy_tens=1, busy_pairs=1, turns=2, quick_runs=2
    ),
}


# Background load.


def keep_busy(period_seconds: float = 0.2) -> None:
    """Use one core for half of the time until the parent process ends."""
    parent = os.getppid()
    while os.getppid() == parent:
        end = time.perf_counter() + period_seconds / 2
        while time.perf_counter() < end:
            pass
        time.sleep(period_seconds / 2)


@contextlib.contextmanager
def background_load() -> Iterator[None]:
    """Keep one core busy for half of the time with another process."""
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# The comparisons of a complete run.
Compared = Mapping[tuple[Case, str], Comparison]


class Measurements:
    """Make each kind of measurement when it is first used, and keep it."""

    def __init__(
        self, scale: Scale, *, default_runs: Sequence[str], progress: Callable[[str], None]
    ) -> None:
        self.scale = scale
        self._default_runs = default_runs
        self._progress = progress

    def _series(self, design: Design, count: int, label: str) -> list[CopiesRace]:
        races: list[CopiesRace] = []
        while len(races) < count:
            pool = WorkerPool()
            try:
                pool.prepare((WorkerSpec(),), design.plan.processes)
                # A process traces the op's Python on the first race; that is part of its start.
                race_copies(replace(design, plan=replace(design.plan, rounds=1)), pool)
                first = len(races)
                some = min(RACES_PER_POOL, count - first)
                for race in race_series(lambda n: race_copies(design, pool, first + n), some):  # noqa: B023 (consumed within this iteration)
                    races.append(race)
                    self._progress(f"{label}: {len(races)} of {count}, {race.seconds:.1f} s")
            finally:
                pool.close()
        return races

    @functools.cached_property
    def races(self) -> list[CopiesRace]:
        return self._series(RACE, self.scale.races, "races of copies")

    @functools.cached_property
    def tens(self) -> list[CopiesRace]:
        return self._series(TEN, self.scale.tens, "races of ten")

    @functools.cached_property
    def pairs(self) -> list[CopiesRace]:
        return self._series(PAIR, self.scale.pairs, "pairs at 1%")

    @functools.cached_property
    def busy_races(self) -> list[CopiesRace]:
        with background_load():
            return self._series(RACE, self.scale.busy_races, "races under background load")

    @functools.cached_property
    def busy_tens(self) -> list[CopiesRace]:
        with background_load():
            return self._series(TEN, self.scale.busy_tens, "races of ten under background load")

    @functools.cached_property
    def busy_pairs(self) -> list[CopiesRace]:
        with background_load():
            return self._series(BUSY_PAIR, self.scale.busy_pairs, "pairs under background load")

    @functools.cached_property
    def quick_runs(self) -> list[Compared]:
        """Consecutive complete quick runs."""
        stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
        found: list[Compared] = []
        for number in range(1, self.scale.quick_runs + 1):
            name = f"{stamp}-acceptance-{number}"
            self._progress(f"quick run {number} of {self.scale.quick_runs}: {name}")
            run_quick(name)
            found.append(compare_journal(RESULTS / name))
        return found

    @property
    def default_run(self) -> Path:
        return self.default_runs[0]

    @functools.cached_property
    def default_runs(self) -> list[Path]:
        return find_default_runs(RESULTS, self._default_runs)

    @functools.cached_property
    def stored_runs(self) -> list[StoredRun]:
        """The default runs, the oldest first; at least two."""
        if len(self.default_runs) < 2:
            raise ProofError(
                f"{self.default_run.name} is the only default run of this code and machine: "
                "make another one with nox -s bench-cpu"
            )
        return [read_run(path) for path in reversed(self.default_runs)]

    @property
    def agreements(self) -> list[Agreement]:
        """How each default run agrees with the next, by the intervals that are printed."""
        return agreements([summarise(run) for run in self.stored_runs])

    @property
    def falsely_slower(self) -> list[int]:
        """How many candidates `poolbench compare` calls slower, of each default run and the next."""
        return [
            len(slower_between(*pair, RESULTS)) for pair in itertools.pairwise(self.stored_runs)
        ]

    @property
    def slowed_found(self) -> dict[str, bool]:
        """Whether `poolbench compare` names a candidate that takes 25% longer in the later one of two default runs."""
        found = {}
        for before, after in itertools.pairwise(self.stored_runs):
            for op, name in sorted(
                {
                    (m.case.op, m.candidate)
                    for m in after.measurements
                    if m.kind == "candidate" and is_right(m)
                }
            ):
                other = slow_down(after, op, name, 1.25)
                label = f"{before.header.run}, {after.header.run}: {op} {name}"
                found[label] = (op, name) in slower_between(before, other, RESULTS)
        return found

    def bias(self, name: str) -> list[float]:
        """Return the ratio of the warm median to the loop, per turn."""
        worker = Worker(WorkerSpec())
        try:
            ratios = measure_bias(BIASES[name], self.scale.turns, worker, Plan().block_seconds)
        finally:
            worker.close()
        self._progress(f"bias, {name}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
        return ratios

    def sleep(self, name: str) -> list[float]:
        """Return the ratio of a loop with CPU idle states to one without, per turn."""
        worker = Worker(WorkerSpec())
        try:
            return measure_sleep(BIASES[name], self.scale.turns, worker)
        finally:
            worker.close()


def run_quick(name: str) -> None:
    """Make a complete quick run of both ops.

    Raises:
        ProofError: the run did not finish.
    """
    # Exit code 1: a candidate failed its test, which is a result like any other.
    words = ("-m", "poolbench", "run", *SUITES, "--sweep", "quick", "--run", name)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=QUICK_RUN_SECONDS,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        tail = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it printed nothing"]
        raise ProofError(f"the quick run {name} ended with code {done.returncode}: {tail[0]}")


def slower_between(before: StoredRun, after: StoredRun, results: Path) -> set[tuple[str, str]]:
    """Return the op and name of each candidate that `poolbench compare` calls slower."""
    prior, _ = prior_for(before, results, without=[after.header.run])
    table = compare_runs(before, after, prior=prior).table
    slower = table[table["verdict"] == "SLOWER"]
    return set(zip(slower["op"], slower["candidate"], strict=True))


def slow_down(run: StoredRun, op: str, name: str, factor: float) -> StoredRun:
    """Return the run with the times of one candidate multiplied, in all cases."""

    def slowed(samples: Samples) -> Samples:
        seconds = tuple(factor * value for value in samples.seconds)
        return msgspec.structs.replace(samples, seconds=seconds)

    records = [
        msgspec.structs.replace(
            record, samples=slowed(record.samples), wall_samples=slowed(record.wall_samples)
        )
        if isinstance(record, Measurement) and (record.case.op, record.candidate) == (op, name)
        else record
        for record in run.records
    ]
    return replace(run, records=tuple(records))


def compare_journal(folder: Path) -> dict[tuple[Case, str], Comparison]:
    """Compare every correct candidate of a run with its baseline."""
    return compare_measurements(read_run(folder).measurements)


def compare_measurements(
    measurements: Sequence[Measurement],
) -> dict[tuple[Case, str], Comparison]:
    """Compare measurements as `compare_journal` does; those stopped early have no interval and are left out."""
    timed = {(m.case, m.candidate): m for m in measurements if m.status == "ok" and len(m.samples)}
    pairs = {
        key: estimate(m.samples, timed[m.case, m.baseline].samples)
        for key, m in timed.items()
        if m.kind == "candidate" and not m.stopped_early and m.candidate != m.baseline
        and (m.case, m.baseline) in timed
    }  # fmt: skip
    return compare_run({key: found for key, found in pairs.items() if found.degrees > 0}, MARGIN)


def find_default_runs(results: Path, names: Sequence[str]) -> list[Path]:
    """Return the named runs, or the complete default runs of the newest one's code and machine, newest first.

    Raises:
        ProofError: there is none.
    """
    if names:
        return [results / name for name in names]
    journals = sorted(results.glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    found: list[StoredRun] = []
    for path in reversed(journals):
        with contextlib.suppress(StoreError):
            run = read_run(path.parent)
            sweep = run.header.options.get("sweep")
            if sweep == "default" and run.of(TimeBreakdown) and not planned_cases() - cases_of(run):
                found.append(run)
    if not found:
        raise ProofError("there is no complete default run; make one with nox -s bench-cpu")
    return [run.path for run in found if _made_alike(run, found[0])]


def _made_alike(run: StoredRun, other: StoredRun) -> bool:
    here, there = run.header.environment, other.header.environment
    return here.machine == there.machine and here.source.get("code") == there.source.get("code")


def planned_cases() -> set[Case]:
    """Return the cases of a default run."""
    import poolbench.ops  # noqa: F401 (registers them)

    default = [op for op in REGISTRY.ops.values() if not op.further]
    return {case for op in default for case in op.sweep("default").cases()}


def cases_of(run: StoredRun) -> set[Case]:
    """Return the cases that a run has measured."""
    return {measurement.case for measurement in run.measurements}
