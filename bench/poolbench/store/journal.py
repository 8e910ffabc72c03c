"""Journal in, records out: one checksummed JSON line a record, synced as it is written.

Pure: msgspec and filelock. A line is `{"crc32":"89abcdef","record":{...}}`; the checksum is of the
record's bytes as they stand in the line. Non-finite numbers are written as strings ("nan", "inf"),
for JSON has none.

The records of a race belong together: each line but the last of such a batch says how many more
there are, `{"crc32":...,"more":3,"record":...}`; a batch that a killed writer left unfinished is
left out whole: a race is in the journal with all its measurements or not at all.

A journal may come from anybody: what is read is checked here, so that nobody else need doubt it.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec

from poolbench.core.axes import STANDARD, Axis, axes_of, declare_infos
from poolbench.core.case import Case
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import (
    MAX_COUNT,
    SCHEMA_VERSION,
    AnyRecord,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Node,
    Record,
    Samples,
    Selftest,
    TimeBreakdown,
    TraceSummary,
)
from poolbench.store.schema1 import lift

JOURNAL = "journal.jsonl"
# A night's run of the whole product writes some tens of MiB. Small values take up to 24 times as
# much memory as text, so that one line must not be large, nor all of them.
MAX_NBYTES = 256 << 20  # twenty thousand measurements of two hundred samples are 216 MB
MAX_LINE_NBYTES = 4 << 20
# Where the schema takes any scalar, a number that was not finite comes back as its text.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
SHARED_COLUMNS = ("process", "allocation", "round", "calls", "contended")
TRACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}|")
R = TypeVar("R", bound=Record)


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    crc32: str
    record: msgspec.Raw
    more: int = 0
    schema: int = 1


_encoder = msgspec.json.Encoder()
_line_decoder = msgspec.json.Decoder(_Line)
_record_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord, strict=False)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as it was read.

    Attributes:
        path: its folder.
        header: the journal's first line.
        records: all other lines, in order.
        dropped: what was left out of a torn last line, in words; '' if nothing was.
    """

    path: Path
    header: Header
    records: tuple[AnyRecord, ...]
    dropped: str = ""

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def measurements(self) -> list[Measurement]:
        """The last of each candidate, case and node: a race that is run again replaces itself."""
        return list({(m.case, m.candidate, m.node): m for m in self.of(Measurement)}.values())

    @property
    def capabilities(self) -> list[MatrixCell]:
        return self.of(MatrixCell)

    @property
    def trace_summaries(self) -> list[TraceSummary]:
        """The last of each candidate and case: a trace that is recorded again replaces itself."""
        return list({(a.case, a.candidate): a for a in self.of(TraceSummary)}.values())

    @property
    def selftests(self) -> list[Selftest]:
        return self.of(Selftest)

    @property
    def networks(self) -> list[ModelResult]:
        """The last of each model, its direction, mode and batch, and candidate."""
        found = self.of(ModelResult)
        keys = [(r.model, r.direction, r.mode, r.batch, r.op, r.candidate) for r in found]
        return list(dict(zip(keys, found, strict=True)).values())


def encode_line(record: Record, *, more: int = 0) -> bytes:
    """A record as a line of the journal; `more` of its batch follow."""
    plain = finite_text(msgspec.to_builtins(record))
    try:
        body = _encoder.encode(plain)
    except UnicodeEncodeError:  # a lone surrogate, in an error's text or a name
        body = _encoder.encode(_spell_surrogates(plain))
    follow = b'"more":%d,' % more if more else b""
    line = b'{"crc32":"%08x","schema":%d,%s"record":%s}\n'
    return line % (zlib.crc32(body), SCHEMA_VERSION, follow, body)


def finite_text(value: Any) -> Any:
    """The value with non-finite floats as strings: msgspec would write them as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: finite_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value if _all_finite(value) else [finite_text(item) for item in value]
    return value


def _all_finite(values: Sequence[Any]) -> bool:
    """Whether these are numbers, all finite: a sum tells, in a hundredth of a walk's time.

    A sum that overflows says False of finite numbers; then they are walked.
    """
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _spell_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_spell_surrogates(key): _spell_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spell_surrogates(item) for item in value]
    return value


def decode_line(line: bytes) -> AnyRecord:
    """A record from a line of the journal.

    Raises:
        StoreError: it is no such line, in words.
    """
    return _decode_batched(line)[0]


def _decode_batched(line: bytes) -> tuple[AnyRecord, int]:
    """A line's record, and how many more of its batch follow."""
    if len(line) > MAX_LINE_NBYTES:
        raise StoreError(f"it has {len(line)} bytes; a line has at most {MAX_LINE_NBYTES}")
    try:
        outer = _line_decoder.decode(line)
        body = bytes(outer.record)
        if f"{zlib.crc32(body):08x}" != outer.crc32:
            raise StoreError("its checksum does not match")
        record = check_record(_decode_record(body, outer.schema))
    # A ValueError of its own comes from msgspec where a number's text is beyond any number.
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise StoreError(_short(error)) from None
    return record, outer.more


