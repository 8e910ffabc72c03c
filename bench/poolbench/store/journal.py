"""Journal in, records out: one checksummed JSON line per race, synced as it is written.

A line is `{"crc32":"89abcdef","schema":2,"records":[...]}`; the checksum is of the bytes of the records. Non-finite
numbers are written as strings ("nan", "inf"), because JSON has none. The records of a race share a line, so that a
race is in the journal with all its measurements or not at all. Lines of schema 1 hold one record and say by `more`
how many of its race follow.

A journal may come from anybody. One damaged line costs its own race: the others are read, and the loss is said.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec

from poolbench.core.errors import StoreError
from poolbench.core.records import (
    SCHEMA_VERSION,
    AnyRecord,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Record,
    Selftest,
    TraceSummary,
)
from poolbench.core.text import one_line
from poolbench.store.validate import decode_records

JOURNAL = "journal.jsonl"
# A night's run of everything writes some tens of MiB. Small values take up to 24 times as much memory as text,
# so that neither a line nor all of them may be large.
MAX_NBYTES = 256 << 20  # twenty thousand measurements of two hundred samples are 216 MB
MAX_LINE_NBYTES = 16 << 20
MAX_DAMAGED = 20  # a journal with more damaged lines than this is no journal
TORN = "the last race was torn and is left out"
R = TypeVar("R", bound=Record)


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    crc32: str
    records: msgspec.Raw = msgspec.Raw()
    record: msgspec.Raw = msgspec.Raw()
    more: int = 0
    schema: int = 1


_encoder = msgspec.json.Encoder()
_line_decoder = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run read from disk.

    Attributes:
        path: its folder.
        header: the journal's first line.
        records: all other records, in order.
        dropped: description of unfinished or damaged lines that were ignored; '' if there are none.
    """

    path: Path
    header: Header
    records: tuple[AnyRecord, ...]
    dropped: str = ""

    def of(self, kind: type[R]) -> list[R]:
        """Return the records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """The last measurement of each candidate, case and node: a repeated race replaces itself."""
        return list({(m.case, m.candidate, m.node): m for m in self.of(Measurement)}.values())

    @property
    def capabilities(self) -> list[MatrixCell]:
        return self.of(MatrixCell)

    @property
    def trace_summaries(self) -> list[TraceSummary]:
        """The last summary of each candidate and case: a repeated recording replaces itself."""
        return list({(a.case, a.candidate): a for a in self.of(TraceSummary)}.values())

    @property
    def selftests(self) -> list[Selftest]:
        return self.of(Selftest)

    @property
    def networks(self) -> list[ModelResult]:
        """The last result of each model, direction, mode, batch size and candidate."""
        found = self.of(ModelResult)
        keys = [(r.model, r.direction, r.mode, r.batch, r.op, r.candidate) for r in found]
        return list(dict(zip(keys, found, strict=True)).values())


def encode_line(*records: Record) -> bytes:
    """Return the records of one race as a line of the journal.

    Raises:
        StoreError: the line would exceed the limit for reading.
    """
    plain = [finite_text(msgspec.to_builtins(record)) for record in records]
    try:
        body = _encoder.encode(plain)
    except UnicodeEncodeError:  # a lone surrogate, in an error's text or a name
        body = _encoder.encode(_escape_surrogates(plain))
    line = b'{"crc32":"%08x","schema":%d,"records":%s}\n' % (zlib.crc32(body), SCHEMA_VERSION, body)
    if len(line) > MAX_LINE_NBYTES:
        raise StoreError(f"a race of {len(line)} bytes; a line has at most {MAX_LINE_NBYTES}")
    return line


def finite_text(value: Any) -> Any:
    """Return the value with non-finite floats as strings: msgspec would write them as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: finite_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value if _all_finite(value) else [finite_text(item) for item in value]
    return value


def _all_finite(values: Sequence[Any]) -> bool:
    """Tell whether all values are finite numbers, by their sum, which is 100 times faster than a loop.

    False if the sum of finite numbers overflows; the caller then loops.
    """
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _escape_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escape_surrogates(key): _escape_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_surrogates(item) for item in value]
    return value


def decode_line(line: bytes) -> tuple[AnyRecord, ...]:
    """Return the records of a line of the journal.

    Raises:
        StoreError: the line is invalid; the text says why.
    """
    return _decode(line)[0]


def _decode(line: bytes) -> tuple[tuple[AnyRecord, ...], int]:
    """Return a line's records, and how many more of its race follow (schema 1)."""
    if len(line) > MAX_LINE_NBYTES:
        raise StoreError(f"it has {len(line)} bytes; a line has at most {MAX_LINE_NBYTES}")
    try:
        outer = _line_decoder.decode(line)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise StoreError(one_line(str(error))) from None
    body = bytes(outer.record if outer.schema == 1 else outer.records)
    if f"{zlib.crc32(body):08x}" != outer.crc32:
        raise StoreError("its checksum does not match")
    return decode_records(body, outer.schema), outer.more


