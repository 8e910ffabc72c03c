"""Races of one machine are interleaved, process by process and step by step."""

import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import ANSWERS, FakePool, fake_candidate, make_batch
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine import pool, scheduler
from poolbench.engine.pool import WorkerPool
from poolbench.engine.scheduler import MAX_ACTIVE_RACES, PROCESS_SPACING, LocalScheduler
from poolbench.machine.info import Usage
from poolbench.stats.batch import estimate_all
from poolbench.worker import session, timing

ROOT = Path(__file__).parents[1]
PLAN = Plan(processes=3, allocations=1, rounds=1)


class Races:
    """A scheduler over fake workers; notes which case was opened by which process's worker."""

    def __init__(
        self, specs=(), *, answers=None, fault=None, start_fails=False, memory_nbytes=None
    ):
        self.slots = []
        self.pool = FakePool(self._answers)
        self._more = answers or (lambda spec, process: {})
        self._fault = fault
        if start_fails:
            self.pool.prepare = self._fail
        self.scheduler = LocalScheduler(self.pool, memory_nbytes)
        for spec in specs:
            self.scheduler.submit(spec)

    def done(self, count):
        """Return the next so many races that are at their end."""
        return [self.scheduler.next_done() for _ in range(count)]

    def _fail(self, *_, **__):
        raise WorkerFailure("crashed", "no memory")

    def _answers(self, spec, process):
        def open_case(case, *_):
            if self._fault == (number_of(case), process):
                raise AttributeError("a fault of ours")
            self.slots.append((number_of(case), process))
            return ANSWERS[session.open_case]

        return {session.open_case: open_case} | self._more(spec, process)


def number_of(case):
    """Return the number by which `job` made the case."""
    return case.shape[3]


@pytest.fixture
def job(monkeypatch):
    for name in ("one", "two"):
        monkeypatch.setitem(REGISTRY.candidates, ("fake", name), fake_candidate(name))

    def make(number, *, threads=0, plan=PLAN):
        case = make_case(op="fake", shape=(1, 1, 1, number))
        worker = WorkerSpec(backend="numpy", threads=threads)
        return RaceSpec.in_one_worker(
            case, ("one", "two"), baseline="one", plan=plan, worker=worker
        )

    return make


def test_race_alone_runs_process_after_process(job):
    races = Races([job(1)])
    (done,) = races.done(1)
    assert races.slots == [(1, 0), (1, 1), (1, 2)]
    assert {m.candidate: m.status for m in done.result.measurements}["two"] == "ok"


def test_processes_of_a_race_have_slots_of_others_between(job):
    races = Races([job(number) for number in range(1, 61)])
    races.done(60)
    places = defaultdict(list)
    for place, (number, _) in enumerate(races.slots):
        places[number].append(place)
    assert {len(places[number]) for number in range(1, 61)} == {PLAN.processes}
    steady = [np.diff(places[number]) for number in range(20, 40)]
    assert np.all(np.abs(np.array(steady) - PROCESS_SPACING) <= MAX_ACTIVE_RACES)


class Steps:
    """Answers of workers that note each step; nothing may be open twice in one of them.

    Attributes:
        steps: (case's number, process) of each step.
        most_open: cases that were open at a time.
    """

    def __init__(self):
        self.steps = []
        self.most_open = 0
        self._open = {}

    def __call__(self, spec, process):
        def open_case(case, *_):
            assert process not in self._open
            self._open[process] = case
            self.most_open = max(self.most_open, len(self._open))
            return ANSWERS[session.open_case]

        def time_batch(requests):
            self.steps.append((number_of(self._open[process]), process))
            return self.batch(self._open[process], requests)

        def close_case():
            del self._open[process]

        return {
            session.open_case: open_case,
            timing.time_batch: time_batch,
            session.close_case: close_case,
        }

    def batch(self, case, requests):
        return ANSWERS[timing.time_batch](requests)


LONG = Plan(processes=10, allocations=2, rounds=999, budget_seconds=12.0)


@pytest.fixture
def steady_memory(monkeypatch):
    """As much free memory as the machine has now: a simulation of many races need not read it each time."""
    free = scheduler.free_memory_nbytes()
    monkeypatch.setattr(scheduler, "free_memory_nbytes", lambda: free)


@pytest.mark.usefixtures("steady_memory")
def test_leg_of_one_race_follows_a_leg_of_another(job):
    steps = Steps()
    plan = replace(LONG, rounds=72)
    Races([job(number, plan=plan) for number in range(1, 31)], answers=steps).done(30)
    between = [before != after for before, after in zip(steps.steps, steps.steps[1:])]
    assert sum(between) > 0.9 * len(between)
    # Each of a race's processes is another worker's.
    assert len({worker for case, worker in steps.steps if case == 15}) == LONG.processes


