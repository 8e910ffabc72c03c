"""A race whose worker dies: the contender that killed it fails, the others continue."""

import msgspec
import pytest
from fakes import ANSWERS, BLOCK, OPENED, FakePool, FakeWorker, fake_candidate, make_batch
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.core.plan import Plan
from poolbench.engine.race import MOST_SLEEPS, race_in_one_worker
from poolbench.engine.recovery import MAX_DEATHS, Tasks
from poolbench.machine.info import Usage
from poolbench.worker import contender, session, spots, timing, verify

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
CRASH = WorkerFailure("crashed", "killed by SIGABRT", lost=True)
IDLE = WorkerFailure("crashed", "the worker died between two tasks", lost=True, blameless=True)
STOPPED = WorkerFailure("timeout", "no answer within 60 s", lost=True, stopped=True)
QUIET = Usage(clock=0.0, busy_seconds=0.0, steal_seconds=0.0, own_seconds=0.0)


def about(task, arguments):
    """Return what a task is about: a contender's name, 'all' for several, '' for the case."""
    if task is timing.time_batch:
        names = {request.name for request in arguments[0]}
        return names.pop() if len(names) == 1 else "all"
    return arguments[0] if arguments and isinstance(arguments[0], str) else ""


def run(faults, **tasks_of_race):
    """Race 'base' and 'other'; `faults` maps (task, subject) to answers, each given once."""
    faults = {key: list(answers) for key, answers in faults.items()}
    tasks = []

    def answer_of(task, usual):
        def answer(*arguments):
            key = task, about(task, arguments)
            tasks.append(key)
            given = faults[key].pop(0) if faults.get(key) else usual
            return given(*arguments) if callable(given) else given

        return answer

    pool = FakePool({task: answer_of(task, usual) for task, usual in ANSWERS.items()})
    race = race_in_one_worker(
        CASE, [fake_candidate("base", "pool"), fake_candidate("other", "pool")], baseline="base",
        plan=Plan(processes=2), read_usage=lambda: QUIET,
        tasks=Tasks(**tasks_of_race) if tasks_of_race else None,
    )  # fmt: skip
    for process in range(2):
        pool.worker(race.spec.workers[0], process).tail = "what it printed"
    return {m.candidate: m for m in race.run(pool).measurements}, tasks


def test_crash_while_the_case_is_opened_is_the_result_of_all():
    found, tasks = run({(session.open_case, ""): [CRASH]})
    assert {m.status for m in found.values()} == {"crashed"}
    assert tasks.count((session.open_case, "")) == 1


def test_worker_dead_before_the_case_is_opened_is_replaced_without_blame():
    found, _ = run({(session.open_case, ""): [IDLE]})
    assert {m.status for m in found.values()} == {"ok"}


def test_worker_dead_between_two_batches_is_replaced_without_blame():
    found, _ = run({(timing.time_batch, "all"): [IDLE, IDLE]})
    assert {m.status for m in found.values()} == {"ok"}
    assert len(found["other"].samples)


@pytest.mark.fault(
    "a worker alone is stopped (SIGSTOP)",
    "it is replaced without blame, and the blocks in progress are timed again",
)
@pytest.mark.parametrize(
    "place",
    [(session.open_case, ""), (contender.open_contender, "other"), (timing.time_batch, "all")],
    ids=lambda place: place[0].__name__,
)
def test_worker_stopped_from_outside_is_replaced_without_blame(place):
    found, _ = run({place: [STOPPED]})
    assert {m.status for m in found.values()} == {"ok"}
    assert len({len(m.samples) for m in found.values() if m.kind == "candidate"}) == 1
    undisturbed, _ = run({})
    assert len(found["other"].samples) == len(undisturbed["other"].samples)


def test_contender_that_stops_its_process_again_is_to_blame():
    found, tasks = run({(contender.open_contender, "other"): [STOPPED] * 9})
    assert (found["other"].status, found["base"].status) == ("timeout", "ok")
    assert tasks.count((contender.open_contender, "other")) == 2


def test_batch_in_which_the_run_slept_is_done_again(monkeypatch):
    undisturbed, before = run({})
    slept = property(lambda worker: [t for t, _ in worker.tasks].count(timing.time_batch) == 1)
    monkeypatch.setattr(FakeWorker, "slept", slept)
    found, after = run({})
    batch = (timing.time_batch, "all")
    assert after.count(batch) == before.count(batch) + 2  # the first of each process
    assert len(found["other"].samples) == len(undisturbed["other"].samples)