class Journal:
    """A run's journal, open for appending; a lock keeps a second writer out.

    The lock is the operating system's, so that a writer that died does not hold it.

    Raises:
        StoreError: another run writes here, the journal exceeds the limit for reading, or writing fails.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise StoreError(
                f"another run is writing {folder.name}; wait for it, or pick another --run NAME"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from None
        try:
            self.dropped = _cut_torn_line(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise StoreError(f"cannot write {self.path}: {error.strerror or error}") from None
        except StoreError:
            self._lock.release()
            raise

    def append(self, *records: Record) -> None:
        """Write the records of one race as a line and sync it: all are kept, or none.

        Raises:
            StoreError: writing fails, or the journal is full; everything synced before is kept.
        """
        self.write(encode_line(*records))

    def write(self, data: bytes) -> None:
        """Write whole lines and sync them: all are kept, or none.

        Raises:
            StoreError: writing fails, or the journal is full; everything synced before is kept.
        """
        size = self._file.seek(0, os.SEEK_END)
        if size + len(data) > MAX_NBYTES:
            raise StoreError(
                f"{self.path.name} is full; a journal has at most {MAX_NBYTES} bytes: begin another --run NAME"
            )
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the next writer cuts a torn line
                self._file.truncate(size)
            raise StoreError(
                f"cannot write {self.path.name}: {error.strerror or error}; what was finished is "
                f"kept: make room, then go on with --resume {self.path.parent.name}"
            ) from None

    def close(self) -> None:
        """Close the file and release the lock."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> str:
    """Cut a line that a killed writer left unfinished, so that the next one is intact; return a description of the cut.

    Raises:
        StoreError: the journal exceeds the limit for reading; it is left unchanged.
    """
    if not path.exists():
        return ""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        _check_size(path, size)
        file.seek(max(0, size - MAX_LINE_NBYTES))
        end = file.read()
        torn = len(end) - (end.rfind(b"\n") + 1)
        if not torn:
            return ""
        file.truncate(size - torn)
        os.fsync(file.fileno())
    return TORN


def _check_size(path: Path, size: int) -> None:
    if size > MAX_NBYTES:
        raise StoreError(f"{path} is too large; a journal has at most {MAX_NBYTES} bytes")


def read_run(folder: Path) -> StoredRun:
    """Return the run in a folder.

    Raises:
        StoreError: there is no journal, or it is of another schema version, too large, or damaged in its first line
            or in many.
    """
    path = folder / JOURNAL
    try:
        if not path.is_file():
            raise StoreError(f"cannot read {path}: no such file; expected a run's folder")
        _check_size(path, path.stat().st_size)
        with path.open("rb") as file:
            line = file.readline(MAX_LINE_NBYTES + 1)
            torn = len(line) <= MAX_LINE_NBYTES and not line.endswith(b"\n")
            header = _read_header(path, b"" if torn else line)
            records, dropped = _read_lines(path, file)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; expected a run's folder") from None
    return StoredRun(path=folder, header=header, records=tuple(records), dropped="; ".join(dropped))


def _read_lines(path: Path, lines: Iterable[bytes]) -> tuple[list[AnyRecord], list[str]]:
    """Return the records of complete races, and descriptions of the lines that cannot be read."""
    records: list[AnyRecord] = []
    race: list[AnyRecord] = []  # of schema 1, in which a race spans several lines
    damaged: list[str] = []
    for number, line in enumerate(lines, 2):
        if not line.endswith(b"\n"):
            race = []
            damaged.append(TORN)
            break
        try:
            found, more = _decode(line)
        except StoreError as error:
            damaged.append(f"line {number} is damaged and is left out: {error}")
            race = []
            if len(damaged) > MAX_DAMAGED:
                raise StoreError(f"{path} line {number} cannot be read: {error}") from None
            continue
        if any(isinstance(record, Header) for record in found):
            raise StoreError(f"{path} has a second header line; two runs were put into one")
        race += found
        if more <= 0:
            records += race
            race = []
    if race:
        damaged.append(TORN)
    return records, damaged


def read_header(folder: Path) -> Header:
    """Return the header of the run in a folder, without the rest of its journal.

    Raises:
        StoreError: there is no journal, or its first line is not a header.
    """
    path = folder / JOURNAL
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_LINE_NBYTES + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; expected a run's folder") from None
    return _read_header(path, line)


def _read_header(path: Path, line: bytes) -> Header:
    _check_schema(path, line)
    try:
        records = decode_line(line)
    except StoreError as error:
        raise StoreError(f"{path} line 1 cannot be read: {error}") from None
    if len(records) != 1 or not isinstance(records[0], Header):
        raise StoreError(f"{path} does not begin with a header line; it is no journal of poolbench")
    return records[0]


class _SchemaPeek(msgspec.Struct):
    schema: int


class _LinePeek(msgspec.Struct):
    records: list[_SchemaPeek] = []
    record: _SchemaPeek | None = None


def _check_schema(path: Path, line: bytes) -> None:
    try:
        peek = msgspec.json.decode(line, type=_LinePeek)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return  # decode_line reports the better error
    first = peek.records[0] if peek.records else peek.record
    if first is not None and first.schema not in (1, SCHEMA_VERSION):
        raise StoreError(
            f"{path} has schema version {first.schema}; this poolbench reads 1 to {SCHEMA_VERSION}"
        )
