"""A fleet: the same races on other machines, by Ray.

One actor, a node, holds one node: it takes all of the node's processors and accelerators, so that
Ray runs nothing else there, and runs whole races with the same process processes as on one machine.
So clocks, limits and contention are the node's own, and the network is crossed once a race. The
driver keeps a queue and the journal; which node offers what, and placing an actor there, is Ray's.

Ray is imported when a fleet is made: nobody else needs it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from poolbench.core.errors import UsageError
from poolbench.core.plan import RaceSpec, WorkerSpec
from poolbench.core.records import Environment, Node
from poolbench.core.registry import load_suites
from poolbench.engine.pool import WorkerPool, device_names
from poolbench.engine.race import Result
from poolbench.engine.recorder import Seconds
from poolbench.engine.scheduler import Done, LocalScheduler, make_race, refuse
from poolbench.machine.info import collect_environment, source_state
from poolbench.store.runs import differing_fields, source_digests

if TYPE_CHECKING:
    from poolbench.store.journal import StoredRun

PACKAGE = Path(__file__).parent.parent
ACCELERATOR = "accelerator_type:"  # how Ray writes the kind of a node's accelerator as a resource
PLAIN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
ATTEMPTS = 3
CONNECT_SECONDS = 5.0
KEEPER_SECONDS = 300.0
POLL_SECONDS = 1.0
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
class _Host:
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
class _Kinds:
    """Which kind of node measures each device: one kind a device, as long as the run goes on."""

    of: dict[str, Environment] = field(default_factory=dict)

    def takes(self, device: str, environment: Environment) -> bool:
        return device in self.of and not unlike(self.of[device], environment)

    def choose(self, device: str, hosts: Iterable[_Host]) -> None:
        """Settle on the kind that most hosts are of; for the CPU, one without accelerator first."""
        able = [host for host in hosts if host.environment and host.offer.serves(device)]
        if device in self.of or not able:
            return

        def rank(host: _Host) -> tuple[bool, int, str]:
            assert host.environment is not None
            alike = sum(not unlike(host.environment, o.environment) for o in able if o.environment)
            return device.startswith("cpu") and host.offer.accelerators > 0, -alike, host.name

        chosen = min(able, key=rank).environment
        assert chosen is not None
        self.of[device] = chosen


class RayScheduler:
    """Races on the nodes of a Ray cluster: `submit` them, ask for `next_done` until all are back.

    Args:
        address: of the cluster: HOST:PORT, ray://HOST:PORT, or auto.
        files: the user's files that register ops and candidates; they travel, with the Python files
            beside them.
        memory_nbytes: a worker's limit; None takes three quarters of each node's memory.
        patience_seconds: how long a race waits for a node that could run it.
        progress: told of nodes that are lost or lacking, a line each.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """

    def __init__(
        self,
        address: str,
        *,
        files: Sequence[Path] = (),
        memory_nbytes: int | None = None,
        patience_seconds: float = 120.0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._files = tuple(files)
        self._memory_nbytes = memory_nbytes
        self._patience_seconds = patience_seconds
        self._progress = progress
        self._source = {**source_state(PACKAGE), **source_digests(self._files)}
        self._queue: deque[RaceSpec] = deque()
        self._attempts: Counter[RaceSpec] = Counter()
        self._hosts: dict[str, _Host] = {}
        self._kinds = _Kinds()
        self._named = 0
        self._lacking_since: dict[str, float] = {}
        self._shipped = Path(tempfile.mkdtemp(prefix="poolbench-ship-"))
        try:
            self._names = ship(self._files, self._shipped)
            self._ray = connect(address, self._shipped if self._names else None)
        except BaseException:
            shutil.rmtree(self._shipped, ignore_errors=True)
            raise

    def adopt(self, run: StoredRun) -> None:
        """Go on with a run: each device stays with the kind of node that has measured it."""
        nodes = run.of(Node)
        environments = {"local": run.header.environment} | {n.name: n.environment for n in nodes}
        for measurement in run.measurements:
            if measurement.status != "not_run":
                self._kinds.of.setdefault(measurement.case.device, environments[measurement.node])
        self._named = len(nodes)

    def submit(self, job: RaceSpec) -> None:
        """Queue a race."""
        self._queue.append(job)

    def next_done(self) -> Done:
        """The next race that comes back, from whichever node.

        A race whose node died is queued again, first of all; one that no node can run comes back as
        not_run once patience is at its end.
        """
        while True:
            if not self._queue and not any(host.job for host in self._hosts.values()):
                raise RuntimeError("no race is queued")
            self._staff()
            self._assign()
            if (refused := self._refuse()) is not None:
                return refused
            waiting = {host.waits_for: host for host in self._hosts.values() if host.waits_for}
            if not waiting:
                time.sleep(POLL_SECONDS)
                continue
            ready, _ = self._ray.wait(list(waiting), timeout=POLL_SECONDS)
            for reference in ready:
                if (done := self._collect(waiting[reference])) is not None:
                    return done

    def close(self) -> None:
        """Give the nodes back and leave the cluster."""
        for host in self._hosts.values():
            self._release(host)
        self._hosts.clear()
        self._ray.shutdown()
        shutil.rmtree(self._shipped, ignore_errors=True)

    def _staff(self) -> None:
        """Put a node on every node that could run a race that waits; forget nodes that died."""
        alive = {entry["NodeID"]: entry for entry in self._ray.nodes() if entry["Alive"]}
        for gone in [
            host for host in self._hosts.values() if host.id not in alive and not host.job
        ]:
            self._release(gone)
            del self._hosts[gone.id]
        for identity, entry in alive.items():
            host = self._hosts.get(identity)
            if host is None:
                host = self._hosts[identity] = _Host(identity, read_offer(entry["Resources"]))
            if host.node_actor is None and not host.fault and self._wanted(host):
                self._start(host)
            elif host.starting and time.monotonic() - host.since > KEEPER_SECONDS:
                host.fault = f"it was not free within {KEEPER_SECONDS:g} s"
                self._release(host)

    def _wanted(self, host: _Host) -> bool:
        return host.offer.processors > 0 and any(self._can(host, job) for job in self._queue)

    def _can(self, host: _Host, job: RaceSpec) -> bool:
        """Whether the host might run the job, as far as is known of it."""
        device = job.case.device
        if not host.offer.serves(device) or host.fault:
            return False
        known = host.environment is not None and device in self._kinds.of
        return not known or self._kinds.takes(device, host.environment)  # type: ignore[arg-type]

    def _start(self, host: _Host) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spec = next(job.workers[0] for job in self._queue if self._can(host, job))
        host.node_actor = (
            self._ray.remote(NodeActor)
            .options(
                num_cpus=host.offer.processors,
                num_gpus=host.offer.accelerators,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(host.id, soft=False),
            )
            .remote(self._names, self._memory_nbytes, self._source)
        )
        host.environment = None
        host.waits_for = host.node_actor.environment.remote(spec, host.offer.processors)
        host.since = time.monotonic()

    def _assign(self) -> None:
        """Give every idle host the first race that it may run; release those without any."""
        hosts = [host for host in self._hosts.values() if not host.fault]
        for device in dict.fromkeys(job.case.device for job in self._queue):
            # The kind is chosen among all who could: not by who happened to be up first.
            if not any(host.starting and host.offer.serves(device) for host in hosts):
                self._kinds.choose(device, hosts)
        for host in hosts:
            if not host.idle or host.environment is None:
                continue
            able = [job for job in self._queue if self._can(host, job)]
            ready = [j for j in able if self._kinds.takes(j.case.device, host.environment)]
            if ready:
                self._queue.remove(ready[0])
                host.job = ready[0]
                host.waits_for = host.node_actor.race.remote(ready[0])
            elif not able:
                self._release(host)

    def _collect(self, host: _Host) -> Done | None:
        """What a host's reference came to: its environment, a race, or its death."""
        reference, host.waits_for = host.waits_for, None
        job, host.job = host.job, None
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._lost(host, job, error)
        if job is None:
            host.environment = value
            if not host.name:
                self._named += 1
                host.name = f"node-{self._named}"
            return None
        assert host.environment is not None
        measurements = tuple(
            msgspec.structs.replace(measurement, case=job.case, node=host.name)
            for measurement in value.measurements
        )
        return Done(
            spec=job,
            result=Result(measurements=measurements, seconds=value.seconds),
            node=Node(name=host.name, environment=host.environment),
        )

    def _lost(self, host: _Host, job: RaceSpec | None, error: Exception) -> Done | None:
        """A node is gone: its race goes back to the head of the queue, at most ATTEMPTS times."""
        if isinstance(error, self._ray.exceptions.RayTaskError) and job is not None:
            nothing = Result(measurements=(), seconds=Seconds(float))
            return Done(spec=job, result=nothing, error=error)
        self._release(host)
        reason = brief(error)
        self._progress(f"{host.name or 'a node'} was lost: {reason}")
        if job is None:
            host.fault = reason
            return None
        self._attempts[job] += 1
        if self._attempts[job] < ATTEMPTS:
            self._queue.appendleft(job)
            return None
        return self._refusal(job, f"its node was lost {ATTEMPTS} times: {reason}", crashed=True)

    def _refuse(self) -> Done | None:
        """The first race that no node could run for longer than patience lasts."""
        now = time.monotonic()
        for device in dict.fromkeys(job.case.device for job in self._queue):
            jobs = [job for job in self._queue if job.case.device == device]
            hosts = [host for host in self._hosts.values() if host.offer.processors > 0]
            if any(self._can(host, job) for host in hosts for job in jobs):
                self._lacking_since.pop(device, None)
                continue
            if device not in self._lacking_since:
                self._lacking_since[device] = now
                why = self._why_lacking(device, hosts)
                self._progress(f"{why}; waiting {self._patience_seconds:g} s for one")
            if now - self._lacking_since[device] >= self._patience_seconds:
                self._queue.remove(jobs[0])
                return self._refusal(jobs[0], self._why_lacking(device, hosts))
        return None

    def _why_lacking(self, device: str, hosts: Sequence[_Host]) -> str:
        able = [host for host in hosts if host.offer.serves(device)]
        if not able:
            kinds = sorted({f"gpu:{kind}" for host in hosts for kind in host.offer.kinds})
            offers = ", ".join(["cpu", *kinds])
            return f"no node of the fleet has {device}; {len(hosts)} nodes offer {offers}"
        if faults := [host.fault for host in able if host.fault]:
            return f"no node could be used for {device}: {faults[-1]}"
        kind = self._kinds.of[device]
        nearest = min((unlike(kind, h.environment) for h in able if h.environment), key=len)
        return (
            f"the nodes that are left for {device} are of another kind than those before: "
            f"{', '.join(nearest)} differ"
        )

    def _refusal(self, job: RaceSpec, reason: str, *, crashed: bool = False) -> Done:
        measurements = refuse(make_race(job), reason, "crashed" if crashed else "not_run")
        return Done(spec=job, result=Result(measurements=measurements, seconds=Seconds(float)))

    def _release(self, host: _Host) -> None:
        """End a host's node, and with it its workers; what is known of the node stays."""
        node_actor, host.node_actor, host.waits_for = host.node_actor, None, None
        if node_actor is not None:
            with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
                self._ray.kill(node_actor)


def connect(address: str, working_dir: Path | None) -> Any:
    """The ray module, connected; our package and the user's files travel with every actor.

    Raises:
        UsageError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--ray needs Ray; install it with: pip install 'poolbench[cluster]'"
        ) from None
    found = re.fullmatch(r"(?:ray://)?([^:/\s]+):(\d{1,5})", address)
    if address != "auto" and found is None:
        raise UsageError(f"--ray takes HOST:PORT, ray://HOST:PORT or auto; got {address!r}")
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
            f"no Ray cluster answers at {address} (--ray): {brief(error)}; "
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
