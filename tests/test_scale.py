"""Cost of the driver for growing runs: only the workers are fake.

Times are the process' own processor time, so that a busy machine does not decide; the report's are the clock's, which
is what its user waits. The slow tests print
their figures; with POOLBENCH_FIGURES=results/reference-scale/scale.json they keep those of docs/scale.md:
pytest tests/test_scale.py -m slow -s.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from alone import cpu_seconds
from fakes import FakePool, fake_candidate
from poolbench.core.case import make_case
from poolbench.core.plan import Plan
from poolbench.core.registry import REGISTRY
from poolbench.engine.run import Run, RunOptions
from poolbench.store.journal import read_run

ONE_ROUND = Plan(processes=1, allocations=1, rounds=1)
CANDIDATES = [fake_candidate(name) for name in ("one", "two")]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for entry in CANDIDATES:
        monkeypatch.setitem(REGISTRY.candidates, (entry.op, entry.name), entry)


def fake_cases(count):
    return [make_case(op="fake", shape=(1, 1, 1 + i // 1000, 1 + i % 1000)) for i in range(count)]


def drive(folder, count, plan=ONE_ROUND):
    """Seconds of processor time that each of `count` races took, after the journal was begun."""
    moments = []
    options = RunOptions(folder=folder, plan=plan)
    with Run(options, progress=lambda _: None, pool=FakePool()) as bench:
        bench.journal()
        moments.append(time.process_time())
        for case in fake_cases(count):
            bench.race(case, [entry.name for entry in CANDIDATES], baseline="one")
            moments.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(moments)]


def mean(values):
    return sum(values) / len(values)


def keep(**figures):
    """Print the figures, and store them where the environment names a file."""
    print("\n" + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if place := os.environ.get("POOLBENCH_FIGURES"):
        path = Path(place)
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
        path.write_text(json.dumps(stored | rounded, indent=1, sort_keys=True) + "\n")


def test_race_is_synced_once_for_any_number_of_candidates(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    drive(tmp_path / "run", 20)
    assert 1 + 20 <= len(synced) <= 1 + 20 + 1  # the header, each race, the shares


def test_journal_bytes_per_race_stay_equal(tmp_path):
    drive(tmp_path / "run", 50)
    sizes = [len(line) for line in (tmp_path / "run" / "journal.jsonl").open("rb")][1:-1]
    assert max(sizes[-25:]) < 1.1 * max(sizes[:25])


def test_race_measured_before_asks_no_worker(tmp_path):
    pool = FakePool()
    options = RunOptions(folder=tmp_path / "run", plan=ONE_ROUND)
    with Run(options, progress=lambda _: None, pool=pool) as bench:
        (case,) = fake_cases(1)
        bench.race(case, [entry.name for entry in CANDIDATES], baseline="one")
        before = pool.tasks.total()
        bench.race(case, [entry.name for entry in CANDIDATES], baseline="one")
    assert pool.tasks.total() == before


@pytest.mark.slow
def test_ten_thousand_races_cost_the_driver_5_ms_each_from_first_to_last(tmp_path):
    start = time.perf_counter()
    seconds = drive(tmp_path / "run", 10_000)
    wall = time.perf_counter() - start
    first, last = mean(seconds[:2000]), mean(seconds[-2000:])
    nbytes = (tmp_path / "run" / "journal.jsonl").stat().st_size
    start = time.process_time()
    assert len(read_run(tmp_path / "run").measurements) == 10_000 * 5
    reading = time.process_time() - start
    keep(
        race_seconds=mean(seconds), first_race_seconds=first, last_race_seconds=last,
        race_wall_seconds=wall / 10_000, race_nbytes=nbytes / 10_000, read_seconds=reading,
    )  # fmt: skip
    pandas = min(cpu_seconds("-c", "import pandas")[0] for _ in range(3))
    assert mean(seconds) < pandas / 100  # 5 ms where pandas takes half a second
    assert last < 2 * first


@pytest.mark.slow
def test_race_of_the_default_plan_costs_the_driver_little(tmp_path):
    seconds = drive(tmp_path / "run", 300, Plan())
    nbytes = (tmp_path / "run" / "journal.jsonl").stat().st_size
    keep(plan_race_seconds=mean(seconds), plan_race_nbytes=nbytes / 300)
    assert mean(seconds) < 0.01 * Plan().budget_seconds


SUITE = """
import pytest
import poolbench.engine.run
from fakes import FakePool
from poolbench import Op, Sweep, TensorSpec, candidate, product, register, shape_axis

poolbench.engine.run.WorkerPool = lambda *words: FakePool()
COUNT = {count}
shapes = [(1, 1, 1 + i // 1000, 1 + i % 1000) for i in range(COUNT)]
register(Op(
    name="fake", reference=lambda case, x: x, baseline="one", axes=(shape_axis(),),
    inputs=lambda case: {{"x": TensorSpec(case.shape, case.dtype)}},
    sweeps={{"default": Sweep(product(shape=shapes))}},
))


@candidate(op="fake", name="one", backends=("numpy",))
def one(case):
    return lambda x: x


@candidate(op="fake", name="two", backends=("numpy",))
def two(case):
    return lambda x: x


@pytest.mark.poolbench(op="fake")
def test_fake(poolbench):
    poolbench.replay()
"""


@pytest.mark.slow
def test_pytest_time_grows_in_proportion(tmp_path):
    def seconds_a_race(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "test_fake.py").write_text(SUITE.format(count=count))
        here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        words = [
            "-p",
            "poolbench.pytest_plugin",
            "-q",
            "--benchmark-quiet",
            "--poolbench-processes",
            "1",
            "--poolbench-run",
            "r",
            "-p",
            "no:cacheprovider",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, str(folder)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": here},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{2 * count} passed" in done.stdout, done.stdout[-2000:] + done.stderr
        return (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / count

    few, many = seconds_a_race(250), seconds_a_race(1000)
    keep(pytest_250_seconds=few, pytest_1000_seconds=many)
    assert many < 1.5 * few


# Runs a command and prints its peak in KiB. A small process between: a child starts with the peak of
# the process that forked it, and this one has held TensorFlow.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_report_time_grows_in_proportion(tmp_path):
    """A page, and reading a run alone, of 5,000 and 20,000 measurements of 200 samples each."""
    seconds, peak = {}, 0
    for count in (5_000, 20_000):
        folder = synthetic.write_large(tmp_path / str(count), count)
        commands = {
            "page": ["report", str(folder)],
            "table": ["report", str(folder), "--format", "csv"],
        }
        if count == 20_000:
            commands["compare"] = ["compare", str(folder), str(folder)]
        for name, words in commands.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", PEAK, sys.executable, "-m", "poolbench", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            seconds[name, count] = time.perf_counter() - start
            peak = max(peak, int(done.stdout) * 1024)
    keep(
        **{f"{name}_{count}_seconds": value for (name, count), value in seconds.items()},
        report_peak_nbytes=peak,
    )
    # Four times as many: in proportion it is four times the time or less, by the square sixteen.
    for name in ("page", "table"):
        assert seconds[name, 20_000] < 8 * seconds[name, 5_000]
    assert peak < 1e9
