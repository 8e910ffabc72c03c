"""Base against head in one race, on fake workers whose sides differ by a known factor."""

import math

import numpy as np
import pytest
from fakes import FakePool, fake_candidate, make_batch
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.engine.race import Race
from poolbench.engine.recovery import Tasks
from poolbench.engine.versions import LOOKS, make_versions_spec, race_versions
from poolbench.worker import contender, timing

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
BASE = WorkerSpec(backend="numpy")
HEAD = WorkerSpec(backend="numpy", environment=(("SIDE", "head"),))
PLAN = Plan(processes=LOOKS[-1], allocations=1, rounds=10)


def run(factor, *, names="ab", head=HEAD, noise=0.01, seed=0, answers=dict, plan=PLAN):
    """Race candidates 'a' and 'b' whose head takes `factor` times as long; return result and workers."""
    rng = np.random.default_rng(seed)
    spec = make_versions_spec(CASE, tuple(names), base=BASE, head=head, plan=plan)
    slow = next(one.worker for one in spec.contenders if one.label == "head")

    def answers_of(worker, process):
        level = math.exp(rng.normal(0, noise)) * (factor if worker == slow else 1.0)

        def time_batch(requests):
            errors = np.exp(rng.normal(0, noise, len(requests)))
            calls = sum(request.warmup + request.calls for request in requests)
            return make_batch(
                [timing.Block(seconds=1e-3 * level * error) for error in errors],
                cpu_seconds=2e-3 * level * calls,
            )

        return {timing.time_batch: time_batch} | (answers() if worker == slow else {})

    pool = FakePool(answers_of)
    race = Race(spec, [fake_candidate(name, "pool") for name in names], tasks=Tasks(probes=()))
    return race_versions(race, pool), pool


def test_versions_head_slower_by_a_tenth_is_slower_at_an_early_look():
    result, _ = run(1.1)
    assert [one.verdict for one in result.heads] == ["SLOWER", "SLOWER"]
    assert result.processes < LOOKS[-1]
    assert result.heads[0].found.ratio == pytest.approx(1.1, rel=0.05)


def test_versions_of_equal_speed_give_no_alarm():
    results = [run(1.0, seed=seed)[0] for seed in range(20)]
    verdicts = {one.verdict for result in results for one in (*result.heads, *result.controls)}
    assert verdicts <= {"SAME", "UNDECIDED"}


def test_versions_that_stay_undecided_run_the_whole_plan():
    result, _ = run(1.02, noise=0.05)
    assert result.processes == LOOKS[-1]
    assert "UNDECIDED" in {one.verdict for one in result.heads}


@pytest.mark.parametrize("head", [BASE, HEAD])
def test_versions_have_three_workers_per_process(head):
    result, pool = run(1.0, head=head)
    assert len(pool.workers) == 3 * result.processes
    assert len({spec for spec, _ in pool.workers}) == 3


def test_versions_candidate_missing_in_head_is_reported_and_does_not_prolong_the_race():
    failure = WorkerFailure("error", "KeyError: no candidate", lost=False)

    def fail():
        return {contender.open_contender: failure}

    result, _ = run(1.0, answers=fail)
    assert {one.reason for one in result.heads} == {
        "a@head: error: KeyError: no candidate", "b@head: error: KeyError: no candidate",
    }  # fmt: skip
    assert result.processes == LOOKS[0]


def test_versions_of_one_candidate_tell_the_ratio_of_processor_time():
    result, _ = run(1.1, names="a")
    (head,) = result.heads
    assert head.processor.ratio == pytest.approx(1.1, rel=0.05)
    assert head.processor.low is not None


def test_versions_of_candidates_that_share_legs_have_no_processor_time():
    result, _ = run(1.1)
    assert {one.processor.low for one in result.heads} == {None}
