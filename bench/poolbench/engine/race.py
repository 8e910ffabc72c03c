"""A race: one case, its candidates and the bandwidth limit probes, in one process after another.

Rivals run in the same rounds, each round a new balanced random order; inputs are allocated anew several
times in each process; what fails becomes a status and the others go on. The worker, the clock and the
machine's counters are arguments, so that every rule here is tested without a process.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import PROBES
from poolbench.core.records import (
    Contention,
    Measurement,
    Samples,
    common_clock,
)
from poolbench.core.registry import input_nbytes
from poolbench.engine.process import WorkerLike
from poolbench.engine.recorder import ContenderRecord, middle
from poolbench.engine.rounds import affordable, balanced_orders, block_calls
from poolbench.machine import core_distance
from poolbench.machine.info import Seen, Usage, seen_between, seen_together, usage_reader
from poolbench.machine.nvml import DeviceUsage, is_gpu
from poolbench.worker import contender, session, timing, trace

BANDWIDTH_LIMIT_FROM_NBYTES = 1 << 20
# Rounds are sent to the worker, and watched for contention, in batches of about this length: the
# system's counters step by 10 ms, and a task costs a millisecond.
BATCH_SECONDS = 0.25
# Where races take turns a batch goes in legs, between which others have theirs (bench/poolbench/engine/scheduler.py).
LEG_SECONDS = 0.15
# The probes read and write memory of their own: a candidate right behind them runs up to a quarter slower
# for several calls, as does the first after an allocation. So they come last in a round, and not in each,
# and who follows gets a longer warm-up.
PROBE_TURN = 5
# Nor are they blocks of one call: what wakes the threads that read and write is not the memory's time.
PROBE_BLOCK_SECONDS = 0.0015
# A contender whose blocks take n times as long as the middle one's is in each n-th round, so that one slow
# other candidate does not take the time of all; no turn comes more seldom than this.
MOST_ROUNDS_OUT = 4
# After so many processes a race knows how noisy it is; the others get as many rounds as that asks for, within
# these bounds in the plan's.
PACE_FROM = 3
LEAST_PACE, MOST_PACE = 0.25, 3.0
# A block on a GPU ends by waiting for it, some tens of microseconds: blocks are long enough to hide that.
GPU_BLOCK_SECONDS = 0.002
# The device's own clock needs no long blocks: what is noisy is launching.
DEVICE_ROUNDS, DEVICE_CALLS = 2, 10
# How often in one race a worker may die of nobody knows what before the race is given up.
MAX_DEATHS = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often a race runs.

    Attributes:
        processes, max_processes: fresh processes to start with, and at most.
        allocations: times that inputs are allocated in each.
        rounds: at most in one allocation; many short rounds, whose median stands, ride out a machine that
            changes its speed from one hundredth of a second to the next.
        block_seconds: timed calls of one contender in one round, at least one call; on a GPU no less than
            GPU_BLOCK_SECONDS.
        budget_seconds: of rounds in the first `processes` processes.
        precision: half-width of the 95% interval of the ratio at which it is enough.
        margin: equivalence margin of the verdict.
        timeout_seconds: for each task of a worker.
        early-stop ratio: a contender this many times slower than the baseline stops after one process.
        clear_ratio: with every other candidate this far from the baseline in the whole first process, the other
            processes run a third of the rounds.
        bandwidth_limit_slack: how far below the time of the bandwidth limit a contender may be before it is
            flagged: a folded op is many times faster, while a probe may see a third less than the memory has.
        seed: of inputs and orders.
    """

    processes: int = 10
    max_processes: int = 10
    allocations: int = 2
    rounds: int = 72
    block_seconds: float = 0.0005
    budget_seconds: float = 10.8
    precision: float = 0.03
    margin: float = 0.05
    timeout_seconds: float = 60.0
    early_stop_ratio: float = 10.0
    clear_ratio: float = 1.5
    bandwidth_limit_slack: float = 0.5
    seed: int = 0


class Fleet(Protocol):
    """Where processes come from."""

    def worker(self, process: int) -> WorkerLike:
        """The worker of this process: the same one for the same number, fresh ones for new numbers."""


