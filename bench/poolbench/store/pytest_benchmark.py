"""A plain pytest-benchmark file of any project, as a run that the report renders.

The file itself is kept beside the journal, byte for byte, so that `pytest-benchmark compare` shows of the run
what it shows of the file. The journal holds its timings: one process, one allocation, no baseline.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.case import make_case
from poolbench.core.errors import StoreError
from poolbench.core.records import Environment, Header, Measurement, Samples
from poolbench.store.journal import JOURNAL, Journal

MAX_NBYTES = 64 << 20
NAME = "benchmark.json"


class _Stats(msgspec.Struct):
    """What pytest-benchmark says of one benchmark; `data` is there unless it was left out on purpose."""

    median: float
    rounds: int = 1
    iterations: int = 1
    data: list[float] = []


class _Benchmark(msgspec.Struct):
    name: str
    stats: _Stats
    fullname: str = ""
    group: str | None = None


class _File(msgspec.Struct):
    benchmarks: list[_Benchmark]
    version: str = ""
    datetime: str = ""
    machine_info: dict[str, Any] = {}


def import_file(path: Path, results: Path, name: str | None = None) -> Path:
    """Make a run of a pytest-benchmark file; its folder.

    Args:
        path: what `pytest --benchmark-json=FILE` wrote.
        results: where runs are kept.
        name: of the run; None: the file's, in letters that are safe in a path.

    Raises:
        StoreError: it cannot be read or is no such file, or the run is there already.
    """
    data = _read(path)
    file = _parse(path, data)
    run = re.sub(r"[^A-Za-z0-9_-]+", "-", name or path.stem).strip("-")[:80] or "imported"
    folder = results / run
    if (folder / JOURNAL).exists():
        raise StoreError(f"{run} holds a run already; pick another name (--run NAME)")
    with Journal(folder) as journal:
        journal.append(_header(run, file), *_measurements(file))
    (folder / NAME).write_bytes(data)
    return folder


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_NBYTES:
            raise StoreError(f"{path} has {size} bytes; at most {MAX_NBYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: Path, data: bytes) -> _File:
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        said = str(error).split("\n")[0][:200]
        raise StoreError(
            f"{path} is no pytest-benchmark file ({said}); expected what --benchmark-json writes"
        ) from None
    if not file.benchmarks:
        raise StoreError(f"{path} holds no benchmark")
    return file


def _header(run: str, file: _File) -> Header:
    cpu = file.machine_info.get("cpu")
    brand = cpu.get("brand_raw", "") if isinstance(cpu, dict) else ""
    text: dict[str, str | int | float | bool | None] = {"processor": _word(brand)}
    text |= {key: _word(file.machine_info.get(key)) for key in ("machine", "system", "release")}
    versions = {
        "python": _word(file.machine_info.get("python_version")),
        "pytest-benchmark": file.version[:40],
    }
    return Header(
        run=run,
        created=file.datetime[:40]
        or dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        environment=Environment(
            machine=text,
            devices={"cpu:0": "CPU"},
            versions=versions,
            settings={},
            source={},
        ),
        options={"imported": True},
        seed=0,
    )


def _word(value: object) -> str:
    """A text of the file as far as it is one; nested values are not walked through."""
    return value[:200] if isinstance(value, str) else ""


def _measurements(file: _File) -> list[Measurement]:
    """One measurement a benchmark; equal names are told apart by a number."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for benchmark in file.benchmarks:
        op = (benchmark.group or "imported")[:200]
        name = (benchmark.fullname or benchmark.name)[:300]
        seen[op, name] = seen.get((op, name), 0) + 1
        if seen[op, name] > 1:
            name = f"{name} ({seen[op, name]})"
        seconds = benchmark.stats.data or [benchmark.stats.median]
        seconds = [value for value in seconds if math.isfinite(value) and value > 0]
        found.append(
            _measurement(op, name, seconds, max(1, min(benchmark.stats.iterations, 10**9)))
        )
    return found


def _measurement(op: str, name: str, seconds: list[float], calls: int) -> Measurement:
    count = len(seconds)
    zeros = (0,) * count
    return Measurement(
        case=make_case(op=op, mode="eager"),  # pytest-benchmark has the group alone
        candidate=name,
        status="ok" if count else "not_run",
        reason="" if count else "the file holds no finite timing of it",
        samples=Samples(
            process=zeros, allocation=zeros, round=tuple(range(count)), calls=(calls,) * count,
            seconds=tuple(seconds), contended=zeros,
        ),
    )  # fmt: skip
