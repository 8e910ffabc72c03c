"""Untrusted files: mutated journals and pytest-benchmark files through the loaders.

Each becomes a result or a typed error of one line, within 2 seconds (four times what
importing pandas takes) and 1 GB: never anything else.
"""

import functools
import json
import random
import sys
import time
import typing
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import synthetic
from alone import cpu_seconds
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import AnyRecord
from poolbench.report.frame import load
from poolbench.report.history import SUMMARY, runs_of_machine, write_summary
from poolbench.store.journal import JOURNAL, read_run
from poolbench.store.pytest_benchmark import import_file

LIMIT_NBYTES = 1 << 30
TYPED = (StoreError, UsageError)
HOSTILE = (
    None, True, False, 0, -1, 1e308, 5e-324, -0.0, 10**15, 10**30, 2**63, 2**64, "", "nan", "inf",
    "-inf", "NaN", "Infinity", "../../../etc/passwd", "a\nb", "<script>alert(1)</script>", "\u0000",
    "\u202e", "x" * 10_000, [], {}, [[]], [None], {"": None}, [1] * 1000, {"type": "header"},
)  # fmt: skip


@functools.cache
def limit_seconds():
    """Two seconds of the processor where `import pandas` takes half a one, and more on a slower machine."""
    return 4 * cpu_seconds("-c", "import pandas")[0]


def paths(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, (dict, list)) and len(path) < 50:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def without(value, path):
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(value[path[0]], path[1:])
    return copy


def mutate_value(value, generator):
    """The JSON value with one to three of its parts replaced, removed, doubled or nested deeply."""
    for _ in range(generator.randint(1, 3)):
        places = list(paths(value))
        place = generator.choice(places)
        roll = generator.random()
        if roll < 0.7 or not place:
            value = replaced(value, place, generator.choice(HOSTILE))
        elif roll < 0.9:
            value = without(value, place)
        else:
            nested = "deep"
            for _ in range(generator.choice((10, 500))):
                nested = [nested]
            value = replaced(value, place, nested)
    return value


def mutate_bytes(data, generator):
    """The bytes with some flipped, cut, doubled, moved, or made no UTF-8."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place, length = generator.randrange(len(data) + 1), generator.choice((1, 2, 8, 100))
        piece = bytes(data[place : place + length])
        roll = generator.randrange(7)
        if roll == 0:
            data[place : place + 1] = bytes([generator.randrange(256)])
        elif roll == 1:
            del data[place : place + length]
        elif roll == 2:
            data[place:place] = piece * generator.choice((1, 2, 50))
        elif roll == 3:
            data[place:place] = generator.choice(
                (b"\xff\xfe", b"\x00", b"NaN", b"Infinity", b"1e999")
            )
        elif roll == 4:
            data[place:place] = b"[" * generator.choice((10, 5000))
        elif roll == 5:
            del data[place:]
        else:
            data[place : place + length] = piece[::-1]
        if not data:
            break
    return bytes(data)


def journal_line(records, more=0):
    body = json.dumps(records).encode()
    follow = b'"more":%d,' % more if more else b""
    return b'{"crc32":"%08x","schema":2,%s"records":%s}\n' % (zlib.crc32(body), follow, body)


def mutate_journal(lines, generator):
    """A journal changed within its bytes, or within its records and with checksums that are right."""
    if generator.random() < 0.4:
        return mutate_bytes(b"".join(lines), generator)
    lines = list(lines)
    for _ in range(generator.randint(1, 2)):
        number = generator.randrange(len(lines))
        records = json.loads(lines[number])["records"]
        more = generator.choice((0, 0, 0, 1, -1, 10**12))
        try:
            lines[number] = journal_line(mutate_value(records, generator), more)
        except (KeyError, TypeError, RecursionError):
            continue
    if generator.random() < 0.2:
        generator.shuffle(lines)
    if generator.random() < 0.2:
        lines.append(generator.choice(lines))
    return b"".join(lines)


def mutate_json(data, generator):
    if generator.random() < 0.4:
        return mutate_bytes(data, generator)
    return json.dumps(mutate_value(json.loads(data), generator)).encode()


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The lines of a small whole journal with a record of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    plan = synthetic.Plan(processes=2, allocations=1, rounds=2)
    case = synthetic.op_case("depth_max_pool")
    names = list(synthetic.FACTORS[case.op])[:4]
    found = synthetic.race(case, np.random.default_rng(1), plan=plan, names=names)
    head, unusual = synthetic.unusual()
    extras = synthetic.extras()
    synthetic.write(folder, [*found, *unusual, *extras[::7], *extras[-7:]], head)
    kinds = {type(record) for record in (head, *load(folder).run.records)}  # whole, it loads
    assert kinds == set(typing.get_args(AnyRecord))
    return (folder / JOURNAL).read_bytes().splitlines(keepends=True)


BENCHMARK = {
    "machine_info": {"machine": "x86_64", "python_version": "3.11.7", "cpu": {"brand_raw": "CPU"}},
    "commit_info": {"id": "0", "dirty": False},
    "benchmarks": [
        {
            "group": "pool", "name": f"test_pool[{name}]", "fullname": f"t.py::test_pool[{name}]",
            "params": {"size": 3}, "param": name, "extra_info": {"op": "pool", "candidate": name},
            "options": {"timer": "perf_counter"},
            "stats": {"min": 0.1, "max": 0.3, "mean": 0.2, "stddev": 0.1, "rounds": 3, "median": 0.2,
                      "iqr": 0.1, "ops": 5.0, "total": 0.6, "iterations": 1, "data": [0.1, 0.2, 0.3]},
        }
        for name in ("a", "b")
    ],
    "datetime": "2026-01-01T00:00:00+00:00",
    "version": "5.3.1",
}  # fmt: skip


def load_mutated_journals(folder, lines, count, seed):
    """Load so many mutated journals; return how many were results."""
    generator = random.Random(seed)
    results = 0
    for number in range(count):
        data = mutate_journal(lines, generator)
        (folder / JOURNAL).write_bytes(data)
        results += succeeds(lambda: load(folder), f"{seed}/{number}")
    return results


def succeeds(function, label):
    """Return whether the function returned; the only other way to end is a typed error of one line, in time."""
    start = time.process_time()  # of the processor, for others use the machine too
    returned = True
    try:
        function()
    except TYPED as error:
        returned = False
        assert "\n" not in str(error), label
        assert len(str(error)) < 1500, label
    except Exception as error:
        raise AssertionError(f"mutation {label}: {type(error).__name__}: {error}") from error
    assert time.process_time() - start < limit_seconds(), label
    return returned


def import_mutated_files(folder, count, seed):
    """Import so many mutated files; return how many became runs."""
    generator = random.Random(seed)
    whole = json.dumps(BENCHMARK).encode()
    results = 0
    path = folder / "benchmark.json"
    for number in range(count):
        path.write_bytes(mutate_json(whole, generator))
        results += succeeds(
            lambda: load(import_file(path, folder / "results", f"r{number}")),  # noqa: B023
            f"{seed}/{number}",
        )
    return results


def load_mutated_summaries(results, lines, count, seed):
    """Load so many times a run beside a mutated summary of another one; return how often that was read."""
    one, other = results / "one", results / "other"
    for folder in (one, other):
        folder.mkdir(parents=True)
        (folder / JOURNAL).write_bytes(b"".join(lines))
        write_summary(read_run(folder), print)
    whole = json.loads((one / SUMMARY).read_bytes()) | {"run": "other"}
    generator = random.Random(seed)
    read = 0
    for number in range(count):
        mutated = mutate_json(json.dumps(whole).encode(), generator)
        (other / SUMMARY).write_bytes(mutated)
        succeeds(lambda: (load(one), runs_of_machine(read_run(one))), f"{seed}/{number}")
        read += len(runs_of_machine(read_run(one))) > 1
    return read


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status_nbytes(name):
    """VmHWM, the most resident memory so far, or VmRSS, what is resident now."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def peak_nbytes():
    """The most memory that this test has taken, whatever the tests before it took."""
    if not CLEAR_REFS.exists():
        pytest.skip("the system does not let a process forget its peak")
    CLEAR_REFS.write_text("5")  # forget it
    before = status_nbytes("VmRSS")
    return lambda: status_nbytes("VmHWM") - before


