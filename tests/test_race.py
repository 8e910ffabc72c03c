import itertools
import random

import msgspec
import pytest
from poolbench.core.candidate import Candidate, KnownFailure
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import PROBES
from poolbench.engine import recorder
from poolbench.engine.race import PROBE_TURN, Plan, Race
from poolbench.engine.rounds import block_calls
from poolbench.machine.info import Usage
from poolbench.worker import contender, session, timing

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
MS = 1e-3
PROCESSES, ALLOCATIONS = Plan().processes, Plan().allocations
BLOCKS = PROCESSES * ALLOCATIONS * Plan().rounds  # of one candidate in a race of the default plan


def entry(name, failures=()):
    return Candidate(
        op="pool",
        name=name,
        form="function",
        framework="numpy",
        about="",
        build=lambda case: None,
        failures=failures,
        file="here",
    )


class FakeWorker:
    """Answers a race's tasks from a table of seconds a call; a value that is a failure is raised."""

    node = "local"
    tail = ""

    def __init__(self, seconds, clock):
        self.seconds = seconds
        self.clock = clock
        self.tasks = []
        self.requests = []
        self.warmups = []

    def call(self, function, *args, timeout):
        self.tasks.append((function.__name__, *args[:1]))
        answer = getattr(self, function.__name__.lstrip("_"))
        return answer(*args)

    def open_case(self, case, seed, tensorflow):
        return session.Opened(nbytes=1, devices={}, seconds=0.5)

    def open_contender(self, name, check):
        seconds = self.seconds[name]
        if isinstance(seconds, Exception):
            raise seconds
        if isinstance(seconds, contender.OpenedContender):
            return seconds
        return contender.OpenedContender(
            call_seconds=seconds, first_call_seconds=0.1, read_nbytes=300, written_nbytes=100
        )

    def allocate(self):
        return 0.01

    def gather(self):
        return None

    def time_batch(self, requests):
        return timing.Batch(blocks=tuple(map(self.request, requests)), cpu_seconds=0.0, switches=0)

    def request(self, request):
        self.requests.append(request.name)
        self.warmups.append(request.warmup)
        seconds = self.seconds[request.name]
        self.clock[0] += seconds * (request.warmup + request.calls)
        return timing.Block(seconds=seconds, warmup_seconds=seconds * request.warmup)

    def close_case(self):
        return None


class FakeFleet:
    def __init__(self, seconds):
        self.clock = [0.0]
        self.probes = dict.fromkeys(PROBES, 1e-6)
        self.seconds = self.probes | seconds
        self.workers = {}

    def worker(self, process):
        return self.workers.setdefault(process, FakeWorker(self.seconds, self.clock))

    def usage(self, busy=0.0):
        return lambda: Usage(
            clock=self.clock[0],
            busy_seconds=self.clock[0] * busy,
            steal_seconds=0.0,
            own_seconds=0.0,
        )


def run(seconds, *, plan=None, busy=0.0, failures=(), enough=lambda race, processes: True):
    fleet = FakeFleet(seconds)
    race = Race(
        CASE,
        [entry(name, failures) for name in seconds],
        baseline="base",
        plan=plan or Plan(),
        read_usage=fleet.usage(busy),
        enough=enough,
    )
    result = race.run(fleet)
    return {m.candidate: m for m in result.measurements}, fleet, result


def test_every_runner_is_timed_in_every_round():
    found, _, _ = run({"base": MS, "fast": MS / 2})
    places = {
        name: set(zip(m.samples.process, m.samples.allocation, m.samples.round))
        for name, m in found.items()
    }
    assert places["base"] == places["fast"]
    assert all(
        places[probe] == {p for p in places["base"] if p[2] % PROBE_TURN == 0} for probe in PROBES
    )
    assert {place[:2] for place in places["base"]} == {
        (process, allocation) for process in range(PROCESSES) for allocation in range(ALLOCATIONS)
    }


