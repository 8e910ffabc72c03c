"""Probes: each passes what is right and fails what is wrong; how cells come to their words and states."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from capability_candidates import OP
from poolbench.core.candidate import Candidate, KnownFailure
from poolbench.core.case import make_case
from poolbench.core.errors import WorkerFailure, own_folders
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import Worker
from poolbench.matrix import GROUPS, PROBES, judge
from poolbench.matrix.probe import (
    Finding,
    Trial,
    combine,
    error_words,
    explain_error,
)
from poolbench.matrix.probes import repeat, threads, values
from poolbench.matrix.runner import Cell, all_keys, fill, plan_cells, run_step

CANDIDATES = Path(__file__).parent / "capability_candidates.py"

# A candidate that a probe must not let pass, and what it must say of it.
CAUGHT = (
    ("forward-eager", "maxout", "wrong", "where"),
    ("forward-graph", "maxout", "wrong", "where"),
    ("forward-xla", "differs-in-xla", "wrong", "where"),
    ("silent", "differs-in-xla", "wrong", "eager and XLA differ"),
    ("gradient-eager", "double-gradient", "wrong", "is right: off by 100%"),
    ("gradient-graph", "double-gradient", "wrong", "is right: off by 100%"),
    ("gradient-xla", "double-gradient", "wrong", "is right: off by 100%"),
    ("gradient-graph", "native", "unsupported", "no gradient of depthwise max pooling"),
    ("fit-default", "double-gradient", "wrong", "update is off by 100%"),
    ("fit-plain", "double-gradient", "wrong", "update is off by 100%"),
    ("fit-xla", "double-gradient", "wrong", "update is off by 100%"),
    ("second-order-graph", "double-gradient", "wrong", "along a random direction"),
    ("second-order-xla", "double-gradient", "wrong", "along a random direction"),
    ("depth-remainder-valid", "keeps-tail", "wrong", "pads with the lowest value"),
    ("depth-remainder-same", "zero-padding", "wrong", "pads with zero"),
    ("depth-remainder-same", "native", "unsupported", "the window must divide the depth"),
    ("padding-same", "pads-behind", "wrong", "values of other groups"),
    ("remainder-gradient", "double-gradient", "wrong", "is right: off by"),
    ("dynamic-batch", "static", "error", "InvalidArgumentError"),
    ("dynamic-space", "static", "error", "InvalidArgumentError"),
    ("dynamic-channels", "static", "error", "InvalidArgumentError"),
    ("empty-batch", "static", "error", "InvalidArgumentError"),
    ("channels_first", "last-axis", "wrong", "y has shape"),
    ("dtype-float32", "through-float16", "wrong", "is right"),
    ("dtype-float64", "through-float16", "wrong", "is right"),
    ("dtype-float16", "always-float32", "wrong", "y is float32; float16 is right"),
    ("dtype-bfloat16", "always-float32", "wrong", "y is float32; bfloat16 is right"),
    ("dtype-int32", "always-float32", "wrong", "y is float32; int32 is right"),
    ("dtype-uint8", "maxout", "wrong", "is right"),
    ("mixed_float16", "always-float32", "wrong", "y is float32"),
    ("mixed_bfloat16", "double-gradient", "wrong", "update is off by"),
    ("nan", "reduce_max", "wrong", "[nnn] -> -inf"),
    ("minus-inf", "finite", "wrong", "is right"),
    ("negative", "relu", "wrong", "is right"),
    ("tie", "every-tie", "wrong", "it sums to 3"),
    ("repeat-calls", "random", "wrong", "3 calls gave"),
    ("repeat-processes", "random", "wrong", "3 calls gave"),
    ("determinism-graph", "random", "wrong", "3 calls gave"),
    ("determinism-xla", "random", "wrong", "3 calls gave"),
    ("tflite-builtins", "python", "unsupported", "the converter refuses it"),
    ("tflite-flex", "native", "not_run", "it converts; this interpreter has no Flex ops"),
    ("onnx", "native", "wrong", "the ONNX model is the identity"),
)
# Where the right candidate, a function, cannot pass by its nature.
NOT_PASSED = {"overlap": "not_run", "save-keras": "unsupported"}
# One process serves all steps here: nothing scales, and what is read may be noise.
MAY_NOT_BE_READ = "threads"


@pytest.fixture(scope="module")
def worker():
    worker = Worker(WorkerSpec(), files=[CANDIDATES])
    yield worker
    worker.close()


def ask(worker, probe, candidate, folder):
    """What a probe's steps come to, all of them in one process."""
    findings = []
    for step in range(len(PROBES[probe].steps)):
        findings.append(
            worker.call(run_step, OP, candidate, probe, step, "cpu:0", str(folder), timeout=60)
        )
        if findings[-1].state != "pass":
            return findings[-1]
    return PROBES[probe].judge(findings)


