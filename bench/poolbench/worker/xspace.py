"""Read time by operation, memory and threads from a recorded trace (an XSpace message).

Times are picoseconds since the session began, as XSpace has them; what comes out is in seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Interval = tuple[int, int]
PICOSECONDS = 1e-12
EAGER = "EagerLocalExecute: "
END = "end: "
DEVICE_PLANE = "/device:GPU:"
# Other lines of a device are derived from the streams: steps, modules, scopes.
STREAM = "Stream #"
TO_HOST = "MemcpyD2H"
HOST_PLANE = "/host:CPU"
# TensorFlow's intra-op pool: 'tf_numa_-1_Eigen'. Regions of its threads are work, not waiting.
POOL = "Eigen"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event of one thread or stream.

    Attributes:
        kind: 'step', 'eager', 'tf_op', 'hlo', 'kernel', or '' for what is none of them.
        name: as a reader knows the operation: 'MaxPool', 'max_pool_1/MaxPool2d:MaxPool'.
        line: the thread or stream, '/host:CPU/python'.
        start, end: picoseconds.
        returned: when its own thread was done with it, before `end` where a pool goes on.
        stats: what the profiler notes beside it.
    """

    kind: str
    name: str
    line: str
    start: int
    end: int
    returned: int = 0
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> Interval:
        return self.start, self.end


@dataclass(frozen=True, kw_only=True)
class Part:
    """An operation's share of a step: self time, without nested operations of its own kind.

    Attributes:
        seconds, count: a step.
        nbytes: that it allocated, a step.
    """

    kind: str
    name: str
    seconds: float
    count: float
    nbytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one device: the peak above the initial use; bytes allocated and freed per step."""

    peak_nbytes: int
    allocated_nbytes: int
    freed_nbytes: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The contents of a trace.

    Attributes:
        steps: how many marked steps it holds.
        step_seconds: mean seconds a step.
        parts: largest first within each kind; kinds nest, so that none is added to another.
        covered: by kind, the share of the steps' time in which a part of it was under way.
        memory: None where the trace holds no memory event of the device.
        threads_busy: mean number of the host's threads at work during a step.
        device_seconds: seconds a step in which the GPU ran a kernel; None: no GPU in the trace.
        launches: kernels a step.
        gap_seconds: seconds a step between its first and last kernel in which none ran.
    """

    steps: int
    step_seconds: float
    parts: tuple[Part, ...]
    covered: dict[str, float]
    memory: Memory | None
    threads_busy: float
    device_seconds: float | None = None
    launches: float | None = None
    gap_seconds: float | None = None


def read_events(space: Any) -> list[Event]:
    """Return the events of an XSpace, of host and GPUs, sorted by start."""
    events = []
    for plane in space.planes:
        if plane.name != HOST_PLANE and not plane.name.startswith(DEVICE_PLANE):
            continue
        names = {key: value.name for key, value in plane.stat_metadata.items()}
        for line in plane.lines:
            begin = line.timestamp_ns * 1000
            # Two threads of one pool may share a name; the id distinguishes them.
            where = f"{plane.name}/{line.name}/{line.id}"
            for raw in line.events:
                about = plane.event_metadata[raw.metadata_id]
                stats = {names[stat.metadata_id]: _value(stat, names) for stat in raw.stats}
                kind = kind_of(where, about.name, about.display_name, stats)
                name = about.name.removeprefix(EAGER) if kind == "eager" else about.name
                start = begin + raw.offset_ps
                events.append(
                    Event(
                        kind=kind, name=name, line=where, start=start,
                        end=start + raw.duration_ps, stats=stats,
                    )
                )  # fmt: skip
    return sorted(_finish_asynchronous(events), key=lambda event: (event.start, -event.end))


def _value(stat: Any, names: dict[int, str]) -> Any:
    which = stat.WhichOneof("value")
    if which is None:
        return None
    value = getattr(stat, which)
    return names.get(value, value) if which == "ref_value" else value