def test_samples_are_what_the_worker_timed():
    found, _, _ = run({"base": MS, "fast": MS / 2})
    assert set(found["fast"].samples.seconds) == {MS / 2}
    assert found["fast"].first_call_seconds == (0.1,) * PROCESSES


def test_the_order_of_a_round_is_shuffled_and_balanced():
    _, fleet, _ = run({"base": MS, "a": MS, "b": MS}, plan=Plan(rounds=6))
    blocks = [name for worker in fleet.workers.values() for name in worker.requests]
    blocks = [name for name in blocks if name not in PROBES]
    rounds = [tuple(blocks[i : i + 3]) for i in range(0, len(blocks), 3)]
    assert all(len(set(order)) == 3 for order in rounds)
    assert len(set(rounds)) == 6
    first = [order[0] for order in rounds]
    counts = [first.count(name) for name in set(first)]
    assert max(counts) - min(counts) <= 1


def test_probes_come_last_in_a_round_and_who_follows_them_has_a_longer_warmup():
    _, fleet, _ = run({"base": MS, "a": MS})
    requests = fleet.workers[0].requests
    probes = {place for place, name in enumerate(requests) if name in PROBES}
    assert probes
    turn = 2 * PROBE_TURN + len(PROBES)
    assert {place % turn for place in probes if place < 5 * turn} == {2, 3, 4}
    warmups = fleet.workers[0].warmups
    after = {
        warmups[place]
        for place in range(1, len(requests))
        if place - 1 in probes and place not in probes
    }
    others = {
        warmups[place]
        for place in range(1, 24)
        if place - 1 not in probes
        and place not in probes
        and requests[place] != requests[place - 1]
    }
    assert (after, others) == ({12}, {2})


def test_who_was_the_last_of_a_round_needs_no_warmup_as_the_first_of_the_next():
    _, fleet, _ = run({"base": MS, "a": MS}, plan=Plan(rounds=30))
    requests, warmups = fleet.workers[0].requests, fleet.workers[0].warmups
    same = [warmups[i] for i in range(1, 30) if requests[i] == requests[i - 1]]
    assert len(same) > 2
    assert set(same) == {0}


def test_rounds_that_take_longer_than_foreseen_are_fewer():
    plan = Plan(rounds=10_000, budget_seconds=60)
    seconds = {}
    for factor in (1, 4):
        opened = contender.OpenedContender(
            call_seconds=MS, first_call_seconds=0.1, read_nbytes=300, written_nbytes=100
        )
        fleet = FakeFleet({"base": MS, "a": MS})
        worker = FakeWorker(fleet.probes | {"base": factor * MS, "a": factor * MS}, fleet.clock)
        worker.open_contender = lambda name, check, opened=opened: opened
        fleet.worker = lambda process, worker=worker: worker
        race = Race(
            CASE, [entry("base"), entry("a")], baseline="base", plan=plan, read_usage=fleet.usage()
        )
        race.run(fleet)
        seconds[factor] = fleet.clock[0]
    assert seconds[1] == pytest.approx(plan.budget_seconds, rel=0.1)
    assert seconds[4] == pytest.approx(plan.budget_seconds, rel=0.3)


def test_a_candidate_that_crashes_is_one_result_and_the_others_go_on():
    crash = WorkerFailure("crashed", "killed by SIGABRT", lost=True)
    plan = Plan(budget_seconds=60)
    found, fleet, _ = run({"base": MS, "bad": crash, "good": MS}, plan=plan)
    assert (found["bad"].status, found["bad"].reason) == ("crashed", "killed by SIGABRT")
    assert len(found["good"].samples) == len(found["base"].samples) == BLOCKS
    assert [task for worker in fleet.workers.values() for task in worker.tasks].count(
        ("open_contender", "bad")
    ) == 1


def test_a_documented_failure_becomes_unsupported_with_its_reason():
    known = KnownFailure(
        when=lambda case: True, matches="only .* CPU", reason="No GPU kernel.", issue="x#1"
    )
    error = contender.OpenedContender(
        status="error", reason="currently only implemented for CPU devices"
    )
    found, _, _ = run({"base": MS, "native": error}, failures=(known,))
    assert (found["native"].status, found["native"].issue) == ("unsupported", "x#1")
    assert found["native"].reason.startswith("No GPU kernel.")


