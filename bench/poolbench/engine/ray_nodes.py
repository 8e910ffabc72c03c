"""The nodes of a Ray cluster: what each offers, the actor that runs races there, and how code gets there.

Ray is imported when a cluster is connected: nothing else needs it.
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
import psutil

from poolbench.core.errors import UsageError
from poolbench.core.plan import RaceSpec, WorkerSpec
from poolbench.core.records import Environment
from poolbench.core.registry import load_suites
from poolbench.engine.pool import WorkerPool, device_names
from poolbench.engine.race import Result
from poolbench.engine.scheduler import LocalScheduler
from poolbench.machine.info import collect_environment
from poolbench.store.runs import differing_fields

PACKAGE = Path(__file__).parent.parent
ACCELERATOR = "accelerator_type:"  # how Ray writes the kind of a node's accelerator as a resource
PLAIN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
CONNECT_SECONDS = 5.0
# The same memory module reports a few pages more or less from boot to boot.
MEMORY_SLACK = 0.01


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a node offers, as Ray says it.

    Attributes:
        processors, accelerators: how many, as Ray counts them.
        kinds: names by which an accelerator can be asked for, in lower case: 'h100'.
    """

    processors: float
    accelerators: float = 0.0
    kinds: tuple[str, ...] = ()

    def serves(self, device: str) -> bool:
        """Whether a case's device can be had here: 'cpu:0', 'gpu:0', 'gpu:H100'."""
        kind, _, name = device.partition(":")
        if kind == "cpu":
            return True
        return self.accelerators > int(name) if name.isdigit() else name.lower() in self.kinds


def read_offer(resources: Mapping[str, float]) -> Offer:
    """What an entry of `ray.nodes()` offers; a custom resource names a kind of accelerator too."""
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
    """The device's name on the node that has it: 'gpu:H100' -> 'gpu:0'."""
    kind, _, name = device.partition(":")
    return device if name.isdigit() else f"{kind}:0"


def unlike(one: Environment, other: Environment) -> list[str]:
    """What tells two nodes apart; [] where their figures may stand in one table.

    The code is the driver's on every node: whether it has changed, resuming asks.
    """
    names = differing_fields(*(msgspec.structs.replace(e, source={}) for e in (one, other)))
    memory = [float(e.machine.get("memory_nbytes") or 0) for e in (one, other)]
    if abs(memory[0] - memory[1]) <= MEMORY_SLACK * max(memory):
        names = [name for name in names if name != "memory_nbytes"]
    return names


class NodeActor:
    """The actor that holds a node and runs races there, one at a time."""

    def __init__(
        self, files: Sequence[str], memory_nbytes: int | None, source: dict[str, str | bool]
    ) -> None:
        paths = [Path(file).resolve() for file in files]
        load_suites([str(path) for path in paths])
        self._memory_nbytes = memory_nbytes or psutil.virtual_memory().total * 3 // 4
        self._source = source
        self._pool = WorkerPool(paths, self._memory_nbytes)
        self._races = LocalScheduler(self._pool, self._memory_nbytes)

    def environment(self, spec: WorkerSpec, processors: float) -> Environment:
        """This node, as a worker of this kind sees it."""
        # Ray sets this one to the actor's processors where the node's owner has not; on one machine
        # nobody does, and the figures are to be the same.
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
    """Which kind of node measures each device: one kind a device, as long as the run goes on."""

    of: dict[str, Environment] = field(default_factory=dict)

    def takes(self, device: str, environment: Environment) -> bool:
        return device in self.of and not unlike(self.of[device], environment)

    def choose(self, device: str, hosts: Iterable[Host]) -> None:
        """Settle on the kind that most hosts are of; for the CPU, one without accelerator first."""
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
    """The ray module, connected; our package and the user's files travel with every actor.

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
        if found is not None:  # Ray itself would try for minutes
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
    """An error of Ray's in one line: the last line that says something."""
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
