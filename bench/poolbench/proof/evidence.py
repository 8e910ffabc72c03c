"""What the bars of the acceptance rest on: races of copies, beside a neighbour too, loops, complete runs."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poolbench.core.candidate import REGISTRY
from poolbench.core.case import Case, make_case
from poolbench.core.errors import StoreError
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import Measurement, TimeBreakdown
from poolbench.engine.aa import (
    MARGIN,
    CopiesRace,
    Design,
    ProofError,
    race_copies,
    race_series,
)
from poolbench.engine.process import Worker
from poolbench.engine.race import PROBE_TURN
from poolbench.engine.rounds import block_calls
from poolbench.engine.scheduler import WorkerPool
from poolbench.machine import idle
from poolbench.stats.estimate import Comparison, compare_run, estimate
from poolbench.store.journal import StoredRun, read_run
from poolbench.worker import session

ROOT = Path(__file__).parent.parent.parent.parent
RESULTS = Path("results")
SUITES = ("suites/test_depth_max_pool.py", "suites/test_global_avg_pool.py")
PAIR_SECONDS = 10.0
QUICK_RUN_SECONDS = 600.0

# As a default run races: its plan, and about as many candidates as it has in a race. Four A/A comparisons
# and one slowdown of 10%.
RACE = Design(plain=4, slowdowns=(0.10,))
TEN = Design(plain=9)
# One slowdown of 1%, with the processes and rounds that fit into ten seconds a pair: at margin zero each
# process more makes the interval narrower.
PAIR = Design(
    plain=0,
    slowdowns=(0.01,),
    plan=Plan(processes=12, allocations=1, rounds=4000, budget_seconds=7.6),
)
# Beside a busy neighbour three times the time is allowed.
BUSY_PAIR = replace(PAIR, plan=replace(PAIR.plan, budget_seconds=26.0))
# Processes differ: new ones after so many races, so that the bars hold between them too.
RACES_A_FLEET = 9


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much evidence is gathered."""

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


# A warm block among other candidates, against a loop of nothing else.


@dataclass(frozen=True, kw_only=True)
class Bias:
    """An op whose warm blocks are held against an uninterrupted loop, and its other candidates."""

    case: Case
    subject: str
    rivals: tuple[str, ...]


def _bias(subject: str, rivals: tuple[str, ...], **fields: Any) -> Bias:
    case = make_case(op="depth_max_pool", pool_size=3, padding="valid", **fields)
    return Bias(case=case, subject=subject, rivals=rivals)


BIASES = {
    "cache-resident": _bias("max_pool", ("max_pool2d-view",), shape=(8, 28, 28, 96), mode="graph"),
    "cache-resident, xla": _bias(
        "reshape-reduce_max", ("max_pool",), shape=(8, 28, 28, 96), mode="xla"
    ),
    "base case": _bias(
        "layer-depth_max_pool",
        ("lambda-max_pool", "reshape-reduce_max", "transpose-reduce_max", "max_pool2d-view"),
        shape=(8, 56, 56, 96),
        mode="graph",
    ),
    "large": _bias("max_pool", ("max_pool2d-view",), shape=(32, 112, 112, 96), mode="graph"),
    "two threads": _bias(
        "max_pool2d-view",
        ("max_pool", "lambda-max_pool", "layer-max_pool"),
        shape=(8, 28, 28, 96),
        mode="graph",
    ),
}
# A median of few blocks tells more of the machine than of the op.
BIAS_ROUNDS = 400
BIAS_TURN_SECONDS = 15.0
# What is later than the caches, such as a second processor that wakes, has come by then too.
LOOP_WARMUP_SECONDS = 0.05
# Of a large op fewer: it is the warm blocks, one a round, whose median needs the time.
LOOP_SECONDS, MOST_LOOP_BLOCKS = 0.1, 10
SLEEP_LOOPS = 20
PROBE = "bandwidth-copy"


def time_loop(name: str, warmup: int, calls: int, blocks: int) -> list[float]:
    """Seconds a call in each of `blocks` blocks that follow each other at once; in a worker."""
    return [
        session.time_block(name, warmup if number == 0 else 0, calls).seconds
        for number in range(blocks)
    ]


