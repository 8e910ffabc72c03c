"""Races on this machine: its worker processes, and whose turn it is.

A race is not run at a stretch. What else uses a machine changes within a minute, and speeds up one spelling
more than another; replicas that follow each other within seconds agree on a ratio that the next minute does
not. So races take turns, replica by replica, and a race's interval spans minutes.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import workload
from bench.candidate import REGISTRY
from bench.case import Case, input_nbytes
from bench.measurement import Measurement, Node, Status
from bench.race import Plan, Race, Result, Seconds
from bench.replica import Setting, Worker, WorkerFailure

# The inputs, a second allocation, the oracle's answer, outputs and a framework's temporaries.
COPIES_HELD = 10
# Turns, of a second or so each, from one replica of a race to its next. With ten replicas twenty races are
# under way at a time, each for four minutes: a longer span would lose more of a run that is killed.
TURNS_BETWEEN = 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """A race that is asked for: plain data."""

    case: Case
    candidates: tuple[str, ...]
    baseline: str
    plan: Plan
    setting: Setting

    def make_race(self) -> Race:
        """The race, not begun."""
        entries = [REGISTRY.candidates[self.case.op, name] for name in self.candidates]
        return Race(self.case, entries, baseline=self.baseline, plan=self.plan)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A race that came back, and the node that ran it.

    Attributes:
        node: None where it was this machine, or where no node could run it.
        error: a fault of the harness itself, to be raised where the race was asked for.
    """

    job: Job
    result: Result
    node: Node | None = None
    error: Exception | None = None


class LocalFleet:
    """Worker processes on this machine, kept as long as their setting holds."""

    def __init__(self, files: Sequence[Path], memory_nbytes: int | None) -> None:
        self._files = files
        self._memory_nbytes = memory_nbytes
        self._setting: Setting | None = None
        self._workers: list[Worker] = []

    def use(self, setting: Setting, replicas: int) -> None:
        """Have at least `replicas` workers with this setting, started side by side."""
        if setting != self._setting:
            self.close()
            self._setting = setting
        while len(self._workers) < replicas:
            worker = Worker(setting, files=self._files, memory_nbytes=self._memory_nbytes)
            self._workers.append(worker)
            worker.start()
        for worker in self._workers:
            worker.wait_started()

    def worker(self, replica: int) -> Worker:
        """The worker of a replica; a new number gets a fresh process."""
        assert self._setting is not None, "use() comes first"
        self.use(self._setting, replica + 1)
        return self._workers[replica]

    def started(self) -> Worker | None:
        """A worker that is up, if there is one."""
        return self._workers[0] if self._workers else None

    def close(self) -> None:
        """End every worker."""
        workers, self._workers = self._workers, []
        self._setting = None
        for worker in workers:
            worker.kill()  # all at once: waiting for the end of each is felt at a Ctrl-C
        for worker in workers:
            worker.close()


