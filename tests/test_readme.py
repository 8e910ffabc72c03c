"""The examples of README and docs run unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from poolbench.store.journal import read_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIG = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]


def example(name):
    """Return the Python block behind a marker in the README or in a page of docs/."""
    pages = [README, *(page.read_text() for page in ROOT.glob("docs/*.md"))]
    found = re.search(rf"<!-- example:{name} -->\s*```python\n(.*?)```", "".join(pages), re.DOTALL)
    assert found, f"no page has an example {name}"
    return found[1]


def run_suite(tmp_path, *words):
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", *CONFIG,
            "--poolbench-results", str(tmp_path), "--poolbench-run", "run",
            "--poolbench-processes", "2", "--poolbench-budget", "0.3", "--benchmark-quiet", *words,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip


@pytest.mark.slow
def test_a_candidate_of_five_lines_joins_the_race(tmp_path):
    code = example("candidate")
    assert len(code.splitlines()) <= 5
    file = tmp_path / "mine.py"
    file.write_text(code)
    done = run_suite(
        tmp_path, "suites/test_global_avg_pool.py", "--poolbench-sweep", "quick", "--poolbench-candidates", str(file),
        "--poolbench-axis", "shape=2x7x7x64", "--poolbench-axis", "mode=graph", "--poolbench-axis", "direction=forward",
        "--poolbench-axis", "dtype=float32", "--poolbench-axis", "threads=all",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {m.candidate: m for m in read_run(tmp_path / "run").measurements}
    assert found["sum-over-count"].status == "ok"
    assert len(found["sum-over-count"].samples) == len(found["layer-global_avg_pool"].samples) > 0


@pytest.mark.slow
def test_an_op_of_thirty_lines_runs_is_stored_and_is_reported(tmp_path):
    code = example("op")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 30
    file = tmp_path / "test_row_max.py"
    file.write_text(code)
    done = run_suite(tmp_path, str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "run")
    ran = {(m.case.mode, m.candidate) for m in run.measurements if m.kind == "candidate"}
    assert ran == {(mode, name) for mode in ("eager", "graph") for name in ("reduce_max", "sort")}
    report = subprocess.run(
        [sys.executable, "report.py", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert report.returncode == 0, report.stdout + report.stderr
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "row_max" in page
    assert "Raced forward only" in page


@pytest.mark.parametrize(
    "path", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name
)
def test_docs_links_to_files_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
