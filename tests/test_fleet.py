"""Races on one machine take turns, process by process and leg by leg."""

import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import ANSWERS, FakeWorker, fake_candidate
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine import scheduler as fleet_module
from poolbench.engine.race import Plan
from poolbench.engine.scheduler import LANES, TURNS_BETWEEN, RaceSpec, Scheduler, WorkerPool
from poolbench.machine.info import Usage
from poolbench.stats.estimate import estimate
from poolbench.worker import timing

ROOT = Path(__file__).parents[1]
PLAN = Plan(processes=3, max_processes=3, allocations=1, rounds=1)


class Fleet:
    """Notes which case was opened by which process's worker, and which settings were asked for."""

    def __init__(self, fault=None):
        self.turns = []
        self.settings = []
        self.beside = False
        self._fault = fault

    def use(self, setting, processes, *, beside=False):
        if self._fault == "start":
            raise WorkerFailure("crashed", "no memory")
        self.settings.append(setting)
        self.beside |= beside

    def worker(self, process):
        def open_case(case, *_):
            if self._fault == (case.shape[3], process):
                raise AttributeError("a fault of ours")
            self.turns.append((case.shape[3], process))
            return ANSWERS["open_case"]

        return FakeWorker(Counter(), open_case=open_case)

    def close(self):
        pass