def test_another_error_than_the_documented_one_stays_an_error():
    known = KnownFailure(when=lambda case: True, matches="something else", reason="")
    error = contender.OpenedContender(status="error", reason="ValueError: no")
    found, _, _ = run({"base": MS, "native": error}, failures=(known,))
    assert found["native"].status == "error"


def test_a_documented_wrong_answer_stays_wrong_and_is_marked():
    known = KnownFailure(when=lambda case: True, matches="beyond", reason="Half sums.")
    wrong = contender.OpenedContender(status="wrong", reason="error beyond the bound")
    found, _, _ = run({"base": MS, "half": wrong}, failures=(known,))
    assert found["half"].status == "wrong"
    assert "documented" in found["half"].flags
    assert not len(found["half"].samples)


def test_a_runner_ten_times_slower_is_settled_after_one_process():
    found, _, _ = run({"base": MS, "slow": 11 * MS})
    assert found["slow"].stopped_early
    assert set(found["slow"].samples.process) == {0}
    assert not found["base"].stopped_early


def test_race_candidate_above_bandwidth_limit_is_flagged(monkeypatch):
    monkeypatch.setattr("poolbench.engine.race.input_nbytes", lambda case: 2 << 20)
    probes = {"bandwidth-read": MS, "bandwidth-write": MS, "bandwidth-copy": 2 * MS}
    seconds = {**probes, "base": 3 * MS, "folded": MS / 10}
    found, _, _ = run(seconds)
    assert found["folded"].flags == ("faster-than-limit",)
    assert found["base"].flags == ()


def test_rounds_under_contention_are_marked_and_done_again_within_bounds():
    plan = Plan(budget_seconds=60)
    quiet, _, _ = run({"base": MS}, plan=plan)
    found, _, _ = run({"base": MS}, plan=plan, busy=1.0)
    assert len(found["base"].samples) == 1.5 * len(quiet["base"].samples)
    assert set(found["base"].samples.contended) == {1}
    blocks = sum(len(m.samples) for m in quiet.values())
    # Probes are in each third round only: the count of a part of a batch is an estimate.
    assert found["base"].contention.blocks_redone == pytest.approx(blocks / 2, rel=0.05)
    assert "contended" in found["base"].flags


@pytest.mark.parametrize(("looks", "share"), [((None,), None), ((0.0, 1.0), 0.5)])
def test_how_often_a_sibling_was_busy_is_told(monkeypatch, looks, share):
    seen = itertools.cycle(looks)
    batch = FakeWorker.time_batch
    monkeypatch.setattr(
        FakeWorker,
        "time_batch",
        lambda self, requests: msgspec.structs.replace(
            batch(self, requests), smt_sibling_busy=next(seen)
        ),
    )
    found, _, _ = run({"base": MS, "rival": MS})
    assert found["rival"].contention.smt_sibling_busy == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("apart", [None, False, True])
def test_blocks_of_processors_that_are_far_apart_are_marked(monkeypatch, apart):
    monkeypatch.setattr(FakeWorker, "gather", lambda self: apart)
    found, _, _ = run({"base": MS, "rival": MS})
    assert set(found["rival"].samples.contended) == {int(bool(apart))}
    assert found["rival"].contention.cores_distant == (None if apart is None else float(apart))


def test_more_processes_are_added_until_it_is_precise_enough():
    plan = Plan(processes=3, max_processes=8)
    found, _, _ = run({"base": MS}, plan=plan, enough=lambda race, processes: processes >= 6)
    assert set(found["base"].samples.process) == set(range(6))


