"""The request for a race: its contenders, their worker processes, and its duration. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from poolbench.core.case import Case

# The bandwidth probes, timed in the same rounds as the candidates.
PROBES = ("bandwidth-read", "bandwidth-write", "bandwidth-copy")
# Inputs below SMALL_NBYTES stay in a cache, whose bandwidth is not the memory's: there no call is
# quicker than this probe, which returns its inputs.
IDENTITY = "identity-call"
PROBE_NAMES = (*PROBES, IDENTITY)
SMALL_NBYTES = 1 << 20


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a worker process that a framework cannot change after it has started.

    Attributes:
        interpreter: path of the Python that runs it; '' for the one that runs this.
        backend: the framework that is imported at the start: 'tensorflow', 'jax', 'torch', or 'numpy' for none.
        threads: intra-op threads; 0 keeps the framework's default, every core.
        logical_devices: number of logical devices that the CPU is split into.
        deterministic: op determinism.
        environment: environment variables that are set before anything is imported. A PYTHONPATH among them
            replaces the code of the process that starts it.
        files: the user's files that register ops and candidates; empty for those of the worker's pool.
    """

    interpreter: str = ""
    backend: str = "tensorflow"
    threads: int = 0
    logical_devices: int = 1
    deterministic: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The duration and the repetitions of a race.

    Attributes:
        processes: fresh processes.
        allocations: input allocations per process.
        rounds: maximum per allocation. Many short rounds average over a machine whose speed changes within
            10 ms.
        block_seconds: timed calls of one contender in one round, at least one call; longer on a GPU.
        budget_seconds: of rounds, over all processes.
        precision: target half-width of the 95% interval of a ratio.
        margin: equivalence margin of the verdict.
        timeout_seconds: for each task of a worker.
        early_stop_ratio: a contender this many times slower than the baseline stops after one process.
        bandwidth_limit_slack: how far below the time of the bandwidth limit a contender may be before it is
            flagged. A folded op is many times faster, while a probe may see a third less than the memory has.
        seed: of inputs and orders.
    """

    processes: int = 8
    allocations: int = 2
    rounds: int = 72
    block_seconds: float = 0.0005
    budget_seconds: float = 8.4
    precision: float = 0.03
    margin: float = 0.05
    timeout_seconds: float = 60.0
    early_stop_ratio: float = 10.0
    bandwidth_limit_slack: float = 0.5
    seed: int = 0


# The fields in which a sweep differs from Plan's defaults; command-line options take precedence.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        "quick": {"processes": 5, "budget_seconds": 4.0},
        "full": {"budget_seconds": 16.0},
        # Processes agree by the device's own clock, and opening a case takes as long as racing it.
        "backends": {"processes": 4, "budget_seconds": 2.0},
        "gpu": {"processes": 3, "allocations": 3, "budget_seconds": 2.0},
    }
)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A candidate in a worker process of one kind.

    Attributes:
        candidate: its name.
        worker: the process that it runs in.
        label: distinguishes contenders of the same candidate, 'head' or 'jax'; '' for a single one.
    """

    candidate: str
    worker: WorkerSpec = field(default_factory=WorkerSpec)
    label: str = ""

    @property
    def name(self) -> str:
        """The name within the race: 'reduce_max', or 'reduce_max@head'."""
        return f"{self.candidate}@{self.label}" if self.label else self.candidate


@dataclass(frozen=True, kw_only=True)
class RaceSpec:
    """The request for one race.

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
