"""Axes: the dimensions of a case, and the text form of their values.

An op declares its own axes; the standard ones come with the harness. Declarations are kept by op, and a
journal's header carries them, so that a report can label the cases of an op that it cannot import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import msgspec

from poolbench.core.errors import UsageError

Shape = tuple[int, ...]
Value = str | bool | int | float | tuple[int, ...]
V = TypeVar("V", bound=Value)
Kind = Literal["category", "ordinal", "size"]
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# Attributes of a Case, and columns of a report's table.
RESERVED = frozenset(
    """
    op axes get replace line race label nbytes moved_nbytes candidate form status reason issue right baseline clock
    seconds seconds_low seconds_high wall_seconds samples processes first_seconds ratio ratio_low ratio_high
    mean_low mean_high verdict processes_needed textbook_ratio textbook_low textbook_high textbook_reason
    bandwidth_limit_seconds efficiency
    efficiency_low efficiency_high worst max_relative tie peak_nbytes stopped_early disagree flags steal others
    throttled program unlike blocks_marked blocks_redone node kind tail probe bandwidth
    """.split()
)


class Scope(str, Enum):
    """Where a value takes effect: in what is computed, in how it is called, or when a process starts."""

    PROBLEM = "problem"
    CALL = "call"
    PROCESS = "process"


def format_value(value: Value) -> str:
    """Return a value as the user types it: '32x56x56x96' from (32, 56, 56, 96)."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


class AxisInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of an axis that is plain data, for the header of a journal.

    Attributes:
        name: of the axis.
        kind: how a report draws it: 'category', 'ordinal', or 'size' (logarithmic).
        prefix: precedes a value in labels: 'k' in 'k3'.
        default: the value of a case that gives none; None: each case must give one.
        quiet: labels leave the default out.
    """

    name: str
    kind: Kind = "category"
    prefix: str = ""
    default: Value | None = None
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis(Generic[V]):
    """One dimension along which cases of an op vary.

    Attributes:
        name: an attribute of every Case of the op.
        parse: text to value; raises ValueError.
        format: value to text, which `parse` reads back.
        default: the value of a case that gives none; None: each case must give one.
        choices: all values, if they are few.
        scope: where a value takes effect.
        kind: how a report draws it.
        prefix: precedes a value in labels: 'k' in 'k3'.
        quiet: labels leave the default out.
        example: a value as text, for error messages.
        inferred: of a journal whose op is not registered here: what `parse` returns is a guess.
    """

    name: str
    parse: Callable[[str], V]
    format: Callable[[V], str] = format_value
    default: V | None = None
    choices: tuple[V, ...] = ()
    scope: Scope = Scope.PROBLEM
    kind: Kind = "category"
    prefix: str = ""
    quiet: bool = False
    example: str = ""
    inferred: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"an axis is named by lower-case letters, digits and _; got {self.name!r}"
            )
        if self.name in RESERVED:
            raise UsageError(f"an axis may not be named as a column of a report; got {self.name!r}")

    @property
    def info(self) -> AxisInfo:
        """The axis as plain data."""
        return AxisInfo(
            name=self.name, kind=self.kind, prefix=self.prefix, default=self.default, quiet=self.quiet
        )  # fmt: skip

    def read(self, value: object) -> V:
        """Return a value, or the text of one, as a checked value of this axis.

        Raises:
            UsageError: the value is invalid; the text says what the axis takes.
        """
        given: Any = tuple(value) if isinstance(value, list) else value
        text = given.strip() if isinstance(given, str) else self.format(given)
        try:
            return self.parse(text)
        except (ValueError, TypeError):
            raise UsageError(
                f"{self.name} must be {self._expected()}; got {text[:80]!r} (--axis {self.name}=...)"
            ) from None

    def label(self, value: V) -> str:
        """Format a value for labels: 'k3'."""
        return self.prefix + self.format(value)

    def _expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(repr(self.format(value)) for value in self.choices)
        return f"like {self.example!r}" if self.example else "a value of its kind"


def choice_axis(
    name: str,
    *choices: str,
    default: str | None = None,
    quiet: bool = False,
    scope: Scope = Scope.PROBLEM,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Axis[str]:
    """Return an axis of a few words, in any letter case; the first is the default."""
    written = {choice.lower(): choice for choice in choices}

    def parse(text: str) -> str:
        word = aliases.get(text.lower(), text.lower())
        if word.lower() not in written:
            raise ValueError(text)
        return written[word.lower()]

    return Axis(
        name=name, parse=parse, choices=choices, default=default or choices[0], quiet=quiet, scope=scope,
    )  # fmt: skip


def size_axis(name: str, default: int | None = None, *, prefix: str | None = None) -> Axis[int]:
    """Return an axis of whole numbers from 1; labels show 'name3'."""
    return Axis(
        name=name, parse=parse_count, default=default, kind="size", example="3",
        prefix=name if prefix is None else prefix,
    )  # fmt: skip


def shape_axis(
    name: str = "shape", default: Shape | None = None, *, rank: int | None = None, example: str = ""
) -> Axis[Shape]:
    """Return an axis of shapes, '32x56x56x96'; `rank`: the only number of dimensions that it takes."""

    def parse(text: str) -> Shape:
        shape = parse_shape(text)
        if rank is not None and len(shape) != rank:
            raise ValueError(text)
        return shape

    usual = format_value(default) if default else "x".join("8" * (rank or 2))
    return Axis(name=name, parse=parse, default=default, kind="size", example=example or usual)


def parse_shape(text: str) -> Shape:
    """Return (32, 56, 56, 96) from '32x56x56x96'."""
    if not re.fullmatch(r"\d{1,9}(x\d{1,9}){0,15}", text):
        raise ValueError(text)
    shape = tuple(int(part) for part in text.split("x"))
    if min(shape) < 1:
        raise ValueError(text)
    return shape


def parse_count(text: str) -> int:
    """Return a whole number from 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_threads(text: str) -> int:
    """Return intra-op threads from '1', '2' or 'all' (0)."""
    return 0 if text.lower() in ("all", "0") else parse_count(text)


