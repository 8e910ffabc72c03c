"""The plan of rounds: orders, untimed and timed calls, alternating workers."""

import random
from collections import Counter

import pytest
from fakes import fake_candidate
from poolbench.core.case import make_case
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.engine.recorder import ContenderRecord
from poolbench.engine.rounds import Rounds, balanced_orders, block_calls, lost_calls, one_by_one
from poolbench.worker.timing import Block, BlockRequest

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
BASE, HEAD = WorkerSpec(backend="numpy"), WorkerSpec(backend="numpy", environment=(("A", "1"),))


def make_rounds(*workers, probe=False, seed=0):
    """Return rounds of candidates 'a' and 'b' in each of the workers, planned."""
    records = [
        ContenderRecord(f"{name}@{number}", fake_candidate(name), worker, call_seconds=1e-3)
        for number, worker in enumerate(workers)
        for name in ("a", "b")
    ]
    if probe:
        records.append(ContenderRecord("bandwidth-read", None, workers[0], call_seconds=1e-3))
    rounds = Rounds(records, baseline="a@0", plan=Plan(seed=seed), case=CASE)
    rounds.plan(records)
    return rounds


def test_block_calls_any_duration_fill_the_block_and_have_a_warmup():
    rng = random.Random(0)
    for _ in range(200):
        seconds = 10 ** rng.uniform(-6, 0)
        warmup, calls = block_calls(seconds, 0.01, nbytes=1 << 24)
        assert 0 <= calls * seconds - 0.01 < seconds, "no call more than fills the block"
        assert warmup <= 8 or warmup == calls // 8
        assert warmup >= 8 or abs(warmup - 0.003 / seconds) <= 0.5
        within, _ = block_calls(seconds, 0.01, nbytes=1 << 20)
        assert within == warmup or 2 <= within < warmup
        after_probe, _ = block_calls(seconds, 0.01, nbytes=1 << 24, cold=True)
        assert after_probe >= warmup
        assert after_probe <= 24 or after_probe == warmup
        assert seconds < 0.006 or after_probe <= 2


@pytest.mark.parametrize(("seconds", "counts"), [(0.0012, {2, 3}), (0.005, {0, 1}), (0.1, {0, 1})])
def test_block_calls_fractional_warmup_is_rounded_by_chance(seconds, counts):
    rng = random.Random(0)
    found = [
        block_calls(seconds, 0.001, nbytes=1 << 24, dither=rng.random())[0] for _ in range(2000)
    ]
    assert set(found) == counts
    assert sum(found) / len(found) == pytest.approx(0.003 / seconds, rel=0.02, abs=0.01)


def test_round_of_long_calls_is_predicted_by_its_mean_warmup():
    records = [
        ContenderRecord(name, fake_candidate(name), BASE, call_seconds=0.012, read_nbytes=1 << 24)
        for name in ("a", "b")
    ]
    rounds = Rounds(records, baseline="a", plan=Plan(), case=CASE)
    rounds.plan(records)
    assert rounds.seconds == pytest.approx(2 * 0.012 * 1.25)


def test_balanced_orders_of_n_names_give_each_name_each_place_once():
    orders = balanced_orders("abcd", random.Random(1))
    for _ in range(5):
        square = [next(orders) for _ in range(4)]
        assert all(len(set(column)) == 4 for column in zip(*square, strict=True))


def test_leg_of_one_worker_is_one_task():
    (task,) = make_rounds(BASE).tasks(range(5), others_between=False)
    assert task.worker == BASE
    assert [block.round for block in task.blocks] == [number for number in range(5) for _ in "ab"]


def test_tasks_of_two_workers_have_the_same_rounds():
    tasks = make_rounds(BASE, HEAD).tasks(range(5), others_between=False)
    assert {task.worker for task in tasks} == {BASE, HEAD}
    for task in tasks:
        assert Counter(block.round for block in task.blocks) == dict.fromkeys(range(5), 2)
        assert {block.record.worker for block in task.blocks} == {task.worker}
        assert {block.request.name for block in task.blocks} == {"a", "b"}