@pytest.fixture
def job(monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setitem(REGISTRY.candidates, ("fake", name), fake_candidate(name))

    def make(number, *, threads=None, plan=PLAN):
        case = make_case(op="fake", shape=(1, 1, 1, number))
        return RaceSpec(
            case=case, candidates=("one", "two"), baseline="one", plan=plan,
            setting=WorkerSpec(threads=threads),
        )  # fmt: skip

    return make


def races_of(fleet, jobs):
    races = Scheduler(fleet, None)
    for one in jobs:
        races.submit(one)
    return races


def test_a_race_alone_runs_at_a_stretch(job):
    fleet = Fleet()
    done = races_of(fleet, [job(1)]).next_done()
    assert fleet.turns == [(1, 0), (1, 1), (1, 2)]
    assert {m.candidate: m.status for m in done.result.measurements}["two"] == "ok"


def test_the_processes_of_a_race_are_turns_of_others_apart(job):
    fleet = Fleet()
    races = races_of(fleet, [job(number) for number in range(1, 61)])
    for _ in range(60):
        races.next_done()
    places = defaultdict(list)
    for place, (number, _) in enumerate(fleet.turns):
        places[number].append(place)
    assert {len(places[number]) for number in range(1, 61)} == {PLAN.processes}
    steady = [np.diff(places[number]) for number in range(20, 40)]
    assert np.all(np.abs(np.array(steady) - TURNS_BETWEEN) <= LANES)


class LegsFleet(Fleet):
    """Notes what each worker is asked; a call takes 1 ms, and nothing may be open twice in a worker."""

    def __init__(self):
        super().__init__()
        self.legs = []  # (case, worker)
        self.open = {}  # worker -> case
        self.most_open = 0

    def worker(self, process):
        def open_case(case, *_):
            assert process not in self.open
            self.open[process] = case
            self.most_open = max(self.most_open, len(self.open))
            return ANSWERS["open_case"]

        def time_batch(requests):
            self.legs.append((self.open[process].shape[3], process))
            return self.batch(self.open[process], requests)

        def close_case():
            del self.open[process]

        return FakeWorker(
            Counter(), open_case=open_case, time_batch=time_batch, close_case=close_case
        )

    def batch(self, case, requests):
        return ANSWERS["time_batch"](requests)


LEGS = Plan(processes=10, max_processes=10, allocations=2, rounds=999, budget_seconds=12.0)


def test_a_leg_of_one_race_follows_a_leg_of_another(job):
    fleet = LegsFleet()
    plan = replace(LEGS, rounds=72)
    races = races_of(fleet, [job(number, plan=plan) for number in range(1, 31)])
    for _ in range(30):
        races.next_done()
    between = [before != after for before, after in zip(fleet.legs, fleet.legs[1:])]
    assert sum(between) > 0.9 * len(between)
    # Each of a race's processes is another worker's.
    assert len({worker for case, worker in fleet.legs if case == 15}) == LEGS.processes


@pytest.mark.parametrize(("available", "most"), [(1000, LANES), (250, 2)])
def test_lanes_hold_no_more_than_the_memory_that_is_free(job, monkeypatch, available, most):
    monkeypatch.setattr("poolbench.engine.scheduler.needed_nbytes", lambda case: 100)
    monkeypatch.setattr(
        "poolbench.engine.scheduler.psutil.virtual_memory",
        lambda: SimpleNamespace(available=available),
    )
    fleet = LegsFleet()
    plan = replace(LEGS, rounds=72)
    races = races_of(fleet, [job(number, plan=plan) for number in range(1, 21)])
    for _ in range(20):
        races.next_done()
    assert fleet.most_open == most


def test_a_gpu_has_one_race_at_a_time(job):
    fleet = LegsFleet()
    plan = replace(LEGS, processes=3, max_processes=3, rounds=72)
    jobs = [replace(one, case=one.case.replace(device="gpu:0"))
            for one in (job(number, plan=plan) for number in range(1, 6))]  # fmt: skip
    races = races_of(fleet, jobs)
    for _ in jobs:
        races.next_done()
    assert fleet.most_open == 1


class NoisyFleet(LegsFleet):
    """Even cases are noisy, odd ones are not; the seconds that each is given, by a clock of its own."""

    def __init__(self, ratio):
        super().__init__()
        self.seconds = Counter()
        self._ratio = ratio
        self._rng = np.random.default_rng(0)

    def usage(self, device):
        return lambda: Usage(
            clock=self.seconds.total(), busy_seconds=0.0, steal_seconds=0.0, own_seconds=0.0
        )

    def batch(self, case, requests):
        number = case.shape[3]
        blocks = []
        for request in requests:
            usual = 1e-3 * (self._ratio if request.name == "two" else 1.0)
            self.seconds[number] += usual * (request.warmup + request.calls)
            noise = self._rng.normal(0, 0.001 if number % 2 else 0.3)
            blocks.append(timing.Block(seconds=usual * float(np.exp(noise))))
        return timing.Batch(blocks=tuple(blocks), cpu_seconds=0.0, switches=0)


@pytest.mark.parametrize(("ratio", "more"), [(1.0, True), (9.0, False)])
def test_what_a_steady_race_does_not_need_goes_to_a_noisy_one_that_is_undecided(
    job, monkeypatch, ratio, more
):
    fleet = NoisyFleet(ratio)
    monkeypatch.setattr("poolbench.engine.race.usage_reader", fleet.usage)
    races = races_of(fleet, [job(number, plan=LEGS) for number in range(1, 13)])
    for _ in range(12):
        races.next_done()
    steady, noisy = (
        np.median([fleet.seconds[number] for number in range(first, 13, 2)]) for first in (1, 2)
    )
    assert steady < 0.7 * LEGS.budget_seconds
    assert (noisy > 1.15 * LEGS.budget_seconds) == more


def test_races_come_back_one_by_one_about_in_the_order_in_which_they_were_asked_for(job):
    races = races_of(Fleet(), [job(number) for number in range(1, 31)])
    numbers = [races.next_done().job.case.shape[3] for _ in range(30)]
    assert sorted(numbers) == list(range(1, 31))
    assert all(abs(number - place) <= LANES for place, number in enumerate(numbers, 1))


@pytest.mark.parametrize("room", [False, True])
def test_races_of_another_setting_take_turns_too_where_their_workers_have_room(
    job, monkeypatch, room
):
    free = 2 * fleet_module.WORKER_NBYTES * PLAN.processes
    memory = SimpleNamespace(available=free + 1 if room else free)
    monkeypatch.setattr(fleet_module.psutil, "virtual_memory", lambda: memory)
    fleet = Fleet()
    races = races_of(fleet, [job(1), job(2), job(3, threads=1), job(4)])
    for _ in range(4):
        races.next_done()
    threads = [setting.threads for setting in fleet.settings]
    assert Counter(threads) == {None: 9, 1: 3}
    assert (threads == [None] * 6 + [1] * 3 + [None] * 3) != room
    assert fleet.beside == room


def test_workers_of_another_setting_end_the_former_unless_they_are_to_be_beside(monkeypatch):
    class FakeProcess:
        def __init__(self, setting, **more):
            self.setting = setting

        def start(self):
            pass

        wait_started = kill = close = start

    monkeypatch.setattr(fleet_module, "Worker", FakeProcess)
    fleet = WorkerPool((), None)
    one, two = WorkerSpec(threads=1), WorkerSpec(threads=2)
    fleet.use(one, 2)
    first = fleet.worker(0)
    fleet.use(two, 1, beside=True)
    assert fleet.worker(0).setting == two
    fleet.use(one, 2)
    assert fleet.worker(0) is first
    fleet.use(WorkerSpec(threads=3), 1)
    fleet.use(one, 1)
    assert fleet.worker(0) is not first


def test_what_is_under_way_counts_by_its_processes(job):
    races = races_of(Fleet(), [job(number) for number in range(1, 31)])
    assert races.under_way() == 0
    races.next_done()
    assert 0 < races.under_way() < TURNS_BETWEEN


def test_a_fault_of_the_harness_comes_back_with_its_race_and_the_others_go_on(job):
    races = races_of(Fleet(fault=(2, 1)), [job(1), job(2), job(3)])
    done = {one.job.case.shape[3]: one for one in (races.next_done() for _ in range(3))}
    assert isinstance(done[2].error, AttributeError) and not done[2].result.measurements
    assert done[1].error is None and done[3].error is None
    with pytest.raises(RuntimeError, match="no race is queued"):
        races.next_done()


def test_without_workers_the_measurements_say_why(job):
    done = races_of(Fleet(fault="start"), [job(1)]).next_done()
    assert {m.status for m in done.result.measurements} == {"crashed"}
    assert "no worker could be started: no memory" in done.result.measurements[0].reason


def test_scheduler_case_above_memory_limit_is_not_opened(job, monkeypatch):
    monkeypatch.setattr("poolbench.engine.scheduler.input_nbytes", lambda case: 64 * 64 * 4)
    fleet = Fleet()
    races = Scheduler(fleet, 1)
    races.submit(replace(job(1), case=make_case(op="fake", shape=(1, 64, 64, 1))))
    assert {m.status for m in races.next_done().result.measurements} == {"not_run"}
    assert not fleet.turns


def test_races_of_a_setting_of_their_own_come_last_so_that_workers_are_started_once():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "suites", "-q", "--poolbench-dry-run"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    alone = ["threads1" in line for line in done.stdout.splitlines() if "x56x56x" in line]
    assert any(alone) and alone == sorted(alone)


class DriftingFleet(Fleet):
    """A machine on which candidate 'two' is now faster, now slower than 'one', within a minute, and equal in the long run."""

    def __init__(self, seed):
        super().__init__()
        self.now = 0.0
        rng = np.random.default_rng(seed)
        self._periods = rng.uniform(15, 90, 12)
        self._phases = rng.uniform(0, 2 * np.pi, 12)
        self._rng = rng

    def worker(self, process):
        return FakeWorker(Counter(), time_batch=self._time_batch)

    def _time_batch(self, requests):
        self.now += 1.0
        drift = 0.03 * np.sin(2 * np.pi * self.now / self._periods + self._phases).sum()
        noise = self._rng.normal(0, 0.02, len(requests))
        blocks = [
            timing.Block(seconds=1e-3 * float(np.exp(drift * (request.name == "two") + error)))
            for request, error in zip(requests, noise, strict=True)
        ]
        return timing.Batch(blocks=tuple(blocks), cpu_seconds=0.0, switches=0)


def share_that_covers(jobs, at_once):
    """Of the races' 95% intervals, those that hold the long run's ratio of one."""
    races = Scheduler(DriftingFleet(seed=1), None)
    covered = []
    for start in range(0, len(jobs), at_once):
        for one in jobs[start : start + at_once]:
            races.submit(one)
        for _ in jobs[start : start + at_once]:
            found = {m.candidate: m for m in races.next_done().result.measurements}
            interval = estimate(found["two"].samples, found["one"].samples)
            covered.append(interval.low <= 0 <= interval.high)
    return sum(covered) / len(covered)


def test_where_the_machine_drifts_races_in_turns_say_the_truth_and_at_a_stretch_do_not(job):
    plan = Plan(processes=10, max_processes=10, allocations=1, rounds=4)
    jobs = [job(number, plan=plan) for number in range(1, 201)]
    assert share_that_covers(jobs, at_once=200) > 0.93
    assert share_that_covers(jobs, at_once=1) < 0.6
