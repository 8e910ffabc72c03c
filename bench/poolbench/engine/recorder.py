"""Record the status and the samples of each contender, and convert them to Measurements."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import IDENTITY, PROBES, SMALL_NBYTES, WorkerSpec
from poolbench.core.program import Program
from poolbench.core.records import (
    Accuracy,
    Clock,
    Contention,
    Measurement,
    Samples,
    Status,
    common_clock,
)
from poolbench.core.registry import input_nbytes
from poolbench.core.text import format_seconds
from poolbench.machine.nvml import is_gpu

FLAGS = {
    "stopped_early": "ten times slower than the baseline in the first process: stopped there, no interval",
    "faster-than-limit": "faster than the memory or a call allows: something was folded away or not run",
    "documented": "the wrong answer or crash is a documented one",
    "contended": "something else used the machine in most of its blocks, and no better time came",
}

# A few blocks of a loaded machine can all be slow, a candidate's or a probe's: below so many of either, half the limit
# is the limit.
ENOUGH_BLOCKS, FEW_SLACK = 8, 1.0
TOO_FAST = "faster than {} ({} against {}): something was folded away or not run"

# Of one block: process, allocation, round, calls, seconds, contended.
Row = tuple[int, int, int, int, float, int]
Seconds = defaultdict[str, float]  # seconds by kind: 'samples', 'warmup', 'first_calls', ...


@dataclass
class ContenderRecord:
    """The state of one contender during a race."""

    name: str
    candidate: Candidate | None  # None for a probe
    worker: WorkerSpec = field(default_factory=WorkerSpec)
    status: Status = "ok"
    reason: str = ""
    tail: str = ""
    issue: str = ""
    flags: list[str] = field(default_factory=list)
    accuracy: Accuracy | None = None
    first_calls: list[float] = field(default_factory=list)
    call_seconds: float = 0.0  # the minimum so far
    usual_seconds: float = 0.0
    lost_calls: float = 0.0  # by a block before the call is steady, the median so far
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int | None = None
    energy_joules: float | None = None
    settings: dict[str, str] = field(default_factory=dict)
    program: Program | None = None
    stopped_early: bool = False
    every: int = 1  # it runs in each `every`-th round
    columns: list[Row] = field(default_factory=list)
    device_columns: list[Row] = field(default_factory=list)
    processor_columns: list[Row] = field(default_factory=list)  # of races of several workers
    lost_columns: list[float] = field(default_factory=list)  # of blocks with untimed calls

    @property
    def runs(self) -> bool:
        return self.status == "ok" and not self.stopped_early

    @property
    def task_name(self) -> str:
        """Return its name in the worker."""
        return self.candidate.name if self.candidate else self.name

    @property
    def nbytes(self) -> int:
        return self.read_nbytes + self.written_nbytes

    @property
    def clock(self) -> Clock:
        """Return 'device' if the device's clock timed this contender in every process, else 'wall'."""
        processes = {row[0] for row in self.columns}
        timed = {row[0] for row in self.device_columns}
        return "device" if processes and timed == processes else "wall"

    def rows(self, clock: Clock) -> list[Row]:
        """Return the blocks by this clock."""
        return self.columns if clock == "wall" else self.device_columns

    def samples(self, clock: Clock) -> Samples:
        """Return the blocks by this clock as they are stored."""
        return to_samples(self.rows(clock))

    def fail(self, case: Case, failure: WorkerFailure) -> None:
        """Record a failure; a documented one becomes `unsupported`, or a documented wrong answer or crash."""
        self.status, self.reason, self.tail = failure.status, failure.reason, failure.tail
        for known in self.candidate.failures if self.candidate else ():
            if known.when(case) and re.search(known.matches, failure.reason):
                if failure.status in ("wrong", "crashed"):
                    self.flags.append("documented")
                else:
                    self.status = "unsupported"
                self.reason = f"{known.reason} [{failure.reason}]"
                self.issue = known.issue
                return


def to_samples(rows: Sequence[Row]) -> Samples:
    """Return blocks as they are stored."""
    columns = list(zip(*rows, strict=True)) or [()] * 6
    names = ("process", "allocation", "round", "calls", "seconds", "contended")
    return Samples(**dict(zip(names, columns, strict=True)))


