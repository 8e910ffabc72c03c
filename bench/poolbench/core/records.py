"""What was seen: the records of a run, as they are stored.

Pure: msgspec only. Every record is a frozen struct with a tag, so that a journal is a list of one
tagged union; statistics are derived from the records (poolbench.stats.estimate), never stored in them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from poolbench.core import errors
from poolbench.core.axes import AxisInfo
from poolbench.core.case import Case

SCHEMA_VERSION = 2

Status = errors.Status
STATUSES = errors.STATUSES


class Record(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True
):
    """A line of the journal."""


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Machine, devices, versions and settings of one node. No host name, no path, no user.

    Attributes:
        machine: processor, its features, cores, memory, caches, operating system.
        devices: name to description, as TensorFlow sees them: {'cpu:0': 'Intel Xeon ...'}.
        versions: package to version, Python's included.
        settings: environment variables that matter and their values.
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
        environments: by node name ('local', or the fleet's nodes, which later lines refer to).
        options: what the user asked: sweep, axes, processes, precision, budget, timeout, ...
        seed: of the inputs and of the order of rounds.
        axes: by op, its axes, so that a report can label cases whose op it cannot import.
    """

    schema: int = SCHEMA_VERSION
    run: str
    created: str
    environment: Environment
    options: dict[str, Any]
    seed: int
    axes: dict[str, tuple[AxisInfo, ...]] = {}


class Node(Record, frozen=True, kw_only=True, tag="node"):
    """Another machine of the run, before the first line that refers to it."""

    name: str
    environment: Environment


# What a journal may count: whatever reads JSON holds whole numbers below this exactly.
MAX_COUNT = 1 << 53
Count = Annotated[int, msgspec.Meta(ge=0, lt=MAX_COUNT)]


class Samples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The blocks of one contender, as columns of equal length.

    Attributes:
        process, allocation, round: where the block sits; contenders pair by these three.
        calls: calls in the block.
        seconds: seconds a call in the block (the sample).
        contended: 1 where something else used the machine during the block.
    """

    process: tuple[Count, ...] = ()
    allocation: tuple[Count, ...] = ()
    round: tuple[Count, ...] = ()
    calls: tuple[Count, ...] = ()
    seconds: tuple[Annotated[float, msgspec.Meta(ge=0)], ...] = ()
    contended: tuple[Count, ...] = ()

    def __len__(self) -> int:
        return len(self.seconds)


FASTER_THAN_LIMIT = "faster-than-limit"  # a flag: the memory allows no such time


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's answer held against the float64 reference.

    Attributes:
        worst: the largest error over its bound, values and gradient; 1 is at the bound.
        max_relative, max_absolute: largest error of the values y.
        gradient_worst: the same ratio for dx alone; None when forward.
        tie: where a tie's gradient goes: 'first', 'last', 'split', 'one' (some other one), 'none'
            (no tie in these inputs), or None when forward.
        bound: the bound in words, 'relative 1e-06, absolute 0'.
    """

    worst: float
    max_relative: float
    max_absolute: float
    gradient_worst: float | None = None
    tie: str | None = None
    bound: str = ""


class Contention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What else the machine did during a race. None: this system does not let us see it.

    Attributes:
        steal: share of the processors' time that the hypervisor took.
        others: share of the processors' time that other processes used.
        throttled: processor time that a CPU quota withheld, per wall time; None also without a quota.
        blocks_marked, blocks_redone: blocks under contention, and those done again.
        involuntary_switches: of the workers.
        cores_distant: share of the blocks that were timed while the host had this machine's two processors far from
            each other.
        smt_sibling_busy: share of the probes at which the other hardware thread of a core was busy with
            another guest of the host.
        device_clock_mhz: lowest and highest clock of a GPU at the ends of its rounds.
        device_celsius: its highest temperature.
        device_slowdowns: why its clock was held down, in words.
        device_others: largest share of its processors' time that others took.
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
    cores_distant: float | None = None
    smt_sibling_busy: float | None = None
    throttled: float | None = None


Clock = Literal["wall", "device"]


