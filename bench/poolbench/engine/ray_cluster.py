"""Run races on the nodes of a Ray cluster.

One actor holds one node. It reserves all processors and accelerators, so that Ray runs nothing else there, and
runs whole races in worker processes as on one machine. Clocks, limits and noise are therefore the node's own,
and the network is crossed once per race. The driver keeps the queue and the journal; Ray finds nodes and places
actors.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from poolbench.core.plan import RaceSpec
from poolbench.core.records import Node, Status
from poolbench.engine.cleanup import temporary_folder
from poolbench.engine.race import Result
from poolbench.engine.ray_nodes import (
    PACKAGE,
    Host,
    Kinds,
    NodeActor,
    brief,
    connect,
    read_offer,
    ship,
    unlike,
)
from poolbench.engine.scheduler import Done, make_race, refuse
from poolbench.machine.info import source_state
from poolbench.store.journal import StoredRun
from poolbench.store.runs import source_digests

ATTEMPTS = 3
ACTOR_SECONDS = 300.0
POLL_SECONDS = 1.0


class RayScheduler:
    """Races on the nodes of a Ray cluster: `submit` them, ask for `next_done` until all are back.

    Args:
        address: of the cluster: HOST:PORT, ray://HOST:PORT, or auto.
        files: the user's files that register ops and candidates; they travel, with the Python files
            beside them.
        memory_nbytes: a worker's limit; None takes three quarters of each node's memory.
        patience_seconds: longest wait of a race for a node that can run it.
        progress: called with one line per lost or missing node.

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
        self._hosts: dict[str, Host] = {}
        self._kinds = Kinds()
        self._named = 0
        self._lacking_since: dict[str, float] = {}
        self._shipped = Path(tempfile.mkdtemp(dir=temporary_folder()))
        try:
            self._names = ship(self._files, self._shipped)
            self._ray = connect(address, self._shipped if self._names else None)
        except BaseException:
            shutil.rmtree(self._shipped, ignore_errors=True)
            raise

    def adopt(self, run: StoredRun) -> None:
        """Resume a run: each device stays with the kind of node that has measured it."""
        nodes = run.of(Node)
        environments = {"local": run.header.environment} | {n.name: n.environment for n in nodes}
        for measurement in run.measurements:
            known = environments.get(measurement.node)  # its line may be damaged
            if measurement.status != "not_run" and known is not None:
                self._kinds.of.setdefault(measurement.case.device, known)
        numbers = [re.search(r"\d+$", node.name) for node in nodes]
        self._named = max((int(found[0]) for found in numbers if found), default=0)

    def submit(self, job: RaceSpec) -> None:
        """Queue a race."""
        self._queue.append(job)

    def next_done(self) -> Done:
        """Return the next finished race, of any node.

        A race whose node died returns to the head of the queue. A race that no node can run becomes not_run
        after `patience_seconds`.
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
        """Release the nodes and disconnect from the cluster."""
        for host in self._hosts.values():
            self._release(host)
        self._hosts.clear()
        self._ray.shutdown()
        shutil.rmtree(self._shipped, ignore_errors=True)

    def _staff(self) -> None:
        """Start an actor on every node that could run a waiting race; forget dead nodes."""
        alive = {entry["NodeID"]: entry for entry in self._ray.nodes() if entry["Alive"]}
        for gone in [
            host for host in self._hosts.values() if host.id not in alive and not host.job
        ]:
            self._release(gone)
            del self._hosts[gone.id]
        for identity, entry in alive.items():
            host = self._hosts.get(identity)
            if host is None:
                host = self._hosts[identity] = Host(identity, read_offer(entry["Resources"]))
            if host.node_actor is None and not host.fault and self._wanted(host):
                self._start(host)
            elif host.starting and time.monotonic() - host.since > ACTOR_SECONDS:
                host.fault = f"it was not free within {ACTOR_SECONDS:g} s"
                self._release(host)

    def _wanted(self, host: Host) -> bool:
        return host.offer.processors > 0 and any(self._can(host, job) for job in self._queue)

    def _can(self, host: Host, job: RaceSpec) -> bool:
        """Tell whether the host may be able to run the job."""
        device = job.case.device
        if not host.offer.serves(device) or host.fault:
            return False
        known = host.environment is not None and device in self._kinds.of
        return not known or self._kinds.takes(device, host.environment)  # type: ignore[arg-type]

    def _start(self, host: Host) -> None:
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
        """Assign to every idle host the first race that it may run; release hosts without one."""
        hosts = [host for host in self._hosts.values() if not host.fault]
        for device in dict.fromkeys(job.case.device for job in self._queue):
            # Choose the kind among all candidates, not by the node that started first.
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

    def _collect(self, host: Host) -> Done | None:
        """Handle the result of a host's reference: its environment, a race, or its death."""
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

    def _lost(self, host: Host, job: RaceSpec | None, error: Exception) -> Done | None:
        """Handle a lost node: its race returns to the head of the queue, at most ATTEMPTS times."""
        if isinstance(error, self._ray.exceptions.RayTaskError) and job is not None:
            return Done(spec=job, result=Result(), error=error)
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
        return _refusal(job, f"its node was lost {ATTEMPTS} times: {reason}", "crashed")

    def _refuse(self) -> Done | None:
        """Return the first race that has waited longer than `patience_seconds` for a node."""
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
                return _refusal(jobs[0], self._why_lacking(device, hosts))
        return None

    def _why_lacking(self, device: str, hosts: Sequence[Host]) -> str:
        able = [host for host in hosts if host.offer.serves(device)]
        if not able:
            kinds = sorted({f"gpu:{kind}" for host in hosts for kind in host.offer.kinds})
            offers = ", ".join(["cpu", *kinds])
            return f"no node of the cluster has {device}; {len(hosts)} nodes offer {offers}"
        if faults := [host.fault for host in able if host.fault]:
            return f"no node could be used for {device}: {faults[-1]}"
        kind = self._kinds.of[device]
        nearest = min((unlike(kind, h.environment) for h in able if h.environment), key=len)
        return (
            f"the nodes that are left for {device} are of another kind than those before: "
            f"{', '.join(nearest)} differ"
        )

    def _release(self, host: Host) -> None:
        """End a host's actor and its workers; keep the node's properties."""
        node_actor, host.node_actor, host.waits_for = host.node_actor, None, None
        if node_actor is not None:
            with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
                self._ray.kill(node_actor)


def _refusal(job: RaceSpec, reason: str, status: Status = "not_run") -> Done:
    return Done(spec=job, result=Result(measurements=refuse(make_race(job), reason, status)))
