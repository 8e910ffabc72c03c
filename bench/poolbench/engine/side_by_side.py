"""A job of base-against-head races: every candidate and case in turn, each until it is decided or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import msgspec

from poolbench.core.case import Case
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine.contenders import backend_of, worker_spec
from poolbench.engine.recovery import Workers
from poolbench.engine.sides import Side
from poolbench.engine.versions import AGAIN, BASE, HEAD, Shared, VersionsRace
from poolbench.machine.limits import free_memory_nbytes
from poolbench.stats.side_by_side import Report, Rule, SideBySide

# One race in so many also races base against base.
CONTROL_EVERY = 3
# Starting a process takes as long as several visits, so visits share this many of each kind.
PROCESSES = 4
WORKER_NBYTES = 700 << 20  # of a worker with TensorFlow
Pair = tuple[Case, str]


class Pool(Workers, Protocol):
    """Worker processes that are started side by side."""

    def prepare(
        self, specs: Sequence[WorkerSpec], processes: int, *, keep_others: bool = False
    ) -> None:
        """Start at least so many workers of each kind."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The request.

    Attributes:
        base, head: the sides.
        pairs: cases and candidates.
        rule: decides each of them.
        budget_seconds: of the whole, but for environments.
        seed: of inputs and orders.
        timeout_seconds: for each task of a worker.
        control_every: one race in so many also races base against base; 0 for none.
    """

    base: Side
    head: Side
    pairs: tuple[Pair, ...]
    rule: Rule = field(default_factory=Rule)
    budget_seconds: float = 180.0
    seed: int = 0
    timeout_seconds: float = 60.0
    control_every: int = CONTROL_EVERY


def run_job(
    job: Job,
    pool: Pool,
    *,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Run the races.

    Raises:
        UsageError: a worker of a side cannot start.
    """
    start = clock()
    numbered = list(enumerate(job.pairs))
    numbered.sort(key=lambda item: msgspec.json.encode(_kind(*item[1])))
    heads: dict[int, SideBySide] = {}
    controls: dict[int, SideBySide] = {}
    # A process fixes its threads and its backend: pairs of one kind share the processes.
    for _, items in groupby(numbered, key=lambda item: _kind(*item[1])):
        group = dict(items)
        left = job.budget_seconds - (clock() - start)
        share = left * len(group) / (len(numbered) - len(heads))
        races = _Group(job, group, pool, say)
        races.run(clock, clock() + share)
        heads |= races.heads
        controls |= races.controls
    return Report(
        base=job.base.title,
        head=job.head.title,
        rule=job.rule,
        heads=tuple(heads[number] for number in sorted(heads)),
        controls=tuple(controls[number] for number in sorted(controls)),
        seconds=clock() - start,
    )


class _Group:
    """The races of one kind of worker.

    Attributes:
        heads, controls: the comparisons so far, by the number of their race.
    """

    def __init__(
        self, job: Job, pairs: dict[int, Pair], pool: Pool, say: Callable[[str], None]
    ) -> None:
        self.heads: dict[int, SideBySide] = {}
        self.controls: dict[int, SideBySide] = {}
        kind = _kind(*next(iter(pairs.values())))
        self._sides = {
            label: merge(side.worker, kind) for label, side in ((BASE, job.base), (HEAD, job.head))
        }
        self.races = {
            number: VersionsRace(
                case, name, base=self._sides[BASE], head=self._sides[HEAD], rule=job.rule,
                control=bool(job.control_every) and number % job.control_every == 0,
                seed=job.seed, timeout_seconds=job.timeout_seconds,
            )
            for number, (case, name) in pairs.items()
        }  # fmt: skip
        self._kinds = tuple(
            dict.fromkeys(w for race in self.races.values() for w in race.race.spec.workers)
        )
        self._pool, self._say = pool, say
        room = int(free_memory_nbytes() / WORKER_NBYTES / len(self._kinds))
        self._processes = max(2, min(PROCESSES, room))
        self._workers = Shared(pool, self._processes)

    def run(self, clock: Callable[[], float], until: float) -> None:
        """Check every pair, then visit the undecided ones in turn until the time is up."""
        start_workers(self._pool, self._sides, 1)
        left = {number for number, race in self.races.items() if race.check(self._workers)}
        for number in self.races.keys() - left:
            self.heads[number] = self.races[number].compare()
        visit, longest = 0, 0.0
        while left and clock() + longest < until:
            if visit < self._processes:
                try:
                    self._pool.prepare(self._kinds, visit + 1, keep_others=True)
                except WorkerFailure as failure:
                    raise UsageError(f"cannot start a worker: {failure.reason}") from None
            for number in sorted(left):
                begun = clock()
                if begun + longest > until:
                    break
                look = self.races[number].visit(self._workers)
                longest = max(longest, clock() - begun)
                if look and self._is_decided(number):
                    left.remove(number)
            visit += 1
            self._say(f"{len(self.races) - len(left)} of {len(self.races)} decided")
        for number in left:
            self._is_decided(number)

    def _is_decided(self, number: int) -> bool:
        """Judge head, and base against itself where it races; an alarm of the latter stays."""
        race = self.races[number]
        self.heads[number] = race.compare()
        known = self.controls.get(number)
        if AGAIN in race.labels and (known is None or known.verdict not in ("SLOWER", "FASTER")):
            self.controls[number] = race.compare(AGAIN)
        return self.heads[number].verdict != "UNDECIDED" or race.finished


def _kind(case: Case, name: str) -> WorkerSpec:
    return worker_spec(case, backend_of([REGISTRY.candidates[case.op, name]]))


def merge(side: WorkerSpec, kind: WorkerSpec) -> WorkerSpec:
    """Return a side's worker with the settings that a case fixes."""
    return msgspec.structs.replace(
        side, backend=kind.backend, threads=kind.threads, logical_devices=kind.logical_devices
    )


def start_workers(pool: Pool, sides: dict[str, WorkerSpec], processes: int) -> None:
    """Start workers of all sides together.

    Raises:
        UsageError: one cannot start; the text names its side.
    """
    pool.prepare((sides[BASE],), 0)  # ends the workers of another kind
    try:
        pool.prepare(tuple(dict.fromkeys(sides.values())), processes, keep_others=True)
    except WorkerFailure:
        for label, spec in sides.items():
            try:
                pool.prepare((spec,), processes, keep_others=True)
            except WorkerFailure as failure:  # noqa: PERF203 (each side's is its own)
                raise UsageError(f"{label}: {failure.reason}") from None