def test_tasks_of_two_workers_begin_with_each_equally_often():
    rounds = make_rounds(BASE, HEAD)
    first = Counter(rounds.tasks([number], others_between=False)[0].worker for number in range(20))
    assert first == {BASE: 10, HEAD: 10}


def test_tasks_of_two_workers_warm_up_alike():
    rounds = make_rounds(BASE, HEAD)
    for number in range(4):
        for task in rounds.tasks([number], others_between=True):
            assert [block.request.warmup for block in task.blocks] == [2, 2]


def test_task_of_a_contender_alone_in_its_worker_warms_up_once():
    records = [
        ContenderRecord(f"a@{number}", fake_candidate("a"), worker, call_seconds=1e-3)
        for number, worker in enumerate((BASE, HEAD))
    ]
    rounds = Rounds(records, baseline="a@0", plan=Plan(), case=CASE)
    rounds.plan(records)
    for task in rounds.tasks(range(3), others_between=True):
        assert [block.request.warmup > 0 for block in task.blocks] == [True, False, False]
    assert rounds.seconds == pytest.approx(2 * 1e-3 * task.blocks[0].request.calls)


def test_probes_run_in_the_baselines_worker_alone():
    tasks = make_rounds(BASE, HEAD, probe=True).tasks(range(10), others_between=False)
    probes = {task.worker for task in tasks for block in task.blocks if not block.record.candidate}
    assert probes == {BASE}


def test_orders_with_one_worker_are_decided_by_the_seed():
    def names(seed):
        rounds = make_rounds(BASE, seed=seed)
        (task,) = rounds.tasks(range(40), others_between=False)
        return [block.record.name for block in task.blocks]

    assert names(1) == names(1) != names(2)


def test_one_by_one_makes_a_task_of_each_block():
    tasks = one_by_one(make_rounds(BASE, HEAD).tasks(range(3), others_between=False))
    assert [len(task.blocks) for task in tasks] == [1] * 12


def test_slow_candidate_of_one_long_round_is_left_out_of_the_next_allocations_rounds():
    records = [
        ContenderRecord(name, fake_candidate(name), BASE, call_seconds=seconds)
        for name, seconds in (("a", 1e-3), ("b", 1e-3), ("slow", 2e-2))
    ]
    rounds = Rounds(records, baseline="a", plan=Plan(), case=CASE)

    def names(allocation, numbers):
        rounds.plan(records, allocation)
        (task,) = rounds.tasks(numbers, others_between=False)
        return [block.record.name for block in task.blocks]

    assert sorted(names(0, range(1))) == ["a", "b", "slow"]
    assert sorted(names(1, range(3))) == ["a", "a", "a", "b", "b", "b"]
    assert "slow" in names(2, range(5))
    assert "slow" in names(0, range(1)), "each process has it"


@pytest.mark.parametrize(
    ("seconds", "lost", "warmup"),
    [(4e-4, 0.5, 7), (4e-4, 1.5, 12), (4e-4, 9.0, 24), (2e-3, 0.5, 4), (4e-3, 5.0, 0)],
)
def test_block_calls_a_call_that_others_slow_down_has_more_warmup(seconds, lost, warmup):
    assert block_calls(seconds, 5e-4, nbytes=1 << 24, lost=lost, dither=0.0)[0] == warmup


def test_lost_calls_are_the_time_above_as_many_timed_calls():
    request = BlockRequest(name="a", warmup=8, calls=2)
    assert lost_calls(request, Block(seconds=1e-3, warmup_seconds=10e-3)) == pytest.approx(2.0)


def test_plan_warms_up_by_the_median_of_what_the_blocks_lost():
    records = [
        ContenderRecord(name, fake_candidate(name), BASE, call_seconds=5e-4, read_nbytes=1 << 24)
        for name in ("a", "b")
    ]
    rounds = Rounds(records, baseline="a", plan=Plan(block_seconds=5e-4), case=CASE)
    rounds.plan(records)
    before = rounds.seconds
    records[1].lost_columns = [2.0, 2.0, 40.0]
    rounds.plan(records)
    # Six untimed calls for each, then sixteen for one; a block has one timed call.
    assert (before, rounds.seconds) == pytest.approx((14 * 5e-4, 24 * 5e-4))
