"""The records of a run as they are stored. Plain data: msgspec only.

Every record is a frozen struct with a tag, so that a journal is a list of one tagged union. Statistics are
derived from the records (poolbench.stats.estimate) and never stored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from poolbench.core import errors
from poolbench.core.axes import AxisInfo
from poolbench.core.case import Case
from poolbench.core.program import Count, Program

SCHEMA_VERSION = 2

Status = errors.Status


class Record(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True
):
    """One entry of the journal."""


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Machine, devices, versions and settings of one node. No host name, no path, no user.

    Attributes:
        machine: processor, its features, cores, memory, caches, operating system.
        devices: name to description, as TensorFlow sees them: {'cpu:0': 'Intel Xeon ...'}.
        versions: package to version, Python's included.
        settings: relevant environment variables and their values.
        source: commit and whether the tree was dirty.
    """

    machine: dict[str, str | bool | int | float | None]
    devices: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    source: dict[str, str | bool]


class Header(Record, frozen=True, kw_only=True, tag="header"):
    """The first line of a journal.

    Attributes:
        schema: version of this schema.
        run: the run's name.
        created: UTC, ISO 8601, to the second.
        environment: of the machine that measures, or of the driver of a Ray cluster.
        options: of the command: sweep, axes, processes, precision, budget, timeout, ...
        seed: of the inputs and of the order of rounds.
        axes: by op, its axes, so that a report can label cases whose op it cannot import.
        sources: by op and name, the source text of a user's candidates.
    """

    schema: int = SCHEMA_VERSION
    run: str
    created: str
    environment: Environment
    options: dict[str, Any]
    seed: int
    axes: dict[str, tuple[AxisInfo, ...]] = {}
    sources: dict[str, dict[str, str]] = {}


class Node(Record, frozen=True, kw_only=True, tag="node"):
    """Another machine of the run, before the first line that refers to it."""

    name: str
    environment: Environment


class Samples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The blocks of one contender, as columns of equal length.

    Attributes:
        process, allocation, round: position of the block; contenders are paired by these three.
        calls: calls in the block.
        seconds: seconds per call in the block (the sample).
        contended: 1 if there was background load during the block.
    """

    process: tuple[Count, ...] = ()
    allocation: tuple[Count, ...] = ()
    round: tuple[Count, ...] = ()
    calls: tuple[Count, ...] = ()
    seconds: tuple[Annotated[float, msgspec.Meta(ge=0)], ...] = ()
    contended: tuple[Count, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)


FASTER_THAN_LIMIT = "faster-than-limit"  # a flag: faster than the bandwidth limit


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's output compared with the float64 reference.

    Attributes:
        worst: the largest error over its tolerance, of output and gradient; 1 is at the tolerance.
        max_relative, max_absolute: largest error of the output y.
        gradient_worst: the same ratio for dx alone; None when forward.
        tie: where a tie's gradient goes: 'first', 'last', 'split', 'one' (some other one), 'none'
            (no tie in these inputs), or None when forward.
        bound: the tolerance as text, 'relative 1e-06, absolute 0'.
    """

    worst: float
    max_relative: float
    max_absolute: float
    gradient_worst: float | None = None
    tie: str | None = None
    bound: str = ""


class Contention(msgspec.Struct, frozen=True, kw_only=True):
    """Background load during a race. None: the system does not provide the value.

    Other fields are ignored: older journals have some that are measured no more.

    Attributes:
        steal: share of the processors' time that the hypervisor took.
        others: share of the processors' time that other processes used.
        throttled: processor time that a CPU quota withheld, per wall time; None also without a quota.
        blocks_marked, blocks_redone: blocks under background load, and those repeated.
        involuntary_switches: of the workers.
        device_clock_mhz: lowest and highest clock of a GPU at the ends of its rounds.
        device_celsius: its highest temperature.
        device_slowdowns: reasons for a lower clock, in words.
        device_others: largest share of its multiprocessors' time that other processes used.
    """

    steal: float | None
    others: float | None
    blocks_marked: int
    blocks_redone: int
    involuntary_switches: int | None
    device_clock_mhz: tuple[float, float] | None = None
    device_celsius: float | None = None
    device_slowdowns: tuple[str, ...] = ()
    device_others: float | None = None
    throttled: float | None = None