@pytest.fixture(autouse=True)
def _quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_some_mutated_journals(tmp_path, journal):
    assert 0 < load_mutated_journals(tmp_path, journal, 150, seed=1) < 150


def test_some_mutated_benchmark_files(tmp_path):
    assert 0 < import_mutated_files(tmp_path, 60, seed=2) < 60


def test_some_mutated_summaries_of_other_runs(tmp_path, journal):
    assert load_mutated_summaries(tmp_path, journal, 60, seed=3)


def seeds(usual, more):
    """Return so many seeds, and more that only the tests of many minutes take."""
    return [*range(usual), *(pytest.param(usual + n, marks=pytest.mark.long) for n in range(more))]


@pytest.mark.slow
def test_many_mutated_summaries_of_other_runs(tmp_path, journal):
    assert load_mutated_summaries(tmp_path, journal, 500, seed="many")


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(2, 13))
def test_many_mutated_journals(tmp_path, journal, seed, peak_nbytes):
    assert load_mutated_journals(tmp_path, journal, 1000, seed=f"many {seed}")
    assert peak_nbytes() < LIMIT_NBYTES


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(1, 4))
def test_many_mutated_benchmark_files(tmp_path, seed, peak_nbytes):
    assert import_mutated_files(tmp_path, 1000, seed=f"many {seed}")
    assert peak_nbytes() < LIMIT_NBYTES


HUGE = {
    "a line": lambda: b'{"crc32":"0","record":' + b"[" * (8 << 20) + b"\n",
    "nothing": lambda: b"\0" * (150 << 20),
    "lines": lambda: b"{}\n" * (40 << 20),
    "open": lambda: b'{"crc32":"00000000","more":1,"record":0}\n' * (1 << 20),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_file_is_refused_in_time(tmp_path, kind):
    (tmp_path / JOURNAL).write_bytes(HUGE[kind]())
    start = time.process_time()
    with pytest.raises(StoreError) as caught:
        load(tmp_path)
    assert time.process_time() - start < limit_seconds()
    assert "\n" not in str(caught.value)


def test_a_race_that_was_run_again_is_shown_once(tmp_path, journal):
    (tmp_path / JOURNAL).write_bytes(b"".join([*journal, *journal[1:]]))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / JOURNAL).write_bytes(b"".join(journal))
    assert len(load(tmp_path).table) == len(load(tmp_path / "whole").table)
