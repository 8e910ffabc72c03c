"""Filling the support matrix with workers that answer at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from matrix_candidates import DENSE, OP
from poolbench.core.candidate import Candidate
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.registry import REGISTRY
from poolbench.engine import cleanup
from poolbench.engine.run import Run, RunOptions
from poolbench.matrix import PROBES, record
from poolbench.matrix.finding import Finding
from poolbench.matrix.runner import PendingCell, all_keys, fill, plan_cells
from poolbench.store.journal import JOURNAL, read_run
from poolbench.worker import session


class FakeWorker:
    """Answers by candidate and probe; remembers what it was asked, and by which process."""

    node = "local"

    def __init__(self, process, answers, log):
        self._process, self._answers, self._log = process, answers, log
        self.closed = False

    def call(self, function, *args, timeout):
        _, candidate, probe, step, _, folder = args
        assert Path(folder).is_dir()
        self._log.append((self._process, candidate, probe, step))
        answer = self._answers.get((candidate, probe), Finding(state="pass", evidence="fine"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.closed = True


@pytest.fixture
def candidates(monkeypatch):
    names = {}
    for name, backend in (("one", "tensorflow"), ("two", "tensorflow"), ("host", "numpy")):
        names[OP, name] = Candidate(
            op=OP, name=name, form="function", backends=(backend,), about="", build=print, file=""
        )
    monkeypatch.setattr(REGISTRY, "candidates", names)


def run_fill(keys, answers=None, **options):
    log, workers, lock = [], [], threading.Lock()

    def open_worker(process):
        worker = FakeWorker(process, answers or {}, log)
        with lock:
            workers.append(worker)
        return worker

    records = {
        (record.candidate, record.probe): record
        for record in fill(plan_cells(keys, ["cpu:0"]), open_worker, timeout_seconds=1, **options)
    }
    assert all(worker.closed for worker in workers)
    return records, log


def test_fill_cells_become_one_record_each(candidates):
    keys = [(OP, name, probe) for name in ("one", "two") for probe in ("nan", "negative", "tie")]
    records, log = run_fill(keys)
    assert {record.state for record in records.values()} == {"pass"}
    assert len(records) == len(log) == len(keys)


def test_fill_crash_costs_its_own_cell_only(candidates):
    crash = WorkerFailure(
        "crashed",
        "killed by SIGABRT",
        tail="a\nF0000 00:00 7 pool.cc:9] Check failed: n > 0\n  @ 0x1",
        lost=True,
    )
    hang = WorkerFailure("timeout", "no answer within 1 s (--task-timeout)", lost=True)
    keys = [(OP, "one", probe) for probe in ("nan", "negative", "tie")]
    records, _ = run_fill(keys, {("one", "nan"): crash, ("one", "negative"): hang})
    assert records["one", "nan"].state == "crashed"
    assert records["one", "nan"].evidence == "killed by SIGABRT [Check failed: n > 0]"
    assert records["one", "negative"].state == "timeout"
    assert records["one", "tie"].state == "pass"


def test_fill_worker_that_cannot_be_opened_leaves_no_other_open(candidates):
    opened = []

    def open_worker(process):
        if process == "other":
            raise OSError("no process")
        opened.append(FakeWorker(process, {}, []))
        return opened[-1]

    with pytest.raises(OSError, match="no process"):
        list(fill(plan_cells([(OP, "one", "threads")], ["cpu:0"]), open_worker, timeout_seconds=1))
    assert [worker.closed for worker in opened] == [True]


def test_fill_steps_run_in_their_processes_until_one_fails(candidates):
    keys = [(OP, name, "save-keras") for name in ("one", "two")]
    refused = Finding(state="unsupported", evidence="cannot be saved")
    records, log = run_fill(keys, {("two", "save-keras"): refused})
    assert sorted(log) == [
        ("fresh", "one", "save-keras", 1),
        ("shared", "one", "save-keras", 0),
        ("shared", "two", "save-keras", 0),
    ]
    assert (records["two", "save-keras"].state, records["one", "save-keras"].state) == (
        "unsupported", "pass",
    )  # fmt: skip


def test_fill_exports_run_only_when_asked_for(candidates):
    keys = [(OP, "one", "onnx")]
    records, log = run_fill(keys)
    assert (records["one", "onnx"].state, records["one", "onnx"].evidence, log) == (
        "not_run", "exports run only with --with-exports", [],
    )  # fmt: skip
    assert run_fill(keys, exports=True)[0]["one", "onnx"].state == "pass"


def test_fill_numpy_candidate_runs_values_only(candidates):
    records, _ = run_fill([(OP, "host", "forward-eager"), (OP, "host", "forward-xla")])
    assert records["host", "forward-eager"].state == "pass"
    assert records["host", "forward-xla"].state == "not_run"
    assert records["host", "forward-xla"].evidence


def test_fill_pass_without_evidence_gets_a_default(candidates):
    records, _ = run_fill([(OP, "one", "nan")], {("one", "nan"): Finding(state="pass")})
    assert records["one", "nan"].evidence == "agrees with the reference"


def test_plan_cells_gpu_runs_only_what_a_gpu_may_change(candidates):
    keys = [(OP, "one", "forward-xla"), (OP, "one", "save-keras")]
    cells = plan_cells(keys, ["cpu:0", "gpu:0"])
    assert [(cell.probe.key, cell.device) for cell in cells] == [
        ("forward-xla", "cpu:0"), ("save-keras", "cpu:0"), ("forward-xla", "gpu:0"),
    ]  # fmt: skip


def test_applies_op_without_window_skips_its_checks():
    means = REGISTRY.ops["global_avg_pool"]
    assert not PROBES["overlap"].applies(means)
    assert PROBES["nan"].applies(means)
    assert PROBES["fit-xla"].applies(means)
    assert (OP, "right", "overlap") in all_keys()


def test_applies_op_of_two_inputs_gets_the_checks_that_fit():
    applicable = {key for key, probe in PROBES.items() if probe.applies(REGISTRY.ops[DENSE])}
    assert applicable >= {
        "forward-xla",
        "gradient-graph",
        "dtype-float16",
        "nan",
        "repeat-calls",
        "save-export",
    }
    assert not applicable & {
        "overlap",
        "tie",
        "fit-xla",
        "dynamic-batch",
        "channels_first",
        "save-keras",
        "onnx",
    }


def test_pending_cell_is_decided_by_last_pass_or_first_failure():
    cell = PendingCell(op=OP, candidate="right", probe=PROBES["save-keras"], device="cpu:0")
    assert cell.process == "shared"
    cell.findings.append(Finding(state="pass"))
    assert cell.process == "fresh"
    cell.findings.append(Finding(state="error"))
    assert cell.process is None


def test_fill_scratch_lies_in_the_temporary_folder(candidates):
    folders = []

    class Remembering(FakeWorker):
        def call(self, function, *args, timeout):
            folders.append(Path(args[-1]))
            return Finding(state="pass")

    cells = plan_cells([(OP, "one", "nan")], ["cpu:0"])
    list(fill(cells, lambda process: Remembering(process, {}, []), timeout_seconds=1))
    assert [cleanup.temporary_folder() in folder.parents for folder in folders] == [True]
    assert not folders[0].exists()


class RacePool:
    """The workers of a run's races, which nothing else may use or end."""

    ended = 0

    def started(self):
        raise AssertionError("the matrix asked a worker of a race")

    use = worker = started

    def close(self):
        self.ended += 1