# Round, contender, calls, what came of them, and whether the processors were far apart.
_Timed = tuple[int, ContenderRecord, int, timing.Block, bool | None]
_Asked = tuple[int, ContenderRecord, timing.BlockRequest]  # round, contender, what it is to do
Seconds = defaultdict[str, float]  # seconds by kind: 'samples', 'warmup', 'first_calls', ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a race came to: the measurements, and where its time went (seconds by kind)."""

    measurements: tuple[Measurement, ...]
    seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """How a worker opens a case and its contenders: module-level functions, sent by name.

    The defaults open an op's case, its candidates and the bandwidth limit probes; a network's step brings its own.

    Attributes:
        open_case: (session, case, seed, tensorflow) -> Opened.
        open_contender: (session, name, check) -> OpenedContender.
        probes: names of the bandwidth limit probes that race too.
    """

    open_case: Callable[..., session.Opened] = session.open_case
    open_contender: Callable[..., contender.OpenedContender] = contender.open_contender
    probes: tuple[str, ...] = PROBES


class Race:
    """One case and its contenders, as they go from process to process."""

    def __init__(
        self,
        case: Case,
        candidates: Sequence[Candidate],
        *,
        baseline: str,
        plan: Plan,
        tasks: Tasks | None = None,
        read_usage: Callable[[], Usage] | None = None,
        enough: Callable[[Race, int], bool] | None = None,
    ) -> None:
        self.case = case
        self.baseline = baseline
        self.plan = plan
        self.tensorflow = any(entry.framework != "numpy" for entry in candidates)
        self.records = {entry.name: ContenderRecord(entry.name, entry) for entry in candidates}
        self.tasks = tasks or Tasks()
        self._block_seconds = max(plan.block_seconds, GPU_BLOCK_SECONDS * is_gpu(case.device))
        self.records |= {name: ContenderRecord(name, None) for name in self.tasks.probes}
        self.seconds = Seconds(float)
        self._read_usage = read_usage or usage_reader(case.device)
        self._device_usages: list[DeviceUsage] = []
        self._smt_sibling_busy: list[float] = []
        self._enough = enough or precise_enough
        self._random = random.Random(f"{plan.seed} {case!r}")
        self._orders = balanced_orders([entry.name for entry in candidates], self._random)
        self._probe_orders = balanced_orders(list(self.tasks.probes), self._random)
        self._contention = Counter[str]()
        self._alone = False
        self._cold = True  # what ran last were probes, or nothing on these inputs
        self._last = ""  # who ran last
        self._visible = False
        self._clear = False
        self._pace = 1.0
        self._round_seconds = 0.0
        self._node = "local"
        self._processes = 0
        self._deaths = 0

    def run(self, fleet: Fleet) -> Result:
        """Every process that the plan and the precision ask for, and what they came to."""
        for _ in self._every_process(fleet):
            pass
        return self.result()

    def _every_process(self, fleet: Fleet) -> Generator[None, None, None]:
        more = True
        while more:
            more = yield from self.run_next(
                fleet, seconds=self.usual_seconds, leg_seconds=BATCH_SECONDS
            )

    @property
    def usual_seconds(self) -> float:
        """Seconds of rounds that the plan gives a process."""
        return self.plan.budget_seconds / self.plan.processes

    def wanted_pace(self) -> float:
        """Rounds that its next process should have, over the plan's, for intervals as narrow as the plan asks.

        1 where that is not known: before it has run in PACE_FROM processes, or with one allocation in each. Who
        is clearly faster or slower already needs no more than the plan's.
        """
        if self._processes == PACE_FROM:
            asked = [self._pace_of(*pair) for pair in self.pairs()]
            self._pace = min(MOST_PACE, max(LEAST_PACE, middle(asked or [1.0])))
        return self._pace

    def _pace_of(self, candidate: Samples, baseline: Samples) -> float:
        from poolbench.stats import estimate, planning

        seen = planning.components(candidate, baseline)
        if seen is None:
            return 1.0
        half_width = seen.half_width(
            processes=self.plan.processes, allocations=self.plan.allocations, rounds=seen.rounds
        )
        pace = planning.pace(
            half_width, self.plan.precision, done=self._processes, processes=self.plan.processes
        )
        clear = abs(estimate.estimate(candidate, baseline).log_ratio) > math.log1p(
            self.plan.margin
        ) + 2 * math.log1p(half_width)
        return min(pace, 1.0) if clear else pace

    def pairs(self) -> list[tuple[Samples, Samples]]:
        """The samples of every other candidate that still runs, and those of the baseline by the same clock."""
        baseline = self.records[self.baseline]
        return [
            (record.samples(clock), baseline.samples(clock))
            for record in self._candidates_running()
            if record is not baseline
            for clock in (common_clock(record.clock, baseline.clock),)
        ]

    def run_next(
        self, fleet: Fleet, *, seconds: float, leg_seconds: float
    ) -> Generator[None, None, bool]:
        """Run the next process, a leg a step: other work is welcome between them.

        Args:
            fleet: where its worker comes from.
            seconds: of rounds.
            leg_seconds: of a leg, about.

        Returns:
            Whether another process is to follow.
        """
        process = self._processes
        try:
            worker = fleet.worker(process)
        except WorkerFailure as failure:
            self.fail(failure)
            return False
        yield from self._run_process(process, worker, seconds, leg_seconds)
        self._processes += 1
        if process == 0:
            self._stop_slow_candidates()
            self._clear = self._is_clear()
        if not self._candidates_running() or self._processes >= self.plan.max_processes:
            return False
        return self._processes < self.plan.processes or not self._enough(self, self._processes)

    def result(self) -> Result:
        """What the processes that were run came to."""
        self._flag_impossible()
        return Result(
            measurements=tuple(self._measurement(record) for record in self.records.values()),
            seconds=self.seconds,
        )

    def check(self, worker: WorkerLike) -> Result:
        """Every candidate once against the reference, timing nothing."""
        for name in self.tasks.probes:
            self.records.pop(name, None)
        self._open(0, worker)
        self._close(worker)
        return Result(
            measurements=tuple(self._measurement(record) for record in self.records.values()),
            seconds=self.seconds,
        )

    def _candidates_running(self) -> list[ContenderRecord]:
        return [record for record in self.records.values() if record.runs and record.candidate]

    def _running(self) -> list[ContenderRecord]:
        return [record for record in self.records.values() if record.runs]

    def _run_process(
        self, process: int, worker: WorkerLike, seconds: float, leg_seconds: float
    ) -> Generator[None, None, None]:
        self._node = worker.node
        self._open(process, worker)
        for allocation in range(self.plan.allocations):
            contenders = self._running()
            if not any(record.candidate for record in contenders):
                return
            if allocation and not self._allocate(process, worker):
                return
            self._cold = True
            self._plan_rounds(contenders)
            yield from self._run_rounds(
                process, allocation, seconds / self.plan.allocations, worker, leg_seconds
            )
            self._time_on_device(process, allocation, worker)
        # Emptying the caches between calls takes energy too.
        if process == 0 and is_gpu(self.case.device) and self.case.cache == "warm":
            self._measure_energy(worker)
        self._close(worker)

    def _time_on_device(self, process: int, allocation: int, worker: WorkerLike) -> None:
        """Rounds by the device's own clock, every contender once in each, in a new order.

        A call from Python takes longer to launch than a GPU needs for it, so that wall time tells candidates
        apart only where they are slow. A recording that fails leaves its samples out: the profiler may not be
        allowed here, and the race has been run.
        """
        if not is_gpu(self.case.device):
            return
        contenders = self._running()
        turns = [
            (number, record)
            for number in range(DEVICE_ROUNDS)
            for record in self._random.sample(contenders, len(contenders))
        ]
        start = self._now()
        try:
            found = worker.call(
                trace.time_on_device, [record.name for _, record in turns], DEVICE_CALLS,
                timeout=self.plan.timeout_seconds,
            )  # fmt: skip
        except WorkerFailure as failure:
            if failure.lost:
                self._open(process, worker)
            return
        finally:
            self.seconds["device_clock"] += self._now() - start
        for (number, record), seconds in zip(turns, found, strict=True):
            if seconds is not None:
                row = (process, allocation, number, DEVICE_CALLS, float(f"{seconds:.6g}"), 0)
                record.device_columns.append(row)

    def _now(self) -> float:
        return self._read_usage().clock

    def _measure_energy(self, worker: WorkerLike) -> None:
        """Joules a call of every candidate; a task that fails leaves its figure out."""
        start = self._now()
        for record in self._candidates_running():
            try:
                record.energy_joules = worker.call(
                    timing.measure_energy, record.name, timeout=self.plan.timeout_seconds
                )
            except WorkerFailure as failure:  # noqa: PERF203 (each candidate's is its own)
                if failure.lost:  # the next process starts a fresh one
                    break
        self.seconds["energy"] += self._now() - start

    def _open(self, process: int, worker: WorkerLike) -> None:
        """Open the case and every contender; whoever takes the worker down is out, the others again."""
        while True:
            try:
                opened = worker.call(
                    self.tasks.open_case, self.case, self.plan.seed, self.tensorflow,
                    timeout=self.plan.timeout_seconds,
                )  # fmt: skip
            except WorkerFailure as failure:
                if self._forgives(failure):
                    continue
                self.fail(failure)
                return
            self.seconds["allocation"] += opened.seconds
            if all(self._open_contender(record, process, worker) for record in self._running()):
                return

    def fail(self, failure: WorkerFailure) -> None:
        """Enter the failure with every contender that has none."""
        for record in self._running():
            record.fail(self.case, failure)

    def _forgives(self, failure: WorkerFailure) -> bool:
        """Whether a worker's death is nobody's fault here, and has not happened too often."""
        self._deaths += failure.blameless
        return failure.blameless and self._deaths <= MAX_DEATHS

    def _replace(self, worker: WorkerLike) -> None:
        """End the worker's process; its next task gets a fresh one."""
        # It does not answer: that is how it ends.
        with contextlib.suppress(WorkerFailure):
            worker.call(session.end_process, timeout=self.plan.timeout_seconds)

    def _open_contender(self, record: ContenderRecord, process: int, worker: WorkerLike) -> bool:
        """Open one contender; False if the worker was lost with it, or is no good for the others."""
        try:
            opened = worker.call(
                self.tasks.open_contender, record.name, record.accuracy is None,
                timeout=self.plan.timeout_seconds,
            )  # fmt: skip
        except WorkerFailure as failure:
            if not self._forgives(failure):
                record.fail(self.case, failure)
            return not failure.lost
        self.seconds["first_calls"] += opened.first_call_seconds
        self.seconds["checks"] += opened.check_seconds + opened.calibration_seconds
        record.accuracy = record.accuracy or opened.accuracy
        if opened.status != "ok":
            record.fail(self.case, WorkerFailure(opened.status, opened.reason, tail=worker.tail))
        if opened.tainted:
            self._replace(worker)
            return False
        if opened.status != "ok":
            return True
        if record.candidate and len(record.first_calls) <= process:
            record.first_calls.append(opened.first_call_seconds)
        record.call_seconds = opened.call_seconds or record.call_seconds
        record.read_nbytes, record.written_nbytes = opened.read_nbytes, opened.written_nbytes
        record.peak_nbytes = record.peak_nbytes or opened.peak_nbytes
        return True

    def _allocate(self, process: int, worker: WorkerLike) -> bool:
        try:
            self.seconds["allocation"] += worker.call(
                session.allocate, timeout=self.plan.timeout_seconds
            )
        except WorkerFailure as failure:
            if not failure.lost:
                self.fail(failure)
                return False
            self._open(process, worker)  # lost for a reason of its own: a fresh one goes on
        return True

    def _close(self, worker: WorkerLike) -> None:
        # A worker that was lost here holds nothing any more: that is what closing is for.
        try:
            worker.call(session.close_case, timeout=self.plan.timeout_seconds)
        except WorkerFailure as failure:
            if not failure.lost:  # something that a candidate left there does not let go
                self._replace(worker)

    def _plan_rounds(self, contenders: Sequence[ContenderRecord]) -> None:
        """How often each contender's turn comes, and the seconds that a round then takes on average.

        The baseline, which all are paired with, is in every round. Untimed calls are planned by the least time
        seen so far: three calls when the case was opened say it badly, and whoever they made look slow
        would have fewer untimed calls, and be slower for it, in the whole race.
        """
        for record in contenders:
            seen = [row[4] for row in record.columns]
            record.call_seconds = min([record.call_seconds, *seen])
            record.usual_seconds = middle(seen or [record.call_seconds])
        costs = {record.name: self._block_cost(record) for record in contenders}
        usual = middle(costs[record.name] for record in contenders if record.candidate)
        for record in contenders:
            turn = 1 if record.name == self.baseline else math.floor(costs[record.name] / usual)
            least = 1 if record.candidate else PROBE_TURN
            record.every = max(least, min(MOST_ROUNDS_OUT, turn))
        self._round_seconds = sum(costs[record.name] / record.every for record in contenders)

    def _block_calls(
        self, record: ContenderRecord, *, cold: bool = False, dither: float = 0.5
    ) -> tuple[int, int]:
        least = 0.0 if record.candidate else PROBE_BLOCK_SECONDS
        seconds = max(self._block_seconds, least)
        return block_calls(
            record.call_seconds, seconds, nbytes=record.nbytes, cold=cold, dither=dither
        )

    def _block_cost(self, record: ContenderRecord) -> float:
        warmup, calls = self._block_calls(record)
        return max((warmup + calls) * record.usual_seconds, 1e-9)

    def _run_rounds(
        self,
        process: int,
        allocation: int,
        seconds: float,
        worker: WorkerLike,
        leg_seconds: float,
    ) -> Generator[None, None, None]:
        """The rounds of one allocation: the plan's, or as many as the seconds allow.

        Contended ones are kept, marked, and done again within the seconds: at most half as many, since
        under contention without end more of it would not be quieter.
        """
        most = math.ceil(self.plan.rounds / 3) if self._clear else self.plan.rounds
        batch, leg = (
            max(1, int(length / max(self._round_seconds, 1e-9)))
            for length in (BATCH_SECONDS, leg_seconds)
        )
        rounds = affordable(seconds, self._round_seconds, most)
        number = redone = 0
        spent = 0.0
        while number < rounds:
            some = range(number, min(rounds, number + batch))
            legs = [
                self._leg(some[start : start + leg], leg < batch)
                for start in range(0, len(some), leg)
            ]
            alone = self._alone
            seen = yield from self._run_batch(process, allocation, legs, worker)
            if seen is None:
                if self._alone and not alone:  # the same rounds again, to learn who it was
                    continue
                return
            number += len(some)
            spent += seen.wall_seconds
            again = min(most // 2 - redone, len(some)) if seen.contended() else 0
            redone += again
            self._contention["redone"] += sum(map(len, legs)) * again // len(some)
            rounds = affordable(seconds, spent / number, most + redone)

    def _leg(self, rounds: Iterable[int], others_between: bool) -> list[_Asked]:
        """The blocks of these rounds, as they begin behind another's race or behind a worker's wait."""
        self._last = ""
        self._cold = self._cold or others_between
        return [request for number in rounds for request in self._round(number)]

    def _round(self, number: int) -> Iterator[_Asked]:
        """The blocks of a round: whose turn it is, the candidates in a new order, then the probes."""
        names = [*next(self._orders), *(next(self._probe_orders) if self.tasks.probes else ())]
        for name in names:
            record = self.records[name]
            if not record.runs or number % record.every:
                continue
            cold = self._cold and record.candidate is not None
            warmup, calls = self._block_calls(record, cold=cold, dither=self._random.random())
            if name == self._last:  # the last of a round may be the first of the next: it is warm
                warmup = 0
            self._cold, self._last = record.candidate is None, name
            yield number, record, timing.BlockRequest(name=name, warmup=warmup, calls=calls)

    def _run_batch(
        self,
        process: int,
        allocation: int,
        legs: Sequence[Sequence[_Asked]],
        worker: WorkerLike,
    ) -> Generator[None, None, Seen | None]:
        """Make the blocks; None if the worker was lost.

        A leg is one task, until the worker is lost in it: from then on each block of this race is
        a task of its own, so that whoever takes the next worker down is known.
        """
        tasks = [[request] for leg in legs for request in leg] if self._alone else legs
        parts: list[Seen] = []
        rows: list[_Timed] = []
        for task in tasks:
            asked = [turn for turn in task if turn[1].runs]
            if not asked:
                continue
            if not self._alone:
                yield
            try:
                apart = self._gather(worker)
                start = self._read_usage()
                done = worker.call(
                    timing.time_batch, [request for *_, request in asked],
                    timeout=self.plan.timeout_seconds + 3 * self._expected(asked),
                )  # fmt: skip
            except WorkerFailure as failure:
                self._lose(asked, failure, process, worker)
                return None
            parts.append(seen_between(start, self._read_usage(), done.cpu_seconds))
            self._contention["switches"] += done.switches
            if done.smt_sibling_busy is not None:
                self._smt_sibling_busy.append(done.smt_sibling_busy)
            for (round_, record, request), block in zip(asked, done.blocks, strict=True):
                if block.status == "ok":
                    rows.append((round_, record, request.calls, block, apart))
                elif record.runs:
                    raised = WorkerFailure(block.status, block.reason, tail=worker.tail)
                    record.fail(self.case, raised)
        seen = seen_together(parts)
        self._enter(process, allocation, rows, seen)
        return seen

    def _gather(self, worker: WorkerLike) -> bool | None:
        """Bring the processors together; whether they are far apart after all, None: not known."""
        if is_gpu(self.case.device):
            return None
        apart: bool | None = worker.call(core_distance.gather, timeout=self.plan.timeout_seconds)
        return apart

    def _expected(self, asked: Sequence[_Asked]) -> float:
        return sum(self._block_cost(record) for _, record, _ in asked)

    def _lose(
        self,
        asked: Sequence[_Asked],
        failure: WorkerFailure,
        process: int,
        worker: WorkerLike,
    ) -> None:
        """Enter a task that did not return; if the worker is gone with it, open a fresh one."""
        names = {record.name for _, record, _ in asked}
        if not self._forgives(failure):
            if len(names) > 1:
                self._alone = True
            else:
                asked[0][1].fail(self.case, failure)
        if failure.lost:
            self._open(process, worker)

    def _enter(
        self,
        process: int,
        allocation: int,
        rows: Sequence[_Timed],
        seen: Seen,
    ) -> None:
        disturbed = seen.contended()
        for round_, record, calls, block, apart in rows:
            contended = int(disturbed or bool(apart))
            self._contention["marked"] += contended
            self._contention["watched"] += apart is not None
            self._contention["apart"] += bool(apart)
            record.columns.append(
                (process, allocation, round_, calls, float(f"{block.seconds:.6g}"), contended)
            )
            self.seconds["samples"] += block.seconds * calls
            self.seconds["warmup"] += block.warmup_seconds
        if seen.device is not None:
            self._device_usages.append(seen.device)
        self._visible = self._visible or seen.others_seconds is not None
        self._contention["wall_us"] += int(seen.wall_seconds * 1e6)
        self._contention["steal_us"] += int((seen.steal_seconds or 0.0) * 1e6)
        self._contention["others_us"] += int((seen.others_seconds or 0.0) * 1e6)

    def _is_clear(self) -> bool:
        """Whether every other candidate stands far beyond the margin from the baseline: a short race will do.

        Then one round an allocation is enough; processes and allocations, from which the interval
        comes, stay as many as they were.
        """
        baseline = self.records.get(self.baseline)
        if baseline is None or not baseline.runs:
            return False
        base = {row[:3]: row[4] for row in baseline.columns}
        rivals = [record for record in self._candidates_running() if record is not baseline]
        ratios = [
            [row[4] / base[row[:3]] for row in record.columns if row[:3] in base]
            for record in rivals
        ]
        far = self.plan.clear_ratio
        return bool(ratios) and all(
            row and (min(row) > far or max(row) < 1 / far) for row in ratios
        )

    def _stop_slow_candidates(self) -> None:
        """Stop whoever is so slow in the first process that more of it would teach nothing."""
        baseline = self.records.get(self.baseline)
        if baseline is None or not baseline.columns:
            return
        limit = self.plan.early_stop_ratio * middle(row[4] for row in baseline.columns)
        for record in self._candidates_running():
            if record.columns and middle(row[4] for row in record.columns) > limit:
                record.stopped_early = True
                record.flags.append("stopped_early")

    def _flag_impossible(self) -> None:
        """Flag whoever is faster than the memory allows; its result is not to be believed."""
        if input_nbytes(self.case) < BANDWIDTH_LIMIT_FROM_NBYTES:
            return
        read, write, copy = (self.records.get(name) for name in PROBES)
        if read is None or write is None or copy is None:
            return
        for record in self._timed_candidates():
            columns, *probes = (
                one.device_columns if record.clock == "device" else one.columns
                for one in (record, read, write, copy)
            )
            if not all(probes):
                continue
            reading, writing, copying = (
                middle(row[4] for row in rows) / max(1, probe.nbytes)
                for rows, probe in zip(probes, (read, write, copy), strict=True)
            )
            # Reading and writing may go on at once where caches hold the data.
            bandwidth_limit = min(
                max(record.read_nbytes * reading, record.written_nbytes * writing),
                record.nbytes * copying,
            )
            if (
                middle(row[4] for row in columns) * (1 + self.plan.bandwidth_limit_slack)
                < bandwidth_limit
            ):
                record.flags.append("faster-than-limit")

    def _timed_candidates(self) -> list[ContenderRecord]:
        """Candidates that have samples; wall time on a GPU is launching, and no evidence against one."""
        return [
            record
            for record in self.records.values()
            if record.candidate
            and record.columns
            and (record.clock == "device" or not is_gpu(self.case.device))
        ]

    def _measurement(self, record: ContenderRecord) -> Measurement:
        wall = record.samples("wall")
        if len(wall) and sum(wall.contended) > len(wall) / 2:
            record.flags.append("contended")
        on_device = [row[4] for row in record.device_columns]
        return Measurement(
            case=self.case,
            candidate=record.name,
            form=record.candidate.form if record.candidate else "function",
            kind="candidate" if record.candidate else "probe",
            status=record.status,
            reason=record.reason,
            tail=record.tail,
            issue=record.issue,
            baseline=self.baseline,
            clock=record.clock,
            samples=record.samples(record.clock),
            wall_samples=wall if record.clock == "device" else Samples(),
            first_call_seconds=tuple(float(f"{value:.4g}") for value in record.first_calls),
            accuracy=record.accuracy,
            read_nbytes=record.read_nbytes,
            written_nbytes=record.written_nbytes,
            peak_nbytes=record.peak_nbytes,
            stopped_early=record.stopped_early,
            flags=tuple(dict.fromkeys(record.flags)),
            contention=self._contention_seen(),
            node=self._node,
            energy_joules=record.energy_joules,
            device_seconds=middle(on_device) if on_device else None,
        )

    def _contention_seen(self) -> Contention:
        wall = self._contention["wall_us"] or 1
        watched = self._contention["watched"]
        return Contention(
            steal=round(self._contention["steal_us"] / wall, 4) if self._visible else None,
            others=round(self._contention["others_us"] / wall, 4) if self._visible else None,
            blocks_marked=self._contention["marked"],
            blocks_redone=self._contention["redone"],
            involuntary_switches=self._contention["switches"] if self._visible else None,
            cores_distant=round(self._contention["apart"] / watched, 4) if watched else None,
            smt_sibling_busy=round(statistics.fmean(self._smt_sibling_busy), 4)
            if self._smt_sibling_busy
            else None,
            **device_contention(self._device_usages),
        )


def device_contention(usages: Sequence[DeviceUsage]) -> dict[str, Any]:
    """The fields of a Contention that tell of the device, from its readings after each round."""
    clocks = [usage.clock_mhz for usage in usages if usage.clock_mhz is not None]
    degrees = [usage.celsius for usage in usages if usage.celsius is not None]
    others = [usage.others_share for usage in usages if usage.others_share is not None]
    return {
        "device_clock_mhz": (min(clocks), max(clocks)) if clocks else None,
        "device_celsius": max(degrees, default=None),
        "device_slowdowns": tuple(dict.fromkeys(w for usage in usages for w in usage.slowdowns)),
        "device_others": max(others, default=None),
    }


def precise_enough(race: Race, processes: int) -> bool:
    """Whether every interval is as narrow as the plan asks, or its verdict is clear already."""
    from poolbench.stats.planning import StopRule

    rule = StopRule(
        precision=race.plan.precision,
        margin=race.plan.margin,
        min_processes=race.plan.processes,
        max_processes=race.plan.max_processes,
    )
    return rule.enough(race.pairs(), processes=processes)
