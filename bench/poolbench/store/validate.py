"""Validate records of a journal, which is untrusted input: callers need not check again."""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any

import msgspec

from poolbench.core.axes import STANDARD, Axis, axes_of, declare_infos
from poolbench.core.case import Case
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.program import MAX_COUNT, Count
from poolbench.core.records import (
    SCHEMA_VERSION,
    AnyRecord,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Node,
    Samples,
    Selftest,
    TimeBreakdown,
    TraceSummary,
)
from poolbench.core.text import one_line
from poolbench.store.schema1 import lift

# Where the schema allows any scalar, a non-finite number is read back as text.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
TRACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}|")
MAX_SECONDS = 1e9  # per call: 30 years
SHARED = ("process", "allocation", "round", "calls", "contended")


class _RawSamples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    process: msgspec.Raw = msgspec.Raw(b"[]")
    allocation: msgspec.Raw = msgspec.Raw(b"[]")
    round: msgspec.Raw = msgspec.Raw(b"[]")
    calls: msgspec.Raw = msgspec.Raw(b"[]")
    seconds: tuple[Annotated[float, msgspec.Meta(ge=0)], ...] = ()
    contended: msgspec.Raw = msgspec.Raw(b"[]")


class _RawMeasurement(Measurement, frozen=True, kw_only=True, tag="measurement"):
    """A measurement with the text of what others of its race have too: each is read once."""

    # Of other types than in a measurement, which is never made from these as they are.
    case: msgspec.Raw  # type: ignore[assignment]
    samples: _RawSamples = _RawSamples()  # type: ignore[assignment]


_list_decoder = msgspec.json.Decoder(
    tuple[
        Header | Node | _RawMeasurement | MatrixCell | TraceSummary | Selftest | ModelResult | TimeBreakdown, ...
    ],
    strict=False,
)  # fmt: skip
_column = functools.lru_cache(256)(msgspec.json.Decoder(tuple[Count, ...], strict=False).decode)
_case = functools.lru_cache(4096)(msgspec.json.Decoder(Case).decode)


def _whole(raw: _RawMeasurement) -> Measurement:
    """Return the measurement; equal cases and columns are the same objects, which keeps large runs small."""
    samples = Samples(
        seconds=raw.samples.seconds,
        **{name: _column(bytes(getattr(raw.samples, name))) for name in SHARED},
    )
    fields = {name: getattr(raw, name) for name in Measurement.__struct_fields__}
    return Measurement(**fields | {"case": _case(bytes(raw.case)), "samples": samples})


def decode_records(body: bytes, schema: int) -> tuple[AnyRecord, ...]:
    """Return the checked records of a line: an array, or a single record in schema 1.

    Raises:
        StoreError: the records are invalid; the text is one line.
    """
    try:
        if schema == SCHEMA_VERSION:
            records = tuple(
                _whole(record) if isinstance(record, _RawMeasurement) else record
                for record in _list_decoder.decode(body)
            )
        elif schema == 1:
            plain = msgspec.json.decode(body)
            if not isinstance(plain, dict):
                raise StoreError("a record is a JSON object")
            records = (msgspec.convert(lift(plain), AnyRecord, strict=False),)
        else:
            raise StoreError(
                f"its schema is {schema}; this version reads 1 to {SCHEMA_VERSION}: update poolbench"
            )
        return tuple(check_record(record) for record in records)
    # msgspec raises a plain ValueError if the text of a number is out of range.
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise StoreError(one_line(str(error) or type(error).__name__)) from None


def check_record(record: AnyRecord) -> AnyRecord:
    """Return the record after checks that its types do not cover.

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
        _check_samples(record.wall_samples)
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
    return {name: NON_FINITE.get(value, value) for name, value in figures.items()}


def _declare_axes(header: Header) -> None:
    """Declare the axes of ops that are not registered here, so that their cases have labels."""
    try:
        for op, infos in header.axes.items():
            declare_infos(op, infos)
    except UsageError as error:
        raise StoreError(one_line(str(error) or type(error).__name__)) from None


@functools.lru_cache(maxsize=4096)
def _check_case(case: Case) -> None:
    known = axes_of(case.op)
    if not case.op or not case.axes.keys() >= STANDARD.keys() | known.keys():
        raise StoreError(f"its case is not as a case is written: {case!r:.200}")
    try:
        for name, value in case.axes.items():
            axis = known.get(name) or Axis(name=name, parse=lambda text: text)  # checks the name
            if name in known and not axis.inferred and axis.read(value) != value:
                raise StoreError(f"{name} is not as a case is written: {value!r:.80}")
    except (UsageError, TypeError, ValueError) as error:
        raise StoreError(one_line(str(error) or type(error).__name__)) from None


def _check_samples(samples: Samples) -> None:
    columns = [getattr(samples, name) for name in SHARED]
    count = len(samples)
    if not {*map(len, columns)} <= {0, count}:
        raise StoreError("its samples' columns have unequal lengths")
    if count and not all(len(column) for column in columns[:3]):
        raise StoreError("its samples lack process, allocation or round")
    # A finite sum has finite parts. Ratios need times above 0.
    seconds = samples.seconds or (1.0,)
    if not (math.isfinite(sum(seconds)) and min(seconds) > 0 and max(seconds) < MAX_SECONDS):
        raise StoreError(
            f"its samples are not all finite seconds above 0 and below {MAX_SECONDS:g}"
        )


def _check_counts(record: Measurement) -> None:
    counts = (record.read_nbytes, record.written_nbytes, record.peak_nbytes or 0)
    if not all(0 <= value < MAX_COUNT for value in counts):
        raise StoreError(f"bytes count from 0 and below {MAX_COUNT}; got {max(counts)}")
    if not all(0 <= value < math.inf for value in record.first_call_seconds):
        raise StoreError("its first calls are not all finite seconds from 0")
