"""The nodes of a Ray cluster: their resources, the actor that runs races, and the transfer of code.

Ray is imported only when a cluster is connected.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.errors import UsageError
from poolbench.core.plan import RaceSpec, WorkerSpec
from poolbench.core.records import Environment
from poolbench.core.registry import load_suites
from poolbench.engine.pool import WorkerPool, device_names
from poolbench.engine.race import Result
from poolbench.engine.run import differences
from poolbench.engine.scheduler import LocalScheduler
from poolbench.machine.info import collect_environment
from poolbench.machine.limits import total_memory_nbytes

PACKAGE = Path(__file__).parent.parent
ACCELERATOR = "accelerator_type:"  # prefix of the resource that names a node's accelerator
PLAIN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
CONNECT_SECONDS = 5.0
# Total memory varies by a few pages from boot to boot.
MEMORY_SLACK = 0.01


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The resources of a node as Ray reports them.

    Attributes:
        processors, accelerators: counts.
        kinds: names of the accelerator in lower case: 'h100'.
    """

    processors: float
    accelerators: float = 0.0
    kinds: tuple[str, ...] = ()

    def serves(self, device: str) -> bool:
        """Tell whether the node has a case's device: 'cpu:0', 'gpu:0', 'gpu:H100'."""
        kind, _, name = device.partition(":")
        if kind == "cpu":
            return True
        return self.accelerators > int(name) if name.isdigit() else name.lower() in self.kinds


def read_offer(resources: Mapping[str, float]) -> Offer:
    """Return the resources of an entry of `ray.nodes()`; a custom resource may also name an accelerator."""
    kinds = [
        name.removeprefix(ACCELERATOR).lower()
        for name in resources
        if name not in PLAIN_RESOURCES and not name.startswith("node:")
    ]
    return Offer(
        processors=resources.get("CPU", 0.0),
        accelerators=resources.get("GPU", 0.0),
        kinds=tuple(sorted(kinds)) if resources.get("GPU") else (),
    )


def local_device(device: str) -> str:
    """Return the device's name on its node: 'gpu:H100' -> 'gpu:0'."""
    kind, _, name = device.partition(":")
    return device if name.isdigit() else f"{kind}:0"


def unlike(one: Environment, other: Environment) -> list[str]:
    """Return the differences of two nodes; [] if their results may share a table.

    The code is the driver's on every node; resuming checks whether it has changed.
    """
    sides = (msgspec.structs.replace(e, source={}) for e in (one, other))
    return differences(*sides, memory_slack=MEMORY_SLACK)


class NodeActor:
    """The actor that holds a node and runs races there, one at a time."""

    def __init__(
        self, files: Sequence[str], memory_nbytes: int | None, source: dict[str, str | bool]
    ) -> None:
        paths = [Path(file).resolve() for file in files]
        load_suites([str(path) for path in paths])
        self._memory_nbytes = memory_nbytes or total_memory_nbytes() * 3 // 4
        self._source = source
        self._pool = WorkerPool(paths, self._memory_nbytes)
        self._races = LocalScheduler(self._pool, self._memory_nbytes)

    def environment(self, spec: WorkerSpec, processors: float) -> Environment:
        """Return the environment of this node, from a worker of this kind."""
        # Ray sets this variable to the actor's processors if it is unset. On one machine it stays unset, and the
        # results must be the same.
        if os.environ.get("OMP_NUM_THREADS") == f"{processors:g}":
            del os.environ["OMP_NUM_THREADS"]
        self._pool.prepare((spec,), 1)
        found = collect_environment(device_names(self._pool.started()))
        return msgspec.structs.replace(found, source=self._source)

    def race(self, job: RaceSpec) -> Result:
        """Run the whole race here; the measurements name the device as this node does."""
        here = job.case.replace(device=local_device(job.case.device))
        self._races.submit(replace(job, case=here))
        done = self._races.next_done()
        if done.error is not None:
            raise done.error
        return done.result


@dataclass
class Host:
    """A node as the driver sees it."""

    id: str
    offer: Offer
    name: str = ""
    environment: Environment | None = None
    node_actor: Any = None
    waits_for: Any = None  # Ray's reference to the environment, then to a race's result
    job: RaceSpec | None = None
    since: float = 0.0
    fault: str = ""

    @property
    def starting(self) -> bool:
        return self.node_actor is not None and self.environment is None

    @property
    def idle(self) -> bool:
        return self.node_actor is not None and self.waits_for is None


@dataclass
class Kinds:
    """The kind of node that measures each device: one kind per device for the whole run."""

    of: dict[str, Environment] = field(default_factory=dict)

    def takes(self, device: str, environment: Environment) -> bool:
        return device in self.of and not unlike(self.of[device], environment)

    def choose(self, device: str, hosts: Iterable[Host]) -> None:
        """Choose the most frequent kind of host; for the CPU, prefer one without an accelerator."""
        able = [host for host in hosts if host.environment and host.offer.serves(device)]
        if device in self.of or not able:
            return

        def rank(host: Host) -> tuple[bool, int, str]:
            assert host.environment is not None
            alike = sum(not unlike(host.environment, o.environment) for o in able if o.environment)
            return device.startswith("cpu") and host.offer.accelerators > 0, -alike, host.name

        chosen = min(able, key=rank).environment
        assert chosen is not None
        self.of[device] = chosen


def connect(address: str, working_dir: Path | None) -> Any:
    """Connect and return the ray module; the package and the user's files travel with every actor.

    Raises:
        UsageError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--ray-address needs Ray; install it with: pip install 'poolbench[cluster]'"
        ) from None
    found = re.fullmatch(r"(?:ray://)?([^:/\s]+):(\d{1,5})", address)
    if address != "auto" and found is None:
        raise UsageError(f"--ray-address takes HOST:PORT, ray://HOST:PORT or auto; got {address!r}")
    environment: dict[str, Any] = {"py_modules": [str(PACKAGE)], "excludes": ["**/__pycache__"]}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)
    try:
        if found is not None:  # Ray would retry for minutes
            socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
        ray.init(
            address=address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address} (--ray-address): {brief(error)}; "
            "start one with: ray start --head"
        ) from None
    return ray


def brief(error: Exception, limit: int = 300) -> str:
    """Return an error of Ray in one line, the last informative one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "node" in line.lower() or "Error" in line] or lines
    text = telling[-1] if telling else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def ship(files: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Copy the user's files, each with the Python files beside it; their names under the folder."""
    names = []
    places: dict[Path, Path] = {}
    for file in files:
        if file.parent not in places:
            places[file.parent] = folder / f"files{len(places)}"
            places[file.parent].mkdir()
            for beside in file.parent.glob("*.py"):
                shutil.copy2(beside, places[file.parent])
        names.append(str((places[file.parent] / file.name).relative_to(folder)))
    return tuple(names)
