"""One run: its workers, its journal, the existing measurements, and its time breakdown."""

from __future__ import annotations

import datetime as dt
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from poolbench.core.candidate import KERAS, contender_name
from poolbench.core.case import Case
from poolbench.core.errors import UsageError
from poolbench.core.plan import Plan, RaceSpec, WorkerSpec
from poolbench.core.records import (
    Environment,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Record,
    TimeBreakdown,
)
from poolbench.core.registry import REGISTRY
from poolbench.engine.contenders import contenders_of, logical_cpus, settings_lines
from poolbench.engine.pool import WorkerPool, device_names
from poolbench.engine.process import Worker
from poolbench.engine.recorder import Seconds
from poolbench.engine.scheduler import (
    Done,
    LocalScheduler,
    Scheduler,
    make_race,
    refuse,
    too_large,
)
from poolbench.machine.info import collect_environment
from poolbench.store.journal import Journal, StoredRun, read_run
from poolbench.store.runs import (
    COMPARED_OPTIONS,
    check_allowed,
    differing_fields,
    differing_options,
    field_names,
    source_digests,
)

Key = tuple[Case, str]
# Total memory varies by some megabytes with the kernel, and in a virtual machine with what its host takes back.
MEMORY_SLACK = 0.03
ORDER_OF_ROUNDS = "random Latin squares of the contenders by random.Random(f'{seed} {case!r}')"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a run.

    Attributes:
        folder: results/<run>.
        plan: of its races.
        asked: options as typed by the user, for the header.
        files: the user's files that register ops and candidates.
        memory_nbytes: a worker's limit.
        resume: continue an existing journal.
        allow_different: fields in which a resumed run may differ from this one.
    """

    folder: Path
    plan: Plan = Plan()
    asked: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    memory_nbytes: int | None = None
    resume: bool = False
    allow_different: tuple[str, ...] = ()


class RemoteScheduler(Scheduler, Protocol):
    """Runs races on other machines."""

    def adopt(self, run: StoredRun) -> None:
        """Resume a run: each device stays with the kind of machine that has measured it."""


class Run:
    """A run in progress. Use as a context: leaving it ends the workers and closes the journal."""

    def __init__(
        self,
        options: RunOptions,
        *,
        progress: Callable[[str], None] = print,
        remote: RemoteScheduler | None = None,
        pool: WorkerPool | None = None,
    ) -> None:
        self.options = options
        self._remote = remote
        self._ahead: list[tuple[Case, Sequence[str], str]] = []
        self._submitted: set[Case] = set()
        self._faults: dict[Case, Exception] = {}
        self._nodes: set[str] = set()
        self._told: set[tuple[str, str]] = set()  # backend and mode, whose settings were printed
        self.done: dict[Key, Measurement] = {}
        self.networks: list[ModelResult] = []
        self._kept: Counter[type[Record]] = Counter()
        self.seconds = Seconds(float)
        self._progress = progress
        self.resumed: StoredRun | None = None
        self._journal: Journal | None = None
        self._begun = False
        self._logical_devices = 1
        self._environment: Environment | None = None
        pool = pool or WorkerPool(options.files, options.memory_nbytes)
        self._local = LocalScheduler(pool, options.memory_nbytes, self.journal)
        self._started = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(finished=kind is None)

    def race(self, case: Case, names: Sequence[str], *, baseline: str) -> dict[str, Measurement]:
        """Race these contenders and the baseline, journal the measurements, and return them by name.

        What a resumed journal holds is not run again, unless other candidates of the case are asked
        for too: samples of two races do not pair.
        """
        self.prepare()
        asked = dict.fromkeys(names)
        if baseline and baseline not in asked:
            asked = {baseline: None} | asked
        wanted = self._spec(case, list(asked), baseline)
        if not self._measured(wanted):
            self._await(wanted)
        return {name: self.done[case, name] for name in asked}

    def ahead(self, case: Case, names: Sequence[str], *, baseline: str) -> None:
        """Announce a future race, which is interleaved with the races requested before it."""
        self._ahead.append((case, list(dict.fromkeys([baseline, *names])), baseline))

    def under_way(self) -> float:
        """Return the work done on unfinished races, in races."""
        return self._local.under_way()

    def _spec(self, case: Case, names: Sequence[str], baseline: str) -> RaceSpec:
        """Return the race of these contenders; if one is unmeasured, include all measured ones of the case."""
        if any((case, name) not in self.done for name in names):
            known = (
                contender_name(name, b) for name in REGISTRY.of(case.op) for b in ("", *KERAS[1:])
            )
            measured = [name for name in known if (case, name) in self.done]
            names = list(dict.fromkeys([*names, *measured]))
        contenders = contenders_of(case, names, self._logical_devices)
        return RaceSpec(case=case, contenders=contenders, baseline=baseline, plan=self.options.plan)

    def _await(self, wanted: RaceSpec) -> None:
        """Run unmeasured races and store results until `wanted` is finished."""
        races: Scheduler = self._local
        if self._remote is not None:
            races = self._remote
            self.journal()  # the journal begins once a worker has listed the devices
        start = time.monotonic()
        for spec in (wanted, *(self._spec(*ahead) for ahead in self._ahead)):
            known = spec.case in self._submitted or spec.case in self._faults
            if not known and not self._measured(spec):
                self._submitted.add(spec.case)
                races.submit(spec)
        self._ahead.clear()
        while not self._measured(wanted):
            if wanted.case in self._faults:
                raise self._faults[wanted.case]
            self._take_in(races.next_done())
        if self._remote is not None:
            # With several nodes, the time of the races is not the time of this run.
            self.seconds["waiting"] += time.monotonic() - start

    def _take_in(self, done: Done) -> None:
        """Write the result of a race to the journal, and its node if it is new."""
        self._submitted.discard(done.spec.case)
        if done.error is not None:
            self._faults[done.spec.case] = done.error
            return
        if done.node is not None and done.node.name not in self._nodes:
            self._nodes.add(done.node.name)
            self.append(done.node)
        if self._remote is None:
            for kind, value in done.result.seconds.items():
                self.seconds[kind] += value
        self.append(*done.result.measurements)
        for line in settings_lines(done.result.measurements, self._told):
            self._progress(line)
        self.done |= {(m.case, m.candidate): m for m in done.result.measurements}

    def _measured(self, spec: RaceSpec) -> bool:
        return all((spec.case, one.name) in self.done for one in spec.contenders)

    def check(self, case: Case, names: Sequence[str]) -> dict[str, Measurement]:
        """Check each contender against the reference once; time and store nothing."""
        race = make_race(self._spec(case, names, names[0]))
        if reason := too_large(case, self.options.memory_nbytes):
            return {m.candidate: m for m in refuse(race, reason)}
        return {m.candidate: m for m in race.check(self._local.pool).measurements}

    def append(self, *records: Record) -> None:
        """Write records to the journal, all of them or none; the first call creates it."""
        self.journal().append(*records)
        self._kept.update(type(record) for record in records)

    def kept(self) -> str:
        """Return what the journal holds: '12 measurements, 3 models'; '' if it holds nothing."""
        counts = {
            "measurements": len(self.done),
            "models": self._kept[ModelResult],
            "cells of the matrix": self._kept[MatrixCell],
        }
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)

    def prepare(self) -> None:
        """Open the journal and read what it holds; nothing is run or written.

        Raises:
            UsageError: the run exists already, or the run to resume is missing or differs.
            StoreError: the journal cannot be read or written.
        """
        if self._journal is not None:
            return
        folder = self.options.folder
        if self.options.resume and not folder.is_dir():
            raise UsageError(
                f"there is no run {folder.name} to go on with; begin it by --run {folder.name}"
            )
        self._journal = Journal(folder)
        try:
            if self._journal.path.stat().st_size:
                self._resume(self._journal)
        except BaseException:
            self._journal.close()
            self._journal = None
            raise

    def journal(self, devices: Mapping[str, str] | None = None) -> Journal:
        """Return the open journal; the first call writes its header, or checks the devices in it.

        `devices`: by name, if no worker of a race can list them.
        """
        self.prepare()
        assert self._journal is not None
        if not self._begun:
            self._begin(self._journal, devices)
            self._begun = True
        return self._journal

    def worker(self, spec: WorkerSpec, process: int = 0) -> Worker:
        """Return a worker of this kind, for work outside the scheduler."""
        self._local.pool.prepare((spec,), process + 1)
        return self._local.pool.worker(spec, process)

    def close(self, *, finished: bool = True) -> None:
        """End the workers; an uninterrupted run writes its time breakdown as the last line."""
        self._local.close()
        if self._remote is not None:
            self._remote.close()
        if self._journal is None:
            return
        try:
            if finished and self.seconds:
                self._journal.append(self.shares())
        finally:
            self._journal.close()
            self._journal = None

    def shares(self) -> TimeBreakdown:
        """Return the time breakdown so far."""
        wall = time.monotonic() - self._started
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        seconds["other"] = round(wall - sum(seconds.values()), 3)
        return TimeBreakdown(seconds=seconds, wall_seconds=round(wall, 3))

    def expect(self, cases: Sequence[Case]) -> None:
        """Announce the cases, so that one kind of worker serves as many of them as possible."""
        self._logical_devices = max(map(logical_cpus, cases), default=1)

    def _begin(self, journal: Journal, devices: Mapping[str, str] | None) -> None:
        """Write the header; for a resumed run, check the devices, which only a worker can list."""
        devices = dict(devices or device_names(self._local.pool.started()))
        if self.resumed is not None:
            here, known = self.environment(), self.resumed.header.environment.devices
            shared = [name for name in known if name in devices]  # NumPy's worker sees no GPU
            old, new = (
                msgspec.structs.replace(here, devices={name: seen[name] for name in shared})
                for seen in (known, devices)
            )
            refuse_different(old, new, self.options)
            return
        environment = msgspec.structs.replace(self.environment(), devices=devices)
        journal.append(make_header(self.options, environment))

    def environment(self) -> Environment:
        """Return the environment with digests of the code; a worker adds the devices."""
        if self._environment is None:  # it takes a second
            found = collect_environment({})
            source = found.source | source_digests(self.options.files)
            self._environment = msgspec.structs.replace(found, source=source)
        return self._environment

    def _resume(self, journal: Journal) -> None:
        """Read the journal, if it was measured on this machine, with this code and these options."""
        name = journal.path.parent.name
        if not self.options.resume:
            raise UsageError(
                f"{name} holds a run already; go on with it by --resume {name}, "
                "or pick another --run NAME"
            )
        run = read_run(journal.path.parent)
        old = run.header.environment
        here = msgspec.structs.replace(self.environment(), devices=old.devices)
        asked = dict(self.options.asked) | {"seed": self.options.plan.seed}
        check_allowed(self.options.allow_different, {*field_names(old, here), *COMPARED_OPTIONS})
        refuse_different(old, here, self.options, differing_options(run.header, asked))
        self.resumed = run
        self.done = {(m.case, m.candidate): m for m in run.measurements}
        self.networks = run.networks
        self._kept[ModelResult] = len(run.networks)
        self._kept[MatrixCell] = len(run.capabilities)
        if self._remote is not None:
            self._remote.adopt(run)
        dropped = "".join(f"; {said}" for said in (journal.dropped, run.dropped) if said)
        self._progress(f"going on with {name}: {self.kept() or 'nothing'} so far{dropped}")


def make_header(options: RunOptions, environment: Environment) -> Header:
    """Return the first line of a new run's journal."""
    return Header(
        run=options.folder.name,
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        environment=environment,
        options=dict(options.asked) | {"order_of_rounds": ORDER_OF_ROUNDS},
        seed=options.plan.seed,
        axes=REGISTRY.axis_infos(REGISTRY.ops),
        sources=REGISTRY.user_sources(),
    )


