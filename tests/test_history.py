"""Earlier runs of a machine: their summaries, the prior they give, how often they agreed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import synthetic
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.errors import UsageError
from poolbench.launch import launch_repeated
from poolbench.report import history, tables
from poolbench.report.frame import lay_out, load
from poolbench.report.recommend import answer
from poolbench.stats.prior import SHIPPED
from poolbench.store.journal import read_run

ROOT = Path(__file__).parents[1]
PLAN = synthetic.Plan(processes=5, allocations=2, rounds=6)
CASES = [
    synthetic.op_case("global_avg_pool", mode=mode, shape=(n, 28, 28, 96))
    for n in (8, 32) for mode in synthetic.MODES
]  # fmt: skip


def make_run(results, name, seed, *, summary=True, **environment):
    found = synthetic.records(seed, cases=CASES, plan=PLAN, with_extras=False)
    folder = synthetic.write(results / name, found, synthetic.header(name, **environment))
    if summary:
        history.write_summary(read_run(folder), print)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a folder of three runs of one machine and code."""
    results = tmp_path_factory.mktemp("results")
    for seed in range(3):
        make_run(results, f"run-{seed}", seed)
    return results


def test_summary_that_cannot_be_written_is_a_line(tmp_path):
    folder = make_run(tmp_path, "r", 0, summary=False)
    (folder / history.SUMMARY).mkdir()
    said = []
    history.write_summary(read_run(folder), said.append)
    assert said == [f"cannot write {folder / history.SUMMARY}: Is a directory"]


def test_summarise_holds_the_estimates_of_the_report(results):
    run = read_run(results / "run-0")
    summary, loaded = history.summarise(run), lay_out(run)
    compared = loaded.table[loaded.table["verdict"] != ""]
    assert len(summary.comparisons) == len(compared) > 10
    ratios = {(c.case, c.candidate): np.exp(c.log_ratio) for c in summary.comparisons}
    for row in compared.to_dict("records"):
        assert ratios[row["label"], row["candidate"]] == pytest.approx(row["ratio"], rel=1e-5)


def test_load_takes_the_prior_from_the_runs_of_the_machine(results, tmp_path):
    found = load(results / "run-0")
    assert found.source == "this machine: 3 runs" and found.prior != SHIPPED
    alone = load(make_run(tmp_path, "alone", 0))
    assert alone.source == "prior" and alone.prior == SHIPPED
    # These runs differ by nothing but noise: their own variance is below the shipped one, and counts down to a bound.
    assert found.prior.slope == history.NARROWEST * SHIPPED.slope
    widths = [
        np.nanmedian(np.log(one.table["ratio_high"] / one.table["ratio_low"]))
        for one in (found, alone)
    ]
    assert widths[0] < widths[1]


def test_load_takes_what_pooled_runs_show_once(results):
    pooled = load(results / "run-1", results / "run-0")
    # Beside them is one run only, which gives no prior: two runs are what is known.
    assert pooled.source == "this machine: 2 runs" and pooled.prior == SHIPPED


@pytest.mark.parametrize(
    "other",
    [
        {"source": {"code": "another"}},
        {"versions": {"tensorflow": "2.20.0"}},
        {"machine": {"processor": "another", "cores": 2}},
    ],
)
def test_prior_for_unlike_runs_is_the_shipped_one(other, tmp_path):
    make_run(tmp_path, "a", 0)
    make_run(tmp_path, "b", 1, **other)
    run = read_run(make_run(tmp_path, "c", 2, summary=False))
    assert history.prior_for(run, tmp_path) == (SHIPPED, 0)


def test_prior_for_a_compared_run_leaves_it_out(results):
    run = read_run(results / "run-0")
    assert history.prior_for(run, results)[1] == 3
    assert history.prior_for(run, results, without=["run-2"])[1] == 2


def summary_of(name, *, moved=0.0, op="o"):
    """The summary of a run with ten comparisons, three of which were moved."""
    comparisons = tuple(
        history.Comparison(
            op=op, case=f"c{number}", node="local", candidate="a", eager=False, one_thread=False,
            log_ratio=0.4 + moved * (number < 3), standard_error=0.004, degrees=9, processes=10,
        )
        for number in range(10)
    )  # fmt: skip
    return history.RunSummary(
        run=name, created="2026", code="c", machine={}, comparisons=comparisons
    )