class Measurement(Record, frozen=True, kw_only=True, tag="measurement"):
    """What one contender did in one case.

    Attributes:
        case, op's candidate, form: what was asked.
        kind: 'candidate', or 'probe' for the memory bandwidth limit ('bandwidth-read', '-write', '-copy').
        status: one of STATUSES; `reason` says why it is not ok, in one line; `tail` is the end of
            what the worker printed.
        issue: the upstream issue of a documented failure.
        baseline: the candidate that ratios are taken to.
        clock: what the samples are of: 'wall', a call from Python until it has returned; or 'device', the
            time in a call in which the GPU was at work, by its own clock.
        samples: raw, in seconds a call.
        wall_samples: the same calls' wall time where the samples are of the device; else empty.
        first_call_seconds: trace, compile and run, one a process; AutoGraph has converted the Python before.
        accuracy: against the reference; None for probes and where it did not run.
        read_nbytes, written_nbytes: fewest bytes that a call must read and write.
        peak_nbytes: peak of the device's memory above the inputs; None: not measured.
        stopped early: stopped after the first process, at ten times the baseline: no interval.
        flags: 'faster-than-limit', ...; words of `poolbench.engine.recorder.FLAGS`.
        contention: of the race.
        node: the machine, 'local' or a Node's name.
        device_seconds: median device time a call, from the profiler; None: not measured.
        joules: energy a call; None: not measured.
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


def samples_by(measurement: Measurement, clock: Clock) -> Samples:
    """Its samples by this clock; none where it has no such."""
    if measurement.clock == clock:
        return measurement.samples
    return measurement.wall_samples if clock == "wall" else Samples()


def common_clock(one: Clock, other: Clock) -> Clock:
    """The clock that two are compared by: the device's where both have it."""
    return "device" if one == other == "device" else "wall"


CellState = Literal["pass", "wrong", "unsupported", "error", "crashed", "timeout", "not_run"]


class MatrixCell(Record, frozen=True, kw_only=True, tag="matrix_cell"):
    """One cell of the support matrix.

    Attributes:
        op, candidate, probe: the cell; `probe` is a key of `poolbench.matrix.PROBES`.
        device: 'cpu:0', ...
        state: pass, wrong (a wrong answer), unsupported (a documented error), error, crashed,
            timeout, not_run.
        evidence: what was seen, in words: the error's text, the size of the error, the rule at a tie.
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
    """Where the time and memory of a traced step went.

    Attributes:
        case, candidate: what was traced; `trace` names its folder under traces/plugins/profile/.
        steps: how many steps the trace holds.
        step_seconds: seconds a step, traced: never a benchmark.
        parts: one dict an operation: kind ('eager', 'tf_op', 'hlo', 'kernel'), name, seconds a step, count a
            step, nbytes.
        peak_nbytes, allocated_nbytes, freed_nbytes: from the trace's memory events.
        threads_busy: mean number of threads at work during a step.
        compiler_nbytes: the compiler's own figure for the peak, under XLA.
        covered: by kind of part, the share of the steps' time in which one was under way.
        device_seconds: seconds a step in which the GPU ran a kernel: the third clock.
        launches: kernels a step on the GPU.
        gap_seconds: seconds a step between its first and last kernel in which none ran.
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
    """What the harness proved of itself on this machine.

    Attributes:
        injected: the slowdown that was injected, 0 for A/A.
        margin: the equivalence margin that the verdicts used.
        comparisons, faster, slower, same, undecided: counts of verdicts.
        noise_floor: 95th percentile of the A/A log ratio's size.
        seconds: what it took.
        kind: 'aa', an op with itself; 'injected', a known slowdown.
        power: share of the comparisons that got SLOWER; None for A/A.
        figures: how it was raced: case, processes, allocations, races, share of blocks contended.
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


HEAD = "-head"  # how the name of a network's head ends
ALL_POOLING = "all pooling"


class ModelResult(Record, frozen=True, kw_only=True, tag="model"):
    """Does the choice matter in a whole network: one model, direction and candidate.

    Attributes:
        model: 'textbook', 'resnet50', ...
        direction: 'forward' or 'training'; batch: its batch size; mode as in Case.
        candidate: the candidate that was put in place; `op` its op.
        status, reason: as in Measurement.
        samples: seconds a step.
        share: share of the step that pooling takes, with its 95% interval (low, middle, high).
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
    """Where the run's wall time went, seconds by kind; the last line of a run that ended by itself.

    Attributes:
        seconds: 'start' (workers), 'samples', 'warmup', 'first_calls', 'allocation', 'checks',
            'waiting', 'other'; on a GPU also 'device_clock' and 'energy'.
        wall_seconds: from the first worker's start to the end.
    """

    seconds: dict[str, float]
    wall_seconds: float


AnyRecord = (
    Header | Node | Measurement | MatrixCell | TraceSummary | Selftest | ModelResult | TimeBreakdown
)
