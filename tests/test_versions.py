"""Base against head in one race, on fake workers whose sides differ by a known factor."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
from fakes import OPENED, FakePool, make_batch
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import load_builtin
from poolbench.engine import versions
from poolbench.engine.side_by_side import PROCESSES, Job, run_job
from poolbench.engine.sides import Side
from poolbench.engine.versions import VersionsRace
from poolbench.report.side_by_side import as_json, as_markdown
from poolbench.stats.estimate import from_error
from poolbench.stats.side_by_side import LOOKS, Rule, compare_legs
from poolbench.worker import contender, outputs, timing

CASE = load_builtin().ops["global_avg_pool"].sweep("quick").base_case
NAMES = ("layer-global_avg_pool", "avg_pool2d", "lambda-reduce_mean", "mean-of-means")
BASE = WorkerSpec()
HEAD = WorkerSpec(environment=(("SIDE", "head"),))
SHORT = Rule(looks=(4, 6))
ANSWER = outputs.Outputs(
    inputs="a", shapes=((2,),), dtypes=("float32",), data=(np.float32([1, 2]).tobytes(),)
)


@pytest.fixture(autouse=True)
def few_legs(monkeypatch):
    """Fake workers answer at once: two legs of each visit say as much as all."""
    monkeypatch.setattr(versions, "LEGS", 2)


def is_head(spec):
    return ("SIDE", "head") in spec.environment


def fake_pool(factor=1.0, *, used=None, noise=0.01, seed=0, answers=dict, outputs_of_head=ANSWER):
    """Return fake workers; head takes `factor` times as long on the wall, and `used` times the processor time."""
    rng = np.random.default_rng(seed)
    used = factor if used is None else used

    def answers_of(worker, process):
        wall, processor = (factor, used) if is_head(worker) else (1.0, 1.0)

        def time_batch(requests):
            level = math.exp(rng.normal(0, noise))
            errors = np.exp(rng.normal(0, 0.01, len(requests)))
            return make_batch(
                timing.Block(
                    seconds=1e-3 * level * wall * error,
                    processor_seconds=2e-3 * level * processor * error,
                )
                for error in errors
            )

        own = {timing.time_batch: time_batch, outputs.read_outputs: ANSWER}
        return own | (
            {outputs.read_outputs: outputs_of_head} | answers() if is_head(worker) else {}
        )

    return FakePool(answers_of)


def run(pool, *, pairs=NAMES[:2], clock=lambda: 0.0, **fields):
    job = Job(
        base=Side(title="main (1234567)", worker=BASE), head=Side(title="working tree", worker=HEAD),
        pairs=tuple((CASE, name) for name in pairs), **fields,
    )  # fmt: skip
    return run_job(job, pool, say=lambda line: None, clock=clock)


def verdicts(report):
    return [one.verdict for one in report.heads]


def test_race_of_head_slower_by_a_tenth_is_slower_at_an_early_look():
    report = run(fake_pool(1.1))
    assert verdicts(report) == ["SLOWER", "SLOWER"]
    assert report.heads[0].visits < LOOKS[-1]
    assert report.heads[0].wall.ratio == pytest.approx(1.1, rel=0.05)
    assert len(report.found) == 2


def test_races_of_equal_speed_give_no_alarm():
    reports = [
        run(fake_pool(seed=seed), pairs=NAMES[:1], control_every=1, rule=SHORT) for seed in range(4)
    ]
    found = {one.verdict for report in reports for one in (*report.heads, *report.controls)}
    assert found <= {"SAME", "UNDECIDED"}
    assert not any(report.found or report.false_alarms for report in reports)


def test_rule_of_equal_sides_errs_in_fewer_than_alpha_of_races():
    rng, rule, false = np.random.default_rng(1), Rule(margin=0.0, alpha=0.05), 0
    for _ in range(1000):
        units = rng.normal(0, 0.02, LOOKS[-1])
        for look in LOOKS:
            some = units[:look]
            error = some.std(ddof=1) / math.sqrt(look)
            found = from_error(some.mean(), error, look - 1, look, rule.confidence)
            if rule.judge(found) in ("SLOWER", "FASTER"):
                false += 1
                break
    assert false <= 50


def test_race_that_stays_undecided_ends_with_what_it_could_have_found():
    pool = fake_pool(1.01, noise=0.1)
    report = run(pool, pairs=NAMES[:1], control_every=0, rule=SHORT)
    assert verdicts(report) == ["UNDECIDED"]
    assert report.heads[0].visits == SHORT.looks[-1]
    assert len(pool.workers) == 2 * PROCESSES  # the visits go round them
    assert 0.01 < report.heads[0].detectable < 0.3
    assert "would have been found 9 times of 10" in as_markdown(report)


def test_race_of_one_kind_of_worker_on_both_sides_has_processes_of_its_own():
    race = VersionsRace(CASE, NAMES[0], base=BASE, head=BASE, control=True)
    assert len(set(race.race.spec.workers)) == 3


def test_job_out_of_time_judges_what_it_has():
    ticks = iter(np.arange(0.0, 1e6, 10.0))
    report = run(fake_pool(1.1), clock=lambda: next(ticks), budget_seconds=300.0)
    assert all(0 < one.visits < LOOKS[-1] for one in report.heads)
    assert len(report.heads) == 2


def test_job_without_time_for_one_visit_is_undecided():
    ticks = iter(np.arange(0.0, 1e6, 10.0))
    report = run(fake_pool(1.1), clock=lambda: next(ticks), budget_seconds=1.0)
    assert verdicts(report) == ["UNDECIDED"] * 2


def test_race_of_fewer_visits_than_the_first_look_is_undecided():
    pool = fake_pool(3.0, noise=0.0)
    race = VersionsRace(CASE, NAMES[0], base=BASE, head=HEAD)
    shared = versions.Shared(pool, PROCESSES)
    assert race.check(shared)
    found = []
    for _ in range(LOOKS[0]):
        race.visit(shared)
        found.append(race.compare().verdict)
    assert found == ["UNDECIDED"] * (LOOKS[0] - 1) + ["SLOWER"]


def test_candidate_that_fails_in_head_broke_and_is_not_timed():
    failure = WorkerFailure("error", "KeyError: no candidate")
    pool = fake_pool(answers=lambda: {contender.open_contender: failure})
    report = run(pool)
    assert verdicts(report) == ["BROKE", "BROKE"]
    assert report.heads[0].reason == "head: error: KeyError: no candidate"
    assert timing.time_batch not in pool.tasks
    assert "## Broke: layer-global" in as_markdown(report)


def test_candidate_that_fails_its_check_in_head_broke():
    wrong = msgspec.structs.replace(OPENED, status="wrong", reason="y is beyond the bound")
    report = run(fake_pool(answers=lambda: {contender.open_contender: wrong}))
    assert verdicts(report) == ["BROKE", "BROKE"]


def test_outputs_that_differ_beyond_the_tolerance_are_the_headline():
    other = msgspec.structs.replace(ANSWER, data=(np.float32([1, 2.1]).tobytes(),))
    report = run(fake_pool(1.1, outputs_of_head=other))
    text = as_markdown(report)
    assert text.startswith("## Answers differ: layer-global")
    assert "times the tolerance" in text.splitlines()[0]
    assert "Slower: " in text.splitlines()[0]
    assert len(report.found) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": (np.float32([1, 2.000001]).tobytes(),)}, ""),
        ({"inputs": "b"}, "their inputs differ"),
        ({"shapes": ((1, 2),)}, "float32[2] became float32[1, 2]"),
    ],
)
def test_difference_of_outputs_tells_its_kind(change, says):
    found = outputs.difference(CASE, ANSWER, msgspec.structs.replace(ANSWER, **change))
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_difference_of_gradients_has_their_own_tolerance():
    """A maximum is exact, its gradient in float32 is not."""
    case = load_builtin().ops["depth_max_pool"].make_case(direction="training")
    columns = {"shapes": ((1,), (1,)), "dtypes": ("float32",) * 2}

    def answer(y, dx):
        data = tuple(np.float32([value]).tobytes() for value in (y, dx))
        return msgspec.structs.replace(ANSWER, **columns, data=data)

    assert outputs.difference(case, answer(1, 1), answer(1, 1 + 2e-7)) == ""
    assert outputs.difference(case, answer(1, 1), answer(1 + 2e-7, 1)) != ""


def test_wall_alone_slower_is_told_to_have_the_same_processor_time():
    report = run(fake_pool(1.2, used=1.0))
    assert report.heads[0].verdict == "SLOWER"
    assert report.heads[0].clocks_disagree
    assert "something else had the machine" in as_markdown(report)


def test_processor_time_breaks_a_near_tie():
    rule = Rule()
    wall = from_error(0.05, 0.03, 5, 6, rule.confidence)
    used = from_error(0.05, 0.001, 5, 6, rule.confidence)
    assert rule.judge(wall) == "UNDECIDED"
    assert rule.judge_both(wall, used, True, True) == ("SLOWER", "processor")
    against = from_error(-0.05, 0.001, 5, 6, rule.confidence)
    assert rule.judge_both(wall, against, True, True) == ("UNDECIDED", "wall")


def test_compare_legs_ignores_interrupted_blocks():
    rng = np.random.default_rng(0)
    quick = [(v, a, r, 1, 1e-3 * math.exp(rng.normal(0, 0.003)), 0)
             for v in range(6) for a in range(3) for r in range(30)]  # fmt: skip
    hit = [(*row[:4], row[4] * (5 if rng.random() < 0.4 else 1), 0) for row in quick]
    assert abs(compare_legs(hit, quick, 0.95).log_ratio) < 0.01


def test_report_prints_base_against_itself_beside_the_verdicts():
    report = run(fake_pool(1.1), control_every=1)
    assert "Base against itself, in this job: none of 2 differed" in as_markdown(report)
    alarm = dataclasses.replace(report.controls[0], verdict="SLOWER")
    report = dataclasses.replace(report, controls=(alarm,))
    assert "do not trust these verdicts" in as_markdown(report)
    hostile = dataclasses.replace(alarm, candidate="<img>*a*")
    text = as_markdown(dataclasses.replace(report, controls=(hostile,)))
    assert "<img>" not in text and "*a*)" not in text
    broke = dataclasses.replace(report.heads[0], verdict="BROKE", reason="no kernel " * 40)
    slower = dataclasses.replace(report.heads[0], verdict="SLOWER")
    text = as_markdown(dataclasses.replace(report, heads=(broke, slower)))
    assert "Slower: " in text.splitlines()[0], "however long what broke is"


def test_report_as_json_has_every_comparison():
    found = msgspec.json.decode(as_json(run(fake_pool(1.1), control_every=1)))
    assert [one["verdict"] for one in found["comparisons"]] == ["SLOWER", "SLOWER"]
    assert len(found["base_against_itself"]) == 2
    assert found["comparisons"][0]["wall"]["low"] > 1


def test_worker_that_cannot_start_names_its_side():
    class Pool(FakePool):
        def prepare(self, specs, processes, *, keep_others=False):
            if any(map(is_head, specs)):
                raise WorkerFailure(
                    "error", "python3 cannot start a worker: No module named 'msgspec'"
                )

    with pytest.raises(UsageError, match="head: python3 cannot start a worker: No module named"):
        run(Pool())


def test_cases_of_unlike_threads_are_raced_one_kind_after_the_other():
    pool = fake_pool(1.1)
    pairs = [(CASE.replace(threads=threads), NAMES[0]) for threads in (1, 0, 1)]
    job = Job(
        base=Side(title="a", worker=BASE), head=Side(title="b", worker=HEAD), pairs=tuple(pairs)
    )
    report = run_job(job, pool, say=lambda line: None, clock=lambda: 0.0)
    assert [one.case.threads for one in report.heads] == [1, 0, 1]
    threads = [spec.threads for specs in pool.prepared for spec in specs]
    assert threads == sorted(threads)