def measure_bias(bias: Bias, turns: int, worker: Worker, block_seconds: float) -> list[float]:
    """For each turn the median over its rounds of a warm block over the median of the uninterrupted loop after it.

    Raises:
        ProofError: a contender could not be opened.
    """
    limit = 120.0
    worker.call(session.open_case, bias.case, 0, timeout=limit)
    names = (bias.subject, *bias.rivals)
    blocks: dict[str, Callable[..., tuple[int, int]]] = {}
    for name in (*names, PROBE):
        contender = worker.call(
            functools.partial(session.open_contender, check=True), name, timeout=limit
        )
        if contender.status != "ok":
            raise ProofError(f"{name}: {contender.status}: {contender.reason}")
        nbytes = contender.read_nbytes + contender.written_nbytes
        blocks[name] = functools.partial(
            block_calls, contender.call_seconds, block_seconds, nbytes=nbytes
        )
        if name == bias.subject:
            before_loop = math.ceil(LOOP_WARMUP_SECONDS / contender.call_seconds)
            loop_calls = math.ceil(LOOP_SECONDS / contender.call_seconds)
    generator = random.Random(0)
    ratios = []
    for _ in range(turns):
        rounds: list[float] = []
        end = time.perf_counter() + BIAS_TURN_SECONDS
        for number in range(BIAS_ROUNDS):
            if rounds and time.perf_counter() > end:
                break
            # As in a race: probes last, in each fifth round, and a longer warm-up behind them. The other candidate that
            # goes before stands between the loop and the op, which would else find all as it has left it.
            shuffled = generator.sample(names, len(names))
            order = [bias.rivals[0], *shuffled, *[PROBE] * (number % PROBE_TURN == 0)]
            requests = []
            for place, name in enumerate(order):
                cold = place == 0 and number % PROBE_TURN == 1
                warmup, calls = blocks[name](cold=cold)
                requests.append(session.BlockRequest(name=name, warmup=warmup, calls=calls))
            batch = worker.call(session.time_batch, requests, timeout=limit)
            warm = batch.blocks[1 + shuffled.index(bias.subject)].seconds
            _, calls = blocks[bias.subject]()
            some = min(MOST_LOOP_BLOCKS, math.ceil(loop_calls / calls))
            loop = worker.call(
                time_wakeful_loop, bias.subject, before_loop, calls, some, timeout=limit
            )
            # By round: the machine's speed changes from one second to the next, for both alike.
            rounds.append(warm / statistics.median(loop))
        ratios.append(statistics.median(rounds))
    worker.call(session.close_case, timeout=limit)
    return ratios


def time_wakeful_loop(name: str, warmup: int, calls: int, blocks: int) -> list[float]:
    """As time_loop, of processors that are kept awake, as a race's are."""
    with idle.kept_awake():
        return time_loop(name, warmup, calls, blocks)


def measure_sleep(bias: Bias, turns: int, worker: Worker) -> list[float]:
    """For each turn the median of a loop whose processors may sleep over that of one where they may not.

    Raises:
        ProofError: the processors cannot be kept awake, or the op could not be opened.
    """
    if not idle.can_keep_awake():
        raise ProofError("the system does not let this user keep the processors awake")
    limit = 120.0
    worker.call(session.open_case, bias.case, 0, timeout=limit)
    contender = worker.call(
        functools.partial(session.open_contender, check=True), bias.subject, timeout=limit
    )
    if contender.status != "ok":
        raise ProofError(f"{bias.subject}: {contender.status}: {contender.reason}")
    warmup = math.ceil(LOOP_WARMUP_SECONDS / contender.call_seconds)
    ratios = []
    for _ in range(turns):
        seconds: dict[Callable[..., list[float]], list[float]] = {}
        for loop in (time_wakeful_loop, time_loop) * SLEEP_LOOPS:
            seconds.setdefault(loop, []).extend(
                worker.call(loop, bias.subject, warmup, 2, MOST_LOOP_BLOCKS, timeout=limit)
            )
        ratios.append(
            statistics.median(seconds[time_loop]) / statistics.median(seconds[time_wakeful_loop])
        )
    worker.call(session.close_case, timeout=limit)
    return ratios


# A neighbour on the machine.