Clock = Literal["wall", "device"]


class Measurement(Record, frozen=True, kw_only=True, tag="measurement"):
    """The result of one contender in one case.

    Attributes:
        case, candidate, form: of the request.
        kind: 'candidate', or 'probe' for the memory bandwidth limit ('bandwidth-read', '-write', '-copy').
        status: a value of Status; `reason` says in one line why it is not ok; `tail` is the end of
            the worker's output.
        issue: the upstream issue of a documented failure.
        baseline: the candidate that ratios are taken to.
        clock: of the samples: 'wall', from the call in Python until it returns, or 'device', the time per call
            during which the GPU ran kernels, by its own clock.
        samples: raw, in seconds per call.
        wall_samples: wall time of the same calls if the samples are device times; else empty.
        first_call_seconds: trace, compile and run, one per process, without AutoGraph's conversion.
        accuracy: against the reference; None for probes and candidates that did not run.
        read_nbytes, written_nbytes: fewest bytes that a call must read and write.
        peak_nbytes: peak of the device's memory above the inputs; None: not measured.
        stopped_early: whether it stopped after the first process, at ten times the baseline; no interval then.
        flags: 'faster-than-limit', ...; words of `poolbench.engine.recorder.FLAGS`.
        contention: of the race.
        node: the machine, 'local' or a Node's name.
        device_seconds: median device time per call, from the profiler; None: not measured.
        energy_joules: per call; None: not measured.
        settings: what affects times besides the case, as the framework in the worker had it: threads, precision, ...
        program: what the framework made of the candidate; None: not read.
    """

    case: Case
    candidate: str
    form: str = "function"
    kind: Literal["candidate", "probe"] = "candidate"
    status: Status
    reason: str = ""
    tail: str = ""
    issue: str = ""
    baseline: str = ""
    clock: Clock = "wall"
    samples: Samples = Samples()
    wall_samples: Samples = Samples()
    first_call_seconds: tuple[float, ...] = ()
    accuracy: Accuracy | None = None
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int | None = None
    stopped_early: bool = False
    flags: tuple[str, ...] = ()
    contention: Contention | None = None
    node: str = "local"
    device_seconds: float | None = None
    energy_joules: float | None = None
    settings: dict[str, str] = {}
    program: Program | None = None


def samples_by(measurement: Measurement, clock: Clock) -> Samples:
    """Return the samples by this clock; empty if it has none."""
    if measurement.clock == clock:
        return measurement.samples
    return measurement.wall_samples if clock == "wall" else Samples()


def common_clock(one: Clock, other: Clock) -> Clock:
    """Return the clock for comparing two measurements: 'device' if both have it."""
    return "device" if one == other == "device" else "wall"


CellState = Literal["pass", "wrong", "unsupported", "error", "crashed", "timeout", "not_run"]


def is_right(measurement: Measurement) -> bool:
    """Return whether it may be ranked: ok, within its tolerance, timed, and not above the bandwidth limit."""
    accuracy = measurement.accuracy
    return (
        measurement.status == "ok"
        and (accuracy is None or accuracy.worst <= 1)
        and len(measurement.samples) > 0
        and FASTER_THAN_LIMIT not in measurement.flags
    )


class MatrixCell(Record, frozen=True, kw_only=True, tag="matrix_cell"):
    """One cell of the support matrix.

    Attributes:
        op, candidate, probe: the cell; `probe` is a key of `poolbench.matrix.PROBES`.
        device: 'cpu:0', ...
        state: pass, wrong (a wrong answer), unsupported (a documented error), error, crashed,
            timeout, not_run.
        evidence: the observation in words: text or size of the error, treatment of a tie.
        figures: numbers behind the evidence.
        issue: upstream issue.
    """

    op: str
    candidate: str
    probe: str
    device: str = "cpu:0"
    state: CellState
    evidence: str = ""
    figures: dict[str, float | int | str | None] = {}
    issue: str = ""
    seconds: float = 0.0


