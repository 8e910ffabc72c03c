"""A fleet whose workers answer at once, for tests of what stands around them."""

from collections import Counter

from poolbench.core.candidate import Candidate
from poolbench.worker import contender, session, timing


def fake_candidate(name, op="fake"):
    """A candidate that nobody will build."""
    return Candidate(
        op=op, name=name, form="function", framework="numpy", about="",
        build=lambda case: None, file="here",
    )  # fmt: skip


BLOCK = timing.Block(seconds=1e-3)
ANSWERS = {
    "open_case": session.Opened(nbytes=1, devices={}, seconds=0.0),
    "open_contender": contender.OpenedContender(
        call_seconds=1e-3, first_call_seconds=0.1, read_nbytes=300, written_nbytes=100
    ),
    "allocate": 0.0,
    "time_batch": lambda requests: timing.Batch(
        blocks=(BLOCK,) * len(requests), cpu_seconds=0.0, switches=0
    ),
    "gather": None,
    "close_case": None,
    "measure_energy": None,
    "time_on_device": lambda names, calls: [None] * len(names),
}


class FakeWorker:
    """Answers each of a race's tasks from a table, and counts them."""

    node = "local"

    def __init__(self, tasks, **answers):
        self.tasks = tasks
        self.answers = ANSWERS | answers

    def call(self, function, *args, timeout):
        name = function.__name__.lstrip("_")
        self.tasks[name] += 1
        answer = self.answers[name]
        return answer(*args) if callable(answer) else answer

    def close(self):
        pass


class FakeFleet:
    """One fake worker for every process; what it says that a call takes of the device is given."""

    def __init__(self, *, energy_joules=None, device_seconds=None):
        self.tasks = Counter()
        self._worker = FakeWorker(
            self.tasks,
            measure_energy=energy_joules,
            time_on_device=lambda names, calls: [
                device_seconds(name) if callable(device_seconds) else device_seconds
                for name in names
            ],
        )

    def use(self, setting, processes, *, beside=False):
        pass

    def worker(self, process):
        return self._worker

    def started(self):
        return None

    def close(self):
        pass
