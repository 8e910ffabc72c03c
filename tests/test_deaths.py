"""What a race does when its worker dies, with a worker that answers from a table."""

import msgspec
from poolbench.core.candidate import Candidate
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure
from poolbench.engine.race import MAX_DEATHS, Plan, Race
from poolbench.machine.info import Usage
from poolbench.worker import contender, session, timing

CASE = make_case(op="pool", shape=(8, 28, 28, 96), pool_size=3)
BLOCK = timing.Block(seconds=1e-3)
RUNNER = contender.OpenedContender(call_seconds=1e-3, read_nbytes=300, written_nbytes=100)
CRASH = WorkerFailure("crashed", "killed by SIGABRT", lost=True)
IDLE = WorkerFailure("crashed", "the worker died between two tasks", lost=True, blameless=True)


class ScriptedWorker:
    """Answers a race's tasks; `faults` maps (task, first argument) to what to do, one time each."""

    node = "local"
    tail = "what it printed"

    def __init__(self, faults):
        self.faults = {key: list(value) for key, value in faults.items()}
        self.tasks = []

    def call(self, function, *args, timeout):
        name = function.__name__.lstrip("_")
        first = args[0] if args and isinstance(args[0], str) else ""
        if name == "time_batch":
            names = {request.name for request in args[0]}
            first = names.pop() if len(names) == 1 else "all"
        self.tasks.append((name, first))
        fault = self.faults.get((name, first), [])
        if fault:
            answer = fault.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer(*args) if callable(answer) else answer
        answers = {
            "open_case": session.Opened(nbytes=1, devices={}, seconds=0.0),
            "open_contender": RUNNER,
            "allocate": 0.0,
        }
        if name == "time_batch":
            blocks = (BLOCK,) * len(args[0])
            return timing.Batch(blocks=blocks, cpu_seconds=0.0, switches=0)
        if name == "end_process":
            raise WorkerFailure("crashed", "the process exited with code 1", lost=True)
        return answers.get(name)

    def worker(self, process):
        return self


def entry(name):
    return Candidate(
        op="pool", name=name, form="function", framework="numpy", about="",
        build=lambda case: None, file="here",
    )  # fmt: skip


def run(faults):
    worker = ScriptedWorker(faults)
    quiet = Usage(clock=0.0, busy_seconds=0.0, steal_seconds=0.0, own_seconds=0.0)
    race = Race(
        CASE, [entry("base"), entry("rival")], baseline="base", plan=Plan(processes=2),
        read_usage=lambda: quiet, enough=lambda race, processes: True,
    )  # fmt: skip
    return {m.candidate: m for m in race.run(worker).measurements}, worker


def test_a_crash_while_the_case_is_opened_is_everybody_s_result_once():
    found, worker = run({("open_case", ""): [CRASH]})
    assert {m.status for m in found.values()} == {"crashed"}
    assert [task for task, _ in worker.tasks].count("open_case") == 1


def test_a_worker_that_died_between_races_is_replaced_and_nobody_blamed():
    found, _ = run({("open_case", ""): [IDLE]})
    assert {m.status for m in found.values()} == {"ok"}


def test_a_death_between_two_blocks_blames_nobody():
    found, _ = run({("time_batch", "all"): [IDLE, IDLE]})
    assert {m.status for m in found.values()} == {"ok"}
    assert len(found["rival"].samples)


def test_who_crashes_in_a_stretch_is_found_by_visits_one_by_one_and_the_others_go_on():
    found, worker = run({("time_batch", "all"): [CRASH], ("time_batch", "rival"): [CRASH]})
    assert (found["rival"].status, found["base"].status) == ("crashed", "ok")
    assert worker.tasks.count(("time_batch", "all")) == 1
    assert set(found["base"].samples.process) == {0, 1}


def test_a_crash_that_does_not_come_again_blames_nobody():
    found, _ = run({("time_batch", "all"): [CRASH]})
    assert {m.status for m in found.values()} == {"ok"}


def test_what_a_call_raises_in_a_stretch_ends_that_candidate_only():
    broken = timing.Block(status="error", reason="ValueError: no")

    def batch(requests):
        blocks = tuple(broken if request.name == "rival" else BLOCK for request in requests)
        return timing.Batch(blocks=blocks, cpu_seconds=0.0, switches=0)

    found, _ = run({("time_batch", "all"): [batch]})
    assert (found["rival"].status, found["rival"].reason) == ("error", "ValueError: no")
    assert (found["base"].status, found["rival"].tail) == ("ok", "what it printed")


def test_a_worker_that_dies_again_and_again_ends_the_race():
    found, worker = run({("open_case", ""): [IDLE] * 100})
    assert {m.status for m in found.values()} == {"crashed"}
    assert [task for task, _ in worker.tasks].count("open_case") == MAX_DEATHS + 1


def test_what_crashes_once_is_not_tried_in_another_process():
    found, worker = run({("open_contender", "rival"): [CRASH]})
    assert (found["rival"].status, found["base"].status) == ("crashed", "ok")
    assert worker.tasks.count(("open_contender", "rival")) == 1
    assert set(found["base"].samples.process) == {0, 1}


def test_a_candidate_that_taints_its_process_is_out_and_the_process_replaced():
    tainted = msgspec.structs.replace(RUNNER, status="error", reason="it left 1", tainted=True)
    found, worker = run({("open_contender", "rival"): [tainted]})
    assert (found["rival"].status, found["rival"].reason) == ("error", "it left 1")
    assert found["rival"].tail == "what it printed"
    assert worker.tasks.count(("end_process", "")) == 1
    assert found["base"].status == "ok"


def test_a_case_that_does_not_close_costs_only_its_process():
    failure = WorkerFailure("error", "ValueError: still held")
    found, worker = run({("close_case", ""): [failure]})
    assert {m.status for m in found.values()} == {"ok"}
    assert worker.tasks.count(("end_process", "")) == 1


def test_a_worker_that_cannot_be_started_is_said_of_every_candidate():
    class Fleet:
        def worker(self, process):
            raise WorkerFailure("error", "ImportError: no module named mine")

    race = Race(CASE, [entry("base")], baseline="base", plan=Plan())
    found = race.run(Fleet()).measurements
    assert {(m.status, m.reason) for m in found} == {("error", "ImportError: no module named mine")}
