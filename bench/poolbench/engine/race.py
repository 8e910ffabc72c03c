"""A race: one case, its contenders and the bandwidth probes, in one fresh process after another.

Contenders run in the same rounds, each round in a new balanced random order. Inputs are allocated anew several
times in each process. A failure becomes a status, and the other contenders go on. The workers, the clock and the
machine's counters are arguments, so that every rule is tested without a process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import Plan, RaceSpec, WorkerSpec
from poolbench.core.records import Measurement
from poolbench.engine import device
from poolbench.engine.budget import PACE_FROM, RaceBudget, RoundBudget, stop_slow_candidates
from poolbench.engine.noise import MachineNoise, NoiseLog
from poolbench.engine.recorder import (
    ContenderRecord,
    Seconds,
    flag_implausible,
    make_measurement,
    pairs,
)
from poolbench.engine.recovery import RaceWorkers, Tasks, Workers
from poolbench.engine.rounds import PlannedBlock, Rounds, Task, lost_calls, one_by_one
from poolbench.machine.info import Seen, Usage, seen_together
from poolbench.machine.nvml import is_gpu
from poolbench.worker import timing

# Rounds are sent to the worker, and watched for noise, in batches of about this length: the system's counters
# step by 10 ms, and a task costs a millisecond.
BATCH_SECONDS = 0.25
# Interleaved races alternate after about this time. Shorter parts would pay for cold caches and thread pools, and
# longer ones would see the machine change.
STEP_SECONDS = 0.15
# Workers of several kinds alternate after about this time. What slows a processor is drawn anew for each leg: of
# identical code, the ratio of 30 s in legs of 0.03 s is as steady as that of 120 s in legs of 0.15 s.
LEG_SECONDS = 0.015
# Batches of a race that are timed again because the run slept: one that always seems to must not go on for ever.
MOST_SLEEPS = 20


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of a race, and its time by kind in seconds."""

    measurements: tuple[Measurement, ...] = ()
    seconds: Seconds = field(default_factory=lambda: Seconds(float))


_Timed: TypeAlias = tuple[PlannedBlock, timing.Block]


