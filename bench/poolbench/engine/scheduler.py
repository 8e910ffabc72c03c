"""Interleave the races of this machine.

Background load drifts over about a minute and affects implementations unequally, so that processes run back to
back agree with each other but not with a process run a minute later. The processes of a race are therefore spread over
minutes, with processes of other races between them. Rounds within a tenth of a second agree in the same way, so several
races are active at a time and alternate every STEP_SECONDS.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import RaceSpec, WorkerSpec
from poolbench.core.records import Measurement, Node, Status
from poolbench.core.registry import REGISTRY, input_nbytes
from poolbench.core.text import format_nbytes
from poolbench.engine.pool import RotatedPool, WorkerPool
from poolbench.engine.race import BATCH_SECONDS, STEP_SECONDS, Race, Result
from poolbench.engine.recorder import make_measurement
from poolbench.engine.recovery import Tasks
from poolbench.machine.limits import free_memory_nbytes
from poolbench.machine.nvml import is_gpu
from poolbench.worker import contender

# Inputs, a second allocation, the reference's output, outputs and a framework's temporaries.
COPIES_HELD = 10
# Slots, of a second or so each, from one process of a race to its next. With eight processes twenty races are
# under way at a time, each for four minutes: a longer span would lose more of a run that is killed.
PROCESS_SPACING = 24
# Races of which a process is being run at a time, each in workers of its own.
MAX_ACTIVE_RACES = 8
# Memory of a worker without a case. Races that need other workers are interleaved only if twice as much is free.
WORKER_NBYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished race, and the node that ran it.

    Attributes:
        node: None for this machine, or if no node could run the race.
        error: an error of the harness, raised where the race was requested.
    """

    spec: RaceSpec
    result: Result
    node: Node | None = None
    error: Exception | None = None


class Scheduler(Protocol):
    """Runs races: `submit` them, then call `next_done` until all have finished."""

    def submit(self, spec: RaceSpec) -> None:
        """Queue a race."""

    def next_done(self) -> Done:
        """Return the next finished race."""

    def close(self) -> None:
        """Abandon active races and end every worker."""


