"""Races on this machine: its worker processes, and whose turn it is.

A race is not run at a batch. What else uses a machine changes within a minute, and speeds up one implementation
more than another; processes that follow each other within seconds agree on a ratio that the next minute does
not. So races take turns, process by process, and a race's interval spans minutes. Within a turn the same holds
for rounds that follow each other within a tenth of a second: several turns are taken at a time, a leg of each.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import Measurement, Node, Status
from poolbench.core.registry import REGISTRY, input_nbytes
from poolbench.engine.process import Worker
from poolbench.engine.race import BATCH_SECONDS, LEG_SECONDS, Plan, Race, Result, Seconds
from poolbench.machine.nvml import is_gpu
from poolbench.worker import session

# The inputs, a second allocation, the reference's answer, outputs and a framework's temporaries.
COPIES_HELD = 10
# Turns, of a second or so each, from one process of a race to its next. With ten processes twenty races are
# under way at a time, each for four minutes: a longer span would lose more of a run that is killed.
TURNS_BETWEEN = 24
# Turns that are taken at a time, each in a worker of its own.
LANES = 8
# Of a worker that holds no case. Races of two settings take turns only where twice as much is free.
WORKER_NBYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class RaceSpec:
    """A race that is asked for: plain data."""

    case: Case
    candidates: tuple[str, ...]
    baseline: str
    plan: Plan
    setting: WorkerSpec

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

    job: RaceSpec
    result: Result
    node: Node | None = None
    error: Exception | None = None


class WorkerPool:
    """Worker processes on this machine, kept until those of another setting are asked for."""

    def __init__(self, files: Sequence[Path], memory_nbytes: int | None) -> None:
        self._files = files
        self._memory_nbytes = memory_nbytes
        self._setting: WorkerSpec | None = None
        self._workers: dict[WorkerSpec, list[Worker]] = {}

    def use(self, setting: WorkerSpec, processes: int, *, beside: bool = False) -> None:
        """Have at least `processes` workers with this setting, started side by side.

        Those of other settings are ended, unless these are to be `beside` them.
        """
        if setting not in self._workers and not beside:
            self.close()
        self._setting = setting
        workers = self._workers.setdefault(setting, [])
        while len(workers) < processes:
            worker = Worker(setting, files=self._files, memory_nbytes=self._memory_nbytes)
            workers.append(worker)
            worker.start()
        for worker in workers:
            worker.wait_started()

    def worker(self, process: int) -> Worker:
        """The worker of a process, with the setting last used; a new number gets a fresh process."""
        assert self._setting is not None, "use() comes first"
        self.use(self._setting, process + 1)
        return self._workers[self._setting][process]

    def started(self) -> Worker | None:
        """A worker that is up, if there is one."""
        return next((workers[0] for workers in self._workers.values() if workers), None)

    def close(self) -> None:
        """End every worker."""
        workers = [worker for some in self._workers.values() for worker in some]
        self._workers, self._setting = {}, None
        for worker in workers:
            worker.kill()  # all at once: waiting for the end of each is felt at a Ctrl-C
        for worker in workers:
            worker.close()


@dataclass(frozen=True, kw_only=True)
class _Shifted:
    """A fleet whose first worker is another one for each race, so that races in lanes meet seldom."""

    fleet: WorkerPool
    first: int
    processes: int

    def place(self, process: int) -> int:
        """Which of the fleet's workers a process has."""
        return (process + self.first) % self.processes if process < self.processes else process

    def worker(self, process: int) -> Worker:
        return self.fleet.worker(self.place(process))


