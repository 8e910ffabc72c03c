"""Every figure in README.md and docs/ is the reference run's."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference():
    folder = ROOT / "results" / "reference"
    if not (folder / "journal.jsonl").exists():
        pytest.skip("no reference run is committed: nox -s reference makes one")
    return folder


def test_the_generated_blocks_are_up_to_date(reference):
    from poolbench.report.readme import fill

    assert fill(ROOT, check=True, run=reference) == [], "python report.py readme writes them anew"


def test_a_block_that_was_changed_by_hand_is_noticed(reference, tmp_path):
    from poolbench.report.readme import fill

    (tmp_path / "docs").mkdir()
    readme = (ROOT / "README.md").read_text()
    assert "<!-- generated:headline -->\n|" in readme
    (tmp_path / "README.md").write_text(
        readme.replace("<!-- generated:headline -->\n|", "<!-- generated:headline -->\n")
    )
    for test in ROOT.glob("tests/**/test_*.py"):
        copy = tmp_path / test.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    assert "README.md" in fill(tmp_path, check=True, run=reference)


def test_the_reference_run_is_small_and_nothing_in_it_failed(reference):
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