@pytest.mark.parametrize(("available", "most"), [(1000, MAX_ACTIVE_RACES), (250, 2)])
def test_active_races_hold_no_more_than_the_free_memory(job, monkeypatch, available, most):
    monkeypatch.setattr(scheduler, "needed_nbytes", lambda case: 100)
    monkeypatch.setattr(scheduler, "free_memory_nbytes", lambda: available)
    steps = Steps()
    plan = replace(LONG, rounds=72)
    Races([job(number, plan=plan) for number in range(1, 21)], answers=steps).done(20)
    assert steps.most_open == most


def test_gpu_has_one_race_at_a_time(job):
    steps = Steps()
    plan = replace(LONG, processes=3, rounds=72)
    specs = [job(number, plan=plan) for number in range(1, 6)]
    specs = [replace(one, case=one.case.replace(device="gpu:0")) for one in specs]
    Races(specs, answers=steps).done(len(specs))
    assert steps.most_open == 1


class NoisySteps(Steps):
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
        return make_batch(blocks)


@pytest.mark.parametrize(("ratio", "more"), [(1.0, True), (9.0, False)])
def test_rounds_that_steady_races_do_not_need_go_to_noisy_undecided_ones(
    job, monkeypatch, ratio, more
):
    steps = NoisySteps(ratio)
    monkeypatch.setattr("poolbench.engine.noise.usage_reader", steps.usage)
    Races([job(number, plan=LONG) for number in range(1, 13)], answers=steps).done(12)
    steady, noisy = (
        np.median([steps.seconds[number] for number in range(first, 13, 2)]) for first in (1, 2)
    )
    assert steady < 0.7 * LONG.budget_seconds
    assert (noisy > 1.15 * LONG.budget_seconds) == more


def test_races_come_back_about_in_the_order_of_submission(job):
    done = Races([job(number) for number in range(1, 31)]).done(30)
    numbers = [number_of(one.spec.case) for one in done]
    assert sorted(numbers) == list(range(1, 31))
    assert all(abs(number - place) <= MAX_ACTIVE_RACES for place, number in enumerate(numbers, 1))


@pytest.mark.parametrize("room", [False, True])
def test_races_of_another_spec_are_interleaved_where_their_workers_have_room(
    job, monkeypatch, room
):
    free = 2 * scheduler.WORKER_NBYTES * PLAN.processes
    monkeypatch.setattr(scheduler, "free_memory_nbytes", lambda: free + room)
    races = Races([job(1), job(2), job(3, threads=1), job(4)])
    races.done(4)
    threads = [spec.threads for (spec,) in races.pool.prepared]
    assert Counter(threads) == {0: 9, 1: 3}
    assert (threads == [0] * 6 + [1] * 3 + [0] * 3) != room
    assert races.pool.kept_others == room


def test_race_of_two_specs_has_both_of_its_workers_per_slot(job):
    one = job(1)
    head = WorkerSpec(backend="numpy", environment=(("SIDE", "head"),))
    contenders = (*one.contenders, Contender(candidate="one", worker=head, label="head"))
    races = Races([replace(one, contenders=contenders), job(2)])
    done = races.done(2)
    (both,) = (one.result.measurements for one in done if number_of(one.spec.case) == 1)
    assert {m.status for m in both} == {"ok"}
    assert {m.candidate for m in both if m.kind == "candidate"} == {"one", "two", "one@head"}
    assert {spec for spec, _ in races.pool.workers} == {head, one.contenders[0].worker}


@pytest.fixture
def ended(monkeypatch):
    """The kinds of the workers that a pool of processes that never start has ended."""
    ended = []

    class FakeProcess:
        def __init__(self, spec, **more):
            self.spec = spec

        def start(self):
            pass

        def kill(self):
            ended.append(self.spec)

        wait_started = close = start

    monkeypatch.setattr(pool, "Worker", FakeProcess)
    return ended


def test_pool_race_of_more_specs_keeps_the_workers_of_its_own(ended):
    workers = WorkerPool()
    one, two, three = (WorkerSpec(threads=number) for number in (1, 2, 3))
    workers.prepare((one,), 1)
    mine = workers.worker(one)
    workers.prepare((one, two), 1)
    assert workers.worker(one) is mine and ended == []
    workers.prepare((three,), 1)
    assert set(ended) == {one, two}