@pytest.mark.parametrize("row", CAUGHT, ids=lambda row: "-".join(row[:2]))
def test_a_probe_catches_what_is_wrong(worker, tmp_path, row):
    probe, candidate, state, words = row
    skip_without_exports(probe)
    found = ask(worker, probe, candidate, tmp_path)
    assert (found.state, words in found.evidence) == (state, True), found


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_right_passes(worker, tmp_path, probe):
    skip_without_exports(probe)
    found = ask(worker, probe, "right", tmp_path)
    if probe == MAY_NOT_BE_READ and found.state == "not_run":
        pytest.skip(found.evidence)
    assert found.state == NOT_PASSED.get(probe, "pass"), found


def skip_without_exports(probe):
    from importlib.util import find_spec

    needed = {"onnx": ("tf2onnx", "onnxruntime")}.get(probe, ())
    if not all(find_spec(module) for module in needed):
        pytest.skip("the extra 'export' is not installed")


def test_a_layer_that_forgets_its_window_loads_wrong(worker, tmp_path):
    found = ask(worker, "save-keras", "forgetful", tmp_path)
    assert (found.state, "shape" in found.evidence) == ("wrong", True), found


def test_every_probe_is_caught_failing_somewhere():
    elsewhere = {"overlap", "save-keras", "save-export", "threads"}
    assert {row[0] for row in CAUGHT} | elsewhere == set(PROBES)


def test_the_table_of_probes_needs_no_tensorflow():
    code = "import poolbench.matrix.runner, sys; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probes_have_titles_questions_and_groups_together():
    titles = [probe.title for probe in PROBES.values()]
    assert len(set(titles)) == len(titles)
    assert all(
        probe.question.rstrip(")").endswith(("?", ".", "value", "read", "Lambda"))
        for probe in PROBES.values()
    )
    assert [g for g in GROUPS if any(p.group == g for p in PROBES.values())] == list(
        dict.fromkeys(probe.group for probe in PROBES.values())
    )


# Words and states


def test_the_worst_finding_is_the_cell_and_equal_words_are_said_once():
    found = combine(
        {
            "eager": Finding(state="pass", evidence="exact", figures={"error": 0.0}),
            "graph": Finding(state="pass", evidence="exact", figures={"error": 0.0}),
            "xla": Finding(
                state="wrong", evidence="off", figures={"error": 0.5}, issue="tensorflow#1"
            ),
        }
    )
    assert (found.state, found.evidence) == ("wrong", "eager, graph: exact; xla: off")
    assert (found.figures["error (xla)"], found.issue) == (0.5, "tensorflow#1")


def test_a_silent_wrong_answer_is_worse_than_an_error():
    states = ("error", "wrong", "unsupported")
    found = combine({state: Finding(state=state, evidence=state) for state in states})
    assert found.state == "wrong"


def test_a_documented_failure_of_the_candidate_is_unsupported_with_its_issue():
    failure = KnownFailure(
        when=lambda case: True, matches="no window", reason="as documented", issue="a#1"
    )
    entry = SimpleNamespace(failures=(failure,))
    found = explain_error(entry, make_case(op=OP), RuntimeError("there is no window"))
    assert (found.state, found.issue) == ("unsupported", "a#1")
    assert found.evidence == "as documented [RuntimeError: there is no window]"


def test_an_error_that_nobody_documents_is_an_error():
    found = explain_error(SimpleNamespace(failures=()), make_case(op=OP), KeyError("x"))
    assert (found.state, found.evidence) == ("error", "KeyError: 'x'")


def test_error_words_leave_out_the_folders_of_this_machine():
    place = own_folders()[0]
    words = error_words(ValueError(f"FlatBuffer.{place}/lib/keras.py:1: it is refused"))
    assert words == "ValueError: FlatBuffer.lib/keras.py:1: it is refused"


def test_error_words_leave_out_stack_traces_and_node_names():
    text = (
        "Graph execution error:\n\nDetected at node grad/MaxPoolGrad defined at (most recent call last):\n"
        '  File "<string>", line 1, in <module>\n\n  File "/somewhere/x.py", line 3, in f\n\n'
        "Not yet supported.\n\t [[{{node grad/MaxPoolGrad}}]] [Op:__inference_f_12] name: "
    )
    assert error_words(ValueError(text)) == "ValueError: Not yet supported."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Reshape 252 to 240\n\ttf2xla conversion failed while converting __f_1[a=b]",
            "Reshape 252 to 240",
        ),
        (
            "'T' of int32 is not in the list ; NodeDef: {{node X}}; Op<name=X>",
            "'T' of int32 is not in the list",
        ),
        (
            "<class 'M'> could not be made.\n\nconfig={1}.\n\nException encountered: No class 'P'",
            "No class 'P'",
        ),
    ],
)
def test_error_words_keep_what_an_error_says(text, words):
    assert error_words(ValueError(text)) == f"ValueError: {words}"


def test_equal_infinities_and_nan_are_no_error():
    array = np.array([np.inf, -np.inf, np.nan, 1.0])
    assert judge.errors(array, array.copy(), (0.0, 0.0)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_value_lost_in_one_of_them_is_an_error(value):
    assert judge.errors(np.array([value]), np.array([-np.inf]), (1e-3, 1e-3))[2] == np.inf


@pytest.mark.parametrize(
    ("share", "rule"),
    [
        ([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], "first"),
        ([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 1]], "last"),
        ([[1 / 3] * 3, [0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]], "split equally"),
        ([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], "all of it to every tied value"),
        ([[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], "one of them"),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], "some other rule"),
    ],
)
def test_tie_rules_are_told_apart(share, rule):
    assert values.tie_rule(np.array(share, float)) == rule


