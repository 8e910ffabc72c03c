"""Import a pytest-benchmark file of any project as a run that the report renders.

The file itself is kept beside the journal, byte for byte, so that `pytest-benchmark compare` shows of the run
what it shows of the file. The journal holds its timings: one process, one allocation, no baseline.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.axes import is_declared
from poolbench.core.case import make_case
from poolbench.core.errors import StoreError
from poolbench.core.records import Environment, Header, Measurement, Samples
from poolbench.core.registry import load_builtin
from poolbench.core.text import one_line
from poolbench.store.journal import JOURNAL, Journal, encode_line

MAX_NBYTES = 64 << 20
# The most samples that fit a line of the journal; of more samples, evenly spaced ones are taken.
MAX_SAMPLES = 250_000
NAME = "benchmark.json"
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# pytest-benchmark writes NaN and Infinity, which JSON lacks; strings are left unchanged.
NON_FINITE = re.compile(rb'"(?:[^"\\]|\\.)*"?|-?\b(?:NaN|Infinity)\b', re.DOTALL)
Number = float | None


class _Stats(msgspec.Struct):
    """The statistics of one benchmark; `data` is empty if it was left out on purpose."""

    median: Number = None
    iterations: Number = None
    data: list[Number] | None = None


class _Benchmark(msgspec.Struct):
    name: str
    stats: _Stats
    fullname: str | None = None
    group: str | None = None


class _File(msgspec.Struct):
    benchmarks: list[_Benchmark]
    version: str | None = None
    datetime: str | None = None
    machine_info: dict[str, Any] | None = None


def import_file(path: Path, results: Path, name: str | None = None) -> Path:
    """Make a run of a pytest-benchmark file; return its folder.

    Args:
        path: a file written by `pytest --benchmark-json=FILE`.
        results: folder of the runs.
        name: of the run; None: the file's name, in characters that are safe in a path.

    Raises:
        StoreError: the file is unreadable, invalid or too large, or the run exists; nothing is left behind.
    """
    data = _read(path)
    file = _parse(path, data)
    run = re.sub(r"[^A-Za-z0-9_-]+", "-", name or path.stem).strip("-")[:80] or "imported"
    folder = results / run
    if (folder / JOURNAL).exists():
        raise StoreError(f"{run} holds a run already; pick another name (--run NAME)")
    lines = b"".join(encode_line(record) for record in (_header(run, file), *_measurements(file)))
    existed = folder.exists()
    try:
        with Journal(folder) as journal:
            journal.write(lines)
        (folder / NAME).write_bytes(data)
    except (StoreError, OSError) as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot write {run}: {error.strerror}") from None
    return folder


def _read(path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is no regular file; expected what --benchmark-json writes")
        if found.st_size > MAX_NBYTES:
            raise StoreError(f"{path} has {found.st_size} bytes; at most {MAX_NBYTES} are read")
        with path.open("rb") as file:
            return file.read(MAX_NBYTES)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: Path, data: bytes) -> _File:
    if data.startswith(b"\x1f\x8b"):
        raise StoreError(f"{path} is compressed by gzip; unpack it first (gunzip)")
    try:
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if data.startswith(mark):
                data = data.decode(encoding).encode()
        file = _decode(data)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise StoreError(
            f"{path} is no pytest-benchmark file ({one_line(str(error), 200)}); "
            "expected what --benchmark-json writes"
        ) from None
    if not file.benchmarks:
        raise StoreError(f"{path} holds no benchmark")
    return file


def _decode(data: bytes) -> _File:
    try:
        return msgspec.json.decode(data, type=_File)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        text = NON_FINITE.sub(lambda m: m[0] if m[0].startswith(b'"') else b"null", data)
        if text == data:
            raise
        return msgspec.json.decode(text, type=_File)


def _header(run: str, file: _File) -> Header:
    machine = file.machine_info or {}
    cpu = machine.get("cpu")
    brand = (cpu.get("brand_raw") or cpu.get("brand", "")) if isinstance(cpu, dict) else ""
    text: dict[str, str | int | float | bool | None] = {"processor": _word(brand)}
    text |= {key: _word(machine.get(key)) for key in ("machine", "system", "release")}
    versions = {
        "python": _word(machine.get("python_version")),
        "pytest-benchmark": _word(file.version)[:40],
    }
    return Header(
        run=run,
        created=_word(file.datetime)[:40]
        or dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        environment=Environment(
            machine=text, devices={"cpu:0": "CPU"}, versions=versions, settings={}, source={}
        ),
        options={"imported": True},
        seed=0,
    )


def _word(value: object) -> str:
    """Return a value of the file as text; nested values are not followed."""
    return value[:200] if isinstance(value, str) else ""


def _measurements(file: _File) -> list[Measurement]:
    """Return one measurement per benchmark; a number distinguishes equal names."""
    load_builtin()
    seen: dict[tuple[str, str], int] = {}
    found = []
    for benchmark in file.benchmarks:
        op = (benchmark.group or "imported")[:200]
        if is_declared(op):  # a group of that name is not a case of the op: it lacks its axes
            op = f"{op} (imported)"
        name = (benchmark.fullname or benchmark.name)[:300]
        seen[op, name] = seen.get((op, name), 0) + 1
        if seen[op, name] > 1:
            name = f"{name} ({seen[op, name]})"
        found.append(_measurement(op, name, benchmark.stats))
    return found


def _measurement(op: str, name: str, stats: _Stats) -> Measurement:
    seconds = [v for v in stats.data or [stats.median] if v and math.isfinite(v) and v > 0]
    seconds = seconds[:: -(-len(seconds) // MAX_SAMPLES) or 1]
    iterations = stats.iterations or 1
    calls = max(1, int(min(iterations, 10**9))) if math.isfinite(iterations) else 1
    count = len(seconds)
    zeros = (0,) * count
    return Measurement(
        case=make_case(op=op, mode="eager"),  # pytest-benchmark knows the group only
        candidate=name,
        status="ok" if count else "not_run",
        reason="" if count else "the file holds no finite timing of it",
        samples=Samples(
            process=zeros, allocation=zeros, round=tuple(range(count)), calls=(calls,) * count,
            seconds=tuple(seconds), contended=zeros,
        ),
    )  # fmt: skip