class Race:
    """One case and its contenders over all processes.

    Args:
        spec: the request.
        candidates: the implementations that its contenders name.
        tasks: how workers open the case.
        read_usage: reads the machine's counters and its clock.
    """

    def __init__(
        self,
        spec: RaceSpec,
        candidates: Iterable[Candidate],
        *,
        tasks: Tasks | None = None,
        read_usage: Callable[[], Usage] | None = None,
    ) -> None:
        tasks = tasks or Tasks()
        named = {candidate.name: candidate for candidate in candidates}
        records = [
            ContenderRecord(one.name, named[one.candidate], one.worker) for one in spec.contenders
        ]
        probes = [
            ContenderRecord(name, None, spec.workers[0]) for name in tasks.probes_of(spec.case)
        ]
        self.spec = spec
        self.records = {record.name: record for record in (*records, *probes)}
        self.seconds = Seconds(float)
        self.budget = RaceBudget(spec.plan)
        self._rounds = Rounds(
            [*records, *probes], baseline=spec.baseline, plan=spec.plan, case=spec.case
        )
        self._workers = RaceWorkers(
            spec.case, self.records, plan=spec.plan, tasks=tasks, seconds=self.seconds
        )
        self._noise = MachineNoise(spec.case.device, read_usage)
        self._noise_log = NoiseLog()
        self._node = "local"
        self._processes = 0
        self._sleeps = 0

    @property
    def plan(self) -> Plan:
        return self.spec.plan

    def run(self, workers: Workers) -> Result:
        """Run every process of the race; return the result."""
        while self.run_process(workers):
            pass
        return self.result()

    def run_process(self, workers: Workers) -> bool:
        """Run the next process by itself; return whether another one follows."""
        seconds = self.budget.usual_seconds
        steps = self.run_next(workers, seconds=seconds, step_seconds=BATCH_SECONDS)
        while True:
            try:
                next(steps)
            except StopIteration as end:  # noqa: PERF203 (so a generator returns its value)
                return bool(end.value)

    def run_next(
        self, workers: Workers, *, seconds: float, step_seconds: float
    ) -> Generator[None, None, bool]:
        """Run the next process in steps, so that other races can run between them.

        Args:
            workers: provides the workers.
            seconds: of rounds.
            step_seconds: approximate duration of a step.

        Returns:
            Whether another process follows.
        """
        process = self._processes
        if not self._open(workers, process):
            return False
        self._node = self._workers.node
        yield from self._run_process(process, seconds, step_seconds)
        self._processes += 1
        if baseline := self.records.get(self.spec.baseline):
            if process == 0:
                stop_slow_candidates(self._candidates(), baseline, self.plan.early_stop_ratio)
            if self._processes == PACE_FROM:
                self.budget.set_pace(self._processes, pairs(self._candidates(), baseline))
        return bool(self._candidates()) and self._processes < self.plan.processes

    def check(self, workers: Workers) -> Result:
        """Run every candidate once against the reference, timing nothing."""
        for name in [name for name, record in self.records.items() if not record.candidate]:
            del self.records[name]
        if self._open(workers, 0):
            self._workers.close()
        return self.result()

    def fail(self, failure: WorkerFailure) -> None:
        """Record the failure for every contender that has none."""
        self._workers.fail(failure)

    def result(self) -> Result:
        """Return the result of the processes so far."""
        case = self.spec.case
        flag_implausible(self.records, case, self.plan.bandwidth_limit_slack)
        contention = self._noise_log.contention()
        measurements = tuple(
            make_measurement(
                record, case, baseline=self.spec.baseline, node=self._node, contention=contention
            )
            for record in self.records.values()
        )
        return Result(measurements=measurements, seconds=self.seconds)

    def _open(self, workers: Workers, process: int) -> bool:
        """Open the case in the workers of a process; a failed start is the result of every contender."""
        try:
            started = {spec: workers.worker(spec, process) for spec in self.spec.workers}
        except WorkerFailure as failure:
            self.fail(failure)
            return False
        self._workers.open(process, started)
        return True

    def _running(self) -> list[ContenderRecord]:
        return [record for record in self.records.values() if record.runs]

    def _candidates(self) -> list[ContenderRecord]:
        return [record for record in self._running() if record.candidate]

    def _run_process(self, process: int, seconds: float, step_seconds: float) -> Iterator[None]:
        on_gpu = is_gpu(self.spec.case.device)
        for allocation in range(self.plan.allocations):
            if allocation and self._candidates():
                self._workers.allocate()
            if not self._candidates():
                return
            self._rounds.plan(self._running(), allocation)
            yield from self._run_allocation(
                process, allocation, seconds / self.plan.allocations, step_seconds
            )
            if on_gpu:
                start = self._noise.now()
                device.time_on_device(
                    self._workers, self._running(), self._rounds.shuffled, (process, allocation)
                )
                self.seconds["device_clock"] += self._noise.now() - start
        if process == 0 and on_gpu and self.spec.case.cache == "warm":  # evicting uses energy too
            start = self._noise.now()
            device.measure_energy(self._workers, self._candidates())
            self.seconds["energy"] += self._noise.now() - start
        start = self._noise.now()
        self._workers.verify()
        verified = self._noise.now()
        self.seconds["rechecks"] += verified - start
        if process == 0:
            self._workers.read_programs()
            self.seconds["programs"] += self._noise.now() - verified
        self._workers.close()

    def _run_allocation(
        self, process: int, allocation: int, seconds: float, step_seconds: float
    ) -> Iterator[None]:
        """Run the rounds of one allocation: the plan's, or as many as the seconds allow."""
        rounds = self._rounds
        if rounds.workers > 1:  # each worker gets the time of a step of one worker
            step_seconds = LEG_SECONDS * rounds.workers
        step = rounds.within(step_seconds)
        batch = max(rounds.within(BATCH_SECONDS), step * (rounds.workers > 1))
        budget = RoundBudget(most=self.plan.rounds, seconds=seconds, round_seconds=rounds.seconds)
        while numbers := budget.next(batch):
            tasks = [
                task
                for start in range(0, len(numbers), step)
                for task in rounds.tasks(numbers[start : start + step], others_between=step < batch)
            ]
            was_one_by_one = self._workers.one_by_one
            seen = yield from self._run_batch(process, allocation, tasks)
            if seen == "again":
                continue
            if seen is not None:
                budget.enter(len(numbers), seen.wall_seconds, noisy=seen.contended())
            elif was_one_by_one or not self._workers.one_by_one:
                return
            # Otherwise repeat the same rounds block by block, to find the contender that killed the worker.

    def _run_batch(
        self, process: int, allocation: int, tasks: Sequence[Task]
    ) -> Generator[None, None, Seen | Literal["again"] | None]:
        """Time the blocks, a task per step.

        Returns:
            The interference; None if a contender ended a worker; 'again' if the batch is to be repeated, because the
            run was suspended or a worker was lost without a contender's doing.
        """
        parts: list[Seen] = []
        timed: list[_Timed] = []
        slept = False
        for task in one_by_one(tasks) if self._workers.one_by_one else tasks:
            blocks = [planned for planned in task.blocks if planned.record.runs]
            if not blocks:
                continue
            if not self._workers.one_by_one:
                yield
            worker = self._workers[task.worker]
            expected = self._rounds.expected_seconds(blocks)
            try:
                self._noise.before()
                done: timing.Batch = worker.call(
                    timing.time_batch, [planned.request for planned in blocks],
                    timeout=self.plan.timeout_seconds + 3 * expected,
                )  # fmt: skip
            except WorkerFailure as failure:
                records = [planned.record for planned in blocks]
                return "again" if self._workers.handle_loss(task.worker, records, failure) else None
            slept |= worker.slept
            self._noise_log.enter_task(done)
            parts.append(self._noise.after(done))
            self.seconds["rechecks"] += done.recheck_seconds
            if done.recheck_seconds:
                self._rounds.evict()
            results = list(zip(blocks, done.blocks, strict=True))
            for planned, block in results:
                if block.status != "ok" and planned.record.runs:
                    raised = WorkerFailure(block.status, block.reason, tail=worker.tail)
                    planned.record.fail(self.spec.case, raised)
            if done.dirty:  # timed with what a candidate left behind
                self._workers.renew(task.worker)
                continue
            timed += [result for result in results if result[1].status == "ok"]
        if slept and self._sleeps < MOST_SLEEPS:
            self._sleeps += 1
            return "again"
        seen = seen_together(parts)
        self._enter(process, allocation, timed, seen)
        return seen

    def _enter(self, process: int, allocation: int, timed: Sequence[_Timed], seen: Seen) -> None:
        noisy = self._noise_log.enter_blocks(len(timed), seen)
        # Rounds beyond the plan's are run only because as many earlier ones were noisy.
        self._noise_log.enter_redone(sum(one.round >= self.plan.rounds for one, _ in timed))
        for planned, block in timed:
            calls, seconds = planned.request.calls, float(f"{block.seconds:.6g}")
            place = process, allocation, planned.round, calls
            planned.record.columns.append((*place, seconds, int(noisy)))
            if planned.request.warmup:
                planned.record.lost_columns.append(lost_calls(planned.request, block))
            if self._rounds.workers > 1:
                planned.record.processor_columns.append((*place, block.processor_seconds, 0))
            self.seconds["samples"] += block.seconds * calls
            self.seconds["warmup"] += block.warmup_seconds


def race_in_one_worker(
    case: Case,
    candidates: Sequence[Candidate],
    *,
    baseline: str,
    plan: Plan,
    worker: WorkerSpec | None = None,
    tasks: Tasks | None = None,
    read_usage: Callable[[], Usage] | None = None,
) -> Race:
    """Return the race of these candidates in workers of one kind."""
    names = [candidate.name for candidate in candidates]
    spec = RaceSpec.in_one_worker(
        case, names, baseline=baseline, plan=plan, worker=worker or WorkerSpec()
    )
    return Race(spec, candidates, tasks=tasks, read_usage=read_usage)