def test_distinct_inputs_do_not_tie_and_are_exact_in_bfloat16():
    case = make_case(op=OP, shape=(2, 3, 4, 50), dtype="bfloat16")
    x = judge.distinct_input(case)
    assert (np.diff(np.sort(x.astype(np.float64), axis=-1), axis=-1) > 0).all()
    wide = judge.distinct_input(make_case(op=OP, shape=case.shape, dtype="float64"))
    assert np.array_equal(x.astype(np.float64), wide)


def test_two_processes_that_differ_in_a_mode_are_told():
    first = Finding(state="pass", figures={"digest (eager)": "a", "digest (xla)": "b"})
    second = Finding(state="pass", figures={"digest (eager)": "a", "digest (xla)": "c"})
    assert repeat.same_digests([first, first]).state == "pass"
    assert repeat.same_digests([first, second]).evidence == "two processes differ: digest (xla)"


def test_thread_scaling_is_a_ratio_in_words(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = scale(0.5, 0.2, 0.3, 0.2)
    assert found.figures["seconds, one thread"] == 0.3
    assert (found.state, found.evidence.split(" as ")[0]) == ("pass", "1.50 times")


def test_more_than_the_cores_can_give_was_not_read(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert scale(0.4, 0.1).state == "not_run"


def test_one_core_has_nothing_to_scale_over(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert scale(0.4, 0.4).state == "not_run"


def scale(*seconds):
    return threads.scaling([Finding(state="pass", figures={"seconds": s}) for s in seconds])


# Filling the matrix, with workers that only say what they are told


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
    for name, framework in (("one", "tensorflow"), ("two", "tensorflow"), ("host", "numpy")):
        names[OP, name] = Candidate(
            op=OP, name=name, form="function", framework=framework, about="", build=print, file=""
        )
    monkeypatch.setattr(REGISTRY, "candidates", names)


def run_fill(keys, answers=None, **options):
    log, workers, lock = [], [], threading.Lock()

    def open_worker(process, lane):
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


def test_every_cell_becomes_one_record(candidates):
    keys = [(OP, name, probe) for name in ("one", "two") for probe in ("nan", "negative", "tie")]
    records, log = run_fill(keys)
    assert {record.state for record in records.values()} == {"pass"}
    assert len(records) == len(log) == len(keys)


def test_a_crash_costs_its_own_cell_only(candidates):
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


def test_steps_go_to_the_processes_that_they_name_and_stop_at_the_first_that_fails(candidates):
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


def test_exports_are_not_run_unless_asked_for_and_say_so(candidates):
    keys = [(OP, "one", "onnx")]
    records, log = run_fill(keys)
    assert (records["one", "onnx"].state, records["one", "onnx"].evidence, log) == (
        "not_run", "exports are asked for by --with-exports", [],
    )  # fmt: skip
    assert run_fill(keys, exports=True)[0]["one", "onnx"].state == "pass"


def test_a_numpy_candidate_is_asked_for_its_values_only(candidates):
    records, _ = run_fill([(OP, "host", "forward-eager"), (OP, "host", "forward-xla")])
    assert records["host", "forward-eager"].state == "pass"
    assert records["host", "forward-xla"].state == "not_run"
    assert records["host", "forward-xla"].evidence


def test_no_cell_is_without_words(candidates):
    records, _ = run_fill([(OP, "one", "nan")], {("one", "nan"): Finding(state="pass")})
    assert records["one", "nan"].evidence == "as the reference has it"


def test_on_a_gpu_only_what_a_gpu_may_change_is_asked(candidates):
    keys = [(OP, "one", "forward-xla"), (OP, "one", "save-keras")]
    cells = plan_cells(keys, ["cpu:0", "gpu:0"])
    assert [(cell.probe.key, cell.device) for cell in cells] == [
        ("forward-xla", "cpu:0"), ("save-keras", "cpu:0"), ("forward-xla", "gpu:0"),
    ]  # fmt: skip


def test_probes_of_windows_are_not_asked_of_an_op_without():
    window = Trial(op=REGISTRY.ops[OP], candidate=None).has_window
    plain = SimpleNamespace(axes=("shape",))
    assert window
    assert not PROBES["overlap"].applies(plain)
    assert PROBES["nan"].applies(plain)
    assert (OP, "right", "overlap") in all_keys()


def test_a_cell_is_decided_when_its_last_step_passed_or_one_did_not():
    cell = Cell(op=OP, candidate="right", probe=PROBES["save-keras"], device="cpu:0")
    assert cell.process == "shared"
    cell.findings.append(Finding(state="pass"))
    assert cell.process == "fresh"
    cell.findings.append(Finding(state="error"))
    assert cell.process is None
