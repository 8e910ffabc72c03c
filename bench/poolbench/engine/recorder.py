"""One contender as its race goes: its status, its blocks, and what else the race has learned of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.records import Accuracy, Clock, Samples, Status

FLAGS = {
    "stopped_early": "ten times slower than the baseline in the first process: stopped there, no interval",
    "faster-than-limit": "faster than the memory allows: something was folded away or not run",
    "documented": "the wrong answer is a documented one",
    "contended": "in most of its blocks something else used the machine, or the host had its processors far from "
    "each other, and no better time came",
}

# Of one block: process, allocation, round, calls, seconds, contended.
Row = tuple[int, int, int, int, float, int]


@dataclass
class ContenderRecord:
    """One contender as the race goes."""

    name: str
    candidate: Candidate | None  # None for a probe
    status: Status = "ok"
    reason: str = ""
    tail: str = ""
    issue: str = ""
    flags: list[str] = field(default_factory=list)
    accuracy: Accuracy | None = None
    first_calls: list[float] = field(default_factory=list)
    call_seconds: float = 0.0  # the least seen
    usual_seconds: float = 0.0
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int | None = None
    energy_joules: float | None = None
    stopped_early: bool = False
    every: int = 1  # its turn comes in each `every`-th round
    columns: list[Row] = field(default_factory=list)
    device_columns: list[Row] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return self.status == "ok" and not self.stopped_early

    @property
    def nbytes(self) -> int:
        return self.read_nbytes + self.written_nbytes

    @property
    def clock(self) -> Clock:
        """The device's own where it timed this contender in each process that it ran in."""
        processes = {row[0] for row in self.columns}
        timed = {row[0] for row in self.device_columns}
        return "device" if processes and timed == processes else "wall"

    def samples(self, clock: Clock) -> Samples:
        columns = self.columns if clock == "wall" else self.device_columns
        rows = list(zip(*columns, strict=True)) or [()] * 6
        names = ("process", "allocation", "round", "calls", "seconds", "contended")
        return Samples(**dict(zip(names, rows, strict=True)))

    def fail(self, case: Case, failure: WorkerFailure) -> None:
        """Enter a failure; a documented one becomes `unsupported`, or a documented wrong answer."""
        self.status, self.reason, self.tail = failure.status, failure.reason, failure.tail
        for known in self.candidate.failures if self.candidate else ():
            if known.when(case) and re.search(known.matches, failure.reason):
                if failure.status == "wrong":
                    self.flags.append("documented")
                else:
                    self.status = "unsupported"
                self.reason = f"{known.reason} [{failure.reason}]"
                self.issue = known.issue
                return


def middle(values: Iterable[float]) -> float:
    """The median."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