def kind_of(line: str, name: str, display: str, stats: dict[str, Any]) -> str:
    """Return the kind of an event; '' for those of the profiler and the runtime."""
    if line.startswith(DEVICE_PLANE):
        return "kernel" if f"/{STREAM}" in line else ""
    if "step_num" in stats and "_r" in stats:
        return "step"
    if name.startswith(END):
        return ""
    if "hlo_op" in stats:
        return "hlo"
    if name.startswith(EAGER):
        return "eager"
    return "tf_op" if display and name.endswith(f":{display}") else ""


def _finish_asynchronous(events: Sequence[Event]) -> list[Event]:
    """Extend each HLO operation to its `end:`.

    XLA's event spans only the calling thread's share; the pool's last thread marks the true end,
    and the two name each other by the ids of a producer and its consumer.
    """
    ends = {e.stats["_c"]: e.end for e in events if e.name.startswith(END) and "_c" in e.stats}
    return [
        replace(e, returned=e.end, end=max(e.end, ends.get(e.stats.get("_p"), 0)))
        if e.kind == "hlo"
        else e
        for e in events
    ]


def read_trace(space: Any, *, device: str = "cpu:0") -> Reading:
    """Summarise the marked steps of an XSpace.

    Raises:
        ValueError: it holds no marked step.
    """
    return summarise(read_events(space), device=device)


def summarise(events: Sequence[Event], *, device: str = "cpu:0") -> Reading:
    """Summarise events sorted by start, as `read_trace` does."""
    steps = union(event.interval for event in events if event.kind == "step")
    count = sum(event.kind == "step" for event in events)
    total = length(steps)
    if not count or not total:
        raise ValueError("the trace holds no marked step")
    inside = [event for event in events if _contains(steps, event.start)]
    kernels = [event.interval for event in inside if event.kind == "kernel"]
    kinds = sorted({event.kind for event in inside} - {"step", ""})
    return Reading(
        steps=count,
        step_seconds=total * PICOSECONDS / count,
        parts=read_parts(inside, count),
        covered={
            kind: length(clip(union(e.interval for e in inside if e.kind == kind), steps)) / total
            for kind in kinds
        },
        memory=read_memory(events, count, device),
        threads_busy=threads_busy(events, steps),
        device_seconds=length(union(kernels)) * PICOSECONDS / count if kernels else None,
        launches=len(kernels) / count if kernels else None,
        gap_seconds=_gaps(kernels, steps) * PICOSECONDS / count if kernels else None,
    )


def read_device_seconds(space: Any) -> dict[str, list[float]]:
    """Return the seconds during which a GPU was busy in each marked step, by the steps' name, in order."""
    return device_seconds(read_events(space))


def device_seconds(events: Sequence[Event]) -> dict[str, list[float]]:
    """Return the seconds of `read_device_seconds`, from events sorted by start.

    Pauses between two kernels are the launching's and not counted. A step that brings data to the host goes on
    there, by a clock that the device does not have: it counts for nothing.
    """
    kernels = union(event.interval for event in events if event.kind == "kernel")
    starts = [start for start, _ in kernels]
    to_host = [event.start for event in events if event.kind == "kernel" and TO_HOST in event.name]
    found: dict[str, list[float]] = defaultdict(list)
    for step in (event for event in events if event.kind == "step"):
        own = kernels[bisect_left(starts, step.start) : bisect_left(starts, step.end)]
        if bisect_left(to_host, step.start) < bisect_left(to_host, step.end):
            own = []
        found[step.name].append(length(own) * PICOSECONDS)
    return dict(found)


def read_parts(events: Sequence[Event], steps: int) -> tuple[Part, ...]:
    """Return self time, count and bytes per step of each operation, by kind, the largest first."""
    seconds: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[str] = Counter()
    lines: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        if event.kind not in ("", "step"):
            lines[event.kind, event.line].append(event)
        elif event.name == "MemoryAllocation":
            nbytes[str(event.stats.get("tf_op", ""))] += int(event.stats.get("requested_bytes", 0))
    for (kind, _), found in lines.items():
        for event, own in self_times(found):
            seconds[kind, event.name] += own
            counts[kind, event.name] += 1
    parts = [
        Part(
            kind=kind,
            name=name,
            seconds=own * PICOSECONDS / steps,
            count=counts[kind, name] / steps,
            nbytes=nbytes[name.rpartition(":")[0]] / steps if kind == "tf_op" else 0.0,
        )
        for (kind, name), own in seconds.items()
    ]
    return tuple(sorted(parts, key=lambda part: (part.kind, -part.seconds)))


