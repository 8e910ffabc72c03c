"""Compare base with head: one candidate in workers of two kinds, in one race that ends when it is decided.

The kinds may differ in interpreter, code, environment, backend or threads. Short legs of the workers
alternate in balanced random order, on newly allocated inputs each time. A race may have a third
worker per process, of base's kind: base against base shows the false alarms of the very same race.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.program import Program
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import WorkerLike
from poolbench.engine.race import LEG_SECONDS, Race
from poolbench.engine.recorder import ContenderRecord
from poolbench.engine.recovery import Tasks, Workers
from poolbench.stats.side_by_side import Rule, SideBySide, compare_legs
from poolbench.worker import contender, session
from poolbench.worker.outputs import Outputs, difference, read_outputs

BASE, HEAD, AGAIN = "base", "head", "base-again"
# Legs of each worker in one visit to its process, each on inputs of its own.
LEGS = 16
BLOCK_SECONDS = 0.001
# No framework reads this variable; it distinguishes a second worker of the same kind.
COPY = "POOLBENCH_COPY"


class Shared:
    """Workers of a fixed number of processes, whose visits go round them.

    Args:
        workers: provides the processes.
        processes: of each kind.
    """

    def __init__(self, workers: Workers, processes: int) -> None:
        self._workers = workers
        self._processes = processes

    def worker(self, spec: WorkerSpec, process: int, /) -> WorkerLike:
        """Return the worker of this visit."""
        return self._workers.worker(spec, process % self._processes)


class VersionsRace:
    """One candidate in one case: its race, and what it has shown.

    Args:
        case: the case.
        candidate: its name.
        base: the kind of worker that ratios are taken to.
        head: the other kind; it may be equal.
        rule: decides.
        control: whether base also races itself.
        programs: whether `check` also reads the compiled programs.
        seed: of inputs and orders.
        timeout_seconds: for each task of a worker.
    """

    def __init__(
        self,
        case: Case,
        candidate: str,
        *,
        base: WorkerSpec,
        head: WorkerSpec,
        rule: Rule | None = None,
        control: bool = False,
        programs: bool = False,
        seed: int = 0,
        timeout_seconds: float = 60.0,
    ) -> None:
        self.rule = rule or Rule()
        sides = {BASE: base, HEAD: _copy_of(base, "2") if head == base else head}
        if control:
            sides[AGAIN] = _copy_of(base, "1")
        most = self.rule.looks[-1]
        plan = Plan(
            processes=most, allocations=LEGS, rounds=round(LEG_SECONDS / BLOCK_SECONDS), block_seconds=BLOCK_SECONDS,
            budget_seconds=most * LEGS * len(sides) * LEG_SECONDS, seed=seed,
            timeout_seconds=timeout_seconds, early_stop_ratio=float("inf"),
        )  # fmt: skip
        contenders = tuple(
            Contender(candidate=candidate, worker=worker, label=label)
            for label, worker in sides.items()
        )
        spec = RaceSpec(case=case, contenders=contenders, baseline=contenders[0].name, plan=plan)
        self.race = Race(spec, [REGISTRY.candidates[case.op, candidate]], tasks=Tasks(probes=()))
        self.case, self.candidate, self.labels = case, candidate, tuple(sides)
        self.visits = 0
        self.difference = ""
        self.programs: dict[str, Program | None] = {}
        self._reads_programs = programs

    def check(self, workers: Workers) -> bool:
        """Check both sides against the reference and compare their outputs; return whether both can be timed."""
        read = {label: self._read(label, workers) for label in (BASE, HEAD)}
        base, head = read[BASE], read[HEAD]
        if base and head:
            self.difference = difference(self.case, base, head)
        if AGAIN in self.labels:
            one, other = self._record(BASE), self._record(AGAIN)
            other.status, other.accuracy = one.status, one.accuracy
            other.call_seconds = one.call_seconds
        return not self.reason

    def visit(self, workers: Workers) -> bool:
        """Time one process of each kind; return whether it is time for a look."""
        more = self.race.run_process(workers)
        self.visits += 1
        return not more or self.finished or self.visits in self.rule.looks

    def spec_of(self, label: str) -> WorkerSpec:
        """Return the kind of a side's workers."""
        return self._record(label).worker

    @property
    def finished(self) -> bool:
        """Tell whether the race has used its visits, or a side fails."""
        return bool(self.reason) or self.visits >= self.rule.looks[-1]

    @property
    def reason(self) -> str:
        """Return why a side has no correct result; '' if both have."""
        failed = [(label, self._record(label)) for label in (BASE, HEAD)]
        return "; ".join(
            f"{label}: {one.status}: {one.reason}" for label, one in failed if one.status != "ok"
        )

    def compare(self, label: str = HEAD) -> SideBySide:
        """Return the comparison of a side with base so far, judged."""
        base, other = self._record(BASE), self._record(label)
        confidence = self.rule.confidence
        wall = compare_legs(other.columns, base.columns, confidence)
        used = compare_legs(other.processor_columns, base.processor_columns, confidence)
        statuses = base.status == "ok", other.status == "ok"
        verdict, clock = self.rule.judge_both(wall, used, *statuses)
        seconds = [row[4] for row in base.columns]
        return SideBySide(
            case=self.case, candidate=self.candidate, verdict=verdict, clock=clock, wall=wall, processor=used,
            seconds=float(np.median(seconds)) if seconds else float("nan"), visits=self.visits,
            difference=self.difference, reason=self.reason,
        )  # fmt: skip

    def _record(self, label: str) -> ContenderRecord:
        return self.race.records[Contender(candidate=self.candidate, label=label).name]

    def _read(self, label: str, workers: Workers) -> Outputs | None:
        """Open a side and check it; return its outputs, or None with its record's status set."""
        record, plan = self._record(label), self.race.plan
        try:
            worker = workers.worker(record.worker, 0)

            def call(function: Any, *args: Any) -> Any:
                return worker.call(function, *args, timeout=plan.timeout_seconds)

            call(session.open_case, self.case, plan.seed)
            opened: contender.OpenedContender = call(contender.open_contender, self.candidate, True)
            if opened.tainted:
                with contextlib.suppress(WorkerFailure):  # the process ends without an answer
                    call(session.end_process)
            if opened.status != "ok":
                record.fail(self.case, WorkerFailure(opened.status, opened.reason))
                return None
            outputs: Outputs = call(read_outputs, self.candidate)
            if self._reads_programs:
                self.programs[label] = call(contender.read_program, self.candidate)
            call(session.close_case)
        except WorkerFailure as failure:
            record.fail(self.case, failure)
            return None
        record.accuracy, record.call_seconds = opened.accuracy, opened.call_seconds
        return outputs


def _copy_of(spec: WorkerSpec, number: str) -> WorkerSpec:
    environment = (*spec.environment, (COPY, number))
    return msgspec.structs.replace(spec, environment=environment)
