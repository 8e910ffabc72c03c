"""TensorFlow, JAX and PyTorch: names of contenders, settings, programs, and every candidate in a real worker."""

import importlib.util
import os
from pathlib import Path

import msgspec
import pytest
import synthetic
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.candidate import BACKENDS, KERAS, contender_name, split_contender
from poolbench.core.errors import UsageError
from poolbench.core.plan import IDENTITY, Contender, Plan, RaceSpec, WorkerSpec
from poolbench.core.program import Program
from poolbench.core.records import TimeBreakdown
from poolbench.core.registry import (
    baseline_of,
    candidate,
    contender_names,
    load_builtin,
    parse_axis,
)
from poolbench.engine.contenders import contenders_of
from poolbench.engine.pool import WorkerPool
from poolbench.engine.process import Worker
from poolbench.engine.race import Race
from poolbench.engine.recorder import ContenderRecord, flag_implausible
from poolbench.engine.recovery import Tasks
from poolbench.matrix import PROBES
from poolbench.matrix.runner import PendingCell, reason_to_skip, run_step
from poolbench.report.backends import cost_tables, races_of
from poolbench.report.figures.choice import plot_heatmap
from poolbench.report.frame import lay_out, load
from poolbench.report.page import programs_sentence
from poolbench.report.programs import compare_programs, same_program, unlike
from poolbench.report.recommend import answer
from poolbench.report.tables import measurement_table, sentences
from poolbench.store.journal import JOURNAL, encode_line, read_run
from poolbench.worker import contender, session

ROOT = Path(__file__).parent.parent
REGISTRY = load_builtin()
SMALL = {
    "depth_max_pool": (2, 4, 5, 48),
    "global_avg_pool": (2, 4, 5, 48),
    "masked_global_pool": (4, 9, 8),
    "adaptive_pool": (2, 14, 16, 8),
}


def case_of(op, **values):
    return REGISTRY.ops[op].make_case(shape=SMALL[op], **values)


# Names


def test_parse_axis_backend_is_read_and_jit_is_xla():
    assert parse_axis("backend=tensorflow,JAX") == ("backend", ("tensorflow", "jax"))
    assert parse_axis("mode=jit,compile") == ("mode", ("xla", "compile"))
    with pytest.raises(UsageError, match="one of 'tensorflow', 'jax', 'torch'; got 'mxnet'"):
        parse_axis("backend=mxnet")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("eager", ["keras-ops", "keras-ops@torch"]),
        ("graph", ["keras-ops"]),
        ("xla", ["keras-ops", "keras-ops@jax"]),
        ("compile", ["keras-ops@torch"]),
    ],
)
def test_contender_names_leave_out_what_a_backend_lacks(mode, expected):
    assert contender_names(case_of("depth_max_pool", mode=mode), "keras-ops", KERAS) == expected