@pytest.fixture
def opened(monkeypatch):
    """The workers that a matrix opens, fake ones."""
    workers = []

    class OwnWorker(FakeWorker):
        def __init__(self, spec, **_):
            super().__init__(spec, {}, [])
            workers.append(self)

        def wait_started(self):
            pass

        def call(self, function, *args, timeout):
            if function is session.list_devices:
                return {"cpu:0": "CPU"}
            return super().call(function, *args, timeout=timeout)

    monkeypatch.setattr(record, "Worker", OwnWorker)
    return workers


def test_run_matrix_leaves_the_workers_of_races_alone(candidates, opened, tmp_path):
    pool = RacePool()
    keys = [(OP, "one", "nan"), (OP, "two", "save-keras")]
    with Run(RunOptions(folder=tmp_path / "run"), pool=pool) as run:
        found = record.run_matrix(run, keys, say=[].append)
        assert pool.ended == 0
    assert {key: cells[0].state for key, cells in found.items()} == dict.fromkeys(keys, "pass")
    assert opened
    assert all(worker.closed for worker in opened)


def test_run_matrix_device_that_is_not_there_is_refused(candidates, opened, tmp_path):
    with (
        Run(RunOptions(folder=tmp_path / "run")) as run,
        pytest.raises(UsageError, match="there is no gpu:3; TensorFlow sees cpu:0"),
    ):
        record.run_matrix(run, [(OP, "one", "nan")], devices=["gpu:3"])
    assert [worker.closed for worker in opened] == [True]


def test_run_kept_counts_the_cells_of_the_matrix(candidates, opened, tmp_path):
    with Run(RunOptions(folder=tmp_path / "run")) as run:
        assert run.kept() == ""
        record.run_matrix(run, [(OP, "one", "nan"), (OP, "two", "nan")], say=[].append)
        assert run.kept() == "2 cells of the matrix"


def test_run_matrix_resumed_runs_only_missing_cells(candidates, opened, tmp_path):
    folder, said = tmp_path / "run", []
    keys = [(OP, "one", "nan"), (OP, "one", "negative"), (OP, "two", "nan")]
    with Run(RunOptions(folder=folder)) as run:
        record.run_matrix(run, keys[:2], say=said.append)
    with Run(RunOptions(folder=folder, resume=True), progress=said.append) as run:
        found = record.run_matrix(run, keys, say=said.append)
    assert "going on with run: 2 cells of the matrix so far" in said
    assert list(found) == keys
    assert len(read_run(folder).capabilities) == len(keys)
    assert [line.split(" in ")[0] for line in said if " cells in " in line] == [
        "2 cells",
        "1 cells",
    ]


@pytest.mark.fault(
    "`poolbench matrix` is killed",
    "its checks are kept but for the line in progress; resuming runs those that are missing",
)
def test_run_matrix_torn_line_runs_that_check_again(candidates, opened, tmp_path):
    folder, said = tmp_path / "run", []
    keys = [(OP, "one", "nan"), (OP, "one", "negative"), (OP, "two", "nan")]
    with Run(RunOptions(folder=folder)) as run:
        record.run_matrix(run, keys[:2], say=said.append)
    path = folder / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])  # as a kill while the line was written leaves it
    with Run(RunOptions(folder=folder, resume=True)) as run:
        record.run_matrix(run, keys, say=said.append)
    assert path.read_bytes().startswith(whole[: whole.rindex(b"\n", 0, -1)])
    assert sorted((c.op, c.candidate, c.probe) for c in read_run(folder).capabilities) == keys