def pairs(
    records: Iterable[ContenderRecord], baseline: ContenderRecord
) -> list[tuple[Samples, Samples]]:
    """Return the samples of each other record, and those of the baseline by the same clock."""
    return [
        (record.samples(clock), baseline.samples(clock))
        for record in records
        if record is not baseline
        for clock in (common_clock(record.clock, baseline.clock),)
    ]


def make_measurement(
    record: ContenderRecord,
    case: Case,
    *,
    baseline: str,
    node: str = "local",
    contention: Contention | None = None,
) -> Measurement:
    """Return the Measurement of a contender."""
    wall = record.samples("wall")
    flags = list(record.flags)
    if len(wall) and sum(wall.contended) > len(wall) / 2:
        flags.append("contended")
    on_device = [row[4] for row in record.device_columns]
    return Measurement(
        case=case,
        candidate=record.name,
        form=record.candidate.form if record.candidate else "function",
        kind="candidate" if record.candidate else "probe",
        status=record.status,
        reason=record.reason,
        tail=record.tail,
        issue=record.issue,
        baseline=baseline,
        clock=record.clock,
        samples=record.samples(record.clock),
        wall_samples=wall if record.clock == "device" else Samples(),
        first_call_seconds=tuple(float(f"{value:.4g}") for value in record.first_calls),
        accuracy=record.accuracy,
        read_nbytes=record.read_nbytes,
        written_nbytes=record.written_nbytes,
        peak_nbytes=record.peak_nbytes,
        stopped_early=record.stopped_early,
        flags=tuple(dict.fromkeys(flags)),
        contention=contention,
        node=node,
        energy_joules=record.energy_joules,
        settings=record.settings,
        program=record.program,
        device_seconds=middle(on_device) if on_device else None,
    )


def flag_implausible(records: Mapping[str, ContenderRecord], case: Case, slack: float) -> None:
    """Give candidates the status `implausible` that are faster than the memory, or than the cheapest call.

    Args:
        records: of the race, by name; without its probes nothing is flagged.
        case: of the race; below SMALL_NBYTES the limit is a call that returns its inputs.
        slack: how far below the time of the limit a candidate may be.
    """
    small = input_nbytes(case) < SMALL_NBYTES
    probes = [records[name] for name in ((IDENTITY,) if small else PROBES) if name in records]
    if len(probes) < (1 if small else len(PROBES)):
        return
    for record in records.values():
        # Wall time on a GPU is launch time, and no evidence against a candidate.
        if not record.candidate or (record.clock == "wall" and is_gpu(case.device)):
            continue
        if small and record.worker.backend != probes[0].worker.backend:
            continue  # a call of another framework may be cheaper
        columns = record.rows(record.clock)
        rows = [probe.rows(record.clock) for probe in probes]
        if not record.columns or not all(rows):
            continue
        # Other processes slow a probe in some blocks, and make no call impossible: what the candidate takes in
        # three blocks of four is held against the probe's quickest.
        seconds, *times = _quantile(columns, 0.75), *(_quantile(found, 0.0) for found in rows)
        few = min(map(len, (columns, *rows))) < ENOUGH_BLOCKS
        if few:  # the only block of a probe may be a slow one: the calls that sized it count too
            times = [
                min(time, one.call_seconds or time) for time, one in zip(times, probes, strict=True)
            ]
        limit = times[0] if small else _limit_seconds(record, probes, times)
        if seconds * (1 + (FEW_SLACK if few else slack)) < limit:
            record.flags.append("faster-than-limit")
            if record.status == "ok":
                record.status = "implausible"
                record.reason = TOO_FAST.format(
                    "a call that returns its input" if small else "the memory allows",
                    *map(format_seconds, (seconds, limit)),
                )


def _quantile(rows: Sequence[Row], share: float) -> float:
    """Return the seconds that this share of the blocks does not exceed."""
    ordered = sorted(row[4] for row in rows)
    return ordered[round(share * (len(ordered) - 1))]


def _limit_seconds(
    record: ContenderRecord, probes: Sequence[ContenderRecord], times: Sequence[float]
) -> float:
    """Return the least time of a call: reading and writing may go on at once where caches hold the data."""
    reading, writing, copying = (
        seconds / max(1, probe.nbytes) for seconds, probe in zip(times, probes, strict=True)
    )
    return min(
        max(record.read_nbytes * reading, record.written_nbytes * writing), record.nbytes * copying
    )


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