def test_contender_names_native_candidate_runs_on_its_backend_only():
    case = case_of("depth_max_pool", mode="eager")
    assert contender_names(case, "torch-amax", KERAS) == ["torch-amax@torch"]
    assert contender_names(case, "torch-amax", ["tensorflow"]) == []
    assert contender_names(case, "max_pool", KERAS) == ["max_pool"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_contender_reads_what_contender_name_writes(backend):
    name, label = split_contender(contender_name("keras-ops", backend))
    assert (name, label) == ("keras-ops", backend if backend in ("jax", "torch") else "")


def test_baseline_of_a_backend_alone_is_its_own_function():
    case = case_of("global_avg_pool", mode="eager")
    both = ["keras-ops", "keras-ops@torch", "torch-mean@torch"]
    assert baseline_of(case, both) == REGISTRY.ops["global_avg_pool"].baseline
    assert baseline_of(case, both[1:]) == "torch-mean@torch"
    assert baseline_of(case, both[1:2]) == "keras-ops@torch"


def test_contenders_of_several_backends_have_a_worker_each_with_onednn_alike():
    case = case_of("global_avg_pool", mode="xla", threads=1)
    found = contenders_of(case, ["keras-ops", "reduce_mean", "keras-ops@jax"])
    kinds = [one.worker for one in found]
    assert [kind.backend for kind in kinds] == ["tensorflow", "tensorflow", "jax"]
    assert kinds[0] == kinds[1] and {kind.threads for kind in kinds} == {1}
    assert {kind.environment for kind in kinds} == {(("TF_ENABLE_ONEDNN_OPTS", "1"),)}
    (alone,) = contenders_of(case, ["keras-ops"])
    assert alone.worker == WorkerSpec(threads=1), "without another backend nothing is set"


def test_candidate_unknown_backend_is_refused():
    with pytest.raises(UsageError, match="backends must be of tensorflow, jax, torch, numpy"):
        candidate(op="depth_max_pool", name="x", backends=("mxnet",))
    with pytest.raises(UsageError, match=r"backends must be of .*; got \(\)"):
        candidate(op="depth_max_pool", name="x", backends=())


# Settings and programs of a run

ONE = Program(hash="0" * 16, key="tensorflow 2.21.0, threads=2", kernels=2, bytes_accessed=1 << 20)
OTHER = msgspec.structs.replace(ONE, hash="1" * 16, kernels=3, bytes_accessed=3 << 20)
CASE = synthetic.op_case("depth_max_pool", mode="xla")
VICTIM = "transpose-reduce_max"


def run_of(folder, programs, settings=None):
    """A stored run in which the candidates have these programs and settings, the others ONE's."""
    settings = settings or {}
    plan = synthetic.Plan(processes=6, allocations=2, rounds=2)
    found = [
        msgspec.structs.replace(
            m,
            program=programs.get(m.candidate, ONE) if m.kind == "candidate" else None,
            settings={"threads": "2", **settings.get(m.candidate, {})},
        )
        for m in synthetic.records(1, cases=[CASE], plan=plan, with_extras=False)
    ]
    return store(folder, found)


def store(folder, measurements):
    """A stored run of these measurements."""
    folder.mkdir()
    end = TimeBreakdown(seconds={"samples": 1.0}, wall_seconds=1.0)
    lines = map(encode_line, [synthetic.header(folder.name), *measurements, end])
    (folder / JOURNAL).write_bytes(b"".join(lines))
    return read_run(folder)


def test_compare_programs_changed_candidate_is_the_only_one_named(tmp_path):
    before, after = run_of(tmp_path / "a", {}), run_of(tmp_path / "b", {VICTIM: OTHER})
    assert compare_programs(before, before).changed == ()
    found = compare_programs(before, after)
    (line,) = found.changed
    assert line.startswith(f"depth_max_pool {VICTIM} (")
    assert line.endswith("kernels 2 -> 3, bytes_accessed 1.00 MiB -> 3.00 MiB")
    assert found.summary == f"Programs: {found.common - 1} of {found.common} are equal."


@pytest.mark.parametrize(("key", "code"), [(ONE.key, 1), ("tensorflow 2.22.0, threads=2", 0)])
def test_compare_programs_only_fails_on_a_change_of_one_compiler(tmp_path, key, code):
    changed = msgspec.structs.replace(OTHER, key=key)
    run_of(tmp_path / "a", {}), run_of(tmp_path / "b", {VICTIM: changed})
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    done = CliRunner().invoke(main, [*words, "--programs-only"])
    assert done.exit_code == code
    assert VICTIM in done.stdout and "are equal" in done.stdout
    assert ("'measure again', not 'worse'" in done.stdout) == (code == 0)
    assert VICTIM in CliRunner().invoke(main, words).stdout, "beside the times too"
    # A change of one compiler's counts, whatever else was upgraded.
    other = msgspec.structs.replace(ONE, key="jax 0.10.2, threads=2")
    run_of(tmp_path / "c", {VICTIM: changed, "slices-maximum": other})
    mixed = ["compare", str(tmp_path / "a"), str(tmp_path / "c"), "--programs-only"]
    assert CliRunner().invoke(main, mixed).exit_code == code
    refused = CliRunner().invoke(main, [*words, "--programs-only", "--format", "json"])
    assert refused.exit_code == 2 and "--format is for a comparison of times" in refused.output


def test_compare_programs_only_without_a_common_program_is_refused(tmp_path):
    run_of(tmp_path / "a", {})
    found = [
        msgspec.structs.replace(m, program=None)
        for m in synthetic.records(1, cases=[CASE], with_extras=False)
    ]
    store(tmp_path / "b", found)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--programs-only"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "nothing can be compared" in done.output


def test_lay_out_unlike_settings_get_no_verdict(tmp_path):
    run = run_of(tmp_path / "a", {}, {VICTIM: {"threads": "1"}})
    loaded = lay_out(run)
    table = loaded.table.set_index("candidate")
    assert table.loc[VICTIM, "unlike"] == "unlike: threads 1 | 2"
    assert table.loc[VICTIM, "verdict"] == ""
    assert {*table["verdict"].drop(VICTIM)} - {""}
    shown = measurement_table(loaded.table).set_index("candidate")
    assert shown.loc[VICTIM, "verdict"] == "unlike: threads 1 | 2"


def test_unlike_setting_that_one_backend_lacks_is_not_compared(tmp_path):
    one, other, *_ = run_of(tmp_path / "a", {VICTIM: OTHER}).measurements
    other = msgspec.structs.replace(other, settings={"threads": "2", "oneDNN": "on"})
    assert unlike(one, other) == ""


def test_same_program_needs_equal_hash_and_key(tmp_path):
    found = {m.candidate: m for m in run_of(tmp_path / "a", {VICTIM: OTHER}).measurements}
    one, two = found["reshape-reduce_max"], found["slices-maximum"]
    elsewhere = msgspec.structs.replace(ONE, key="jax 0.10.2, threads=2")
    assert same_program(one, two)
    assert not same_program(one, found[VICTIM])
    assert not same_program(one, msgspec.structs.replace(two, program=elsewhere))


def test_page_one_program_pairs_are_a_comparison_with_itself(tmp_path):
    run = run_of(tmp_path / "a", {VICTIM: OTHER, "slices-maximum": OTHER})
    loaded = lay_out(run)
    table = loaded.table.set_index("candidate")
    ranked = table.index[table["right"] & ~table["stopped_early"]]
    count = len(ranked.difference([VICTIM, "slices-maximum"]))
    assert {VICTIM, "slices-maximum"} < {*ranked}
    text = programs_sentence(loaded)
    assert text.startswith(f"{count * (count - 1) // 2 + 1} pairs of candidates are one program")
    assert "called different" in text
    for choice in answer(loaded).choices:
        words = " ".join(sentences(loaded, choice))
        assert ("the same program as" in words) == (len(choice.best) > 1)


def test_plot_heatmap_with_xla_one_program_has_one_row(tmp_path):
    records = synthetic.records(1, with_extras=False, cases=[
        synthetic.op_case("depth_max_pool", mode="xla", shape=(size, 8, 8, 96)) for size in (1, 2)
    ])  # fmt: skip
    found = [
        msgspec.structs.replace(m, program=OTHER if m.candidate == VICTIM else ONE)
        for m in records
        if m.kind == "candidate"
    ]
    loaded = lay_out(store(tmp_path / "a", found))
    assert plot_heatmap(xla=False)(loaded, "depth_max_pool", "cpu:0") is None
    plot = plot_heatmap(xla=True)(loaded, "depth_max_pool", "cpu:0")
    rows = [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]
    right = {*loaded.table.loc[loaded.table["right"], "candidate"]}
    assert VICTIM in rows and len(right.intersection(rows)) == 2
    assert "One program, shown once: " in plot.caption


def test_cost_tables_committed_run_has_a_row_per_case_and_backend():
    loaded = load(ROOT / "results" / "reference-backends")
    tables = cost_tables(races_of(loaded.run.measurements))
    assert {*tables} == {"depth_max_pool", "global_avg_pool", "masked_global_pool", "adaptive_pool"}
    for op, table in tables.items():
        assert len(table) == 20, "two shapes and directions, five backends with a mode"
        assert table["own function"].str.contains(r", [\d.]+ [mµ]s$").all()
        by_keras = ["keras-ops", "keras-stock"] if "keras-ops" in table else [f"layer-{op}"]
        assert (table[by_keras] != "").all(axis=None)
    assert cost_tables(races_of(load(ROOT / "results" / "reference").run.measurements)) == {}


def test_flag_implausible_small_input_another_framework_may_call_faster():
    case = case_of("depth_max_pool", mode="xla")
    records = {}
    for name, backend, seconds in (
        (IDENTITY, "tensorflow", 4e-4), ("keras-ops", "tensorflow", 1e-4), ("keras-ops@jax", "jax", 1e-4),
    ):  # fmt: skip
        entry = None if name == IDENTITY else REGISTRY.candidates["depth_max_pool", "keras-ops"]
        records[name] = ContenderRecord(name, entry, WorkerSpec(backend=backend))
        records[name].columns = [(0, 0, n, 1, seconds, 0) for n in range(3)]
    flag_implausible(records, case, 0.5)
    assert records["keras-ops"].status == "implausible"
    assert records["keras-ops@jax"].status == "ok"


def test_flag_implausible_probe_slowed_by_other_processes_is_no_evidence():
    case = case_of("depth_max_pool", mode="xla")
    records = {
        IDENTITY: ContenderRecord(IDENTITY, None, WorkerSpec()),
        "a": ContenderRecord("a", REGISTRY.candidates["depth_max_pool", "keras-ops"], WorkerSpec()),
    }
    # Most calls of the probe waited for a processor; a few did not.
    times = {IDENTITY: [9e-5] * 3 + [1e-3] * 17, "a": [1e-4] * 20}
    for name, seconds in times.items():
        records[name].columns = [(0, 0, n, 1, s, 0) for n, s in enumerate(seconds)]
    flag_implausible(records, case, 0.5)
    assert records["a"].status == "ok"


# Real workers


def test_worker_without_another_backend_imports_neither_jax_nor_torch(tmp_path, monkeypatch):
    for name in ("jax", "torch"):
        code = f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)\nraise ImportError\n"
        (tmp_path / f"{name}.py").write_text(code)
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    worker = Worker(WorkerSpec(threads=1))
    try:
        for mode in ("eager", "xla"):
            worker.call(session.open_case, case_of("global_avg_pool", mode=mode), 0, timeout=600)
            for name in ("keras-ops", "layer-global_avg_pool", "keras-stock"):
                opened = worker.call(contender.open_contender, name, True, timeout=600)
                assert opened.status == "ok", opened.reason
                worker.call(contender.read_program, name, timeout=600)
    finally:
        worker.close()
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_race_worker_with_another_setting_has_no_verdict(tmp_path):
    pytest.importorskip("torch")
    usual = WorkerSpec(backend="torch", threads=1)
    other = msgspec.structs.replace(usual, environment=(("TF_ENABLE_ONEDNN_OPTS", "0"),))
    contenders = tuple(
        Contender(candidate="torch-mean", worker=worker, label=label)
        for label, worker in (("torch", usual), ("other", other))
    )
    spec = RaceSpec(
        case=case_of("global_avg_pool", mode="eager"), contenders=contenders, baseline=contenders[0].name,
        plan=Plan(processes=2, budget_seconds=0.3),
    )  # fmt: skip
    race = Race(
        spec, [REGISTRY.candidates["global_avg_pool", "torch-mean"]], tasks=Tasks(probes=())
    )
    pool = WorkerPool()
    try:
        run = store(tmp_path / "a", race.run(pool).measurements)
    finally:
        pool.close()
    table = lay_out(run).table.set_index("candidate")
    assert table["right"].all()
    assert table.loc["torch-mean@other", ["unlike", "verdict"]].tolist() == [
        "unlike: oneDNN off | on",
        "",
    ]