def _decode_record(body: bytes, schema: int) -> AnyRecord:
    if schema == SCHEMA_VERSION:
        return _record_decoder.decode(body)
    if schema != 1:
        raise StoreError(
            f"its schema is {schema}; this version reads 1 to {SCHEMA_VERSION}: update poolbench"
        )
    plain = msgspec.json.decode(body)
    if not isinstance(plain, dict):
        raise StoreError("a record is a JSON object")
    record: AnyRecord = msgspec.convert(lift(plain), AnyRecord, strict=False)
    return record


def _short(error: Exception, limit: int = 300) -> str:
    """An error's first line, in letters that a terminal shows as they are."""
    text = (str(error) or type(error).__name__).split("\n")[0][:limit]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def check_record(record: AnyRecord) -> AnyRecord:
    """The record, if what the types do not say holds as well.

    Raises:
        StoreError: a case that no axis allows, columns of unequal lengths, a path in a name, ...
    """
    if isinstance(record, Header):
        _declare_axes(record)
    if isinstance(record, (Measurement, TraceSummary)):
        _check_case(record.case)
    if isinstance(record, (Measurement, ModelResult)):
        _check_samples(record.samples)
    if isinstance(record, Measurement):
        _check_counts(record)
    if isinstance(record, TraceSummary):
        if not TRACE_NAME.fullmatch(record.trace):
            raise StoreError(f"a trace is named by a folder's name; got {record.trace[:80]!r}")
        parts = tuple(_restore(part) for part in record.parts)
        return msgspec.structs.replace(record, parts=parts)
    if isinstance(record, (MatrixCell, ModelResult, Selftest)):
        return msgspec.structs.replace(record, figures=_restore(record.figures))
    return record


def _restore(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in figures.items()
    }


def _declare_axes(header: Header) -> None:
    """Make the axes of ops that are not registered here known, so that their cases have labels."""
    try:
        for op, infos in header.axes.items():
            declare_infos(op, infos)
    except UsageError as error:
        raise StoreError(_short(error)) from None


@functools.lru_cache(maxsize=4096)
def _check_case(case: Case) -> None:
    if not case.op or not case.axes.keys() >= STANDARD.keys():
        raise StoreError(f"its case is not as a case is written: {case!r:.200}")
    known = axes_of(case.op)
    try:
        for name, value in case.axes.items():
            axis = known.get(name) or Axis(name=name, parse=lambda text: text)  # checks the name
            if name in known and axis.read(value) != value:
                raise StoreError(f"{name} is not as a case is written: {value!r:.80}")
    except (UsageError, TypeError, ValueError) as error:
        raise StoreError(_short(error)) from None


def _check_samples(samples: Samples) -> None:
    columns = (
        samples.process, samples.allocation, samples.round, samples.calls, samples.contended,
    )  # fmt: skip
    count = len(samples)
    if not {*map(len, columns)} <= {0, count}:
        raise StoreError("its samples' columns have unequal lengths")
    if count and not all(len(column) for column in columns[:3]):
        raise StoreError("its samples lack process, allocation or round")
    # A finite sum has finite parts, and is quickly found; one by one only where it is not.
    if not math.isfinite(sum(samples.seconds)) and not all(map(math.isfinite, samples.seconds)):
        raise StoreError("its samples are not all finite seconds")


def _check_counts(record: Measurement) -> None:
    counts = (record.read_nbytes, record.written_nbytes, record.peak_nbytes or 0)
    if not all(0 <= value < MAX_COUNT for value in counts):
        raise StoreError(f"bytes count from 0 and below {MAX_COUNT}; got {max(counts)}")
    if not all(0 <= value < math.inf for value in record.first_call_seconds):
        raise StoreError("its first calls are not all finite seconds from 0")