def refuse_different(
    old: Environment, new: Environment, options: RunOptions, different_options: Sequence[str] = ()
) -> None:
    """Refuse to resume a run that another machine, other code or other options have measured.

    Raises:
        UsageError: fields differ that `options` do not allow to differ.
    """
    different = [*differences(old, new), *different_options]
    if "code" in old.source and "code" in new.source:
        # The digests are more precise: a commit may not change the code, and a dirty tree may.
        different = [field for field in different if field not in ("commit", "dirty")]
    if refused := [field for field in different if field not in options.allow_different]:
        raise UsageError(
            f"{options.folder.name} was run elsewhere, with other code or other options: "
            f"{', '.join(refused)} differ; go on by "
            + " ".join(f"--allow-different {shlex.quote(field)}" for field in refused)
            + ", or begin a new run"
        )


def differences(
    one: Environment, other: Environment, *, memory_slack: float = MEMORY_SLACK
) -> list[str]:
    """Return the names of the fields that differ; total memory may differ by the share `memory_slack`."""
    names = differing_fields(one, other)
    memory = [found.machine.get("memory_nbytes") for found in (one, other)]
    known = [nbytes for nbytes in memory if isinstance(nbytes, (int, float))]
    if len(known) == 2 and max(known) - min(known) <= memory_slack * max(known):
        names = [name for name in names if name != "memory_nbytes"]
    return names