class LocalScheduler:
    """Races of this machine, interleaved.

    A slot is one process of one race. The processes of a race are PROCESS_SPACING slots from each other, and a
    new race begins whenever one ends, so that races finish one by one and in order. Up to MAX_ACTIVE_RACES slots
    are active and alternate: nothing runs in parallel.

    Args:
        pool: the worker processes.
        memory_nbytes: a worker's limit.
        ready: called when the workers have started, before any race, so that an unwritable journal is found
            before time is spent.
    """

    def __init__(
        self,
        pool: WorkerPool,
        memory_nbytes: int | None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.pool = pool
        self._memory_nbytes = memory_nbytes
        self._ready = ready
        self._queue: deque[RaceSpec] = deque()
        self._waiting: list[_Slot] = []
        self._active: deque[_Slot] = deque()
        self._spare_seconds = 0.0
        self._begun = 0
        self._next_begin = 0

    def submit(self, spec: RaceSpec) -> None:
        """Queue a race."""
        self._queue.append(spec)

    def next_done(self) -> Done:
        """Run steps of the active races in turn until a race has finished."""
        while True:
            self._activate()
            if not self._active:
                raise RuntimeError("no race is queued")
            slot = self._active.popleft()
            try:
                process_ends = next(slot.steps)
            except StopIteration as end:
                return Done(spec=slot.spec, result=end.value)
            except Exception as error:  # noqa: BLE001 (raised where the race was requested)
                return Done(spec=slot.spec, result=Result(), error=error)
            if process_ends:
                slot.due += PROCESS_SPACING
                self._waiting.append(slot)
            else:
                self._active.append(slot)

    def under_way(self) -> float:
        """Return the work done on unfinished races, in races."""
        return sum(min(1.0, slot.processes / slot.spec.plan.processes) for slot in self._slots)

    def close(self) -> None:
        """End every worker; abandon active races."""
        self._queue.clear()
        self._waiting.clear()
        self._active.clear()
        self.pool.close()

    @property
    def _slots(self) -> tuple[_Slot, ...]:
        """Return the slots of the races in progress, except for the one that is running a step."""
        return (*self._waiting, *self._active)

    def _activate(self) -> None:
        while len(self._active) < MAX_ACTIVE_RACES:
            self._begin_races()
            free = [slot for slot in self._waiting if self._has_room(slot)]
            if not free:
                return
            slot = min(free, key=lambda slot: slot.due)
            self._waiting.remove(slot)
            self._active.append(slot)

    def _has_room(self, slot: _Slot) -> bool:
        """Tell whether the slot can be active beside the others: its workers and its memory are free.

        A slot on a GPU is exclusive, because the GPU's memory use is unknown here.
        """
        if not self._active:
            return True
        together = [slot, *self._active]
        return (
            not any(slot.workers & other.workers for other in self._active)
            and not any(is_gpu(one.spec.case.device) for one in together)
            and sum(needed_nbytes(one.spec.case) * len(one.spec.workers) for one in together)
            < free_memory_nbytes()
        )

    def _begin_races(self) -> None:
        """Begin races that are due; a race whose workers do not fit into memory waits for all others."""
        while self._queue:
            spec = self._queue[0]
            due = min((slot.due for slot in self._waiting), default=self._next_begin)
            if self._slots and (self._next_begin > due or not self._workers_fit(spec)):
                return
            begin = self._next_begin
            pool = RotatedPool(pool=self.pool, first=self._begun, processes=spec.plan.processes)
            steps = self._steps(spec, pool)
            self._waiting.append(_Slot(due=begin, begin=begin, spec=spec, pool=pool, steps=steps))
            self._next_begin += spec.plan.processes
            self._begun += 1
            self._queue.popleft()

    def _workers_fit(self, spec: RaceSpec) -> bool:
        """Tell whether the workers of the race have started, or may start beside the others."""
        up = {worker for slot in self._slots for worker in slot.spec.workers}
        new = set(spec.workers) - up
        if not new:
            return True
        free = free_memory_nbytes()
        needed = 2 * WORKER_NBYTES * spec.plan.processes * len(new)
        return not is_gpu(spec.case.device) and needed < free

    def _steps(self, spec: RaceSpec, pool: RotatedPool) -> Generator[bool, None, Result]:
        """Run a race in steps; if it cannot run, its measurements hold the reason.

        Yields:
            Whether a process has finished.
        """
        race = make_race(spec)
        if reason := too_large(spec.case, self._memory_nbytes, workers=len(spec.workers)):
            return Result(measurements=refuse(race, reason))
        own, more = set(spec.workers), True
        while more:
            start = time.monotonic()
            try:
                others = any(not own.issuperset(slot.spec.workers) for slot in self._slots)
                self.pool.prepare(spec.workers, spec.plan.processes, keep_others=others)
            except WorkerFailure as failure:
                reason = f"no worker could be started: {failure.reason}"
                race.fail(WorkerFailure(failure.status, reason, tail=failure.tail))
                return race.result()
            race.seconds["start"] += time.monotonic() - start
            self._ready()
            more = yield from self._process(race, pool)
            if more:
                yield True
        return race.result()

    def _process(self, race: Race, pool: RotatedPool) -> Generator[bool, None, bool]:
        """Run the race's next process in steps; unaccounted time counts as waiting."""
        steps = race.run_next(
            pool,
            seconds=self._seconds_for(race),
            step_seconds=BATCH_SECONDS if is_gpu(race.spec.case.device) else STEP_SECONDS,
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
        """Return the seconds of rounds of its next process: noisy races get the time that steady ones do not need."""
        extra = min(race.budget.extra_seconds, self._spare_seconds / MAX_ACTIVE_RACES)
        self._spare_seconds -= extra
        return race.budget.usual_seconds + extra


@dataclass(eq=False, kw_only=True)
class _Slot:
    """A race in progress: the slots of its first and its next process."""

    due: int
    begin: int
    spec: RaceSpec
    pool: RotatedPool
    steps: Generator[bool, None, Result]

    @property
    def processes(self) -> int:
        """Return the number of finished processes."""
        return (self.due - self.begin) // PROCESS_SPACING

    @property
    def workers(self) -> set[tuple[WorkerSpec, int]]:
        """Return the pool's workers of its active or next process."""
        place = self.pool.place(self.processes)
        return {(worker, place) for worker in self.spec.workers}


def make_race(spec: RaceSpec) -> Race:
    """Return the race, not begun; its candidates are the registered ones."""
    of = REGISTRY.of(spec.case.op)
    return Race(
        spec,
        [of[one.candidate] for one in spec.contenders],
        tasks=Tasks(read_program=contender.read_program, compares_processes=True),
    )


def needed_nbytes(case: Case) -> int:
    """Estimate the memory of a worker while it races the case."""
    return COPIES_HELD * input_nbytes(case)


def too_large(case: Case, memory_nbytes: int | None, *, workers: int = 1) -> str:
    """Return why this machine, or a worker's limit, cannot hold the case; '' if they can."""
    available = free_memory_nbytes() // workers
    limit = min(available, memory_nbytes or available)
    needed = needed_nbytes(case)
    if needed <= limit:
        return ""
    return (
        f"the case needs about {format_nbytes(needed)} ({COPIES_HELD} times its input of "
        f"{format_nbytes(input_nbytes(case))}), {format_nbytes(limit)} are free; "
        "take a smaller shape (--axis shape=...)"
    )


def refuse(race: Race, reason: str, status: Status = "not_run") -> tuple[Measurement, ...]:
    """Return measurements with the reason why the race did not run."""
    for record in race.records.values():
        record.status, record.reason = status, reason
    return tuple(
        make_measurement(record, race.spec.case, baseline=race.spec.baseline)
        for record in race.records.values()
    )