class TraceSummary(Record, frozen=True, kw_only=True, tag="trace_summary"):
    """The time and memory of a traced step by operation.

    Attributes:
        case, candidate: of the step; `trace` names its folder under traces/plugins/profile/.
        steps: how many steps the trace holds.
        step_seconds: seconds per traced step; not a benchmark.
        parts: one dict per operation: kind ('eager', 'tf_op', 'hlo', 'kernel'), name, seconds per step, count
            per step, nbytes.
        peak_nbytes, allocated_nbytes, freed_nbytes: from the trace's memory events.
        threads_busy: mean number of busy threads during a step.
        compiler_nbytes: the compiler's own figure for the peak, with XLA.
        covered: by kind of part, the share of the steps' time during which one was running.
        device_seconds: seconds per step during which the GPU ran a kernel.
        launches: kernels per step on the GPU.
        gap_seconds: seconds per step between its first and last kernel during which none ran.
    """

    case: Case
    candidate: str
    trace: str
    status: Status = "ok"
    reason: str = ""
    steps: int = 0
    step_seconds: float = 0.0
    parts: tuple[dict[str, str | float | int], ...] = ()
    peak_nbytes: int | None = None
    allocated_nbytes: int | None = None
    freed_nbytes: int | None = None
    threads_busy: float | None = None
    compiler_nbytes: int | None = None
    covered: dict[str, float] = {}
    device_seconds: float | None = None
    launches: float | None = None
    gap_seconds: float | None = None


class Selftest(Record, frozen=True, kw_only=True, tag="selftest"):
    """False alarms, power and noise floor, measured on this machine.

    Attributes:
        injected: the slowdown that was injected, 0 for A/A.
        margin: the equivalence margin that the verdicts used.
        comparisons, faster, slower, same, undecided: counts of verdicts.
        noise_floor: 95th percentile of the absolute A/A log ratio.
        seconds: duration.
        kind: 'aa', an op with itself; 'injected', a known slowdown.
        power: share of the comparisons that got SLOWER; None for A/A.
        figures: of the races: case, processes, allocations, count, share of blocks under background load.
    """

    injected: float
    margin: float
    comparisons: int
    faster: int
    slower: int
    same: int
    undecided: int
    noise_floor: float
    seconds: float
    kind: Literal["aa", "injected"] = "aa"
    power: float | None = None
    figures: dict[str, float | int | str | None] = {}


HEAD = "-head"  # suffix of the name of a model's head
ALL_POOLING = "all pooling"


class ModelResult(Record, frozen=True, kw_only=True, tag="model"):
    """The effect of one implementation on a whole model, in one direction.

    Attributes:
        model: 'textbook', 'resnet50', ...
        direction: 'forward' or 'training'; batch: its batch size; mode as in Case.
        candidate: the implementation that replaced the original; `op` is its op.
        status, reason: as in Measurement.
        samples: seconds per step.
        share: pooling's share of the step, with its 95% interval (low, middle, high).
        figures: throughput and latency percentiles, peak memory, by name with its unit.
    """

    model: str
    op: str
    candidate: str
    direction: str
    mode: str
    batch: int
    status: Status = "ok"
    reason: str = ""
    baseline: str = ""
    samples: Samples = Samples()
    share: tuple[float, float, float] | None = None
    figures: dict[str, float | int | str | None] = {}


class TimeBreakdown(Record, frozen=True, kw_only=True, tag="time"):
    """The wall time of a run by kind, in seconds; the last line of a run that was not interrupted.

    Attributes:
        seconds: 'start' (workers), 'samples', 'warmup', 'first_calls', 'allocation', 'checks', 'rechecks'
            (after timing), 'programs' (what was compiled), 'waiting', 'other'; on a GPU also 'device_clock'
            and 'energy'.
        wall_seconds: from the first worker's start to the end.
    """

    seconds: dict[str, float]
    wall_seconds: float


AnyRecord = (
    Header | Node | Measurement | MatrixCell | TraceSummary | Selftest | ModelResult | TimeBreakdown
)