def self_times(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Yield each event of one line and kind with its self time, without the events nested in it."""
    own = [event.end - event.start for event in events]
    around: list[int] = []
    for place, event in enumerate(events):
        while around and events[around[-1]].end <= event.start:
            around.pop()
        if around:
            parent = events[around[-1]]
            own[around[-1]] -= min(event.end, parent.end) - event.start
        around.append(place)
    return list(zip(events, own, strict=True))


def read_memory(events: Sequence[Event], steps: int, device: str) -> Memory | None:
    """Return the running sum of requested bytes over allocations and releases.

    What was allocated before the session is none of a step's: its release is left out.
    """
    on_gpu = device.startswith("gpu")
    held: dict[tuple[str, int], int] = {}
    now = peak = allocated = freed = 0
    seen = False
    for event in events:
        if event.name not in ("MemoryAllocation", "MemoryDeallocation"):
            continue
        allocator = str(event.stats.get("allocator_name", ""))
        if allocator.lower().startswith("gpu") != on_gpu or "host" in allocator.lower():
            continue
        seen = True
        where = allocator, int(event.stats.get("addr", 0))
        if event.name == "MemoryAllocation":
            held[where] = int(event.stats.get("requested_bytes", 0))
            now += held[where]
            allocated += held[where]
            peak = max(peak, now)
        else:
            released = held.pop(where, 0)
            now -= released
            freed += released
    if not seen:
        return None
    return Memory(
        peak_nbytes=peak,
        allocated_nbytes=round(allocated / steps),
        freed_nbytes=round(freed / steps),
    )


def threads_busy(events: Sequence[Event], steps: Sequence[Interval]) -> float:
    """Return the mean number of busy threads of the host.

    The pool's threads are at work in their regions, a thread that XLA calls in its own share of an
    operation; an operation in which neither is seen counts as one thread, for its own may only wait
    for the pool.
    """
    lines: dict[str, list[Interval]] = defaultdict(list)
    operations: list[Interval] = []
    opened: dict[str, int] = {}
    for event in events:
        if event.kind == "hlo":
            lines[event.line].append((event.start, event.returned))
        if event.kind in ("hlo", "tf_op", "eager"):
            operations.append(event.interval)
        elif POOL in event.line and event.name.endswith("::StartRegion"):
            opened[event.line] = event.start
        elif POOL in event.line and event.name.endswith("::StopRegion"):
            lines[event.line].append((opened.pop(event.line, event.start), event.start))
    at_work = [clip(union(intervals), steps) for intervals in lines.values()]
    seen = union(interval for intervals in at_work for interval in intervals)
    under_way = clip(union(operations), steps)
    alone = length(union([*under_way, *seen])) - length(seen)
    return (sum(map(length, at_work)) + alone) / length(steps)


def _gaps(kernels: Sequence[Interval], steps: Sequence[Interval]) -> int:
    """Return the picoseconds between the first and last kernel of each step during which none ran."""
    gaps = 0
    for step in steps:
        own = union(kernel for kernel in kernels if _contains([step], kernel[0]))
        gaps += own[-1][1] - own[0][0] - length(own) if own else 0
    return gaps


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals sorted, with overlapping ones merged."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def clip(intervals: Sequence[Interval], windows: Sequence[Interval]) -> list[Interval]:
    """Return the parts of the intervals within the windows; both are sorted and without overlap."""
    return [
        (max(start, low), min(end, high))
        for low, high in windows
        for start, end in intervals
        if start < high and end > low
    ]


def length(intervals: Iterable[Interval]) -> int:
    """Return the sum of the lengths."""
    return sum(end - start for start, end in intervals)


def _contains(windows: Sequence[Interval], moment: int) -> bool:
    return any(low <= moment < high for low, high in windows)
