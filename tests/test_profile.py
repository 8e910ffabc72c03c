"""Traces: reading, recording, and the result that TensorBoard serves."""

import gzip
import json
import os
import re
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import traced
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.case import make_case
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import TraceSummary
from poolbench.core.registry import REGISTRY, Registry
from poolbench.engine import tracing
from poolbench.engine.process import Worker
from poolbench.engine.tracing import Recorder, Selection, select, trace_name
from poolbench.report import tensorboard
from poolbench.store.journal import decode_line, encode_line
from poolbench.worker import trace, xspace
from poolbench.worker.xspace import Event

HOST = "/host:CPU/python/1"
POOL = "/host:CPU/tf_numa_-1_Eigen/7/2"
GPU = "/device:GPU:0/Stream #13/13"
MS = 10**9  # picoseconds


def event(kind, name, start, end, line=HOST, returned=None, **stats):
    return Event(
        kind=kind, name=name, line=line, start=start * MS, end=end * MS,
        returned=(end if returned is None else returned) * MS, stats=stats,
    )  # fmt: skip


def summarise(*events, device="cpu:0"):
    return xspace.summarise(sorted(events, key=lambda e: (e.start, -e.end)), device=device)


STEPS = [event("step", "x", 0, 10), event("step", "x", 20, 30)]


# Reading


def test_union_puts_overlapping_intervals_together():
    assert xspace.union([(5, 7), (0, 3), (2, 4)]) == [(0, 4), (5, 7)]


def test_clip_keeps_parts_within_the_windows():
    assert xspace.clip([(0, 10), (12, 20)], [(5, 15)]) == [(5, 10), (12, 15)]


def test_a_nested_operation_is_taken_off_the_one_around_it():
    reading = summarise(*STEPS, event("tf_op", "Call:Call", 1, 9), event("tf_op", "Max:Max", 2, 6))
    seconds = {part.name: part.seconds for part in reading.parts}
    assert seconds == pytest.approx({"Call:Call": 2e-3, "Max:Max": 2e-3})


def test_kinds_nest_and_are_never_added_across():
    reading = summarise(*STEPS, event("eager", "f", 0, 10), event("tf_op", "Max:Max", 1, 9))
    assert {p.kind: p.seconds for p in reading.parts} == pytest.approx(
        {"eager": 5e-3, "tf_op": 4e-3}
    )
    assert reading.covered == pytest.approx({"eager": 0.5, "tf_op": 0.4})


def test_events_outside_the_marked_steps_are_left_out():
    reading = summarise(*STEPS, event("tf_op", "Max:Max", 12, 18))
    assert (reading.parts, reading.steps) == ((), 2)
    assert reading.step_seconds == pytest.approx(10e-3)


def test_a_trace_without_a_marked_step_is_refused():
    with pytest.raises(ValueError, match="no marked step"):
        summarise(event("tf_op", "Max:Max", 0, 1))


def memory(name, moment, nbytes, addr, allocator="mklcpu"):
    return event("", f"Memory{name}", moment, moment, requested_bytes=nbytes, addr=addr,
                 allocator_name=allocator)  # fmt: skip


def test_the_peak_is_the_largest_running_sum():
    reading = summarise(
        *STEPS,
        memory("Allocation", 1, 100, 1), memory("Allocation", 2, 50, 2),
        memory("Deallocation", 3, 100, 1), memory("Allocation", 4, 70, 1),
        memory("Deallocation", 5, 70, 1), memory("Deallocation", 6, 50, 2),
    )  # fmt: skip
    assert reading.memory == xspace.Memory(peak_nbytes=150, allocated_nbytes=110, freed_nbytes=110)


def test_memory_held_before_the_session_is_not_counted():
    reading = summarise(*STEPS, memory("Deallocation", 1, 1000, 9), memory("Allocation", 2, 50, 2))
    assert reading.memory.peak_nbytes == 50
    assert reading.memory.freed_nbytes == 0


