"""The result of a race of a model's steps: shares, throughput, latencies, and records of a journal."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from poolbench.core.axes import Axis, declare, size_axis
from poolbench.core.case import Case, make_case
from poolbench.core.records import ALL_POOLING, Measurement, ModelResult, Samples
from poolbench.core.registry import REGISTRY
from poolbench.models.config import Unknown
from poolbench.models.pools import Pool
from poolbench.models.probe import Form
from poolbench.models.steps import ISOLATED, ORIGINAL, isolated_copies, parse_contender
from poolbench.models.zoo import Source

if TYPE_CHECKING:
    from poolbench.stats.estimate import Estimate
    from poolbench.stats.runs import RunsEstimate

# Low, middle and high of a ratio.
Interval = tuple[float, float, float]
PERCENTILES = (50.0, 95.0, 99.0, 99.9)
# A model's step is a case too: of which model, at which batch size.
OP = "model"
declare(OP, (Axis(name="model", parse=str, example="resnet50"), size_axis("batch", 1)))


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a model for the parent process.

    Attributes:
        pools: its pooling calls.
        traced: the batch size at which the pools' shapes are.
        macs: multiplications and additions of one forward call, about.
        pastable: op to the candidates that can be written into the model, with what to write.
        unknown: layers that need code that may not run.
        notes: what layers of the user's code are, where they are no pool.
        untrained: why it has no training step; '' if it has one.
        batch: the batch size that the file fixes.
        code: names of the layers whose code is not Keras's and ran.
    """

    pools: tuple[Pool, ...]
    traced: int
    macs: float = 0.0
    pastable: dict[str, dict[str, str]] = {}
    unknown: tuple[Unknown, ...] = ()
    notes: dict[str, str] = {}
    untrained: str = ""
    batch: int | None = None
    code: tuple[str, ...] = ()

    @property
    def forms(self) -> dict[str, Form]:
        """Return the forms of its pools by `Pool.key`, for `Source.forms`."""
        return {pool.key: pool.form for pool in self.pools if pool.form is not None}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One race of a model's step.

    Attributes:
        name: of the model.
        source: how a worker gets it.
        direction: 'forward' or 'training'.
        batch: its batch size.
        mode: as in Case.
        replaced: whether steps with each implementation are raced; otherwise only its isolated pooling is, for a
            model that takes long to trace and whose step a pool cannot move.
        isolated: whether each implementation's isolated pooling is raced.
        candidates: op to the candidates that race; an op that is not named races all of its own.
        latency_calls: single calls to time of each implementation; 0: none.
        processes: fresh processes.
        budget_seconds: of rounds.
    """

    name: str
    source: Source
    direction: str
    batch: int
    mode: str = "graph"
    replaced: bool = True
    isolated: bool = True
    candidates: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    latency_calls: int = 0
    processes: int = 3
    budget_seconds: float = 4.0

    @property
    def label(self) -> str:
        """'resnet50-head-training-graph-32'."""
        return f"{self.name}-{self.direction}-{self.mode}-{self.batch}"

    @property
    def case(self) -> Case:
        """The case that the step is."""
        axes = {"batch": self.batch, "direction": self.direction, "mode": self.mode}
        return make_case(op=OP, model=self.name, **axes)


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A race of a network's steps that has been run."""

    entry: Entry
    described: Described
    measurements: dict[str, Measurement]
    latencies: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def copies(self) -> int:
        """How often one call of isolated pooling runs each pool."""
        return isolated_copies(self.described.pools, self.entry.batch / self.described.traced)

    def seconds(self, name: str) -> float | None:
        """Return a contender's median time of a call; None where it did not run."""
        m = self.measurements.get(name)
        ran = m is not None and m.status == "ok" and len(m.samples)
        return statistics.median(m.samples.seconds) if m is not None and ran else None

    def share(self, step: str = ORIGINAL) -> Interval | None:
        """Return pooling's time over the step's, on this machine; None without an interval."""
        found = self._estimates(ISOLATED + step, step, 1 / self.copies) if self.copies else None
        return _interval(found.mean) if found else None

    def rough_share(self) -> float | None:
        """Return the share of the original step without an interval, which one process is enough for."""
        pooling, step = self.seconds(ISOLATED + ORIGINAL), self.seconds(ORIGINAL)
        return pooling / self.copies / step if pooling and step else None

    def ratio(self, slow: str, fast: str) -> Interval | None:
        """Return one contender's time over another's, as another run will find it; None without an interval."""
        found = self._estimates(slow, fast)
        return _interval(found.next_run) if found else None

    def _estimates(self, slow: str, fast: str, factor: float = 1.0) -> RunsEstimate | None:
        if not (self.seconds(slow) and self.seconds(fast)):
            return None
        # SciPy, which collection need not wait for.
        from poolbench.stats.estimate import estimate
        from poolbench.stats.runs import widen

        one, other = self.measurements[slow].samples, self.measurements[fast].samples
        found = estimate(scaled(one, factor), other)
        if found.low is None:
            return None
        return widen(found, eager=self.entry.mode == "eager", one_thread=False)


