"""Journal in, records out: one checksummed JSON line a record, synced as it is written.

Pure: msgspec and filelock. A line is `{"crc32":"89abcdef","record":{...}}`; the checksum is of the
record's bytes as they stand in the line. Non-finite numbers are written as strings ("nan", "inf"),
for JSON has none.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec

from bench.measurement import (
    SCHEMA_VERSION,
    Account,
    AnyRecord,
    Capability,
    Header,
    Measurement,
    Network,
    Node,
    Record,
    Selftest,
    Shares,
)

JOURNAL = "journal.jsonl"
MAX_NBYTES = 1 << 30
R = TypeVar("R", bound=Record)


class StoreError(Exception):
    """A run cannot be read or written; the text is one line that says why and what to do."""


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    crc32: str
    record: msgspec.Raw


_encoder = msgspec.json.Encoder()
_line_decoder = msgspec.json.Decoder(_Line)
_record_decoder = msgspec.json.Decoder(AnyRecord, strict=False)


@dataclass(frozen=True, kw_only=True)
class Run:
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
        return self.of(Measurement)

    @property
    def capabilities(self) -> list[Capability]:
        return self.of(Capability)

    @property
    def accounts(self) -> list[Account]:
        return self.of(Account)

    @property
    def selftests(self) -> list[Selftest]:
        return self.of(Selftest)

    @property
    def networks(self) -> list[Network]:
        return self.of(Network)


def encode_line(record: Record) -> bytes:
    """A record as a line of the journal."""
    body = _encoder.encode(finite_text(msgspec.to_builtins(record)))
    return b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(body), body)


def finite_text(value: Any) -> Any:
    """The value with non-finite floats as strings: msgspec would write them as null."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, dict):
        return {key: finite_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_text(item) for item in value]
    return value


def decode_line(line: bytes) -> AnyRecord:
    """A record from a line of the journal.

    Raises:
        StoreError: it is no such line, in words.
    """
    try:
        outer = _line_decoder.decode(line)
        body = bytes(outer.record)
        if f"{zlib.crc32(body):08x}" != outer.crc32:
            raise StoreError("its checksum does not match")
        return _record_decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise StoreError(str(error).split("\n")[0]) from None


class Journal:
    """A run's journal, open for appending; a lock keeps a second writer out.

    The lock is the operating system's, so that a writer that died does not hold it.

    Raises:
        StoreError: another run writes here, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL
        self._lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise StoreError(
                f"another run is writing {folder.name}; wait for it, or pick another --run NAME"
            ) from None
        _drop_torn_line(self.path)
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Write a record and sync it.

        Raises:
            StoreError: the disk refuses; what was synced before stays.
        """
        size = self._file.tell()
        line = encode_line(record)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError("only a part of the line could be written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            raise StoreError(
                f"cannot write {self.path.name}: {error.strerror or error}; what was finished is kept: "
                "make room, then go on with --resume"
            ) from None

    def close(self) -> None:
        """Close the file and let the lock go."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed writer left half written, so that the next line stands alone."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            file.truncate(end)


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        StoreError: there is no journal, or it is damaged, of another schema version, or too large.
    """
    path = folder / JOURNAL
    try:
        size = path.stat().st_size
        if size > MAX_NBYTES:
            raise StoreError(f"{path} has {size} bytes; a journal has at most {MAX_NBYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; expected a run's folder") from None
    lines = data.split(b"\n")
    torn = lines.pop()
    records = list(_decode_lines(path, lines))
    if not records or not isinstance(records[0], Header):
        raise StoreError(f"{path} does not begin with a header line; it is no journal of poolbench")
    dropped = "the last line was torn and is left out" if torn else ""
    return Run(path=folder, header=records[0], records=tuple(records[1:]), dropped=dropped)


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
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return  # decode_line will say it better
    if peek.record.schema != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {peek.record.schema}; this poolbench reads {SCHEMA_VERSION}"
        )


__all__ = [
    "JOURNAL",
    "Journal",
    "Node",
    "Run",
    "Shares",
    "StoreError",
    "decode_line",
    "encode_line",
    "read_run",
]