def test_each_devices_memory_is_its_own():
    events = [
        *STEPS, memory("Allocation", 1, 10, 1), memory("Allocation", 2, 99, 2, "GPU_0_bfc"),
        memory("Allocation", 3, 7, 3, "gpu_host_bfc"),  # of the host, for transfers
    ]  # fmt: skip
    assert summarise(*events).memory.peak_nbytes == 10
    assert summarise(*events, device="gpu:0").memory.peak_nbytes == 99


def test_the_pools_regions_and_the_callers_share_are_threads_at_work():
    region = [
        event("", "ThreadpoolListener::StartRegion", 0, 0, POOL),
        event("", "ThreadpoolListener::StopRegion", 10, 10, POOL),
    ]
    step = STEPS[0]
    assert summarise(step, *region, event("hlo", "fusion", 0, 10, returned=5)).threads_busy == 1.5
    # An operation that waits for the pool is no thread more.
    assert summarise(step, *region, event("tf_op", "Max:Max", 0, 10)).threads_busy == 1.0
    assert summarise(step, event("tf_op", "Max:Max", 0, 8)).threads_busy == 0.8


def test_a_gpus_kernels_are_the_third_clock_with_their_gaps():
    reading = summarise(
        STEPS[0],
        event("kernel", "a", 1, 3, GPU), event("kernel", "b", 5, 9, GPU),
        event("kernel", "c", 6, 7, "/device:GPU:0/Stream #14/14"),
    )  # fmt: skip
    assert reading.device_seconds == pytest.approx(6e-3)
    assert reading.gap_seconds == pytest.approx(2e-3)
    assert reading.launches == 3


@pytest.mark.parametrize(
    ("name", "display", "stats", "kind"),
    [
        ("x", "", {"_r": 1, "step_num": 3}, "step"),
        ("FunctionRun", "", {"_r": 1}, ""),
        ("EagerLocalExecute: MaxPool", "", {}, "eager"),
        ("pool/MaxPool2d:MaxPool", "MaxPool", {}, "tf_op"),
        ("wrapped_reduce-window", "", {"hlo_op": "wrapped_reduce-window"}, "hlo"),
        ("end: wrapped_reduce-window", "", {"hlo_op": "wrapped_reduce-window"}, ""),
        ("ThreadpoolListener::Record", "", {}, ""),
    ],
)
def test_kinds_of_events(name, display, stats, kind):
    assert xspace.kind_of("/host:CPU", name, display, stats) == kind


# Names and selection