def test_pool_workers_of_another_spec_end_the_former_unless_kept(ended):
    workers = WorkerPool()
    one, two, three = (WorkerSpec(threads=number) for number in (1, 2, 3))
    workers.prepare((one,), 2)
    first = workers.worker(one)
    workers.prepare((two,), 1, keep_others=True)
    assert workers.worker(two).spec == two
    workers.prepare((one,), 2)
    assert workers.worker(one) is first and ended == []
    workers.prepare((three,), 1)
    assert Counter(ended) == {one: 2, two: 1}
    workers.prepare((one,), 1)
    assert workers.worker(one) is not first


def test_under_way_counts_the_processes_that_were_run(job):
    races = Races([job(number) for number in range(1, 31)])
    assert races.scheduler.under_way() == 0
    races.done(1)
    assert 0 < races.scheduler.under_way() < PROCESS_SPACING


def test_fault_of_the_harness_comes_back_with_its_race_and_others_go_on(job):
    races = Races([job(1), job(2), job(3)], fault=(2, 1))
    done = {number_of(one.spec.case): one for one in races.done(3)}
    assert isinstance(done[2].error, AttributeError) and not done[2].result.measurements
    assert done[1].error is None and done[3].error is None
    with pytest.raises(RuntimeError, match="no race is queued"):
        races.done(1)


def test_race_without_workers_says_why_in_its_measurements(job):
    (done,) = Races([job(1)], start_fails=True).done(1)
    assert {m.status for m in done.result.measurements} == {"crashed"}
    assert "no worker could be started: no memory" in done.result.measurements[0].reason


def test_case_larger_than_the_limit_is_not_opened(job, monkeypatch):
    monkeypatch.setattr(scheduler, "input_nbytes", lambda case: 1 << 14)
    races = Races([job(1)], memory_nbytes=1)
    (done,) = races.done(1)
    assert {m.status for m in done.result.measurements} == {"not_run"}
    assert not races.slots


@pytest.mark.fault(
    "a case larger than the free memory of the machine or of its cgroup",
    "`not_run`, with the bytes that it needs and that are free; nothing is allocated",
)
def test_too_large_case_says_both_figures_in_units_that_fit(job, monkeypatch):
    monkeypatch.setattr(scheduler, "input_nbytes", lambda case: 6 << 18)
    monkeypatch.setattr(scheduler, "free_memory_nbytes", lambda: 8 << 20)
    says = scheduler.too_large(job(1).case, None)
    assert says.startswith(
        "the case needs about 15.0 MiB (10 times its input of 1.50 MiB), 8.00 MiB are free"
    )


def test_races_of_a_spec_of_their_own_come_last():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "suites", "-q", "--poolbench-dry-run"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    alone = ["threads1" in line for line in done.stdout.splitlines() if "x56x56x" in line]
    assert set(alone) == {False, True} and alone == sorted(alone)


class Drift:
    """A machine on which candidate 'two' is now faster, now slower than 'one', and equal in the long run."""

    def __init__(self, seed):
        self.now = 0.0
        rng = np.random.default_rng(seed)
        self._periods = rng.uniform(15, 90, 12)
        self._phases = rng.uniform(0, 2 * np.pi, 12)
        self._rng = rng

    def __call__(self, spec, process):
        return {timing.time_batch: self._time_batch}

    def _time_batch(self, requests):
        self.now += 1.0
        drift = 0.03 * np.sin(2 * np.pi * self.now / self._periods + self._phases).sum()
        noise = self._rng.normal(0, 0.02, len(requests))
        return make_batch(
            timing.Block(seconds=1e-3 * float(np.exp(drift * (request.name == "two") + error)))
            for request, error in zip(requests, noise, strict=True)
        )


def share_that_covers(specs, at_once):
    """Return the share of the races whose 95% interval holds the long run's ratio of one."""
    races = Races(answers=Drift(seed=1))
    pairs = []
    for start in range(0, len(specs), at_once):
        some = specs[start : start + at_once]
        for spec in some:
            races.scheduler.submit(spec)
        for done in races.done(len(some)):
            found = {m.candidate: m for m in done.result.measurements}
            pairs.append((found["two"].samples, found["one"].samples))
    return sum(one.low <= 0 <= one.high for one in estimate_all(pairs)) / len(pairs)


@pytest.mark.usefixtures("steady_memory")
@pytest.mark.slow
def test_interleaved_races_on_a_drifting_machine_cover_the_truth_and_consecutive_ones_do_not(job):
    plan = Plan(processes=10, allocations=1, rounds=4)
    specs = [job(number, plan=plan) for number in range(1, 201)]
    assert share_that_covers(specs, at_once=200) > 0.93
    assert share_that_covers(specs, at_once=1) < 0.6
