"""A plain pytest-benchmark file becomes a run, and is kept as it was."""

import json
import subprocess
import sys

import pytest
from poolbench.core.errors import StoreError
from poolbench.report.frame import load
from poolbench.store.journal import read_run
from poolbench.store.pytest_benchmark import import_file

TIMES = [0.001, 0.0012, 0.0011]


def plain(name="test_sort", **fields):
    return {
        "name": name,
        "fullname": f"tests/test_x.py::{name}",
        "group": None,
        "params": None,
        "param": None,
        "extra_info": {},
        "options": {},
        "stats": {
            "min": 0.001, "max": 0.0012, "mean": 0.0011, "stddev": 1e-4, "median": 0.0011, "iqr": 1e-4,
            "q1": 0.00105, "q3": 0.00115, "iqr_outliers": 0, "stddev_outliers": 0, "outliers": "0;0",
            "ld15iqr": 0.001, "hd15iqr": 0.0012, "ops": 909.0, "total": 0.0033, "rounds": 3,
            "iterations": 5, "data": TIMES,
        },
    } | fields  # fmt: skip


def write(folder, *benchmarks, **fields):
    path = folder / "other project.json"
    whole = {
        "machine_info": {},
        "commit_info": {},
        "benchmarks": list(benchmarks),
        "version": "5.3.1",
    }
    path.write_text(json.dumps(whole | {"datetime": "2026-01-01T00:00:00+00:00"} | fields))
    return path


def test_every_timing_is_a_sample(tmp_path):
    folder = import_file(write(tmp_path, plain(), plain("test_b")), tmp_path / "results")
    found = {m.candidate: m for m in read_run(folder).measurements}
    assert set(found) == {"tests/test_x.py::test_sort", "tests/test_x.py::test_b"}
    assert found["tests/test_x.py::test_sort"].samples.seconds == tuple(TIMES)


def test_the_name_of_the_run_is_safe_in_a_path(tmp_path):
    assert import_file(write(tmp_path, plain()), tmp_path / "results", "../../up").name == "up"


def test_two_of_one_name_are_told_apart(tmp_path):
    folder = import_file(write(tmp_path, plain(), plain()), tmp_path / "results")
    assert [m.candidate[-4:] for m in read_run(folder).measurements] == ["sort", " (2)"]


def test_an_import_is_rendered_without_a_ranking(tmp_path):
    folder = import_file(write(tmp_path, plain(), plain("test_b")), tmp_path / "results")
    table = load(folder).table
    assert list(table["samples"]) == [3, 3]
    assert set(table["verdict"]) == {""}


def test_pytest_benchmark_compares_the_kept_file_as_it_does_the_original(tmp_path):
    path = write(tmp_path, plain(), plain("test_b"))
    kept = import_file(path, tmp_path / "results") / "benchmark.json"
    assert kept.read_bytes() == path.read_bytes()
    shown = [
        subprocess.run(
            [sys.executable, "-m", "pytest_benchmark", "compare", str(file)],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )
        for file in (path, kept)
    ]  # fmt: skip
    tables = [
        [line.split() for line in done.stdout.splitlines() if "test_" in line] for done in shown
    ]
    assert tables[0]
    assert [row[2:] for row in tables[0]] == [row[2:] for row in tables[1]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b'{"benchmarks": 3}',
        b'{"benchmarks": []}',
        b"\xff",
        b'{"benchmarks":' + b"[" * 99_999,
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        import_file(path, tmp_path / "results")
    assert "\n" not in str(caught.value)


def test_a_run_that_is_there_is_not_written_over(tmp_path):
    path = write(tmp_path, plain())
    import_file(path, tmp_path / "results")
    with pytest.raises(StoreError, match="pick another name"):
        import_file(path, tmp_path / "results")