def keep_busy(period_seconds: float = 0.2) -> None:
    """Use one core for half of the time, for as long as the process that asked for it is there."""
    asker = os.getppid()
    while os.getppid() == asker:
        end = time.perf_counter() + period_seconds / 2
        while time.perf_counter() < end:
            pass
        time.sleep(period_seconds / 2)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process keeps one core busy for half of the time."""
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# Evidence, gathered when first asked for.


# Every comparison of a complete run.
Compared = Mapping[tuple[Case, str], Comparison]


class Evidence:
    """What has been measured so far in this acceptance."""

    def __init__(
        self, scale: Scale, *, default_runs: Sequence[str], progress: Callable[[str], None]
    ) -> None:
        self.scale = scale
        self._default_runs = default_runs
        self._progress = progress

    def _series(self, design: Design, count: int, label: str) -> list[CopiesRace]:
        races: list[CopiesRace] = []
        while len(races) < count:
            fleet = WorkerPool((), None)
            try:
                fleet.use(WorkerSpec(), design.plan.processes)
                # A process converts the op's Python when it first meets it: that belongs to its start.
                race_copies(replace(design, plan=replace(design.plan, rounds=1)), fleet)
                first = len(races)
                some = min(RACES_A_FLEET, count - first)
                for race in race_series(lambda n: race_copies(design, fleet, first + n), some):  # noqa: B023 (used up within the turn)
                    races.append(race)
                    self._progress(f"{label}: {len(races)} of {count}, {race.seconds:.1f} s")
            finally:
                fleet.close()
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
        with busy_neighbour():
            return self._series(RACE, self.scale.busy_races, "races beside a busy neighbour")

    @functools.cached_property
    def busy_tens(self) -> list[CopiesRace]:
        with busy_neighbour():
            return self._series(TEN, self.scale.busy_tens, "races of ten beside a busy neighbour")

    @functools.cached_property
    def busy_pairs(self) -> list[CopiesRace]:
        with busy_neighbour():
            return self._series(BUSY_PAIR, self.scale.busy_pairs, "pairs beside a busy neighbour")

    @functools.cached_property
    def quick_runs(self) -> list[Compared]:
        """Complete quick runs, one after the other."""
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
    def two_default_runs(self) -> list[Compared]:
        """The default run, and the one before it."""
        if len(self.default_runs) < 2:
            raise ProofError(
                f"{self.default_run.name} is the only default run of this code and machine: "
                "make another by nox -s bench-cpu"
            )
        return [compare_journal(path) for path in reversed(self.default_runs[:2])]

    def bias(self, name: str) -> list[float]:
        """Ratios of warm median to loop, one a turn."""
        worker = Worker(WorkerSpec())
        try:
            ratios = measure_bias(BIASES[name], self.scale.turns, worker, Plan().block_seconds)
        finally:
            worker.close()
        self._progress(f"bias, {name}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
        return ratios

    def sleep(self, name: str) -> list[float]:
        """Ratios of a loop on processors that may sleep to one where they may not, one a turn."""
        worker = Worker(WorkerSpec())
        try:
            return measure_sleep(BIASES[name], self.scale.turns, worker)
        finally:
            worker.close()


def run_quick(name: str) -> None:
    """A complete quick run of both ops.

    Raises:
        ProofError: pytest could not run it.
    """
    # 1: some candidate failed its test, which is a result of the run like any other.
    words = ("-m", "pytest", *SUITES, "-q", "--benchmark-quiet", "--sweep", "quick", "--run", name)
    done = subprocess.run(  # noqa: S603
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=QUICK_RUN_SECONDS,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        tail = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it printed nothing"]
        raise ProofError(f"the quick run {name} ended with code {done.returncode}: {tail[0]}")


def compare_journal(folder: Path) -> dict[tuple[Case, str], Comparison]:
    """Every right candidate's comparison to its baseline, with the run's verdicts."""
    return compare_measurements(read_run(folder).measurements)


def compare_measurements(
    measurements: Sequence[Measurement],
) -> dict[tuple[Case, str], Comparison]:
    """As compare_journal, from the measurements; stopped early ones have no interval and are left out."""
    timed = {(m.case, m.candidate): m for m in measurements if m.status == "ok" and len(m.samples)}
    pairs = {
        key: estimate(m.samples, timed[m.case, m.baseline].samples)
        for key, m in timed.items()
        if m.kind == "candidate" and not m.stopped_early and m.candidate != m.baseline
        and (m.case, m.baseline) in timed
    }  # fmt: skip
    return compare_run({key: found for key, found in pairs.items() if found.degrees > 0}, MARGIN)


def find_default_runs(results: Path, names: Sequence[str]) -> list[Path]:
    """The named runs, else the complete default runs, newest first, of the newest's code and machine.

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
            asked = run.header.options.get("sweep")
            if asked == "default" and run.of(TimeBreakdown) and not planned_cases() - cases_of(run):
                found.append(run)
    if not found:
        raise ProofError("no complete default run is there: make one by nox -s bench-cpu")
    return [run.path for run in found if _made_alike(run, found[0])]


def _made_alike(run: StoredRun, other: StoredRun) -> bool:
    here, there = run.header.environment, other.header.environment
    return here.machine == there.machine and here.source.get("code") == there.source.get("code")


def planned_cases() -> set[Case]:
    """The cases of the default sweeps of the ops that ship."""
    import poolbench.ops  # noqa: F401 (registers them)

    return {case for op in REGISTRY.ops.values() for case in op.sweep("default").cases()}


def cases_of(run: StoredRun) -> set[Case]:
    """The cases that a run has measured."""
    return {measurement.case for measurement in run.measurements}