class Scheduler:
    """Races of this machine in turns: `submit` them, ask for `next_done` until all are back.

    A turn is one process of one race. The processes of a race are TURNS_BETWEEN turns apart, and a new
    race begins as often as one comes to its end, so that they come back one by one and in order. Up to
    LANES turns are taken at a time, a leg of one after a leg of another: nothing runs side by side.

    Args:
        fleet: the worker processes.
        memory_nbytes: a worker's limit.
        ready: called when the workers are up, before anything is run: a journal that cannot be
            written is found out before time is spent.
    """

    def __init__(
        self,
        fleet: WorkerPool,
        memory_nbytes: int | None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.fleet = fleet
        self._memory_nbytes = memory_nbytes
        self._ready = ready
        self._queue: deque[RaceSpec] = deque()
        self._waiting: list[_Turn] = []
        self._lanes: deque[_Turn] = deque()
        self._spare_seconds = 0.0
        self._begun = 0
        self._next_begin = 0

    def submit(self, job: RaceSpec) -> None:
        """Queue a race."""
        self._queue.append(job)

    def next_done(self) -> Done:
        """Go on with whoever's turn it is until a race is at its end."""
        while True:
            self._fill_lanes()
            if not self._lanes:
                raise RuntimeError("no race is queued")
            turn = self._lanes.popleft()
            try:
                process_ends = next(turn.steps)
            except StopIteration as end:
                return Done(job=turn.job, result=end.value)
            except Exception as error:  # noqa: BLE001 (raised where the race was asked for)
                nothing = Result(measurements=(), seconds=Seconds(float))
                return Done(job=turn.job, result=nothing, error=error)
            if process_ends:
                turn.due += TURNS_BETWEEN
                self._waiting.append(turn)
            else:
                self._lanes.append(turn)

    def under_way(self) -> float:
        """How many races' worth of work has been done on those that are not at their end."""
        return sum(min(1.0, turn.processes / turn.job.plan.processes) for turn in self._turns)

    def close(self) -> None:
        """End every worker; races under way are given up."""
        self._queue.clear()
        self._waiting.clear()
        self._lanes.clear()
        self.fleet.close()

    @property
    def _turns(self) -> tuple[_Turn, ...]:
        """Of the races under way, but for one whose step is being made."""
        return (*self._waiting, *self._lanes)

    def _fill_lanes(self) -> None:
        while len(self._lanes) < LANES:
            self._begin_races()
            free = [turn for turn in self._waiting if self._has_room(turn)]
            if not free:
                return
            turn = min(free, key=lambda turn: turn.due)
            self._waiting.remove(turn)
            self._lanes.append(turn)

    def _has_room(self, turn: _Turn) -> bool:
        """Whether the turn can be taken beside those in the lanes: its worker and its memory are free.

        A GPU's turn has it for itself: its memory is not seen from here.
        """
        if not self._lanes:
            return True
        beside = [turn, *self._lanes]
        return (
            turn.worker not in {other.worker for other in self._lanes}
            and not any(is_gpu(one.job.case.device) for one in beside)
            and sum(needed_nbytes(one.job.case) for one in beside)
            < psutil.virtual_memory().available
        )

    def _begin_races(self) -> None:
        """Begin those whose time has come; who needs workers that have no room waits until nobody is under way."""
        while self._queue:
            job = self._queue[0]
            due = min((turn.due for turn in self._waiting), default=self._next_begin)
            if self._turns and (self._next_begin > due or not self._workers_fit(job)):
                return
            begin = self._next_begin
            fleet = _Shifted(fleet=self.fleet, first=self._begun, processes=job.plan.processes)
            steps = self._steps(job, fleet)
            self._waiting.append(_Turn(due=begin, begin=begin, job=job, fleet=fleet, steps=steps))
            self._next_begin += job.plan.processes
            self._begun += 1
            self._queue.popleft()

    def _workers_fit(self, job: RaceSpec) -> bool:
        """Whether workers of the job's setting are up, or may be beside those that are."""
        if any(turn.job.setting == job.setting for turn in self._turns):
            return True
        free = psutil.virtual_memory().available
        return not is_gpu(job.case.device) and 2 * WORKER_NBYTES * job.plan.processes < free

    def _others_under_way(self, setting: WorkerSpec) -> bool:
        return any(turn.job.setting != setting for turn in self._turns)

    def _steps(self, job: RaceSpec, fleet: _Shifted) -> Generator[bool, None, Result]:
        """Run a race, a leg a step; or say in its measurements why it cannot be.

        Yields:
            Whether a process is at its end.
        """
        race = job.make_race()
        if reason := too_large(job.case, self._memory_nbytes):
            return Result(measurements=refuse(race, reason), seconds=Seconds(float))
        more = True
        while more:
            start = time.monotonic()
            try:
                self.fleet.use(
                    job.setting, job.plan.processes, beside=self._others_under_way(job.setting)
                )
            except WorkerFailure as failure:
                reason = f"no worker could be started: {failure.reason}"
                race.fail(WorkerFailure(failure.status, reason, tail=failure.tail))
                return race.result()
            race.seconds["start"] += time.monotonic() - start
            self._ready()
            more = yield from self._process(race, fleet)
            if more:
                yield True
        return race.result()

    def _process(self, race: Race, fleet: _Shifted) -> Generator[bool, None, bool]:
        """Run the race's next process, a leg a step; what it does not trace summary for itself was waiting."""
        steps = race.run_next(
            fleet,
            seconds=self._seconds_for(race),
            leg_seconds=BATCH_SECONDS if is_gpu(race.case.device) else LEG_SECONDS,
        )
        while True:
            start, before = time.monotonic(), sum(race.seconds.values())
            try:
                next(steps)
            except StopIteration as end:
                more: bool = end.value
                return more
            finally:
                spent = sum(race.seconds.values()) - before
                race.seconds["waiting"] += time.monotonic() - start - spent
            yield False

    def _seconds_for(self, race: Race) -> float:
        """Seconds of rounds of its next process: what a race does not need is there for those that need more."""
        more = (race.wanted_pace() - 1.0) * race.usual_seconds
        more = min(more, self._spare_seconds / LANES)
        self._spare_seconds -= more
        return race.usual_seconds + more


@dataclass(eq=False, kw_only=True)
class _Turn:
    """A race under way: when its next process is due, and when its first one was."""

    due: int
    begin: int
    job: RaceSpec
    fleet: _Shifted
    steps: Generator[bool, None, Result]

    @property
    def processes(self) -> int:
        """How many of its processes have been run."""
        return (self.due - self.begin) // TURNS_BETWEEN

    @property
    def worker(self) -> tuple[WorkerSpec, int]:
        """Which of the fleet's workers its next process, or the one in a lane, has."""
        return self.job.setting, self.fleet.place(self.processes)


def needed_nbytes(case: Case) -> int:
    """Memory that a worker holds while it races the case, about."""
    return COPIES_HELD * input_nbytes(case)


def too_large(case: Case, memory_nbytes: int | None) -> str:
    """Why this machine, or a worker's limit, cannot hold the case; '' if they can."""
    available = psutil.virtual_memory().available
    limit = min(available, memory_nbytes or available)
    needed = needed_nbytes(case)
    if needed <= limit:
        return ""
    return (
        f"the case needs about {needed / 2**30:.1f} GiB ({COPIES_HELD} times its input of "
        f"{input_nbytes(case) / 2**30:.1f} GiB), {limit / 2**30:.1f} GiB are free; "
        "take a smaller shape (--axis shape=...)"
    )


def device_names(worker: Worker | None) -> dict[str, str]:
    """The devices that a worker sees, by name; without TensorFlow, the CPU alone."""
    if worker is None or not worker.spec.tensorflow:
        return {"cpu:0": "CPU"}
    devices: dict[str, str] = worker.call(session.list_devices, timeout=60)
    return devices


def refuse(
    race: Race, reason: str, status: Status = "not_run", tail: str = ""
) -> tuple[Measurement, ...]:
    """Measurements that say why nothing of the race was run."""
    return tuple(
        Measurement(
            case=race.case,
            candidate=record.name,
            form=record.candidate.form if record.candidate else "function",
            kind="candidate" if record.candidate else "probe",
            status=status,
            reason=reason,
            tail=tail,
            baseline=race.baseline,
        )
        for record in race.records.values()
    )
