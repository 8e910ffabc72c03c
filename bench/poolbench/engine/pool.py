"""Worker processes on this machine, by their settings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.engine.process import Worker, WorkerLike
from poolbench.engine.recovery import Workers
from poolbench.worker import session


class WorkerPool:
    """Worker processes, kept until workers of other specs are asked for.

    Args:
        files: the user's files that register ops and candidates.
        memory_nbytes: a worker's limit; None: no limit.
    """

    def __init__(self, files: Sequence[Path] = (), memory_nbytes: int | None = None) -> None:
        self._files = files
        self._memory_nbytes = memory_nbytes
        self._workers: dict[WorkerSpec, list[Worker]] = {}

    def prepare(
        self, specs: Collection[WorkerSpec], processes: int, *, keep_others: bool = False
    ) -> None:
        """Start at least `processes` workers of each spec, concurrently.

        Workers of other specs are ended, unless `keep_others`.

        Raises:
            WorkerFailure: one cannot be started.
        """
        if not keep_others and not set(specs) <= self._workers.keys():
            self._end(self._workers.keys() - set(specs))
        for spec in specs:
            workers = self._workers.setdefault(spec, [])
            while len(workers) < processes:
                worker = Worker(spec, files=self._files, memory_nbytes=self._memory_nbytes)
                workers.append(worker)
                worker.start()
        for spec in specs:
            for worker in self._workers[spec]:
                worker.wait_started()

    def worker(self, spec: WorkerSpec, process: int = 0) -> Worker:
        """Return a worker of this kind; a new number gets a fresh process."""
        self.prepare((spec,), process + 1, keep_others=True)
        return self._workers[spec][process]

    def release(self, spec: WorkerSpec) -> None:
        """End the workers of this kind."""
        for worker in self._workers.pop(spec, []):
            worker.close()

    def started(self) -> Worker | None:
        """Return a worker that is up, if there is one."""
        return next((workers[0] for workers in self._workers.values() if workers), None)

    def close(self) -> None:
        """End every worker."""
        self._end(set(self._workers))

    def _end(self, specs: Collection[WorkerSpec]) -> None:
        workers = [worker for spec in specs for worker in self._workers.pop(spec)]
        for worker in workers:
            worker.kill()  # kill all first: waiting for each in turn would delay Ctrl-C
        for worker in workers:
            worker.close()


@dataclass(frozen=True, kw_only=True)
class RotatedPool:
    """A pool whose first worker differs per race, so that concurrent races rarely wait for the same worker."""

    pool: Workers
    first: int
    processes: int

    def place(self, process: int) -> int:
        """Return the number of the pool's worker that a process of the race has."""
        return (process + self.first) % self.processes if process < self.processes else process

    def worker(self, spec: WorkerSpec, process: int, /) -> WorkerLike:
        """Return the worker of this process of the race."""
        return self.pool.worker(spec, self.place(process))


def device_names(worker: Worker | None) -> dict[str, str]:
    """Return the devices that a worker sees, by name; without TensorFlow, the CPU alone."""
    if worker is None or worker.spec.backend == "numpy":
        return {"cpu:0": "CPU"}
    try:
        devices: dict[str, str] = worker.call(session.list_devices, timeout=60)
    except WorkerFailure:  # no worker starts: each measurement says why
        return {}
    return devices