def _interval(found: Estimate) -> Interval:
    ends = found.ratio_low, found.ratio, found.ratio_high
    low, middle, high = (float(f"{value:.4g}") for value in ends)
    return low, middle, high


def scaled(samples: Samples, factor: float) -> Samples:
    """Return the samples with their seconds multiplied."""
    seconds = tuple(value * factor for value in samples.seconds)
    return msgspec.structs.replace(samples, seconds=seconds)


def model_records(stepped: Stepped) -> list[ModelResult]:
    """Return the records for the journal: each op's implementations, then the original model."""
    found = []
    for name in stepped.measurements:
        if name.startswith(ISOLATED) or name == ORIGINAL:
            continue
        ((op, candidate),) = parse_contender(name).items()
        found.append(_record(stepped, name, op=op, candidate=candidate))
    found.append(_record(stepped, ORIGINAL, op=ALL_POOLING, candidate=ORIGINAL))
    return found


def _record(stepped: Stepped, name: str, *, op: str, candidate: str) -> ModelResult:
    entry, step = stepped.entry, stepped.measurements[name]
    return ModelResult(
        model=entry.name, op=op, candidate=candidate, direction=entry.direction, mode=entry.mode,
        batch=entry.batch, status=step.status, reason=step.reason, samples=step.samples,
        baseline=ORIGINAL if op == ALL_POOLING else REGISTRY.ops[op].baseline,
        share=stepped.share(name), figures=figures(stepped, name),
    )  # fmt: skip


def figures(stepped: Stepped, name: str) -> dict[str, float | int | str | None]:
    """Throughput, peak memory and latency percentiles of a step, by names with their units."""
    step = stepped.measurements[name]
    found: dict[str, float | int | str | None] = {}
    if len(step.samples):
        middle = statistics.median(step.samples.seconds)
        found["throughput_images_per_second"] = float(f"{stepped.entry.batch / middle:.4g}")
        found["peak_nbytes"] = step.peak_nbytes
    if stepped.latencies.get(name):
        found |= percentiles(stepped.latencies[name])
    if name == ORIGINAL and (best := fastest_isolated(stepped)) is not None:
        pools = [pool for pool in stepped.described.pools if pool.op]
        found["fastest_pooling"] = best
        found["pooling_nbytes"] = sum(4 * math.prod(pool.given) for pool in pools)
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float | int | str | None]:
    """{'latency_p50_seconds': ..., 'latency_p99.9_seconds': ..., 'latency_calls': 3000}."""
    values = np.percentile(seconds, PERCENTILES)
    named = {
        f"latency_p{percentile:g}_seconds": float(f"{value:.4g}")
        for percentile, value in zip(PERCENTILES, values, strict=True)
    }
    return {**named, "latency_calls": len(seconds)}


def fastest_isolated(stepped: Stepped) -> str | None:
    """Return the op and implementation with the fastest isolated pooling, if every pool is of one op."""
    times = {
        name.removeprefix(ISOLATED): seconds
        for name in stepped.measurements
        if name.startswith(ISOLATED) and name != ISOLATED + ORIGINAL
        if (seconds := stepped.seconds(name)) is not None
    }
    if not times or len({pool.op for pool in stepped.described.pools if pool.op}) != 1:
        return None
    return min(times, key=lambda name: times[name])