def test_a_race_that_is_clear_runs_a_third_of_the_rounds_after_the_first_process():
    found, _, _ = run({"base": MS, "fast": MS / 3, "slow": 3 * MS}, plan=Plan(budget_seconds=60))
    samples = found["base"].samples
    whole = ALLOCATIONS * Plan().rounds
    counts = [samples.process.count(process) for process in range(PROCESSES)]
    assert counts == [whole, *[whole / 3] * (PROCESSES - 1)]


def test_a_slow_runner_sits_out_rounds_and_the_baseline_never_does():
    plan = Plan(budget_seconds=120)
    found, _, _ = run({"base": 3 * MS, "b": 3 * MS, "c": 3 * MS, "slow": 27 * MS}, plan=plan)
    rounds = {name: len(m.samples) for name, m in found.items()}
    assert rounds["base"] == rounds["b"] == BLOCKS
    assert rounds["slow"] == BLOCKS / 4
    found, _, _ = run({"base": 27 * MS, "b": 3 * MS, "c": 3 * MS}, plan=plan)
    assert len(found["base"].samples) == len(found["b"].samples)


def test_the_time_is_accounted_for_by_kind():
    _, _, result = run({"base": MS})
    assert result.seconds["samples"] > 0
    assert result.seconds["first_calls"] == pytest.approx(PROCESSES * 4 * 0.1)
    assert result.seconds["allocation"] == pytest.approx(
        PROCESSES * (0.5 + (ALLOCATIONS - 1) * 0.01)
    )


def test_a_block_is_long_enough_and_has_a_warmup():
    rng = random.Random(0)
    for _ in range(200):
        seconds = 10 ** rng.uniform(-6, 0)
        warmup, calls = block_calls(seconds, 0.01, nbytes=1 << 24)
        assert calls * seconds >= 0.01
        assert 1 <= warmup <= calls
        assert warmup >= 4 or warmup * seconds >= 0.0018
        within, _ = block_calls(seconds, 0.01, nbytes=1 << 20)
        assert within == warmup or 2 <= within < warmup
        behind_a_probe, _ = block_calls(seconds, 0.01, nbytes=1 << 24, cold=True)
        assert behind_a_probe >= warmup
        assert behind_a_probe <= 16 or behind_a_probe == warmup
        assert seconds < 0.006 or behind_a_probe <= 2


def test_untimed_calls_that_are_not_whole_are_rounded_by_chance():
    rng = random.Random(0)
    counts = [
        block_calls(0.0012, 0.001, nbytes=1 << 24, dither=rng.random())[0] for _ in range(2000)
    ]
    assert set(counts) == {2, 3}
    assert sum(counts) / len(counts) == pytest.approx(0.003 / 0.0012, rel=0.02)


def test_who_looked_slow_when_the_case_was_opened_has_as_many_untimed_calls_as_its_equal():
    plan = Plan(processes=1, max_processes=1, budget_seconds=60, rounds=200)
    fleet = FakeFleet({"base": MS / 5, "a": MS / 5})
    worker = FakeWorker(fleet.probes | {"base": MS / 5, "a": MS / 5}, fleet.clock)
    honest = worker.open_contender

    def open_contender(name, check):
        slow = 8 if name == "a" else 1
        return msgspec.structs.replace(honest(name, check), call_seconds=slow * MS / 5)

    worker.open_contender = open_contender
    fleet.worker = lambda process: worker
    Race(
        CASE, [entry("base"), entry("a")], baseline="base", plan=plan, read_usage=fleet.usage()
    ).run(fleet)
    later = range(len(worker.requests) // 2, len(worker.requests))
    counts = {
        name: {worker.warmups[place] for place in later if worker.requests[place] == name}
        for name in ("base", "a")
    }
    assert counts["a"] == counts["base"]


def test_the_same_seed_gives_the_same_order():
    orders = []
    for _ in range(2):
        _, fleet, _ = run({"base": MS, "a": MS})
        orders.append(fleet.workers[0].tasks)
    assert orders[0] == orders[1]


def test_every_flag_that_a_race_sets_is_explained():
    assert set(recorder.FLAGS) >= {"stopped_early", "faster-than-limit", "documented", "contended"}
