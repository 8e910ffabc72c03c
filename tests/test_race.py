"""One race over its processes, on a machine whose clock advances only by its calls."""

import itertools
import math

import pytest
from fakes import FakeMachine, fake_candidate
from poolbench.core.candidate import KnownFailure
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import IDENTITY, PROBES, Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.registry import REGISTRY, load_suites
from poolbench.engine import recorder
from poolbench.engine.pool import WorkerPool
from poolbench.engine.race import LEG_SECONDS, Race, race_in_one_worker
from poolbench.engine.rounds import MOST_ROUNDS_OUT, PROBE_TURN
from poolbench.engine.scheduler import make_race
from poolbench.stats.estimate import estimate
from poolbench.worker import contender
from poolbench.worker.session import process_id

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
MS = 1e-3
PROCESSES, ALLOCATIONS = Plan().processes, Plan().allocations
BLOCKS = PROCESSES * ALLOCATIONS * Plan().rounds  # of one candidate in a race of the default plan
QUICK_PROBES = dict.fromkeys(PROBES, 1e-6)


def run(seconds, *, plan=None, failures=(), **machine):
    """Race candidates of these seconds per call; return measurements by name, the machine, the result."""
    machine = FakeMachine(QUICK_PROBES | seconds, **machine)
    candidates = [
        fake_candidate(name, "pool", failures)
        for name in seconds
        if name not in (*PROBES, IDENTITY)
    ]
    race = race_in_one_worker(
        CASE, candidates, baseline="base", plan=plan or Plan(), read_usage=machine.read_usage
    )
    result = race.run(machine.pool)
    flags = {flag for m in result.measurements for flag in m.flags}
    assert flags <= recorder.FLAGS.keys(), "each flag is explained"
    return {m.candidate: m for m in result.measurements}, machine, result


def test_race_times_every_contender_in_every_round():
    found, _, _ = run({"base": MS, "fast": MS / 2})
    places = {
        name: set(zip(m.samples.process, m.samples.allocation, m.samples.round))
        for name, m in found.items()
    }
    assert places["base"] == places["fast"]
    in_turn = {
        place
        for process in range(PROCESSES)
        for place in sorted(p for p in places["base"] if p[0] == process)[::PROBE_TURN]
    }
    assert all(places[probe] == in_turn for probe in PROBES)
    assert {place[:2] for place in places["base"]} == {
        (process, allocation) for process in range(PROCESSES) for allocation in range(ALLOCATIONS)
    }


def test_race_samples_are_the_workers_times():
    found, _, _ = run({"base": MS, "fast": MS / 2})
    assert set(found["fast"].samples.seconds) == {MS / 2}
    assert found["fast"].first_call_seconds == (0.1,) * PROCESSES


def test_rounds_are_in_shuffled_balanced_orders():
    _, machine, _ = run({"base": MS, "a": MS, "b": MS}, plan=Plan(rounds=6))
    blocks = [name for name in machine.names() if name not in PROBES]
    rounds = [tuple(blocks[i : i + 3]) for i in range(0, len(blocks), 3)]
    assert all(len(set(order)) == 3 for order in rounds)
    assert len(set(rounds)) == 6
    first = [order[0] for order in rounds]
    counts = [first.count(name) for name in set(first)]
    assert max(counts) - min(counts) <= 1


def test_probes_come_last_in_a_round_and_are_followed_by_a_longer_warmup():
    _, machine, _ = run({"base": MS, "a": MS})
    requests = machine.names(process=0)
    probes = {place for place, name in enumerate(requests) if name in PROBES}
    assert probes
    turn = 2 * PROBE_TURN + len(PROBES)
    assert {place % turn for place in probes if place < 5 * turn} == {2, 3, 4}
    warmups = [request.warmup for *_, request in machine.requests]
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


def test_rounds_repeated_candidate_needs_no_warmup():
    _, machine, _ = run({"base": MS, "a": MS}, plan=Plan(rounds=30))
    requests, warmups = machine.names(), [request.warmup for *_, request in machine.requests]
    same = [warmups[i] for i in range(1, 30) if requests[i] == requests[i - 1]]
    assert len(same) > 2
    assert set(same) == {0}


def test_rounds_slower_than_predicted_are_fewer():
    plan = Plan(rounds=10_000, budget_seconds=60)
    seconds = {}
    for factor in (1, 4):
        slow = {"base": factor * MS, "a": factor * MS}
        _, machine, _ = run(slow, plan=plan, opens={"base": MS, "a": MS})
        seconds[factor] = machine.now
    assert seconds[1] == pytest.approx(plan.budget_seconds, rel=0.1)
    assert seconds[4] == pytest.approx(plan.budget_seconds, rel=0.3)


