"""A user's op with inputs of different rank and axes of its own is swept, stored and reported."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import fake_candidate
from poolbench.cli import main
from poolbench.core.axes import STANDARD, AxisInfo, declare_infos, size_axis
from poolbench.core.case import Case, case_label, make_case
from poolbench.core.errors import UsageError
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY, Registry, candidate, import_file
from poolbench.store.journal import read_run
from poolbench.store.validate import _check_case
from poolbench.worker import again
from poolbench.worker.backends import BACKENDS
from poolbench.worker.check import check
from poolbench.worker.contender import open_contender
from poolbench.worker.inputs import make_inputs
from poolbench.worker.session import Session, close_case, open_case

FILE = Path(__file__).parent / "candidates" / "dense_op.py"
ROOT = FILE.parent.parent.parent


@pytest.fixture(scope="module")
def dense():
    import_file(FILE)
    return REGISTRY.ops["dense"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [
            sys.executable, "-m", "poolbench", "run", str(FILE),
            "--axis", "width=8,16", "--axis", "activation=relu", "-k", "not tf-matmul",
            "--processes", "1", "--budget", "0.2", "--results", str(folder), "--run", "dense",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # 'swapped' is wrong
    return folder


def test_user_op_inputs_have_their_own_ranks(dense):
    case = dense.make_case(width=16)
    assert [array.shape for array in make_inputs(case, 0)] == [(4, 8, 32), (512,)]
    assert dense.traffic_of(case).read_nbytes == 4 * (4 * 8 * 32 + 512)
    assert dense.traffic_of(case).written_nbytes == 4 * 4 * 8 * 16


def test_user_op_training_checks_the_gradient_of_each_input(dense):
    case = dense.make_case(width=16, direction="training", dtype="float64")
    x, scale, dy = make_inputs(case, 0)
    y, (dx, dscale) = dense.reference(case, x, scale), dense.vjp(case, dy, x, scale)
    assert check(dense, case, (x, scale, dy), (y, dx, dscale)).status == "ok"
    wrong = check(dense, case, (x, scale, dy), (y, dx, 2 * dscale))
    assert (wrong.status, wrong.reason.split(" is ")[0]) == ("wrong", "dscale")
    assert "it returned 1 gradients" in check(dense, case, (x, scale, dy), (y, dx)).reason


@pytest.mark.slow
def test_user_op_swept_by_its_axis_is_checked_timed_and_stored(results):
    run = read_run(results / "dense")
    found = {(m.case.width, m.candidate): m.status for m in run.measurements if m.kind != "probe"}
    assert found == {
        (width, name): "wrong" if name == "swapped" else "ok"
        for width in (8, 16)
        for name in ("matmul", "einsum", "swapped")
    }
    assert all(len(m.samples) for m in run.measurements if m.status == "ok")
    assert case_label(run.measurements[0].case) == "4x8x32-width8-relu-float32-forward-eager-cpu:0"
    assert [axis.name for axis in run.header.axes["dense"]][:3] == [
        "batch_shape",
        "width",
        "activation",
    ]


@pytest.mark.slow
def test_user_op_journal_is_read_where_the_op_is_unknown(results):
    code = (
        "import sys; from pathlib import Path; from poolbench.core.case import case_label\n"
        "from poolbench.store.journal import read_run\n"
        "print(case_label(read_run(Path(sys.argv[1])).measurements[0].case))"
    )
    words = [sys.executable, "-c", code, str(results / "dense")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4x8x32-width8-relu-float32-forward-eager-cpu:0"


@pytest.mark.slow
def test_user_op_run_is_reported_and_compared(results):
    shown = CliRunner().invoke(main, ["report", str(results / "dense"), "--format", "csv"])
    assert shown.exit_code == 0, shown.output
    assert "dense" in shown.output and "width" in shown.output.splitlines()[0]
    # In a process of its own, which does not know the op.
    words = [sys.executable, "-m", "poolbench", "report", str(results / "dense")]
    page = subprocess.run(words, capture_output=True, text=True, check=False)
    assert page.returncode == 0, page.stderr
    assert "dense" in (results / "dense" / "report" / "index.html").read_text()
    shutil.copytree(results / "dense", results / "again")
    done = CliRunner().invoke(main, ["compare", str(results / "dense"), str(results / "again")])
    assert done.exit_code == 0, done.output
    assert "4x8x32-width16-relu" in done.output


@pytest.mark.slow
def test_user_op_is_traced(results):
    words = ["trace", "dense", "tf-matmul", "--axis", "width=16", "--axis", "mode=graph",
             "--axis", "direction=training", "--candidates", str(FILE), "--run", "dense",
             "--results", str(results)]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    (summary,) = read_run(results / "dense").trace_summaries
    assert summary.status == "ok" and summary.parts


def tensorflow():
    pytest.importorskip("tensorflow")
    backend = BACKENDS["tensorflow"]
    backend.start(WorkerSpec())
    return backend


def test_copied_input_keeps_the_sign_of_zero():
    (copy,) = tensorflow().put([np.array([-0.0, 1.0], np.float32)], "cpu:0")
    assert np.signbit(copy.numpy()).tolist() == [True, False]


def test_gradient_of_a_gather_is_an_array():
    import tensorflow as tf

    call = tensorflow().vjp(lambda x: tf.gather(x, [0, 0, 2]), [0])
    _, dx = call(tf.zeros((4, 2)), tf.ones((3, 2)))
    assert dx.numpy().tolist() == [[2, 2], [0, 0], [1, 1], [0, 0]]


def test_copy_probe_takes_a_dtype_that_the_framework_cannot_negate(dense):
    session = Session(backend=tensorflow())
    open_case(session, dense.make_case(width=1 << 15), 0)
    session.open.host = [np.ones(1 << 20, np.uint8)]
    session.open.inputs = session.open.backend.put(session.open.host, "cpu:0")
    probe = open_contender(session, "bandwidth-copy", check=False)
    close_case(session)
    assert (probe.status, probe.read_nbytes) == ("ok", 1 << 20)


def test_input_that_the_op_fills_is_replaced_as_a_whole(dense, monkeypatch):
    """Half of an old and half of a new one may be none: lengths that no longer are one run, indices out of order."""
    session = Session(backend=BACKENDS["numpy"])
    case = dense.make_case(width=8)
    specs = dense.inputs(case)
    count = specs["scale"].shape[0]

    def rising(generator, size):
        return np.sort(generator.standard_normal(size))

    filled = specs | {"scale": dataclasses.replace(specs["scale"], fill=rising)}
    monkeypatch.setitem(REGISTRY.ops, "dense", dataclasses.replace(dense, inputs=lambda _: filled))
    open_case(session, case, 0)
    before = session.open.host[1].copy()
    again.change_values(session.open)
    after = session.open.host[1]
    close_case(session)
    assert len(after) == count and (np.diff(after) >= 0).all() and not np.array_equal(before, after)


def test_journal_of_an_unknown_op_may_hold_any_value_of_an_axis():
    infos = tuple(AxisInfo(name=name) for name in ("rate", "size", "flag"))
    declare_infos("nowhere", infos)
    for rate, size, flag in ((0.5, (1000,), True), ("3", 3, "x")):
        standard = {axis.name: axis.default for axis in STANDARD.values()}
        case = Case(op="nowhere", axes=standard | {"rate": rate, "size": size, "flag": flag})
        _check_case(case)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"file": "elsewhere.py"}, "elsewhere.py must pick another name"),
        ({"sweeps": {}}, "op 'dense' needs a sweep named 'default'; got []"),
        ({"axes": (size_axis("width"),) * 2}, "op 'dense' declares the axis 'width' twice"),
    ],
)
def test_op_that_cannot_be_registered_is_refused(dense, changed, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        REGISTRY.add_op(dataclasses.replace(dense, **changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": "a@v2"}, "has an @, behind which a backend is named"),
        ({"file": "elsewhere.py"}, "elsewhere.py must pick another name"),
    ],
)
def test_candidate_that_cannot_be_registered_is_refused(dense, changed, says):
    entry = dataclasses.replace(REGISTRY.candidates["dense", "matmul"], **changed)
    with pytest.raises(UsageError, match=says):
        REGISTRY.add_candidate(entry)


def test_second_candidate_of_one_name_in_a_file_is_refused():
    registry = Registry()
    registry.add_candidate(fake_candidate("same"))
    with pytest.raises(UsageError, match="'same' of fake is registered twice in here"):
        registry.add_candidate(fake_candidate("same"))


def test_candidate_of_an_op_that_no_file_registers_is_refused(dense):
    REGISTRY.check_ops()
    registry = Registry(ops={"dense": dense})
    registry.add_candidate(dataclasses.replace(fake_candidate("x"), op="dens"))
    with pytest.raises(
        UsageError, match=r"of the op 'dens', which is not registered; there are dense$"
    ):
        registry.check_ops()


def test_candidate_of_an_unknown_form_is_refused():
    with pytest.raises(UsageError, match="form must be one of function, layer; got 'module'"):
        candidate(op="dense", name="x", form="module")


def test_case_without_a_value_of_an_axis_that_has_no_default_is_refused(dense):
    with pytest.raises(UsageError, match="a case of dense needs a value of width"):
        make_case(op="dense")


def test_write_probe_writes_as_much_as_an_op_without_a_window(dense):
    case = dense.make_case(width=1 << 14)
    session = Session(backend=BACKENDS["numpy"])
    open_case(session, case, 0)
    probe = open_contender(session, "bandwidth-write", check=False)
    reading = open_contender(session, "bandwidth-read", check=False)
    close_case(session)
    assert probe.written_nbytes == 4 * 4 * 8 * (1 << 14)
    assert reading.read_nbytes == 4 * 32 * (1 << 14)  # of the second input, which is the larger
