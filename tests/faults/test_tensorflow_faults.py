"""One fault of each kind inside TensorFlow, in one race; the other candidates keep their results."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs
from poolbench.store.journal import read_run

pytestmark = pytest.mark.slow
EXPECTED = {
    "base": ("ok", "^$"),
    "transposed": ("ok", "^$"),
    "abort": ("crashed", "SIGABRT"),
    "segv": ("crashed", "SIGSEGV"),
    "kill": ("crashed", "SIGKILL"),
    "leave": ("crashed", "exited with code 7"),
    "hang": ("timeout", "no answer within"),
    "loop": ("timeout", "no answer within"),
    "grow": ("out_of_memory", "^host memory: killed at"),
    "allocator": ("out_of_memory", "^host memory: ResourceExhaustedError"),
    "invalid": ("error", "evenly divide|InvalidArgument|Unimplemented|ValueError"),
    "nan": ("wrong", "finite"),
    "shape": ("wrong", "shape"),
    "state": ("error", "functions_run_eagerly.*floatx"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    words = ("--run", "tf", "--task-timeout", "15", "--memory", "3GiB", "--sweep", "quick")
    words += ("--processes", "1", "--precision", "90%", "--budget", "0.4")
    status, output = runs.run(results, *words, suite=runs.CANDIDATES / "tensorflow_faults.py")
    assert status == 1, output
    return [m for m in read_run(results / "tf").measurements if m.kind == "candidate"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_in_tensorflow_is_one_typed_result(found, name):
    (measurement,) = [m for m in found if m.candidate == name]
    status, reason = EXPECTED[name]
    assert (measurement.status, bool(re.search(reason, measurement.reason))) == (status, True), (
        measurement.status,
        measurement.reason,
    )


def test_the_sound_candidates_have_samples(found):
    timed = {m.candidate for m in found if m.status == "ok" and len(m.samples)}
    assert timed == {"base", "transposed"}