def test_race_crashed_candidate_is_one_result_and_others_go_on():
    crash = WorkerFailure("crashed", "killed by SIGABRT", lost=True)
    plan = Plan(budget_seconds=60)
    found, machine, _ = run({"base": MS, "bad": crash, "good": MS}, plan=plan)
    assert (found["bad"].status, found["bad"].reason) == ("crashed", "killed by SIGABRT")
    assert len(found["good"].samples) == len(found["base"].samples) == BLOCKS
    tasks = [task for worker in machine.pool.workers.values() for task in worker.tasks]
    assert tasks.count((contender.open_contender, "bad")) == 1


def test_known_failure_becomes_unsupported_with_its_reason():
    known = KnownFailure(
        when=lambda case: True, matches="only .* CPU", reason="No GPU kernel.", issue="x#1"
    )
    error = contender.OpenedContender(
        status="error", reason="currently only implemented for CPU devices"
    )
    found, _, _ = run({"base": MS, "native": error}, failures=(known,))
    assert (found["native"].status, found["native"].issue) == ("unsupported", "x#1")
    assert found["native"].reason.startswith("No GPU kernel.")


def test_known_failure_with_another_text_stays_an_error():
    known = KnownFailure(when=lambda case: True, matches="something else", reason="")
    error = contender.OpenedContender(status="error", reason="ValueError: no")
    found, _, _ = run({"base": MS, "native": error}, failures=(known,))
    assert found["native"].status == "error"


@pytest.mark.parametrize("status", ["wrong", "crashed"])
def test_known_failure_wrong_answer_or_crash_stays_and_is_flagged(status):
    known = KnownFailure(when=lambda case: True, matches="beyond", reason="Half sums.")
    wrong = contender.OpenedContender(status=status, reason="error beyond the bound")
    found, _, _ = run({"base": MS, "half": wrong}, failures=(known,))
    assert found["half"].status == status
    assert "documented" in found["half"].flags
    assert not len(found["half"].samples)


def test_candidate_ten_times_slower_stops_after_one_process():
    found, _, _ = run({"base": MS, "slow": 11 * MS})
    assert found["slow"].stopped_early
    assert set(found["slow"].samples.process) == {0}
    assert not found["base"].stopped_early


def test_race_candidate_above_bandwidth_limit_is_flagged(monkeypatch):
    monkeypatch.setattr("poolbench.engine.recorder.input_nbytes", lambda case: 2 << 20)
    probes = {"bandwidth-read": MS, "bandwidth-write": MS, "bandwidth-copy": 2 * MS}
    seconds = {**probes, "base": 3 * MS, "folded": MS / 10}
    found, _, _ = run(seconds)
    assert found["folded"].flags == ("faster-than-limit",)
    assert (found["folded"].status, found["base"].flags) == ("implausible", ())


def test_race_of_small_inputs_candidate_faster_than_a_call_is_implausible(monkeypatch):
    for module in ("recorder", "recovery"):
        monkeypatch.setattr(f"poolbench.engine.{module}.input_nbytes", lambda case: 1 << 19)
    seconds = {IDENTITY: MS / 100, "base": MS / 100, "cached": MS / 1000}
    found, _, _ = run(seconds)
    assert (found["cached"].status, found["base"].status) == ("implausible", "ok")
    assert found["cached"].reason.startswith(
        "faster than a call that returns its input (1.00 µs against 10.0 µs)"
    )
    assert found[IDENTITY].kind == "probe"


@pytest.mark.parametrize(
    ("probe", "candidate", "flagged"),
    [
        ([10.0] * 9, [7.0] * 9, True),
        ([10.0] * 9, [7.0] * 6 + [11.0] * 3, False),  # the machine was busy in some blocks
        ([10.0] * 8 + [6.0], [7.0] * 9, False),  # the probe itself was once as quick
        ([10.0] * 3, [6.0] * 20, False),  # three slow blocks in a row are no limit
        ([10.0] * 3, [4.0] * 20, True),
    ],
)
def test_flag_implausible_noise_alone_flags_nothing(monkeypatch, probe, candidate, flagged):
    monkeypatch.setattr(recorder, "input_nbytes", lambda case: 1024)
    records = {}
    for name, times in ((IDENTITY, probe), ("one", candidate)):
        entry = None if name == IDENTITY else fake_candidate("one")
        records[name] = record = recorder.ContenderRecord(name, entry)
        record.columns = [(0, 0, i, 1, seconds, 0) for i, seconds in enumerate(times)]
    recorder.flag_implausible(records, CASE, slack=0.2)
    assert ("faster-than-limit" in records["one"].flags) == flagged