class Journal:
    """A run's journal, open for appending; a lock keeps a second writer out.

    The lock is the operating system's, so that a writer that died does not hold it.

    Raises:
        StoreError: another run writes here, or the disk refuses.
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
            self.dropped = _drop_torn_end(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise StoreError(f"cannot write {self.path}: {error.strerror or error}") from None

    def append(self, *records: Record) -> None:
        """Write records that belong together and sync them: all are kept, or none.

        Raises:
            StoreError: the disk refuses; what was synced before stays.
        """
        size = self._file.seek(0, os.SEEK_END)
        data = b"".join(
            encode_line(record, more=len(records) - place)
            for place, record in enumerate(records, 1)
        )
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            raise StoreError(
                f"cannot write {self.path.name}: {error.strerror or error}; what was finished is "
                f"kept: make room, then go on with --resume {self.path.parent.name}"
            ) from None

    def close(self) -> None:
        """Close the file and let the lock go."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_torn_end(path: Path) -> str:
    """Cut what a killed writer left unfinished, so that the next line stands alone; what it was."""
    if not path.exists():
        return ""
    with path.open("r+b") as file:
        data = file.read(MAX_NBYTES)
        kept, dropped = split_torn(data)
        if dropped:
            file.truncate(len(kept))
            os.fsync(file.fileno())
    return dropped


def split_torn(data: bytes) -> tuple[bytes, str]:
    """(what a journal holds without an unfinished end, what was left out in words or '')."""
    end = data.rfind(b"\n") + 1
    dropped = "the last line was torn and is left out" if end < len(data) else ""
    # Back over the lines of a batch that say that more were to follow.
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            more = _line_decoder.decode(data[start:end]).more
        except (msgspec.MsgspecError, RecursionError, ValueError):
            break  # reading it says what is wrong
        if more <= 0:
            break
        end, dropped = start, "the last race was torn and is left out"
    return data[:end], dropped


def read_run(folder: Path) -> StoredRun:
    """The run in a folder.

    Raises:
        StoreError: there is no journal, or it is damaged, of another schema version, or too large.
    """
    path = folder / JOURNAL
    try:
        if not path.is_file():
            raise StoreError(f"cannot read {path}: no such file; expected a run's folder")
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; expected a run's folder") from None
    if len(data) > MAX_NBYTES:
        raise StoreError(f"{path} is too large; a journal has at most {MAX_NBYTES} bytes")
    data, dropped = split_torn(data)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    records = [_share_columns(record, known) for record in _decode_lines(path, io.BytesIO(data))]
    if not records or not isinstance(records[0], Header):
        raise StoreError(f"{path} does not begin with a header line; it is no journal of poolbench")
    if any(isinstance(record, Header) for record in records[1:]):
        raise StoreError(f"{path} has a second header line; two runs were put into one")
    return StoredRun(path=folder, header=records[0], records=tuple(records[1:]), dropped=dropped)


def read_header(folder: Path) -> Header:
    """The header of the run in a folder, without the rest of its journal.

    Raises:
        StoreError: there is no journal, or it begins with no header.
    """
    path = folder / JOURNAL
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_LINE_NBYTES + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; expected a run's folder") from None
    for record in _decode_lines(path, [line]):
        if isinstance(record, Header):
            return record
    raise StoreError(f"{path} does not begin with a header line; it is no journal of poolbench")


def _share_columns(record: AnyRecord, known: dict[tuple[int, ...], tuple[int, ...]]) -> AnyRecord:
    """The record, columns that others have as well held once: a large run is mostly such."""
    if isinstance(record, Measurement):
        for name in SHARED_COLUMNS:
            column = getattr(record.samples, name)
            msgspec.structs.force_setattr(record.samples, name, known.setdefault(column, column))
    return record


def _decode_lines(path: Path, lines: Iterable[bytes]) -> Iterator[AnyRecord]:
    for number, line in enumerate(lines, 1):
        if number == 1:
            _check_schema(path, line)
        try:
            yield decode_line(line)
        except StoreError as error:
            raise StoreError(f"{path} line {number} cannot be read: {error}") from None


class _SchemaPeek(msgspec.Struct):
    schema: int


class _LinePeek(msgspec.Struct):
    record: _SchemaPeek


def _check_schema(path: Path, line: bytes) -> None:
    try:
        peek = msgspec.json.decode(line, type=_LinePeek)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return  # decode_line will say it better
    if peek.record.schema not in (1, SCHEMA_VERSION):
        raise StoreError(
            f"{path} has schema version {peek.record.schema}; this poolbench reads 1 to {SCHEMA_VERSION}"
        )


__all__ = [
    "JOURNAL",
    "Journal",
    "Node",
    "StoredRun",
    "TimeBreakdown",
    "decode_line",
    "encode_line",
    "read_header",
    "read_run",
]
