"""The checks of the support matrix: each passes a correct candidate and fails an incorrect one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matrix_candidates import DENSE, OP
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine.process import Worker
from poolbench.matrix import GROUPS, PROBES
from poolbench.matrix.runner import run_step

CANDIDATES = Path(__file__).parent / "matrix_candidates.py"

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


def ask(worker, probe, candidate, folder, op=OP):
    """What a probe's steps come to, all of them in one process."""
    findings = []
    for step in range(len(PROBES[probe].steps)):
        findings.append(
            worker.call(run_step, op, candidate, probe, step, "cpu:0", str(folder), timeout=600)
        )
        if findings[-1].state != "pass":
            return findings[-1]
    return PROBES[probe].judge(findings)


@pytest.mark.parametrize("row", CAUGHT, ids=lambda row: "-".join(row[:2]))
def test_probe_incorrect_candidate_is_caught(worker, tmp_path, row):
    probe, candidate, state, words = row
    skip_without_exports(probe)
    found = ask(worker, probe, candidate, tmp_path)
    assert (found.state, words in found.evidence) == (state, True), found


@pytest.mark.parametrize("probe", PROBES)
def test_probe_correct_candidate_passes(worker, tmp_path, probe):
    skip_without_exports(probe)
    found = ask(worker, probe, "right", tmp_path)
    if probe == MAY_NOT_BE_READ and found.state == "not_run":
        pytest.skip(found.evidence)
    assert found.state == NOT_PASSED.get(probe, "pass"), found


@pytest.mark.parametrize("probe", PROBES)
def test_probe_op_of_two_inputs_passes_where_it_applies(worker, tmp_path, probe):
    if not PROBES[probe].applies(REGISTRY.ops[DENSE]):
        pytest.skip("needs what this op lacks")
    skip_without_exports(probe)
    found = ask(worker, probe, "matvec", tmp_path, op=DENSE)
    if probe == MAY_NOT_BE_READ and found.state == "not_run":
        pytest.skip(found.evidence)
    assert found.state == "pass", found


def skip_without_exports(probe):
    from importlib.util import find_spec

    if PROBES[probe].group == "backends":
        pytest.skip("runs in another framework's worker: tests/test_backends.py")
    needed = {"onnx": ("tf2onnx", "onnxruntime")}.get(probe, ())
    if not all(find_spec(module) for module in needed):
        pytest.skip("the extra 'export' is not installed")


def test_save_keras_layer_without_config_is_wrong(worker, tmp_path):
    found = ask(worker, "save-keras", "forgetful", tmp_path)
    assert (found.state, "shape" in found.evidence) == ("wrong", True), found


def test_probes_each_have_a_candidate_that_fails():
    elsewhere = {"overlap", "save-keras", "save-export", "threads"}
    elsewhere |= {key for key, probe in PROBES.items() if probe.group == "backends"}
    assert {row[0] for row in CAUGHT} | elsewhere == set(PROBES)


def test_matrix_import_loads_no_tensorflow():
    code = "import poolbench.matrix.runner, sys; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probes_have_unique_titles_and_a_question_and_stand_by_group():
    titles = [probe.title for probe in PROBES.values()]
    assert len(set(titles)) == len(titles)
    assert [probe.key for probe in PROBES.values() if "?" not in probe.question] == []
    assert [g for g in GROUPS if any(p.group == g for p in PROBES.values())] == list(
        dict.fromkeys(probe.group for probe in PROBES.values())
    )