@pytest.mark.parametrize(("opened", "flagged"), [(0.4, False), (2.7, True)])
def test_flag_implausible_only_block_of_a_probe_is_no_evidence_against_its_own_calls(
    monkeypatch, opened, flagged
):
    monkeypatch.setattr(recorder, "input_nbytes", lambda case: 1024)
    probe = recorder.ContenderRecord(IDENTITY, None, WorkerSpec(), call_seconds=opened)
    one = recorder.ContenderRecord("one", fake_candidate("one"), WorkerSpec())
    probe.columns = [(0, 0, 0, 4, 2.75, 1)]
    one.columns = [(0, 0, i, 2, 1.2, 1) for i in range(3)]
    recorder.flag_implausible({IDENTITY: probe, "one": one}, CASE, slack=0.2)
    assert (one.status == "implausible") == flagged


def test_race_candidate_that_changed_shared_state_costs_the_batch_its_samples():
    clean, _, _ = run({"base": MS})
    found, _, _ = run({"base": MS}, batch=lambda: {"dirty": True})
    assert len(clean["base"].samples)
    assert not len(found["base"].samples)


def test_noisy_rounds_are_marked_and_run_again_within_bounds():
    plan = Plan(budget_seconds=60)
    quiet, _, _ = run({"base": MS}, plan=plan)
    found, _, _ = run({"base": MS}, plan=plan, busy=1.0)
    assert len(found["base"].samples) == 1.5 * len(quiet["base"].samples)
    assert set(found["base"].samples.contended) == {1}
    blocks = sum(len(m.samples) for m in quiet.values())
    # Probes are in each fifth round only: half of the rounds have not exactly half of their blocks.
    assert found["base"].contention.blocks_redone == pytest.approx(blocks / 2, rel=0.05)
    assert "contended" in found["base"].flags


def test_noisy_rounds_without_seconds_for_more_are_not_counted_as_redone():
    # Whole batches fill these seconds: a batch of one round would be too short to be judged.
    found, _, _ = run({"base": MS}, plan=Plan(rounds=1000, budget_seconds=10), busy=1.0)
    contention = found["base"].contention
    assert contention.blocks_marked == sum(len(m.samples) for m in found.values())
    assert contention.blocks_redone == 0


def test_slow_candidate_skips_rounds_and_the_baseline_never_does():
    plan = Plan(budget_seconds=400)
    found, _, _ = run({"base": 30 * MS, "b": 30 * MS, "c": 30 * MS, "slow": 270 * MS}, plan=plan)
    rounds = {name: len(m.samples) for name, m in found.items()}
    assert rounds["base"] == rounds["b"] == BLOCKS
    assert rounds["slow"] == BLOCKS / MOST_ROUNDS_OUT
    found, _, _ = run({"base": 27 * MS, "b": 3 * MS, "c": 3 * MS}, plan=plan)
    assert len(found["base"].samples) == len(found["b"].samples)


def test_race_accounts_for_its_time_by_kind():
    _, _, result = run({"base": MS})
    assert result.seconds["samples"] > 0
    assert result.seconds["first_calls"] == pytest.approx(PROCESSES * 4 * 0.1)
    assert result.seconds["allocation"] == pytest.approx(
        PROCESSES * (0.5 + (ALLOCATIONS - 1) * 0.01)
    )
    _, _, result = run({"base": MS}, batch=lambda: {"recheck_seconds": MS})
    assert result.seconds["rechecks"] >= PROCESSES * MS