# On JAX and PyTorch keras.ops.mean computes float64 in float32.
DEMOTED = {("global_avg_pool", name, "float64") for name in ("keras-ops", "layer-global_avg_pool")}


@pytest.fixture(scope="module", params=["jax", "torch"])
def worker(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    made = Worker(WorkerSpec(backend=request.param, threads=1))
    yield made
    made.close()


@pytest.mark.parametrize("op", SMALL)
def test_every_candidate_of_a_backend_agrees_with_the_reference(worker, op):
    backend = worker.spec.backend
    mode = {"jax": "xla", "torch": "eager"}[backend]
    names = [name for name, entry in REGISTRY.of(op).items() if entry.runs(backend, mode)]
    assert f"layer-{op}" in names
    assert len(names) >= (4 if op in ("depth_max_pool", "global_avg_pool") else 2)
    changes = [{}, {"direction": "training"}, {"dtype": "float64"}, {"dtype": "bfloat16"}]
    changes += [{"padding": "same", "pool_size": 5}] if op == "depth_max_pool" else []
    axes = REGISTRY.ops[op].axis_names
    changes += [{"reduction": "max", "direction": "training"}] if "reduction" in axes else []
    for change in changes:
        if change.get("dtype") == "bfloat16":  # a sum in 16 bits is another question
            some = [name for name in names if op == "depth_max_pool" or name == "keras-ops"]
        else:
            some = names
        case = case_of(op, mode=mode, **change)
        worker.call(session.open_case, case, 0, timeout=600)
        known = REGISTRY.of(op)
        for name in (n for n in some if not any(f.when(case) for f in known[n].failures)):
            opened = worker.call(contender.open_contender, name, True, timeout=600)
            if (op, name, change.get("dtype")) in DEMOTED:
                assert opened.status == "wrong" and "relative 1" in opened.reason
                continue
            assert opened.status == "ok", (name, change, opened.reason)
            assert opened.settings["threads"] == "1"
            assert opened.settings["determinism"] == "off"


@pytest.mark.parametrize("key", ["forward", "gradient"])
def test_matrix_check_of_a_backend_passes_or_says_what_is_wrong(worker, key, tmp_path):
    probe = f"{key}-{worker.spec.backend}"
    found = worker.call(
        run_step, "depth_max_pool", "layer-depth_max_pool", probe, 0, "cpu:0", str(tmp_path), timeout=600,
    )  # fmt: skip
    assert (found.state, "exact" in found.evidence) == ("pass", True), found


def test_matrix_check_of_a_backend_that_a_candidate_lacks_is_not_run():
    cells = [
        PendingCell(
            op="depth_max_pool", candidate=name, probe=PROBES["forward-jax"], device="cpu:0"
        )
        for name in ("max_pool", "layer-depth_max_pool")
    ]
    assert reason_to_skip(cells[0], exports=False) == "it calls TensorFlow"
    assert "TensorFlow" not in reason_to_skip(cells[1], exports=False)


def test_read_program_of_a_backend_groups_equal_candidates(worker):
    backend = worker.spec.backend
    mode = {"jax": "xla", "torch": "eager"}[backend]
    worker.call(session.open_case, case_of("global_avg_pool", mode=mode), 0, timeout=600)
    native = {"jax": "jnp-mean", "torch": "torch-mean"}[backend]
    found = {}
    for name in ("layer-global_avg_pool", "keras-ops", native, "keras-stock"):
        worker.call(contender.open_contender, name, False, timeout=600)
        found[name] = worker.call(contender.read_program, name, timeout=600)
    assert found[native].key.startswith(backend)
    assert found[native] == found["keras-ops"] == found["layer-global_avg_pool"]
    assert found["keras-stock"].hash != found[native].hash


def test_sweep_asked_for_backends_keeps_its_cases():
    sweep = REGISTRY.ops["depth_max_pool"].sweep("quick")
    cases = sweep.replace("backend", ("jax", "torch")).cases()
    assert cases == sweep.cases()
    assert not any("backend" in case.axes for case in cases)
