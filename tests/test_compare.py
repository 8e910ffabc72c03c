"""Comparison of two runs: verdicts against a normalizer of the same rounds, and refused comparisons."""

import io
import itertools
import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
import synthetic
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.records import FASTER_THAN_LIMIT, MatrixCell, Node, TimeBreakdown
from poolbench.report import compare, compare_text
from poolbench.store.journal import JOURNAL, encode_line, read_run

CASES = [synthetic.op_case(op, mode=mode) for op in synthetic.FACTORS for mode in ("graph", "xla")]
# Blocks enough that 10% is plain whatever the seed's processes are.
PLAN = synthetic.Plan(processes=10, allocations=4, rounds=3)
ROOT = Path(__file__).parent.parent
VICTIM = "transpose-reduce_max"
END = TimeBreakdown(seconds={"samples": 1.0}, wall_seconds=1.0)


def records(seed, **options):
    found = synthetic.records(seed, cases=CASES, plan=PLAN, with_extras=False, **options)
    return [*found, END]


def write(folder, found, **environment):
    """A journal, without the syncs that a real run needs."""
    folder.mkdir(parents=True)
    lines = [synthetic.header(folder.name, **environment), *found]
    (folder / JOURNAL).write_bytes(b"".join(map(encode_line, lines)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write(tmp_path_factory.mktemp("runs") / "base", records(1))


def call(*words):
    done = CliRunner().invoke(main, ["compare", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def refusal(*words):
    """The one line that a comparison which cannot be made prints."""
    code, out, err = call(*words)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def test_compare_run_with_itself_finds_nothing_slower(base):
    code, out, _ = call(base, base)
    assert code == 0
    assert "Nothing became slower" in out and "Slower: 0. Faster: 0." in out


def test_compare_candidate_slowed_by_a_quarter_is_named_and_no_other(base, tmp_path):
    slowed = write(tmp_path / "slowed", records(2, slowed={VICTIM: 1.25}))
    code, out, err = call(base, slowed)
    assert code == 1
    assert VICTIM in out.splitlines()[2] and VICTIM in err
    found = compare.compare_runs(read_run(base), read_run(slowed))
    assert set(found.table[found.table["verdict"] == "SLOWER"]["candidate"]) == {VICTIM}
    assert set(found.table["verdict"][:2]) == {"SLOWER"}  # the surest first


def test_compare_one_measurement_slowed_by_a_quarter_is_slower_alone(base, tmp_path):
    """The same samples but for one candidate in one case: what is slower is that one alone."""
    run = read_run(base)
    victim = next(m for m in run.measurements if m.candidate == VICTIM)
    seconds = tuple(1.25 * value for value in victim.samples.seconds)
    doctored = msgspec.structs.replace(
        victim, samples=msgspec.structs.replace(victim.samples, seconds=seconds)
    )
    found = [doctored if record is victim else record for record in run.records]
    other = read_run(write(tmp_path / "doctored", found))
    table = compare.compare_runs(run, other).table
    slower = table[table["verdict"] == "SLOWER"]
    assert list(slower["candidate"]) == [VICTIM]
    assert slower["ratio"].iloc[0] == pytest.approx(1.25)
    assert not (table["verdict"] == "FASTER").any()


def test_compare_slower_day_finds_no_slower_candidate(base, tmp_path):
    slow_day = read_run(write(tmp_path / "day", records(3, slow=1.5)))
    found = compare.compare_runs(read_run(base), slow_day)
    judged = found.table[found.table["verdict"] != ""]
    assert (judged["seconds"] / judged["base_seconds"]).min() > 1.3
    assert judged["verdict"].isin(["SAME", "UNDECIDED"]).all()
    assert set(judged["normalizer"]) <= {"other candidates", "bandwidth_limit"}


def test_compare_faster_candidate_is_faster(base, tmp_path):
    quicker = read_run(write(tmp_path / "quicker", records(4, slowed={VICTIM: 0.8})))
    found = compare.compare_runs(read_run(base), quicker)
    faster = found.table[found.table["verdict"] == "FASTER"]
    assert set(faster["candidate"]) == {VICTIM} and found.slower == []


def without(found, *probes):
    return [record for record in found if getattr(record, "candidate", "") not in probes]


@pytest.mark.parametrize(
    ("gone", "normalizer"),
    [
        ((), "bandwidth_limit"),
        (("bandwidth-write",), "copy"),
        (("bandwidth-read", "bandwidth-write", "bandwidth-copy"), "baseline"),
    ],
)
def test_compare_normalizer_of_two_candidates_is_the_best_of_both_runs(tmp_path, gone, normalizer):
    """With one other candidate there is no telling which of the two changed."""

    def two(found):
        names = (VICTIM, *synthetic.BASELINES.values())
        return [r for r in found if getattr(r, "kind", "") != "candidate" or r.candidate in names]

    base = read_run(write(tmp_path / "base", two(records(1))))
    slowed = without(two(records(5, slowed={VICTIM: 1.25})), *gone)
    other = read_run(write(tmp_path / "other", slowed))
    for pair in ((base, other), (other, base)):
        table = compare.compare_runs(*pair).table
        assert set(table[table["ratio"].notna()]["normalizer"]) == {normalizer}
    if normalizer == "baseline":
        own = table[table["candidate"] == table["op"].map(synthetic.BASELINES)]
        assert set(own["note"]) == {"is itself the only normalizer"}
        assert set(own["verdict"]) == {""}


def test_compare_candidate_slowed_by_15_percent_is_found_among_the_others(base, tmp_path):
    near = "max_pool2d-reshape"
    slowed = read_run(write(tmp_path / "near", records(2, slowed={near: 1.15})))
    table = compare.compare_runs(read_run(base), slowed).table
    found = table[table["verdict"] == "SLOWER"]
    assert set(found["candidate"]) == {near}
    assert set(found["normalizer"]) == {"other candidates"}


def test_compare_all_candidates_slower_are_found_by_the_bandwidth_limit(base, tmp_path):
    every = dict.fromkeys(synthetic.FACTORS["depth_max_pool"], 1.5)
    other = read_run(write(tmp_path / "all", records(2, slowed=every)))
    table = compare.compare_runs(read_run(base), other).table
    found = table[table["verdict"] == "SLOWER"]
    assert set(found["op"]) == {"depth_max_pool"} and len(found) > 4
    assert set(found["normalizer"]) == {"bandwidth_limit"}


def settle(found, name):
    """The records with a candidate stopped after its first process."""

    def first(samples):
        keep = [i for i, process in enumerate(samples.process) if process == 0]
        columns = msgspec.structs.asdict(samples)
        return type(samples)(**{k: tuple(v[i] for i in keep) for k, v in columns.items()})

    return [
        msgspec.structs.replace(r, stopped_early=True, samples=first(r.samples))
        if getattr(r, "candidate", "") == name and r.status == "ok"
        else r
        for r in found
    ]


@pytest.mark.parametrize(("factor", "verdicts"), [(1.1, {"SAME", "UNDECIDED"}), (3.0, {"SLOWER"})])
def test_compare_candidate_stopped_early_needs_a_wide_margin(base, tmp_path, factor, verdicts):
    found = settle(records(6, slowed={VICTIM: factor}), VICTIM)
    table = compare.compare_runs(
        read_run(base), read_run(write(tmp_path / "stopped_early", found))
    ).table
    rows = table[table["candidate"] == VICTIM]
    assert len(rows) == 2
    assert set(rows["verdict"]) <= verdicts
    assert rows["note"].str.contains("25%").all()


def test_compare_changed_statuses_are_listed_and_timeout_is_slower(base, tmp_path):
    def change(record):
        name, mode = getattr(record, "candidate", ""), getattr(record, "case", None)
        if not name or mode.mode != "graph":
            return record
        new = {
            "reshape-reduce_max": {"status": "wrong", "reason": "off by | a lot"},
            "slices-maximum": {"status": "timeout", "reason": "60 s are over"},
            "recipe-verbatim": {"status": "ok", "reason": ""},
        }.get(name, {})
        return msgspec.structs.replace(record, **new)

    other = write(tmp_path / "other", map(change, records(1)))
    code, out, err = call(base, other)
    assert code == 1
    assert "slices-maximum" in err and "timeout" in err and "reshape" not in err
    lines = [line for line in out.splitlines() if line.startswith(("| broke", "| works now"))]
    assert [line.split(" | ")[2] for line in lines] == [
        "reshape-reduce_max", "slices-maximum", "recipe-verbatim",
    ]  # fmt: skip
    assert "off by \\| a lot" in out


def test_compare_moved_cells_list_removed_limitations_first(base, tmp_path):
    states = [("a", "unsupported", "pass"), ("b", "pass", "wrong"), ("c", "error", "wrong"),
              ("d", "not_run", "pass"), ("e", "pass", "pass")]  # fmt: skip

    def cells(place):
        return [
            MatrixCell(
                op="depth_max_pool",
                candidate=VICTIM,
                probe=row[0],
                state=row[place],
                evidence="seen",
            )
            for row in states
        ]

    pair = [
        read_run(write(tmp_path / name, [*records(1), *cells(place)]))
        for name, place in (("old", 1), ("new", 2))
    ]
    moved = compare.compare_runs(*pair).cells
    assert list(zip(moved["change"], moved["probe"], strict=True)) == [
        ("went away", "a"), ("new", "b"), ("changed", "c"),
    ]  # fmt: skip
    assert "Limitations that came and went" in compare_text.as_comment(compare.compare_runs(*pair))


def test_compare_support_matrices_alone_finds_nothing_slower(tmp_path):
    cell = MatrixCell(op="depth_max_pool", candidate=VICTIM, probe="trains", state="pass")
    pair = [read_run(write(tmp_path / name, [cell])) for name in ("old", "new")]
    found = compare.compare_runs(*pair)
    assert found.table.empty and found.slower == []
    assert "Nothing became slower" in compare_text.as_comment(found)


# What cannot be compared: exit 2 and one line.


@pytest.mark.parametrize("cut", [1, 200])
def test_compare_truncated_journal_is_refused(base, tmp_path, cut):
    torn = write(tmp_path / "torn", records(1))
    data = (torn / JOURNAL).read_bytes()
    (torn / JOURNAL).write_bytes(data[:-cut])
    assert "torn" in refusal(base, torn)
    assert "torn" in refusal(torn, base)


def test_compare_other_schema_version_is_refused(base, tmp_path):
    other = write(tmp_path / "other", [])
    head = msgspec.structs.replace(synthetic.header("other"), schema=99)
    (other / JOURNAL).write_bytes(encode_line(head))
    assert "schema version 99" in refusal(base, other)


def test_compare_no_common_case_is_refused(base, tmp_path):
    elsewhere = [synthetic.op_case("depth_max_pool", pool_size=16)]
    found = synthetic.records(1, cases=elsewhere, plan=synthetic.Plan(processes=2))
    assert "in common" in refusal(base, write(tmp_path / "other", found))


def test_compare_missing_run_is_refused(base):
    assert "no journal.jsonl" in refusal(base, "no-such-run")


UNLIKE = {
    "tensorflow": {"versions": {**synthetic.ENVIRONMENT.versions, "tensorflow": "2.20.0"}},
    "cpu:0": {"devices": {"cpu:0": "Another CPU"}},
    "TF_ENABLE_ONEDNN_OPTS": {"settings": {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}},
    "cores": {"machine": {**synthetic.ENVIRONMENT.machine, "cores": 4}},
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_compare_different_environments_are_named_and_may_be_allowed(base, tmp_path, name):
    other = write(tmp_path / "other", records(1), **UNLIKE[name])
    line = refusal(base, other)
    assert f"--allow-different {name}" in line
    code, out, _ = call(base, other, "--allow-different", name)
    assert code == 0 and f"Different, and allowed: {compare_text.markdown_cell(name)}" in out


def test_compare_field_not_allowed_is_refused(base, tmp_path):
    both = {**UNLIKE["tensorflow"], **UNLIKE["cores"]}
    other = write(tmp_path / "other", records(1), **both)
    line = refusal(base, other, "--allow-different", "cores")
    assert "tensorflow (2.21.0 | 2.20.0)" in line and "cores (" not in line


def test_compare_allowing_a_field_that_no_run_has_is_refused(base, tmp_path):
    other = write(tmp_path / "other", records(1), **UNLIKE["cores"])
    line = refusal(base, other, "--allow-different", "coers")
    assert "a field that one of the runs has; got 'coers', did you mean cores?" in line
    assert call(base, other, *("--allow-different", "cores") * 2)[0] == 0


def test_compare_different_nodes_of_a_cluster_are_named(tmp_path):
    pair = []
    for cores in (2, 4):
        machine = {**synthetic.ENVIRONMENT.machine, "cores": cores}
        environment = msgspec.structs.replace(synthetic.ENVIRONMENT, machine=machine)
        pair.append(write(tmp_path / f"of-{cores}", [Node(name="far", environment=environment)]))
    assert "--allow-different far.cores" in refusal(*pair)
    assert "far.cores" not in refusal(*pair, "--allow-different", "far.cores")


def test_compare_other_commit_is_accepted(base, tmp_path):
    other = write(tmp_path / "other", records(1), source={"commit": "1111111", "dirty": True})
    assert call(base, other)[0] == 0


@pytest.mark.fault(
    "two runs between which a package without effect on timings was installed",
    "compared",
)
@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("versions", {"tensorboard-plugin-profile": "2.0", "pytest": "1", "pandas": "1"}),
        ("settings", {"TF_CPP_MIN_LOG_LEVEL": "0"}),
        ("machine", {"memory_nbytes": 1}),
    ],
)
def test_compare_field_without_effect_on_timings_is_no_difference(base, tmp_path, part, field):
    known = getattr(synthetic.ENVIRONMENT, part)
    other = write(tmp_path / "other", records(1), **{part: {**known, **field}})
    assert call(base, other)[0] == 0


def test_compare_identical_code_with_a_run_effect_finds_nothing_slower(base, tmp_path):
    """Ratios of another run of the same code move by some percent: that is no finding."""
    moved = {
        name: 1 + 0.03 * (-1) ** i for i, name in enumerate(synthetic.FACTORS["depth_max_pool"])
    }
    other = write(tmp_path / "moved", records(9, slowed=moved))
    code, out, _ = call(base, other)
    assert code == 0
    assert "would have shown a slowdown of" in out


def test_compare_impossibly_fast_measurement_is_not_judged(base, tmp_path):
    found = [
        msgspec.structs.replace(r, flags=(FASTER_THAN_LIMIT,))
        if getattr(r, "candidate", "") == VICTIM
        else r
        for r in records(2, slowed={VICTIM: 3.0})
    ]
    table = compare.compare_runs(read_run(base), read_run(write(tmp_path / "fast", found))).table
    rows = table[table["candidate"] == VICTIM]
    assert set(rows["verdict"]) == {""}
    assert set(rows["note"]) == {"faster than the memory allows: not judged"}


# Notes and text.


def test_compare_unfinished_run_is_noted(base, tmp_path):
    found = records(1)[:-1]
    last = found[-1].case
    short = read_run(write(tmp_path / "short", [r for r in found if r.case != last]))
    notes = compare.compare_runs(read_run(base), short).notes
    assert "short did not end by itself" in notes[0]
    assert "measurements are only in base" in notes[1]


def test_compare_selected_rows_decide_and_every_format_names_the_slower(base, tmp_path):
    slowed = write(tmp_path / "slowed", records(2, slowed={VICTIM: 1.25}))
    pick = ("--select", "op=global_avg_pool")
    code, out, _ = call(base, slowed, *pick, "--format", "csv")
    table = pd.read_csv(io.StringIO(out))
    assert code == 0  # what is slower is another op's
    assert set(table["op"]) == {"global_avg_pool"}
    for name in compare_text.FORMATS:
        code, out, _ = call(base, slowed, "--format", name)
        assert code == 1 and VICTIM in out


def test_comment_long_table_is_cut_and_says_so(base):
    found = compare.compare_runs(read_run(base), read_run(base))
    many = pd.concat([found.table] * 20, ignore_index=True)
    text = compare_text.as_comment(compare.keep(found, many))
    assert f"{len(many) - 100} more rows" in text
    assert len(text) < 65_536
    # Long notes leave room for fewer rows.
    many["note"], many["base_status"] = "n" * 400, "wrong"
    text = compare_text.as_comment(compare.keep(found, many))
    assert text.count(f"{len(many) - 30} more rows") == 2
    assert len(text) < 65_536


def test_compare_rows_are_sorted_by_verdict_p_and_size():
    rows = itertools.product(("SAME", "SLOWER", "FASTER"), (0.04, 0.001), (1.1, 1.3))
    table = pd.DataFrame(rows, columns=["verdict", "adjusted_p", "ratio"])
    found = compare._sorted(table)
    assert list(found["verdict"][::4]) == ["SLOWER", "FASTER", "SAME"]
    assert list(found["adjusted_p"][:4]) == [0.001, 0.001, 0.04, 0.04]
    assert list(found["ratio"][:4]) == [1.3, 1.1, 1.3, 1.1]


def test_comment_and_page_hostile_name_is_escaped(base, tmp_path):
    hostile = "<script>alert(1)</script>|`x`"

    def rename(record):
        if getattr(record, "candidate", "") != VICTIM:
            return record
        return msgspec.structs.replace(record, candidate=hostile)

    pair = [
        read_run(write(tmp_path / name, map(rename, records(seed, slowed={VICTIM: factor}))))
        for name, seed, factor in (("old", 1, 1.0), ("new", 2, 1.3))
    ]
    found = compare.compare_runs(*pair)
    assert "<script" not in compare_text.as_comment(found)
    page = compare_text.write_page(found, tmp_path / "out").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert np.isfinite(found.table["ratio"][0]) and hostile in found.slower[0]


def test_options_named_in_the_ci_page_exist():
    """Options in the text and in the workflow; whole commands are tests/test_docs.py's."""
    page = (ROOT / "docs" / "ci.md").read_text()
    named = set(re.findall(r"(?:`|arguments: )(--[a-z-]+)", page))
    commands = (main.commands["compare"], main.commands["import"])
    known = {name for command in commands for param in command.params for name in param.opts}
    assert {"--base", "--budget", "--candidates", "--allow-different"} <= named <= known