class LocalRaces:
    """Races of this machine in turns: `submit` them, ask for `next_done` until all are back.

    A turn is one replica of one race. The replicas of a race are TURNS_BETWEEN turns apart, and a new
    race begins as often as one comes to its end, so that they come back one by one and in order.

    Args:
        fleet: the worker processes.
        memory_nbytes: a worker's limit.
        ready: called when the workers are up, before anything is run: a journal that cannot be
            written is found out before time is spent.
    """

    def __init__(
        self,
        fleet: LocalFleet,
        memory_nbytes: int | None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.fleet = fleet
        self._memory_nbytes = memory_nbytes
        self._ready = ready
        self._queue: deque[Job] = deque()
        self._turns: list[_Turn] = []
        self._next_begin = 0

    def submit(self, job: Job) -> None:
        """Queue a race."""
        self._queue.append(job)

    def next_done(self) -> Done:
        """Go on with whoever's turn it is until a race is at its end."""
        while True:
            self._begin_races()
            if not self._turns:
                raise RuntimeError("no race is queued")
            turn = heapq.heappop(self._turns)
            try:
                next(turn.steps)
            except StopIteration as end:
                return Done(job=turn.job, result=end.value)
            except Exception as error:  # noqa: BLE001 (raised where the race was asked for)
                nothing = Result(measurements=(), seconds=Seconds(float))
                return Done(job=turn.job, result=nothing, error=error)
            turn.due += TURNS_BETWEEN
            heapq.heappush(self._turns, turn)

    def under_way(self) -> float:
        """How many races' worth of work has been done on those that are not at their end."""
        return sum(min(1.0, turn.replicas / turn.job.plan.replicas) for turn in self._turns)

    def close(self) -> None:
        """End every worker; races under way are given up."""
        self._queue.clear()
        self._turns.clear()
        self.fleet.close()

    def _begin_races(self) -> None:
        """Begin those whose time has come; one of another setting waits until nobody is under way."""
        while self._queue:
            job = self._queue[0]
            first = self._turns[0] if self._turns else None
            if first and (self._next_begin > first.due or first.job.setting != job.setting):
                return
            begin = self._next_begin
            turn = _Turn(due=begin, begin=begin, job=job, steps=self._steps(job))
            heapq.heappush(self._turns, turn)
            self._next_begin += job.plan.replicas
            self._queue.popleft()

    def _steps(self, job: Job) -> Generator[None, None, Result]:
        """Run a race, a replica a step; or say in its measurements why it cannot be."""
        race = job.make_race()
        if reason := too_large(job.case, self._memory_nbytes):
            return Result(measurements=refuse(race, reason), seconds=Seconds(float))
        more = True
        while more:
            start = time.monotonic()
            try:
                self.fleet.use(job.setting, job.plan.replicas)
            except WorkerFailure as failure:
                reason = f"no worker could be started: {failure.reason}"
                race.fail(WorkerFailure(failure.status, reason, tail=failure.tail))
                return race.result()
            race.seconds["start"] += time.monotonic() - start
            self._ready()
            start, before = time.monotonic(), sum(race.seconds.values())
            more = race.run_next(self.fleet)
            spent = sum(race.seconds.values()) - before
            race.seconds["waiting"] += time.monotonic() - start - spent
            if more:
                yield
        return race.result()


@dataclass(order=True, kw_only=True)
class _Turn:
    """A race under way: when its next replica is due, and when its first one was."""

    due: int
    begin: int
    job: Job = field(compare=False)
    steps: Generator[None, None, Result] = field(compare=False)

    @property
    def replicas(self) -> int:
        """How many of its replicas have been run."""
        return (self.due - self.begin) // TURNS_BETWEEN


def too_large(case: Case, memory_nbytes: int | None) -> str:
    """Why this machine, or a worker's limit, cannot hold the case; '' if they can."""
    available = psutil.virtual_memory().available
    limit = min(available, memory_nbytes or available)
    needed = COPIES_HELD * input_nbytes(case)
    if needed <= limit:
        return ""
    return (
        f"the case needs about {needed / 2**30:.1f} GiB ({COPIES_HELD} times its input of "
        f"{input_nbytes(case) / 2**30:.1f} GiB), {limit / 2**30:.1f} GiB are free; "
        "take a smaller shape (--axis shape=...)"
    )


def device_names(worker: Worker | None) -> dict[str, str]:
    """The devices that a worker sees, by name; without TensorFlow, the CPU alone."""
    if worker is None or not worker.setting.tensorflow:
        return {"cpu:0": "CPU"}
    devices: dict[str, str] = worker.call(workload.list_devices, timeout=60)
    return devices


def refuse(
    race: Race, reason: str, status: Status = "not_run", tail: str = ""
) -> tuple[Measurement, ...]:
    """Measurements that say why nothing of the race was run."""
    return tuple(
        Measurement(
            case=race.case,
            candidate=tally.name,
            form=tally.candidate.form if tally.candidate else "function",
            kind="candidate" if tally.candidate else "probe",
            status=status,
            reason=reason,
            tail=tail,
            baseline=race.baseline,
        )
        for tally in race.tallies.values()
    )
