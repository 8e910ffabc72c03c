"""Open the workers of one race, and replace one that a contender kills, so that the others continue."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import IDENTITY, PROBES, SMALL_NBYTES, Plan, WorkerSpec
from poolbench.core.program import Program
from poolbench.core.registry import input_nbytes
from poolbench.engine.process import WorkerLike
from poolbench.engine.recorder import ContenderRecord, Seconds
from poolbench.machine.nvml import is_gpu
from poolbench.worker import contender, session, spots
from poolbench.worker.verify import Finding, verify

# Abandon a race after this many worker deaths that no candidate caused.
MAX_DEATHS = 3


class Workers(Protocol):
    """Provides the worker processes of a race."""

    def worker(self, spec: WorkerSpec, process: int, /) -> WorkerLike:
        """Return the worker of this kind: the same one for the same number, fresh ones for new numbers."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The module-level functions that open a case and its contenders in a worker, sent by name.

    The defaults open an op's case, its candidates and the bandwidth probes; a model's step brings its own.

    Attributes:
        open_case: (session, case, seed) -> Opened.
        open_contender: (session, name, check) -> OpenedContender.
        probes: names of the bandwidth probes that race too.
        read_program: (session, name) -> Program or None; None: no programs are read.
        compares_processes: whether results of each process are compared with those that the first one checked. On a
            GPU they are not: copies of results to the host would take a fifth of the time.
    """

    open_case: Callable[..., session.Opened] = session.open_case
    open_contender: Callable[..., contender.OpenedContender] = contender.open_contender
    probes: tuple[str, ...] = PROBES
    read_program: Callable[..., Program | None] | None = None
    compares_processes: bool = False

    def probes_of(self, case: Case) -> tuple[str, ...]:
        """Return the probes of a case: for small inputs on a CPU also the cheapest call."""
        small = 0 < input_nbytes(case) < SMALL_NBYTES and not is_gpu(case.device)
        return (*self.probes, IDENTITY) if self.probes and small else self.probes


class RaceWorkers:
    """The workers of one process of a race, one of each kind, with its case open in them.

    Attributes:
        seconds: total time of opening, by kind.
        one_by_one: whether each block is a task of its own, because a worker was lost in a longer task and
            the contender that kills the next one must be identified.
    """

    def __init__(
        self,
        case: Case,
        records: Mapping[str, ContenderRecord],
        *,
        plan: Plan,
        tasks: Tasks,
        seconds: Seconds,
    ) -> None:
        self.seconds = seconds
        self.one_by_one = False
        self._case = case
        self._records = records
        self._plan = plan
        self._tasks = tasks
        self._process = 0
        self._workers: dict[WorkerSpec, WorkerLike] = {}
        self._deaths = 0
        self._stopped_in: set[int] = set()
        self._samples: dict[WorkerSpec, spots.Samples] = {}

    def __getitem__(self, spec: WorkerSpec) -> WorkerLike:
        return self._workers[spec]

    def call(self, spec: WorkerSpec, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a function's result, run in the worker of this kind within the plan's time limit of a task."""
        return self._workers[spec].call(function, *arguments, timeout=self._plan.timeout_seconds)

    @property
    def node(self) -> str:
        """Return the node of the workers."""
        return next(iter(self._workers.values())).node

    def open(self, process: int, workers: Mapping[WorkerSpec, WorkerLike]) -> None:
        """Open the case and its contenders in the workers of this process of the race."""
        self._process = process
        self._workers = dict(workers)
        for spec in self._workers:
            self.reopen(spec)

    def reopen(self, spec: WorkerSpec) -> None:
        """Open the case and every contender of this worker, until no contender kills it."""
        while True:
            try:
                opened = self.call(spec, self._tasks.open_case, self._case, self._plan.seed)
            except WorkerFailure as failure:
                if self._should_retry(failure):
                    continue
                self.fail(failure, spec)
                return
            self.seconds["allocation"] += opened.seconds
            complete = all(self._open_contender(record) for record in self._running(spec))
            if complete and (not self._running(spec) or self._expect(spec)):
                return

    def fail(self, failure: WorkerFailure, spec: WorkerSpec | None = None) -> None:
        """Record the failure for every contender that has none, of this worker or of all."""
        for record in self._running(spec):
            record.fail(self._case, failure)

    def allocate(self) -> None:
        """Allocate new inputs in every worker."""
        for spec in self._workers:
            try:
                self.seconds["allocation"] += self.call(spec, session.allocate)
            except WorkerFailure as failure:  # noqa: PERF203 (each worker's is its own)
                if failure.lost:  # continue with a fresh worker
                    self.reopen(spec)
                else:
                    self.fail(failure, spec)

    def close(self) -> None:
        """Close the case in the workers; replace a worker that fails to."""
        for spec in self._workers:
            try:
                self.call(spec, session.close_case)
            except WorkerFailure as failure:  # noqa: PERF203 (each worker's is its own)
                # A lost worker holds nothing. Otherwise a candidate left something that cannot be released.
                if not failure.lost:
                    self._replace(spec)

    def verify(self) -> None:
        """Check every candidate again after timing: inputs and settings in each process.

        Comparing all values takes longest: it is done in the first process, whose accepted results those of
        further ones are compared with, or on the timed inputs in the first one and on others in the last one.
        """
        samples = self._tasks.compares_processes and not is_gpu(self._case.device)
        for spec in self._workers:
            if samples:
                fresh = old = spec not in self._samples
            else:
                fresh, old = self._process == self._plan.processes - 1, self._process == 0
            try:
                found: dict[str, Finding] = self.call(spec, verify, fresh, old)
                if samples and fresh:
                    self._samples[spec] = self.call(spec, spots.accepted)
            except WorkerFailure as failure:
                if not failure.lost:
                    self.fail(failure, spec)
                    continue
                if self._should_retry(failure):  # the next process starts a fresh one
                    continue
                # The next process checks all values again: nothing was accepted.
                found = self._verify_one_by_one(spec, fresh, old)
            for record in self._running(spec):
                if finding := found.get(record.task_name):
                    reason = f"{finding.reason} (process {self._process + 1})"
                    record.fail(self._case, WorkerFailure(finding.status, reason))
            if any(finding.status == "error" for finding in found.values()):
                self._replace(spec)

    def _verify_one_by_one(self, spec: WorkerSpec, fresh: bool, old: bool) -> dict[str, Finding]:
        """Check the candidates in tasks of their own, to find the one that ends the worker; return the findings."""
        found: dict[str, Finding] = {}
        self.reopen(spec)
        for record in self._running(spec):
            if record.candidate is None:
                continue
            try:
                found |= self.call(spec, verify, fresh, old, (record.task_name,))
            except WorkerFailure as failure:
                record.fail(self._case, failure)
                if failure.lost:
                    self.reopen(spec)
        return found

    def _expect(self, spec: WorkerSpec) -> bool:
        """Tell a worker which results the first process accepted; return False if the worker was lost."""
        if spec not in self._samples:
            return True
        try:
            self.seconds["rechecks"] += self.call(spec, spots.expect, self._samples[spec])
        except WorkerFailure as failure:
            if not self._should_retry(failure):
                self.fail(failure, spec)
            return not failure.lost
        return True

    def read_programs(self) -> None:
        """Read what was compiled of each candidate, once per race and after timing; it costs a compilation or two."""
        if self._tasks.read_program is None:
            return
        for record in self._running():
            if record.candidate is None or record.program is not None:
                continue
            # A program is evidence beside the times: without it they stand.
            with contextlib.suppress(WorkerFailure):
                record.program = self.call(
                    record.worker, self._tasks.read_program, record.task_name
                )

    def renew(self, spec: WorkerSpec) -> None:
        """Replace a worker in which a candidate changed process-wide state."""
        self._replace(spec)
        self.reopen(spec)

    def handle_loss(
        self, spec: WorkerSpec, contenders: Sequence[ContenderRecord], failure: WorkerFailure
    ) -> bool:
        """Record a failed task of these contenders; open a fresh worker if the task killed it.

        Returns:
            Whether no contender is to blame, and the task is to be done again.
        """
        retry = self._should_retry(failure)
        if not retry:
            if len({record.name for record in contenders}) > 1:
                self.one_by_one = True
            else:
                contenders[0].fail(self._case, failure)
        if failure.lost:
            self.reopen(spec)
        return retry

    def _running(self, spec: WorkerSpec | None = None) -> list[ContenderRecord]:
        return [r for r in self._records.values() if r.runs and spec in (None, r.worker)]

    def _should_retry(self, failure: WorkerFailure) -> bool:
        """Tell whether no task caused the worker's death and such deaths are below the limit."""
        if failure.stopped and self._process not in self._stopped_in:
            # From outside, it seems. A candidate that stops its process does so again.
            self._stopped_in.add(self._process)
            return True
        self._deaths += failure.blameless
        return failure.blameless and self._deaths <= MAX_DEATHS

    def _replace(self, spec: WorkerSpec) -> None:
        """End the worker's process; its next task gets a fresh one."""
        # The worker ends without an answer.
        with contextlib.suppress(WorkerFailure):
            self.call(spec, session.end_process)

    def _open_contender(self, record: ContenderRecord) -> bool:
        """Open one contender; return False if the worker was lost, or must be replaced."""
        unchecked = record.accuracy is None
        try:
            opened = self.call(
                record.worker, self._tasks.open_contender, record.task_name, unchecked
            )
        except WorkerFailure as failure:
            if not self._should_retry(failure):
                record.fail(self._case, failure)
            return not failure.lost
        self.seconds["first_calls"] += opened.first_call_seconds
        self.seconds["checks"] += opened.check_seconds + opened.calibration_seconds
        record.accuracy = record.accuracy or opened.accuracy
        record.settings = record.settings or opened.settings
        if opened.status != "ok":
            tail = self._workers[record.worker].tail
            record.fail(self._case, WorkerFailure(opened.status, opened.reason, tail=tail))
        if opened.tainted:
            self._replace(record.worker)
            return False
        if opened.status != "ok":
            return True
        if record.candidate and len(record.first_calls) <= self._process:
            record.first_calls.append(opened.first_call_seconds)
        record.call_seconds = opened.call_seconds or record.call_seconds
        record.read_nbytes, record.written_nbytes = opened.read_nbytes, opened.written_nbytes
        record.peak_nbytes = record.peak_nbytes or opened.peak_nbytes
        return True