def test_agree_of_equal_and_of_moved_runs():
    same = history.agree(summary_of("a"), summary_of("b"))
    assert (same.coverage.inside, same.coverage.comparisons, same.reversed) == (10, 10, 0)
    moved = history.agree(summary_of("a"), summary_of("b", moved=-0.8))
    assert (moved.coverage.inside, moved.reversed) == (7, 3)
    assert moved.coverage.observed == 0.7


def test_agree_of_runs_of_other_ops_is_refused():
    with pytest.raises(UsageError, match="a and b have no comparison in common"):
        history.agree(summary_of("a"), summary_of("b", op="another"))


def test_selftest_runs_prints_nominal_beside_observed_coverage(results):
    done = CliRunner().invoke(main, ["selftest", "--runs", "--results", str(results)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("3 runs of ")
    assert lines[1].startswith("run-0 and run-1: ") and "FASTER and SLOWER" in lines[1]
    assert "expected 95%" in lines[-1]


def test_selftest_runs_leaves_out_what_has_nothing_in_common(tmp_path):
    (tmp_path / "e").mkdir()
    os.mkfifo(tmp_path / "e" / history.SUMMARY)  # would be read for ever
    for name, op in (("a", "o"), ("b", "another"), ("c", "o"), ("d", "")):
        found = summary_of(name, op=op, moved=0.001 * (name == "c"))
        if not op:
            found = msgspec.structs.replace(found, comparisons=())
        (tmp_path / name).mkdir()
        (tmp_path / name / history.SUMMARY).write_bytes(msgspec.json.encode(found))
    done = CliRunner().invoke(main, ["selftest", "--runs", "--results", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "a and c: 10 of 10 agree" in done.output
    assert "d/summary.json is left out: it has no comparisons" in done.output
    assert "e/summary.json is left out: it is no file of up to " in done.output


def test_selftest_runs_without_two_runs_is_one_line_and_exit_2(tmp_path):
    make_run(tmp_path, "a", 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / history.SUMMARY).write_text("{")
    done = CliRunner().invoke(main, ["selftest", "--runs", "--results", str(tmp_path)])
    assert done.exit_code == 2
    left_out, error = done.output.splitlines()
    assert left_out.startswith("b/summary.json is left out: ")
    assert "--repeat 2" in error


def test_read_summaries_reads_those_that_ship_without_a_journal(results, tmp_path):
    (tmp_path / history.REFERENCE_RUNS).mkdir()
    text = (results / "run-1" / history.SUMMARY).read_bytes()
    (tmp_path / history.REFERENCE_RUNS / "first.json").write_bytes(text)
    (found,) = history.read_summaries(tmp_path)
    assert found == msgspec.json.decode(text, type=history.RunSummary)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / history.SUMMARY).write_bytes(text.replace(b'"run-1"', b'"copy"'))
    assert history.read_summaries(tmp_path) == [found], "the one that ships stands for its copy"


def test_read_summaries_counts_a_copied_run_once(results, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        text = (results / "run-0" / history.SUMMARY).read_text().replace('"run-0"', f'"{name}"')
        (tmp_path / name / history.SUMMARY).write_text(text)
    assert [one.run for one in history.read_summaries(tmp_path)] in (["a"], ["b"])
    with pytest.raises(UsageError, match="needs two runs of one machine, code and op"):
        history.describe_history(tmp_path, print)


@pytest.mark.parametrize(
    ("field", "value"), [("log_ratio", 1e200), ("standard_error", 1e308), ("degrees", 0.0)]
)
def test_read_summaries_leaves_out_impossible_numbers(results, tmp_path, field, value):
    found = msgspec.json.decode((results / "run-0" / history.SUMMARY).read_bytes())
    found["comparisons"][0][field] = value
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / history.SUMMARY).write_bytes(msgspec.json.encode(found))
    said = []
    assert history.read_summaries(tmp_path, said.append) == []
    assert said[0].startswith("a/summary.json is left out: Expected ")


def test_describe_history_skips_pairs_without_a_comparison_in_common(tmp_path):
    runs = [("a", ["x"]), ("b", ["y"]), ("c", ["x", "y"])]
    for number, (name, ops) in enumerate(runs):
        parts = [summary_of(name, op=op) for op in ops]
        one = msgspec.structs.replace(
            parts[0], created=f"2026-01-0{number + 1}T00:00:00+00:00",
            comparisons=sum((part.comparisons for part in parts), ()),
        )  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / history.SUMMARY).write_bytes(msgspec.json.encode(one))
    text = history.describe_history(tmp_path, print)
    assert "b and c: 10 of 10 agree" in text and "a and b" not in text
    (tmp_path / "c" / history.SUMMARY).unlink()
    with pytest.raises(UsageError, match="code and op"):
        history.describe_history(tmp_path, print)


def test_shipped_prior_covers_95_percent_of_the_committed_runs():
    known = history.read_summaries(ROOT / "results")
    known = [one for one in known if one.run.startswith("default-")]
    groups = {(one.code, tuple(sorted(one.machine.items()))): one for one in known}.values()
    found = [a.coverage for one in groups for a in history.agreements(history.alike(known, one))]
    count = sum(one.comparisons for one in found)
    assert len({one.machine["features"] for one in groups}) > 1 and count > 1900
    assert 0.94 <= sum(one.inside for one in found) / count <= 0.96


def test_method_page_has_the_constants_of_the_shipped_prior():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    constants = (
        f"hypot({SHIPPED.base:.1%}, {SHIPPED.slope:.1%} * sqrt(min(|theta|, 1)))"
        f" * ({SHIPPED.eager} in eager mode) * ({SHIPPED.one_thread} on one thread)"
    )
    assert constants in page


def test_launch_repeated_shares_the_budget_and_stops_at_an_interrupt(tmp_path, monkeypatch):
    asked = []

    def call(words, stops):
        asked.append(words[4:])
        return 130 if len(asked) == 2 else 1

    monkeypatch.setattr("poolbench.launch.call_child", call)
    monkeypatch.setattr("poolbench.launch.time.sleep", lambda _: None)
    options = {"sweep": "quick", "results": tmp_path, "run": "r", "op": ("dense",)}
    folders, code = launch_repeated(["x.py"], options, 4)
    assert code == 130 and [folder.name for folder in folders] == ["r-1", "r-2"]
    (tmp_path / "r-3").mkdir()
    (tmp_path / "r-3" / "journal.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="r-3 holds a run already: choose another --run"):
        launch_repeated(["x.py"], options, 4)
    assert len(asked) == 2, "before anything is measured"
    assert asked[0] == [
        "--sweep=quick", "--op=dense", "--budget=1.0", "--run=r-1", f"--results={tmp_path}", "--", "x.py",
    ]  # fmt: skip


# The first run is over at once; the second one takes its time to end.
REPEATED = """
import sys
from poolbench import launch

started, call_child = [], launch.call_child

def call(words, stops):
    started.append(words)
    return 0 if len(started) == 1 else call_child([sys.executable, "-c", sys.argv[1]], stops)

launch.PAUSE_SECONDS, launch.CHILD_END_SECONDS, launch.call_child = 0, 0.1, call
sys.exit(launch.launch_repeated([], {"results": sys.argv[2], "run": "r"}, 3)[1])
"""
CHILD = r"""
import os, signal, sys, time

def end(*_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(0.5)
    os.write(1, b"ended cleanly\n")  # print may be at work below this handler
    sys.exit(130)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
os.write(1, b"ready\n")
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_launch_repeated_interrupted_waits_for_the_present_run_and_starts_no_other(
    tmp_path, send, number
):
    repeated = subprocess.Popen(
        [sys.executable, "-c", REPEATED, CHILD, str(tmp_path)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert repeated.stdout.readline() == "ready\n"
    send(repeated.pid, number)
    said = repeated.stdout.read().splitlines()
    assert repeated.wait(600) == 130
    assert said == ["ended cleanly", "interrupted; whole runs stored: r-1"]


@pytest.mark.parametrize("option", ["resume", "dry_run", "check_only"])
def test_run_repeat_with_an_option_of_one_run_is_refused(option, tmp_path):
    words = ["--resume", "r"] if option == "resume" else [f"--{option.replace('_', '-')}"]
    done = CliRunner().invoke(main, ["run", "--repeat", "2", *words, "--results", str(tmp_path)])
    assert done.exit_code == 2 and "--repeat measures anew" in done.output


def test_history_table_has_a_column_per_run_and_agrees_with_the_page(results):
    loaded = load(results / "run-2")
    table = tables.history_table(loaded, answer(loaded))
    assert [name.partition(",")[0] for name in table.columns[3:]] == ["run-0", "run-1", "run-2"]
    speeds = dict(zip(loaded.table["label"] + loaded.table["candidate"], 1 / loaded.table["ratio"]))
    for row in table.itertuples(index=False):
        assert float(row[-1].partition("x")[0]) == pytest.approx(
            speeds[row.case + row.candidate], rel=0.01
        )


def test_history_table_of_one_run_is_empty(tmp_path):
    loaded = load(make_run(tmp_path, "alone", 0))
    assert tables.history_table(loaded, answer(loaded)).empty
