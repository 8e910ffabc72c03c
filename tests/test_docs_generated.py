"""The generated parts of README.md and docs/."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))


@pytest.fixture(scope="module")
def reference():
    folder = ROOT / "results" / "reference"
    if not (folder / "journal.jsonl").exists():
        pytest.skip("no reference run is committed: nox -s reference makes one")
    return folder


def test_fill_committed_docs_are_up_to_date(reference):
    from _generate import fill

    assert fill(ROOT, check=True, run=reference) == [], "run python docs/_generate.py"


def test_fill_block_edited_by_hand_is_reported(reference, tmp_path):
    from _generate import fill

    (tmp_path / "docs").mkdir()
    readme = (ROOT / "README.md").read_text()
    edited = readme.replace(
        "<!-- generated:short-answer -->\n-", "<!-- generated:short-answer -->\n"
    )
    assert edited != readme
    (tmp_path / "README.md").write_text(edited)
    assert "README.md" in fill(tmp_path, check=True, run=reference)


def test_reference_run_is_small_and_without_unexpected_failures(reference):
    from poolbench.store.journal import read_run

    run = read_run(reference)
    assert (
        sum(
            path.stat().st_size
            for path in reference.rglob("*")
            if path.is_file() and "report" not in path.parts
        )
        < 10e6
    )
    unexpected = [
        (m.case, m.candidate, m.reason)
        for m in run.measurements
        if m.status not in ("ok", "unsupported") and "documented" not in m.flags
    ]
    assert unexpected == []


def test_support_table_counts_passed_checks_per_group():
    from _generate import support_table
    from poolbench.core.records import MatrixCell

    states = {
        ("all", "forward-eager"): "pass", ("all", "nan"): "pass", ("all", "tie"): "wrong",
        ("none", "forward-eager"): "unsupported", ("none", "nan"): "not_run",
    }  # fmt: skip
    cells = [
        MatrixCell(op="o", candidate=name, probe=probe, device="cpu:0", state=state, evidence="e")
        for (name, probe), state in states.items()
    ]
    assert support_table(cells).splitlines() == [
        "| implementation | runs | values |",
        "|---|---|---|",
        "| all | yes | 1/2 |",
        "| none | no |  |",
    ]
