"""What a race is asked: its contenders, the worker process of each, and how long it runs. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from poolbench.core.case import Case

# The bandwidth probes that race beside the candidates.
PROBES = ("bandwidth-read", "bandwidth-write", "bandwidth-copy")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process fixes for its whole life, because no framework can change it once started.

    Attributes:
        interpreter: path of the Python that runs it; '' for the one that runs this.
        backend: the framework that is imported at the start: 'tensorflow', or 'numpy' for none.
        threads: intra-op threads; 0 leaves the framework's own choice, every core.
        logical_devices: logical devices that the machine's CPU is split into.
        deterministic: op determinism.
        environment: environment variables that are set before anything is imported.
    """

    interpreter: str = ""
    backend: str = "tensorflow"
    threads: int = 0
    logical_devices: int = 1
    deterministic: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often a race runs.

    Attributes:
        processes: fresh processes.
        allocations: times that inputs are allocated in each.
        rounds: at most in one allocation. Many short rounds, whose median stands, ride out a machine that
            changes its speed from one hundredth of a second to the next.
        block_seconds: timed calls of one contender in one round, at least one call; longer on a GPU.
        budget_seconds: of rounds in all processes together.
        precision: half-width of the 95% interval of the ratio that the number of rounds aims at.
        margin: equivalence margin of the verdict.
        timeout_seconds: for each task of a worker.
        early_stop_ratio: a contender this many times slower than the baseline stops after one process.
        bandwidth_limit_slack: how far below the time of the bandwidth limit a contender may be before it is
            flagged. A folded op is many times faster, while a probe may see a third less than the memory has.
        seed: of inputs and orders.
    """

    processes: int = 10
    allocations: int = 2
    rounds: int = 72
    block_seconds: float = 0.0005
    budget_seconds: float = 10.8
    precision: float = 0.03
    margin: float = 0.05
    timeout_seconds: float = 60.0
    early_stop_ratio: float = 10.0
    bandwidth_limit_slack: float = 0.5
    seed: int = 0


# The fields in which the races of a sweep differ from Plan's defaults; an option of the command replaces them.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        "quick": {"processes": 5, "budget_seconds": 4.0},
        "full": {"budget_seconds": 16.0},
        # Processes agree by the device's own clock, and to open a case takes as long as to race it.
        "gpu": {"processes": 3, "allocations": 3, "budget_seconds": 2.0},
    }
)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A candidate in a worker process of one kind.

    Attributes:
        candidate: its name.
        worker: the process that it runs in.
        label: tells apart contenders of one candidate, 'head'; '' where there is one.
    """

    candidate: str
    worker: WorkerSpec = field(default_factory=WorkerSpec)
    label: str = ""

    @property
    def name(self) -> str:
        """The name within the race: 'slices-maximum', or 'slices-maximum@head'."""
        return f"{self.candidate}@{self.label}" if self.label else self.candidate


@dataclass(frozen=True, kw_only=True)
class RaceSpec:
    """A race that is asked for.

    Attributes:
        case: what every contender computes.
        contenders: each with a name of its own.
        baseline: name of the contender that ratios are taken to.
        plan: how long it runs.
    """

    case: Case
    contenders: tuple[Contender, ...]
    baseline: str
    plan: Plan = Plan()

    @classmethod
    def in_one_worker(
        cls,
        case: Case,
        candidates: Iterable[str],
        *,
        baseline: str,
        plan: Plan,
        worker: WorkerSpec,
    ) -> RaceSpec:
        """Return the race of these candidates in workers of one kind."""
        contenders = tuple(Contender(candidate=name, worker=worker) for name in candidates)
        return cls(case=case, contenders=contenders, baseline=baseline, plan=plan)

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        """The kinds of worker that the race needs, the baseline's first."""
        ordered = sorted(self.contenders, key=lambda one: one.name != self.baseline)
        return tuple(dict.fromkeys(one.worker for one in ordered))
