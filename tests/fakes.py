"""Fake workers that answer at once from a table."""

from collections import Counter

from poolbench.core.candidate import Candidate
from poolbench.core.errors import WorkerFailure
from poolbench.machine.info import Usage
from poolbench.worker import contender, session, spots, timing, trace, verify


def fake_candidate(name, op="fake", failures=()):
    """Return a candidate that nothing will build."""
    return Candidate(
        op=op, name=name, form="function", backends=("numpy",), about="",
        build=lambda case: None, failures=failures, file="here",
    )  # fmt: skip


BLOCK = timing.Block(seconds=1e-3)
OPENED = contender.OpenedContender(
    call_seconds=1e-3, first_call_seconds=0.1, read_nbytes=300, written_nbytes=100
)


def make_batch(blocks, **fields):
    """Return what a worker answers that has timed these blocks on a quiet machine."""
    return timing.Batch(blocks=tuple(blocks), **({"cpu_seconds": 0.0, "switches": 0} | fields))


# Task -> its answer, or a function of its arguments that returns the answer. An exception is raised.
ANSWERS = {
    session.open_case: session.Opened(nbytes=1, devices={}, seconds=0.0),
    contender.open_contender: OPENED,
    contender.read_program: None,
    session.allocate: 0.0,
    timing.time_batch: lambda requests: make_batch([BLOCK] * len(requests)),
    session.close_case: None,
    session.end_process: WorkerFailure("crashed", "the process exited with code 1", lost=True),
    timing.measure_energy: None,
    verify.verify: {},
    spots.accepted: {},
    spots.expect: 0.0,
    trace.time_on_device: lambda names, calls: [None] * len(names),
}


class FakeWorker:
    """Answers each task from a table, and notes it.

    Attributes:
        tasks: (task, first argument or None) of each, in order.
    """

    node = "local"
    slept = False

    def __init__(self, answers=(), tail=""):
        self.tail = tail
        self.tasks = []
        self._answers = ANSWERS | dict(answers)

    def call(self, function, *args, timeout):
        self.tasks.append((function, args[0] if args else None))
        answer = self._answers[function]
        if callable(answer):
            answer = answer(*args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def answer(self, function, answer):
        """Replace the answer to a task."""
        self._answers[function] = answer

    def close(self):
        pass


class FakePool:
    """Fake workers by spec and process.

    Args:
        answers: a table of answers, or a function of (spec, process) that returns one.

    Attributes:
        prepared: the specs of each `prepare`, in order.
        kept_others: whether workers were ever to be beside those of other specs.
    """

    def __init__(self, answers=()):
        self.workers = {}
        self.prepared = []
        self.kept_others = False
        self._answers = answers

    @property
    def tasks(self):
        """How often each task was called."""
        return Counter(task for worker in self.workers.values() for task, _ in worker.tasks)

    def prepare(self, specs, processes, *, keep_others=False):
        self.prepared.append(tuple(specs))
        self.kept_others |= keep_others

    def worker(self, spec, process=0):
        if (spec, process) not in self.workers:
            answers = self._answers(spec, process) if callable(self._answers) else self._answers
            self.workers[spec, process] = FakeWorker(answers)
        return self.workers[spec, process]

    def started(self):
        return None

    def close(self):
        pass


class FakeMachine:
    """A machine whose clock advances only by the calls that its workers make.

    Args:
        seconds: contender -> seconds per call, or what opening it answers or raises.
        opens: contender -> seconds per call that opening it shows, where that differs.
        busy: processors that others use.
        batch: further fields of each Batch.
    """

    def __init__(self, seconds, *, opens=None, busy=0.0, batch=dict):
        self.now = 0.0
        self.requests = []  # (worker's spec, process, BlockRequest), in order
        self._seconds = seconds
        self._opens = seconds | (opens or {})
        self._busy = busy
        self._batch = batch
        self.pool = FakePool(self._answers)

    def read_usage(self):
        """Return the machine's counters."""
        return Usage(
            clock=self.now, busy_seconds=self.now * self._busy, steal_seconds=0.0, own_seconds=0.0
        )

    def names(self, process=None):
        """Return the contenders in the order of their blocks."""
        return [r.name for _, place, r in self.requests if process in (None, place)]

    def _answers(self, spec, process):
        def time_batch(requests):
            blocks = []
            for request in requests:
                self.requests.append((spec, process, request))
                seconds = self._seconds[request.name]
                self.now += seconds * (request.warmup + request.calls)
                blocks.append(
                    timing.Block(seconds=seconds, warmup_seconds=seconds * request.warmup)
                )
            return make_batch(blocks, **self._batch())

        def open_contender(name, check):
            seconds = self._opens[name]
            if not isinstance(seconds, float):
                return seconds
            return contender.OpenedContender(
                call_seconds=seconds, first_call_seconds=0.1, read_nbytes=300, written_nbytes=100
            )

        return {
            session.open_case: session.Opened(nbytes=1, devices={}, seconds=0.5),
            session.allocate: 0.01,
            contender.open_contender: open_contender,
            timing.time_batch: time_batch,
        }
