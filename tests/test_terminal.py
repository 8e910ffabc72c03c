"""What is printed, by encoding and by reader; what the newest run is."""

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import synthetic
from poolbench.cli import main
from poolbench.core.errors import StoreError, one_line, reason_of
from poolbench.core.terminal import emit
from poolbench.core.text import escape_controls, markdown_cell
from poolbench.models.config import clean
from poolbench.store.journal import JOURNAL, encode_line
from poolbench.store.runs import find_run, newest_run

HOSTILE = "\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x1b\\ \x9b2Jgone\x1b(B"


FULL = Path("/dev/full")


def print_ascii(monkeypatch):
    """Make stdout a terminal that takes ASCII alone, as with LANG=C; return what it gets."""
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    return data


def test_emit_ascii_terminal_gets_every_letter_spelled_out(monkeypatch):
    printed = print_ascii(monkeypatch)
    emit("7 µs ± 1\t→\udc80")
    assert printed.getvalue() == b"7 \\xb5s \\xb1 1\t\\u2192\\udc80\n"


def test_emit_no_stream_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    emit("nothing")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, "red link gone"),
        ("plain µs\n\tnext", "plain µs\n\tnext"),
        ("\x1b[31", "31"),
        ("bell\x07, return\r, zero\x00", "bell\\x07, return\\r, zero\\x00"),
        ("\u202eturned", "\\u202eturned"),
    ],
)
def test_escape_controls_leaves_no_code_of_a_terminal(text, shown):
    assert escape_controls(text) == shown
    assert escape_controls(escape_controls(text)) == shown


@pytest.mark.fault(
    "an error, a name or a figure with escape codes of a terminal",
    "they reach no reason, page or terminal",
)
def test_reason_cell_and_name_hold_no_escape_code():
    assert (
        one_line(ValueError(HOSTILE))
        == reason_of(ValueError(HOSTILE))
        == "ValueError: red link gone"
    )
    assert markdown_cell(HOSTILE) == clean(HOSTILE) == "red link gone"


@pytest.fixture
def results(tmp_path):
    """Two runs: in the second, one candidate is slower by a half."""
    cases = [synthetic.op_case("depth_max_pool", mode="graph")]
    plan = synthetic.Plan(processes=10, allocations=4, rounds=3)
    for name, slowed in (("base", {}), ("gröber", {"transpose-reduce_max": 1.5})):
        found = synthetic.records(1, cases=cases, plan=plan, with_extras=False, slowed=slowed)
        (tmp_path / name).mkdir()
        lines = [synthetic.header(name), *found]
        (tmp_path / name / JOURNAL).write_bytes(b"".join(map(encode_line, lines)))
    return tmp_path


def call(*words):
    return main([str(word) for word in words], standalone_mode=False)


@pytest.mark.fault(
    "a terminal or a file in ASCII",
    "characters that it lacks are escaped; exit codes are the same",
)
def test_compare_slower_run_exits_1_on_an_ascii_terminal(results, monkeypatch, capfd):
    printed = print_ascii(monkeypatch)
    assert call("compare", "base", "gröber", "--results", results) == 1
    assert b"gr\\xf6ber against base" in printed.getvalue()
    assert "Traceback" not in capfd.readouterr().err


def test_report_table_is_printed_on_an_ascii_terminal(results, monkeypatch):
    printed = print_ascii(monkeypatch)
    assert call("report", "base", "--results", results, "--format", "markdown") == 0
    assert b"transpose-reduce_max" in printed.getvalue()


@pytest.mark.fault(
    "stdout is closed, or its reader has gone",
    "the exit code is the same",
)
def test_compare_slower_run_exits_1_whether_or_not_it_is_read(results, monkeypatch):
    """As of `compare ... 2>&1 | true`: the reader has gone before a line is written."""
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    assert call("compare", "base", "gröber", "--results", results) == 1
    assert call("compare", "base", "base", "--results", results) == 0


@pytest.mark.fault(
    "stdout goes to a full disk",
    "one line on stderr and exit code 2, whatever was found",
)
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("full", "code"), [(["stdout"], 2), (["stdout", "stderr"], 2), (["stderr"], 1)]
)
def test_compare_output_to_a_full_disk_exits_2(results, monkeypatch, capfd, full, code):
    with contextlib.ExitStack() as opened:
        for name in full:
            monkeypatch.setattr(sys, name, opened.enter_context(FULL.open("w", encoding="utf-8")))
        assert call("compare", "base", "gröber", "--results", results) == code
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.fault(
    "the disk fills up while a report is written",
    "one line with the folder and exit code 2; the run is kept",
)
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("words", "page"),
    [(["report", "base"], "index.html"), (["compare", "base", "base"], "compare.html")],
)
def test_report_to_a_full_disk_names_the_folder(results, tmp_path, capfd, words, page):
    (tmp_path / page).symlink_to(FULL)
    assert call(*words, "--results", results, "--out", tmp_path) == 2
    expected = f"poolbench: cannot write into {tmp_path}: No space left on device; mend that"
    assert capfd.readouterr().err.splitlines()[-1].startswith(expected)


def test_report_into_a_folder_of_somebody_keeps_his_files(results, tmp_path):
    kept = [tmp_path / "figures" / "logo.svg", tmp_path / "samples" / "lib.js"]
    for path in kept:
        path.parent.mkdir()
        path.write_text("mine")
    assert call("report", "base", "--results", results, "--out", tmp_path) in (0, 1)
    assert [path.read_text() for path in kept] == ["mine", "mine"]


@pytest.mark.fault(
    "a run that was killed before its header was written",
    "the report skips it, with one line",
)
def test_newest_run_empty_journal_is_skipped_and_reported(results):
    for name, left in (("killed", b""), ("torn", b'{"crc32":"00')):
        (results / name).mkdir()
        (results / name / JOURNAL).write_bytes(left)
    for name, written in (("gröber", 1e9), ("base", 1.1e9), ("killed", 1.2e9), ("torn", 1.2e9)):
        os.utime(results / name / JOURNAL, (written, written))
    said = []
    assert find_run(results, None, say=said.append) == newest_run(results) == results / "base"
    assert sorted(said) == [
        f"{name} is skipped: it ended before anything was stored" for name in ("killed", "torn")
    ]


def test_find_run_only_empty_journals_says_that_there_is_no_run(tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / JOURNAL).touch()
    with pytest.raises(StoreError, match="no run under"):
        find_run(tmp_path, None)