def test_unsafe_characters_never_reach_a_path():
    case = make_case(op="pool")
    names = ["../../etc/passwd", "a[b]*?", "a b", "a/b", "ü", "", "\ud800", "a" * 500, ".hidden"]
    slugs = [trace_name(case, name) for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", slug) for slug in slugs)
    assert len(set(slugs)) == len(names)
    for slug in slugs:
        record = TraceSummary(case=case, candidate="a", trace=slug)
        assert decode_line(encode_line(record))[0] == record


def test_a_recording_names_no_folder_of_this_machine():
    root = Path(tracing.__file__).parents[1]
    before = f"{sys.prefix}/lib/a.py {root}/bench/b.py /usr/lib/c.py".encode()
    after = trace._without_folders(before)
    assert len(after) == len(before)
    assert str(root).encode() not in after
    assert sys.prefix.encode() not in after
    assert after.endswith(b"/bench/b.py /usr/lib/c.py")


def test_trace_name_says_op_candidate_and_case():
    case = make_case(op="pool", shape=(1, 2, 3, 4))
    assert trace_name(case, "mean") == "pool-mean-float32-forward-graph-cpu.0-1x2x3x4"


@pytest.fixture(scope="module")
def ops():
    import poolbench.ops  # noqa: F401

    # Another test's own ops are in the registry too, where tests share a process.
    return Registry(
        ops={name: REGISTRY.ops[name] for name in ("depth_max_pool", "global_avg_pool")},
        candidates={key: entry for key, entry in REGISTRY.candidates.items() if entry.builtin},
    )


def test_select_without_words_takes_a_case_per_op_and_mode_with_its_first_candidates(ops):
    chosen = select(Selection(), ops.ops, ops.candidates.values())
    assert len(chosen) == 3 * len(ops.ops)
    assert max(map(len, chosen.values())) <= tracing.DEFAULT_CANDIDATES
    for case, names in chosen.items():
        op = ops.ops[case.op]
        assert op.baseline in names
        assert case in op.sweep("default").cases()


def test_select_by_words_takes_ops_modes_and_candidates(ops):
    words = ("depth_max_pool", "graph", "reshape-reduce_max", "max_pool3d")
    chosen = select(Selection(words=words), ops.ops, ops.candidates.values())
    [(case, names)] = chosen.items()
    assert (case.op, case.mode, names) == (
        "depth_max_pool", "graph", ("reshape-reduce_max", "max_pool3d"),
    )  # fmt: skip


def test_select_by_an_unknown_word_is_refused(ops):
    with pytest.raises(UsageError, match="names no op, mode or candidate"):
        select(Selection(words=("nothing-such",)), ops.ops, ops.candidates.values())


def test_select_by_axes_replaces_values_of_the_cases(ops):
    selection = Selection(words=("graph",), axes=(("pool_size", (2, 4)),))
    cases = select(selection, ops.ops, ops.candidates.values())
    assert [case.get("pool_size") for case in cases] == [2, 4, None]


@pytest.mark.fault(
    "`trace` after a run of another op", "the newest run that holds the op gets the traces"
)
def test_run_folder_of_traces_holds_their_op(runs_of_ops):
    for name, op in (("means", "global_avg_pool"), ("pools", "depth_max_pool")):
        assert tracing.run_folder(runs_of_ops, "", {op}).name == name
    assert tracing.run_folder(runs_of_ops, "", {"other"}).name == "only-traces"


@pytest.fixture
def runs_of_ops(tmp_path, monkeypatch):
    """Runs of one op each, the newest of traces alone."""
    ops = {"means": "global_avg_pool", "pools": "depth_max_pool", "only-traces": None}
    for age, name in enumerate(reversed(ops)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "journal.jsonl"
        path.write_text("{}\n")
        os.utime(path, (1e9 - age, 1e9 - age))

    def read_run(folder):
        op = ops[folder.name]
        return SimpleNamespace(measurements=[SimpleNamespace(case=make_case(op=op))] if op else [])

    monkeypatch.setattr(tracing, "differs_from", lambda folder: [])
    monkeypatch.setattr(tracing, "read_run", read_run)
    return tmp_path


@pytest.mark.parametrize(("run", "op"), [("", "depth_max_pool"), ("means", "global_avg_pool")])
def test_trace_without_words_records_the_ops_of_the_run(runs_of_ops, monkeypatch, run, op):
    seen = []

    def select_alone(selection, ops, candidates):
        seen.extend(ops)
        raise UsageError("enough")

    monkeypatch.setattr(tracing, "select", select_alone)
    with pytest.raises(UsageError, match="enough"):
        tracing.record_selection([], run=run, results=runs_of_ops)
    assert seen == [op]


def test_trace_command_takes_its_folder_of_results_as_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr(tracing, "record_selection", lambda *_, **given: seen.update(given) or 0)
    assert CliRunner().invoke(main, ["trace"]).exit_code == 0
    assert seen["results"] == tmp_path / "results"


# The command tensorboard


@pytest.mark.parametrize(("words", "says"), [((), "poolbench trace"), (("../up",), "a run's name")])
def test_tensorboard_command_without_traces_is_one_line_and_exit_2(tmp_path, words, says):
    done = CliRunner().invoke(main, ["tensorboard", *words, "--results", str(tmp_path)])
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_deep_link_opens_the_trace_viewer_on_the_run():
    link = tensorboard.deep_link("http://127.0.0.1:1/", "a b", ["h"])
    assert link == "http://127.0.0.1:1/?run=a%20b&tag=trace_viewer%40&host=h#profile"
    link = tensorboard.deep_link("http://127.0.0.1:1/", "a", ["h", "i"])
    assert link == "http://127.0.0.1:1/?run=a&tag=trace_viewer%40&hosts=h%2Ci#profile"


def test_the_newest_run_with_traces_is_opened(tmp_path):
    for age, name in enumerate(("new", "old")):
        folder = tmp_path / name / "traces" / tensorboard.PROFILES / "t"
        folder.mkdir(parents=True)
        (folder / "t.xplane.pb").touch()
        os.utime(folder.parent, (1e9 - age, 1e9 - age))
    (tmp_path / "empty").mkdir()
    assert tensorboard.find_logdir(tmp_path) == tmp_path / "new" / "traces"
    assert tensorboard.find_logdir(tmp_path, "old") == tmp_path / "old" / "traces"


# Recorded


@pytest.fixture(scope="module")
def worker():
    worker = Worker(WorkerSpec(environment=tracing.MEMORY_EVENTS))
    try:
        worker.wait_started()
    except WorkerFailure as failure:
        pytest.skip(f"TensorFlow does not start here: {failure.reason}")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


def call(worker, function, *args):
    return worker.call(function, *args, timeout=600)


@pytest.fixture(scope="module")
def large(worker, logdir):
    return call(
        worker, traced.trace, traced.LARGE, "reshape-reduce_max", logdir / tensorboard.PROFILES
    )


def test_the_named_parts_cover_a_large_cases_step(large):
    assert (large.status, large.steps) == ("ok", trace.STEPS)
    assert large.covered["tf_op"] >= 0.9
    assert 0 < sum(p["seconds"] for p in large.parts if p["kind"] == "tf_op") <= large.step_seconds
    assert decode_line(encode_line(large))[0] == large


def test_a_recording_of_an_h100_has_the_device_s_own_time(worker):
    """One fused loop of XLA's and one kernel of cuDNN's in each of twenty steps, 2 us each."""
    recording = Path(__file__).parent / "data" / "h100.xplane.pb"
    times, reading = call(worker, traced.read_device_clock, recording)
    (seconds,) = times.values()
    assert len(seconds) == 20
    assert all(4e-6 < value < 5e-6 for value in seconds)
    assert reading.launches == 2
    assert reading.device_seconds == pytest.approx(sum(seconds) / 20)
    assert reading.memory.peak_nbytes == 8 * 28 * 28 * 32 * 4
    kernels = [part.name for part in reading.parts if part.kind == "kernel"]
    assert kernels[0].startswith("void cudnn::pooling_fw_kernel_max_nhwc")
    assert kernels[1] == "loop_reduce_window_fusion"


def test_an_output_alone_is_the_peak_of_a_reduction(large):
    assert large.peak_nbytes == pytest.approx(32 * 112 * 112 * 32 * 4, rel=0.05)
    assert large.freed_nbytes == large.allocated_nbytes


def test_the_peak_of_a_known_allocation(worker, logdir):
    reading = call(worker, traced.allocate_known, str(logdir / "known"))
    assert reading.memory.peak_nbytes / traced.MEBIBYTE == pytest.approx(48, rel=0.05)
    assert reading.steps == 5


def test_the_peak_under_xla_is_the_compilers(worker, logdir):
    trace_summary = call(worker, traced.trace, traced.GRADIENT, "max_pool", logdir / "gradient")
    assert trace_summary.status == "ok"
    assert trace_summary.peak_nbytes == pytest.approx(trace_summary.compiler_nbytes, rel=0.01)
    assert any(part["kind"] == "hlo" for part in trace_summary.parts)


def test_two_sessions_within_a_second_both_survive(worker, logdir):
    folders = [str(logdir / "twice" / name) for name in ("one", "two")]
    call(worker, traced.two_within_a_second, *folders)
    for folder in folders:
        assert call(worker, traced.read, next(Path(folder).iterdir())).steps == 2


def test_a_step_that_raises_leaves_a_readable_file_and_the_next_session_works(worker, logdir):
    folders = (str(logdir / "raising"), str(logdir / "after"))
    said, broken, after = call(worker, traced.raise_at_step, *folders)
    assert (said, broken.steps, after.steps) == ("the third step", 3, 4)


def test_record_failed_candidate_is_reported_and_leaves_no_trace(worker, tmp_path, monkeypatch):
    class Shared:
        """The module's worker in the place of a fresh one."""

        def __init__(self, *_, **__):
            self.call = worker.call

        def close(self):
            pass

    monkeypatch.setattr(tracing, "Worker", Shared)
    case = make_case(op="depth_max_pool", shape=(1, 2, 2, 6), pool_size=3, padding="valid")
    trace_summary = Recorder(logdir=tmp_path).record(case, "recipe-verbatim")
    assert trace_summary.status == "error"
    assert "padding" in trace_summary.reason
    assert "left out" in tracing.describe_account(trace_summary)
    assert tensorboard.find_traces(tmp_path) == {}


def test_a_comparison_holds_every_traced_candidate_of_the_case(large, logdir):
    folder = Recorder(logdir=logdir).compare(traced.LARGE, ["reshape-reduce_max", "not-traced"])
    assert [path.name for path in folder.iterdir()] == ["reshape-reduce_max.xplane.pb"]


# Served


@pytest.fixture(scope="module")
def address(large, logdir):
    with tensorboard.serve(logdir) as (_, address):
        yield address


def get(address, path):
    with urllib.request.urlopen(f"{address}data/plugin/profile/{path}", timeout=600) as answer:
        data = answer.read()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def step_events(address, run, name):
    found = get(address, f"data?run={run}&tag=trace_viewer@&host={run}")["traceEvents"]
    return [e for e in found if re.fullmatch(rf"{re.escape(name)} \d+", e.get("name", ""))]


@pytest.mark.slow
def test_every_recorded_run_is_listed(address, logdir):
    assert set(tensorboard.find_traces(logdir)) <= set(get(address, "runs"))


@pytest.mark.slow
def test_the_served_trace_holds_each_step_once(address, large):
    steps = step_events(address, large.trace, "reshape-reduce_max")
    assert len(steps) == trace.STEPS
    assert all(step["dur"] > 0 for step in steps)


@pytest.mark.slow
def test_the_account_equals_tensorboards_total_for_the_operation(address, large):
    tables = get(address, f"data?run={large.trace}&tag=framework_op_stats&host={large.trace}")
    columns = [column["id"] for column in tables[0]["cols"]]
    rows = [
        dict(zip(columns, (cell["v"] for cell in row["c"]), strict=True))
        for row in tables[0]["rows"]
    ]
    served = {row["operation"]: row["total_self_time"] * 1e-6 for row in rows}
    parts = [part for part in large.parts if part["kind"] == "tf_op"]
    assert parts
    for part in parts:
        name = part["name"].rpartition(":")[0]
        assert part["seconds"] * large.steps == pytest.approx(served[name], rel=0.01)


@pytest.mark.slow
def test_a_second_recording_replaces_the_first_in_what_is_served(worker, address, logdir):
    folder = logdir / tensorboard.PROFILES / "again"
    for name, steps in (("first", 3), ("second", 4)):
        call(worker, traced.record_named, str(folder), name, steps)
        assert len(step_events(address, "again", name)) == steps
    assert step_events(address, "again", "first") == []