def parse_device(text: str) -> str:
    """Return 'cpu:0' from 'cpu'; 'gpu:H100' stays as it is."""
    if not re.fullmatch(r"(?i:cpu|gpu)(:[A-Za-z0-9_-]{1,32})?", text):
        raise ValueError(text)
    kind, _, index = text.partition(":")
    return f"{kind.lower()}:{index or '0'}"


DTYPES = ("float32", "float16", "bfloat16", "float64")

# Every op has these axes; labels and tables show them after its own.
STANDARD: Mapping[str, Axis[Any]] = {
    axis.name: axis
    for axis in (
        choice_axis("dtype", *DTYPES),
        choice_axis("direction", "forward", "training", scope=Scope.CALL),
        choice_axis(
            "mode",
            "eager",
            "graph",
            "xla",
            "compile",
            default="graph",
            scope=Scope.CALL,
            aliases={"jit": "xla"},  # jax.jit is XLA
        ),
        Axis(name="device", parse=parse_device, default="cpu:0", scope=Scope.CALL, example="cpu:0"),
        Axis(
            name="threads",
            parse=parse_threads,
            format=lambda n: str(n) if n else "all",
            default=0,
            scope=Scope.PROCESS,
            kind="ordinal",
            prefix="threads",
            quiet=True,
            example="all",
        ),
        choice_axis("cache", "warm", "cold", quiet=True, scope=Scope.CALL),
    )
}
# Not of a case: each value is a worker process of a race, whose contenders it names.
BACKEND = choice_axis("backend", "tensorflow", "jax", "torch", scope=Scope.PROCESS)
_DECLARED: dict[str, dict[str, Axis[Any]]] = {}


def declare(op: str, axes: Iterable[Axis[Any]]) -> None:
    """Store an op's own axes, and the standard ones, for `axes_of`.

    Raises:
        UsageError: two axes have the same name.
    """
    own = list(axes)
    names = [axis.name for axis in own] + list(STANDARD)
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"op {op!r} declares the axis {min(twice)!r} twice")
    _DECLARED[op] = {axis.name: axis for axis in own} | dict(STANDARD)


def declare_infos(op: str, infos: Sequence[AxisInfo]) -> None:
    """Store the axes that a journal's header lists, unless the op is registered here."""
    if op not in _DECLARED:
        declare(op, (_from_info(info) for info in infos if info.name not in STANDARD))


def _from_info(info: AxisInfo) -> Axis[Any]:
    def parse(text: str) -> Value:
        # The op is not registered here, so the type is inferred from the text.
        if re.fullmatch(r"\d{1,9}(x\d{1,9}){1,15}", text):
            return tuple(map(int, text.split("x")))
        return int(text) if re.fullmatch(r"-?\d{1,15}", text) else text

    return Axis(
        name=info.name, parse=parse, default=info.default, kind=info.kind, prefix=info.prefix[:40],
        quiet=info.quiet, inferred=True,
    )  # fmt: skip


def is_declared(op: str) -> bool:
    """Tell whether the op's own axes are known."""
    return op in _DECLARED


def axes_of(op: str) -> Mapping[str, Axis[Any]]:
    """Return all axes of an op by name, its own first; only the standard ones of an unknown op."""
    return _DECLARED.get(op, STANDARD)


def label_value(op: str, name: str, value: Value) -> str:
    """Format a value for labels: 'k3'."""
    axis = axes_of(op).get(name)
    return format_value(value) if axis is None else axis.label(value)


def is_usual(op: str, name: str, value: object) -> bool:
    """Tell whether labels omit the value, because it is the default of a quiet axis."""
    axis = axes_of(op).get(name)
    return axis is not None and axis.quiet and axis.default == value