def test_candidate_slow_at_calibration_gets_the_warmup_of_its_equal():
    plan = Plan(processes=1, budget_seconds=60, rounds=200)
    _, machine, _ = run({"base": MS / 5, "a": MS / 5}, plan=plan, opens={"a": 8 * MS / 5})
    later = [request for *_, request in machine.requests[len(machine.requests) // 2 :]]
    warmups = {
        name: {request.warmup for request in later if request.name == name}
        for name in ("base", "a")
    }
    assert warmups["a"] == warmups["base"]


def test_race_same_seed_gives_the_same_tasks():
    requests = [run({"base": MS, "a": MS})[1].requests for _ in range(2)]
    assert requests[0] == requests[1]


SPECS = {label: WorkerSpec(environment=(("SIDE", label),)) for label in ("base", "head")}


def run_sides(seconds, *, plan=None, names=("a", "b")):
    """Race candidates in workers of two kinds."""
    plan = plan or Plan(processes=3, budget_seconds=6)
    machine = FakeMachine(QUICK_PROBES | seconds)
    contenders = tuple(
        Contender(candidate=name, worker=worker, label=label)
        for name in names
        for label, worker in SPECS.items()
    )
    spec = RaceSpec(case=CASE, contenders=contenders, baseline="a@base", plan=plan)
    candidates = [fake_candidate(name, "pool") for name in names]
    race = Race(spec, candidates, read_usage=machine.read_usage)
    return {m.candidate: m for m in race.run(machine.pool).measurements}, machine


def test_race_of_two_workers_has_one_of_each_per_process():
    _, machine = run_sides({"a": MS, "b": MS})
    assert set(machine.pool.workers) == {(w, p) for w in SPECS.values() for p in range(3)}


def test_race_of_two_workers_pairs_the_sides_by_round():
    found, _ = run_sides({"a": MS, "b": MS})
    places = {
        name: list(zip(m.samples.process, m.samples.allocation, m.samples.round))
        for name, m in found.items()
    }
    assert sorted(places["a@base"]) == sorted(places["a@head"]) == sorted(places["b@head"])
    assert {m.status for m in found.values()} == {"ok"}


def test_race_of_two_workers_alternates_in_steps():
    plan = Plan(processes=1, allocations=1, budget_seconds=6, rounds=1000)
    _, machine = run_sides({"a": MS, "b": MS}, plan=plan)
    steps = [
        list(group) for _, group in itertools.groupby(machine.requests, key=lambda one: one[0])
    ]
    seconds = [sum(MS * (r.warmup + r.calls) for *_, r in step if r.name in "ab") for step in steps]
    # Two steps of one worker may be adjacent: last in one order and first in the next.
    assert len(steps) > 6
    assert LEG_SECONDS / 2 < sorted(seconds)[len(seconds) // 2] < 2.5 * LEG_SECONDS


def test_race_worker_lost_on_one_side_leaves_the_other():
    crash = WorkerFailure("crashed", "killed by SIGABRT", lost=True)
    machine = FakeMachine(QUICK_PROBES | {"a": MS})
    healthy = machine.pool.worker
    contenders = tuple(
        Contender(candidate="a", worker=worker, label=label) for label, worker in SPECS.items()
    )
    spec = RaceSpec(
        case=CASE,
        contenders=contenders,
        baseline="a@base",
        plan=Plan(processes=2, budget_seconds=2),
    )

    class Workers:
        def worker(self, spec, process):
            worker = healthy(spec, process)
            if spec == SPECS["head"]:
                worker.answer(contender.open_contender, crash)
            return worker

    race = Race(spec, [fake_candidate("a", "pool")], read_usage=machine.read_usage)
    found = {m.candidate: m.status for m in race.run(Workers()).measurements}
    assert (found["a@base"], found["a@head"]) == ("ok", "crashed")


ADD_ONE = """
import os

from poolbench import Op, Sweep, TensorSpec, candidate, product, register, shape_axis

register(Op(
    name="add_one", axes=(shape_axis("shape"),), baseline="plus",
    inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
    reference=lambda case, x: x + 1,
    sweeps={"default": Sweep(product(shape=[(64, 64)]))},
))


@candidate(op="add_one", name="plus", backends=("numpy",))
def plus(case):
    side = os.environ["SIDE"]  # a process without it fails
    return lambda x: x + 1
"""


def test_race_of_two_environments_against_itself_runs_in_two_processes(tmp_path, monkeypatch):
    file = tmp_path / "add_one.py"
    file.write_text(ADD_ONE)
    monkeypatch.delenv("SIDE", raising=False)
    load_suites([file])
    contenders = tuple(
        Contender(
            candidate="plus", label=side,
            worker=WorkerSpec(backend="numpy", environment=(("SIDE", side),)),
        )
        for side in ("base", "head")
    )  # fmt: skip
    spec = RaceSpec(
        case=REGISTRY.ops["add_one"].make_case(mode="eager"), contenders=contenders,
        baseline="plus@base", plan=Plan(processes=2, allocations=1, budget_seconds=0.4),
    )  # fmt: skip
    pool = WorkerPool([file])
    try:
        found = {m.candidate: m for m in make_race(spec).run(pool).measurements}
        pids = {
            pool.worker(one.worker, process).call(process_id, timeout=600)
            for one in contenders
            for process in range(2)
        }
    finally:
        pool.close()
    sides = [found["plus@base"], found["plus@head"]]
    assert [(m.status, m.reason) for m in sides] == [("ok", "")] * 2
    places = [{*zip(m.samples.process, m.samples.allocation, m.samples.round)} for m in sides]
    assert places[0] == places[1]
    assert len(pids) == 4
    # The same code on both sides: on any machine nearer than a factor of two.
    assert abs(estimate(*(m.samples for m in sides)).log_ratio) < math.log(2)