def test_run_that_seems_to_sleep_in_every_batch_ends(monkeypatch):
    undisturbed, before = run({})
    monkeypatch.setattr(FakeWorker, "slept", True)
    found, after = run({})
    batch = (timing.time_batch, "all")
    assert after.count(batch) == before.count(batch) + MOST_SLEEPS
    assert len(found["other"].samples) == len(undisturbed["other"].samples)


def test_crash_in_a_batch_is_traced_to_its_contender_block_by_block():
    found, tasks = run({(timing.time_batch, "all"): [CRASH], (timing.time_batch, "other"): [CRASH]})
    assert (found["other"].status, found["base"].status) == ("crashed", "ok")
    assert tasks.count((timing.time_batch, "all")) == 1
    assert set(found["base"].samples.process) == {0, 1}


def test_crash_in_a_batch_that_does_not_recur_blames_no_contender():
    found, _ = run({(timing.time_batch, "all"): [CRASH]})
    assert {m.status for m in found.values()} == {"ok"}


def test_exception_in_a_block_ends_its_contender_only():
    broken = timing.Block(status="error", reason="ValueError: no")

    def batch(requests):
        return make_batch([broken if r.name == "other" else BLOCK for r in requests])

    found, _ = run({(timing.time_batch, "all"): [batch]})
    assert (found["other"].status, found["other"].reason) == ("error", "ValueError: no")
    assert (found["base"].status, found["other"].tail) == ("ok", "what it printed")


def test_crash_in_the_check_after_timing_is_traced_to_its_candidate():
    asked = []

    def check(fresh, old, only=("base", "other")):
        asked.append(only)
        if "other" in only and len(asked) <= 3:
            raise CRASH
        return {}

    found, _ = run({(verify.verify, ""): [check] * 9})
    assert (found["base"].status, found["other"].status) == ("ok", "crashed")
    # All, each alone, and in the second process those that are left.
    assert asked == [("base", "other"), ("base",), ("other",), ("base", "other")]


def test_worker_that_dies_again_and_again_ends_the_race():
    found, tasks = run({(session.open_case, ""): [IDLE] * 100})
    assert {m.status for m in found.values()} == {"crashed"}
    assert tasks.count((session.open_case, "")) == MAX_DEATHS + 1


def test_worker_that_dies_whenever_results_are_expected_ends_the_race():
    found, tasks = run({(spots.expect, ""): [CRASH] * 100}, compares_processes=True)
    assert {m.status for m in found.values()} == {"crashed"}
    assert tasks.count((spots.expect, "")) == 1


def test_check_after_timing_that_fails_is_the_result_of_all():
    failure = WorkerFailure("error", "ValueError: no")
    found, _ = run({(verify.verify, ""): [failure]})
    assert {(m.status, m.reason) for m in found.values()} == {("error", "ValueError: no")}


def test_contender_that_taints_its_process_is_out_and_the_process_replaced():
    tainted = msgspec.structs.replace(OPENED, status="error", reason="it left 1", tainted=True)
    found, tasks = run({(contender.open_contender, "other"): [tainted]})
    assert (found["other"].status, found["other"].reason) == ("error", "it left 1")
    assert found["other"].tail == "what it printed"
    assert tasks.count((session.end_process, "")) == 1
    assert found["base"].status == "ok"


def test_case_that_does_not_close_costs_only_its_process():
    failure = WorkerFailure("error", "ValueError: still held")
    found, tasks = run({(session.close_case, ""): [failure]})
    assert {m.status for m in found.values()} == {"ok"}
    assert tasks.count((session.end_process, "")) == 1


@pytest.mark.parametrize("lost", [True, False])
def test_allocation_that_fails_is_repeated_only_in_a_fresh_worker(lost):
    failure = WorkerFailure("out_of_memory", "host memory: full", lost=lost)
    found, _ = run({(session.allocate, ""): [failure]})
    assert {m.status for m in found.values()} == {"ok" if lost else "out_of_memory"}


@pytest.mark.fault(
    "a file of candidates that raises in the worker only",
    "`error` with the exception, for each measurement",
)
def test_worker_that_cannot_start_fails_every_candidate():
    class Workers:
        def worker(self, spec, process):
            raise WorkerFailure("error", "ImportError: no module named mine")

    for act in ("run", "check"):
        race = race_in_one_worker(CASE, [fake_candidate("base")], baseline="base", plan=Plan())
        found = getattr(race, act)(Workers()).measurements
        assert {m.status for m in found} == {"error"}
        assert {m.reason for m in found} == {"ImportError: no module named mine"}
