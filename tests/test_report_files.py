"""A plain pytest-benchmark file becomes a run, and is kept as it was."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alone import cpu_seconds
from poolbench.core.errors import StoreError
from poolbench.report.frame import load
from poolbench.report.terminal import headline_text
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


def test_headline_of_an_import_says_nothing_of_a_textbook(tmp_path):
    folder = import_file(write(tmp_path, plain(), plain("test_b")), tmp_path / "results")
    said = headline_text(load(folder))
    assert "tests/test_x.py::test_" in said
    assert "does not run" not in said
    assert "not raced" not in said


def test_the_name_of_the_run_is_safe_in_a_path(tmp_path):
    assert import_file(write(tmp_path, plain()), tmp_path / "results", "../../up").name == "up"


def test_import_equal_names_get_numbers(tmp_path):
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


def changed(path, value):
    """A file of one benchmark with one value replaced, as JSON text."""
    whole = {"machine_info": {}, "benchmarks": [plain()], "version": "5.1.0", "datetime": "2026"}
    *steps, last = path
    target = whole
    for step in steps:
        target = target[step]
    target[last] = value
    return json.dumps(whole)


FIRST = ("benchmarks", 0)
IN_THE_WILD = {
    "extra_info-nan": changed((*FIRST, "extra_info"), {"loss": float("nan"), 'a "NaN"': "NaN"}),
    "ops-infinity": changed((*FIRST, "stats", "ops"), float("inf")),
    "machine_info-null": changed(("machine_info",), None),
    "datetime-null": changed(("datetime",), None),
    "data-null": changed((*FIRST, "stats", "data"), None),
    "float-rounds": changed((*FIRST, "stats", "rounds"), 5.0),
    "float-iterations": changed((*FIRST, "stats", "iterations"), 5.0),
    "old-cpu-brand": changed(("machine_info", "cpu"), {"brand": "An old processor"}),
    "group-named-as-op": changed((*FIRST, "group"), "depth_max_pool"),
    "many-rounds": changed(
        (*FIRST, "stats", "data"), [1e-6 * (i % 977 + 1) for i in range(198_334)]
    ),
}


@pytest.mark.fault(
    "`import`: NaN, Infinity, null, rounds as floats, other versions",
    "imported",
)
@pytest.mark.parametrize("name", IN_THE_WILD)
def test_import_file_in_the_wild_becomes_a_run(tmp_path, name):
    path = tmp_path / "x.json"
    path.write_text(IN_THE_WILD[name])
    run = read_run(import_file(path, tmp_path / "results"))
    (found,) = run.measurements
    assert found.status == "ok"
    assert len(found.samples) == {"data-null": 1, "many-rounds": 198_334}.get(name, 3)
    if name == "old-cpu-brand":
        assert run.header.environment.machine["processor"] == "An old processor"
    if name == "group-named-as-op":
        assert found.case.op == "depth_max_pool (imported)"


def test_import_benchmark_without_a_finite_timing_is_not_run(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(changed((*FIRST, "stats", "data"), [0.0, float("nan")]))
    (found,) = read_run(import_file(path, tmp_path / "results")).measurements
    assert (found.status, len(found.samples)) == ("not_run", 0)


def test_import_of_more_timings_than_fit_keeps_evenly_spaced_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("poolbench.store.pytest_benchmark.MAX_SAMPLES", 2)
    folder = import_file(write(tmp_path, plain()), tmp_path / "results")
    (found,) = read_run(folder).measurements
    assert found.samples.seconds == tuple(TIMES[::2])


@pytest.mark.fault(
    "`import`: a byte-order mark, UTF-16",
    "imported",
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_import_file_with_a_byte_order_mark_becomes_a_run(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes(changed(("version",), "5").encode(encoding))
    assert len(read_run(import_file(path, tmp_path / "results")).measurements) == 1


@pytest.mark.fault(
    "`import`: gzip, no JSON, no benchmarks",
    "refused in one line that names the kind; nothing is left behind",
)
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"benchmark took 3 ms\n", "no pytest-benchmark file"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "compressed by gzip"),
        (changed(("benchmarks",), []).encode(), "holds no benchmark"),
    ],
)
def test_import_refusal_names_the_kind_and_leaves_nothing(tmp_path, data, said):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=said):
        import_file(path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.fault(
    "`import`: a device, a pipe",
    "refused in one line",
)
@pytest.mark.parametrize("kind", ["device", "fifo", "folder"])
def test_import_refuses_what_is_no_regular_file(tmp_path, kind):
    path = {"device": Path("/dev/zero"), "fifo": tmp_path / "fifo", "folder": tmp_path}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(StoreError, match="is no regular file"):
        import_file(path, tmp_path / "results")


@pytest.mark.fault(
    "`import`: a changed bit or a cut",
    "imported, or refused in one line; nothing is left behind by a refusal",
)
def test_import_of_a_damaged_file_is_a_run_or_one_line(tmp_path):
    generator = random.Random(26)
    whole = write(tmp_path, plain(), plain("test_b"), plain(group="sorts")).read_bytes()
    path, results, read = tmp_path / "x.json", tmp_path / "results", 0
    for number in range(200):
        damaged = bytearray(whole)
        place = generator.randrange(len(damaged))
        if number % 4:
            damaged[place] ^= 1 << generator.randrange(8)
        else:
            del damaged[place : place + generator.choice((1, 100, len(damaged)))]
        path.write_bytes(damaged)
        try:
            read_run(import_file(path, results))
        except StoreError as error:
            assert "\n" not in str(error)
        else:
            read += 1
            shutil.rmtree(results / "x")
        assert not results.exists() or not list(results.iterdir())
    assert 20 < read < 180


def test_import_above_the_journal_s_limit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("poolbench.store.journal.MAX_NBYTES", 1000)
    with pytest.raises(StoreError, match="is full"):
        import_file(write(tmp_path, plain(), plain("b")), tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.fault(
    "`import`: 20,000 benchmarks",
    "imported within seconds",
)
def test_import_of_20_000_benchmarks_is_quick(tmp_path):
    path = write(tmp_path, *(plain(f"test_{number}") for number in range(20_000)))
    start = time.process_time()
    folder = import_file(path, tmp_path / "results")
    seconds = time.process_time() - start
    # Ten seconds of the processor where `import pandas` takes half a one.
    assert seconds < 20 * cpu_seconds("-c", "import pandas")[0]
    assert len(read_run(folder).measurements) == 20_000
