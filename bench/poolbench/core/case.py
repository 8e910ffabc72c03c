"""What is asked: a Case, the axes it can vary along, and the sweeps over them.

Pure: standard library and msgspec only, so that collection and the report stay quick.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from poolbench.core.errors import UsageError

Shape = tuple[int, ...]
Value = str | int | Shape | None
Rule = Callable[["Case"], bool]


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fully specified problem.

    Build one with `make_case`, which normalises and checks the values: msgspec's own constructor
    takes any type, a list for the shape included, and a list does not hash.

    Attributes:
        op: name of a registered op.
        shape: (N, H, W, C), in this order whatever the data format.
        dtype: one of `DTYPES`.
        data_format: 'channels_last' or 'channels_first'.
        pool_size: window along the depth; None where the op has no window.
        padding: 'valid' or 'same'; None where the op has none.
        direction: 'forward', x -> y; or 'training', (x, dy) -> (y, dx).
        mode: 'eager', 'graph' or 'xla'.
        device: 'cpu:0', 'gpu:0', or a kind of accelerator in a fleet, 'gpu:H100'.
        threads: intra-op threads; 0 means all that the machine has.
        cache: 'warm' (the steady state of repeated calls) or 'cold' (inputs evicted before each call).
        distribution: 'normal', or 'relu', of which half ties at zero.
    """

    op: str
    shape: Shape = (32, 56, 56, 96)
    dtype: str = "float32"
    data_format: str = "channels_last"
    pool_size: int | None = None
    padding: str | None = None
    direction: str = "forward"
    mode: str = "graph"
    device: str = "cpu:0"
    threads: int = 0
    cache: str = "warm"
    distribution: str = "normal"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field of Case: how a value is read from text, written as text, and which values there are."""

    name: str
    parse: Callable[[str], Value]
    label: Callable[[Any], str] = str
    choices: tuple[str, ...] = ()
    example: str


def parse_shape(text: str) -> Shape:
    """(32, 56, 56, 96) from '32x56x56x96'."""
    if not re.fullmatch(r"\d{1,9}(x\d{1,9}){3}", text):
        raise ValueError(text)
    shape = tuple(int(part) for part in text.split("x"))
    if min(shape) < 1:
        raise ValueError(text)
    return shape


def label_shape(shape: Shape) -> str:
    """'32x56x56x96' from (32, 56, 56, 96)."""
    return "x".join(map(str, shape))


def parse_count(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_threads(text: str) -> int:
    """Intra-op threads from '1', '2' or 'all' (0)."""
    return 0 if text.lower() in ("all", "0") else parse_count(text)


def parse_device(text: str) -> str:
    """'cpu:0' from 'cpu'; 'gpu:H100' stays what it is."""
    if not re.fullmatch(r"(?i:cpu|gpu)(:[A-Za-z0-9_-]{1,32})?", text):
        raise ValueError(text)
    kind, _, index = text.partition(":")
    return f"{kind.lower()}:{index or '0'}"


def _choice(name: str, *choices: str) -> Axis:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(text)
        return text.lower()

    return Axis(name=name, parse=parse, choices=choices, example=choices[0])


DTYPES = ("float32", "float16", "bfloat16", "float64")

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(name="shape", parse=parse_shape, label=label_shape, example="32x56x56x96"),
        _choice("dtype", *DTYPES),
        _choice("data_format", "channels_last", "channels_first"),
        Axis(name="pool_size", parse=parse_count, label=lambda k: f"k{k}", example="3"),
        _choice("padding", "valid", "same"),
        _choice("direction", "forward", "training"),
        _choice("mode", "eager", "graph", "xla"),
        Axis(name="device", parse=parse_device, example="cpu:0"),
        Axis(
            name="threads",
            parse=parse_threads,
            label=lambda n: f"{n}thread" if n else "allthreads",
            example="all",
        ),
        _choice("cache", "warm", "cold"),
        _choice("distribution", "normal", "relu"),
    )
}
OPTIONAL_AXES = ("pool_size", "padding")
COMMON_AXES = tuple(name for name in AXES if name not in OPTIONAL_AXES)


def parse_value(name: str, text: str) -> Value:
    """One value of an axis, from what the user typed.

    Raises:
        UsageError: in one line, what the axis takes.
    """
    axis = AXES[name]
    try:
        return axis.parse(text.strip())
    except ValueError:
        expected = (
            "one of " + ", ".join(map(repr, axis.choices))
            if axis.choices
            else f"like {axis.example!r}"
        )
        raise UsageError(
            f"{name} must be {expected}; got {text.strip()!r} (--axis {name}=...)"
        ) from None


def parse_axis(text: str, known: Iterable[str] = tuple(AXES)) -> tuple[str, tuple[Value, ...]]:
    """`pool_size=2,3` -> ('pool_size', (2, 3)).

    Raises:
        UsageError: the axis is unknown, the value is bad, or there is none.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not values.strip(", "):
        raise UsageError(f"--axis takes NAME=VALUE[,VALUE...]; got {text!r} (--axis pool_size=2,3)")
    known = tuple(known)
    if name not in known:
        raise UsageError(
            f"no op has an axis {name!r}; there are {', '.join(known)} (--axis NAME=...)"
        )
    parsed = (parse_value(name, value) for value in values.split(",") if value.strip())
    return name, tuple(dict.fromkeys(parsed))


def make_case(**fields: Any) -> Case:
    """A Case whose values are normalised and checked: 'VALID' becomes 'valid', a list a tuple.

    Raises:
        UsageError: an unknown field or a value that its axis does not take.
    """
    op = fields.pop("op")
    normal: dict[str, Value] = {}
    for name, value in fields.items():
        if name not in AXES:
            raise UsageError(f"a case has no axis {name!r}; there are {', '.join(AXES)}")
        if value is None and name in OPTIONAL_AXES:
            continue
        text = label_shape(tuple(value)) if isinstance(value, (list, tuple)) else str(value)
        normal[name] = parse_value(name, text)
    return Case(op=op, **normal)  # type: ignore[arg-type]


def case_label(case: Case, axes: Sequence[str] | None = None) -> str:
    """The case in one word: '32x56x56x96-float32-k3-valid-forward-graph-cpu:0'.

    Without `axes`, every axis that the case has; an axis whose value only says "as usual"
    (channels_last, all threads, warm, normal) is left out, so that labels stay readable.
    """
    parts = []
    for name in axes or AXES:
        value = getattr(case, name)
        if value is None or (axes is None and USUAL.get(name) == value):
            continue
        parts.append(AXES[name].label(value))
    return "-".join(parts)


USUAL: dict[str, Value] = {
    "data_format": "channels_last",
    "threads": 0,
    "cache": "warm",
    "distribution": "normal",
}


def case_slug(case: Case) -> str:
    """The case with its op, in letters that are safe in a file name: [A-Za-z0-9._-] only."""
    return re.sub(r"[^A-Za-z0-9._-]", ".", f"{case.op}-{case_label(case)}")


def input_nbytes(case: Case) -> int:
    """Bytes of x."""
    n, h, w, c = case.shape
    return n * h * w * c * ITEMSIZE[case.dtype]


ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some cases of a sweep: axes that are multiplied or zipped, and who races there.

    Attributes:
        axes: axis name to its values.
        zipped: step through the axes together (they are of equal length) instead of multiplying.
        candidates: names that race in these cases; empty means every candidate of the op.
    """

    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    zipped: bool = False
    candidates: tuple[str, ...] = ()

    def rows(self) -> Iterable[dict[str, Value]]:
        """One dict of axis values a case.

        Raises:
            UsageError: zipped axes of unequal length.
        """
        if self.zipped:
            lengths = {name: len(values) for name, values in self.axes.items()}
            if len(set(lengths.values())) > 1:
                raise UsageError(f"zipped axes must be of equal length; got {lengths}")
            combine: Callable[..., Iterable[tuple[Value, ...]]] = zip
        else:
            combine = itertools.product
        for values in combine(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


def product(*, candidates: Sequence[str] = (), **axes: Sequence[Value]) -> Part:
    """Every combination of the axes' values."""
    return Part(axes={k: tuple(v) for k, v in axes.items()}, candidates=tuple(candidates))


def zipped(*, candidates: Sequence[str] = (), **axes: Sequence[Value]) -> Part:
    """The axes' first values together, then their second, and so on."""
    part = Part(
        axes={k: tuple(v) for k, v in axes.items()}, zipped=True, candidates=tuple(candidates)
    )
    list(part.rows())  # unequal lengths are the author's error: say so where the sweep is written
    return part


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A case of a sweep and the candidates that race in it (empty: all of the op's)."""

    case: Case
    candidates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A base Case, the parts that vary it, and the rules that leave senseless combinations out."""

    base: Case
    parts: tuple[Part, ...] = (Part(),)
    rules: tuple[Rule, ...] = ()

    def planned(self) -> list[Planned]:
        """The cases, each once, in the order of the parts; equal cases pool their candidates."""
        found: dict[Case, tuple[str, ...]] = {}
        for part in self.parts:
            for row in part.rows():
                case = make_case(**(msgspec.structs.asdict(self.base) | row))
                if not all(rule(case) for rule in self.rules):
                    continue
                if case not in found:
                    found[case] = part.candidates
                elif found[case] and part.candidates:
                    found[case] = tuple(dict.fromkeys(found[case] + part.candidates))
                else:  # one of the two parts races them all
                    found[case] = ()
        return [Planned(case=case, candidates=names) for case, names in found.items()]

    def cases(self) -> list[Case]:
        """The cases, each once."""
        return [planned.case for planned in self.planned()]

    def replace(
        self, axis: str, values: Sequence[Value], has: Iterable[str] = tuple(AXES)
    ) -> Sweep:
        """The sweep with an axis' values replaced: what `--axis NAME=V1,V2` does.

        The values replace the axis wherever it varies and the first becomes the base case's. An
        axis that varies nowhere is multiplied with every part; a sweep whose op lacks it (`has`)
        stays as it is.
        """
        if axis not in tuple(has):
            return self
        values = tuple(values)
        base = msgspec.structs.replace(self.base, **{axis: values[0]})
        varies = any(axis in part.axes for part in self.parts)
        parts = []
        for part in self.parts:
            if axis in part.axes or not varies:
                axes = {**part.axes, axis: values}
                parts.append(
                    Part(axes=axes, zipped=part.zipped and varies, candidates=part.candidates)
                )
            else:
                parts.append(part)
        return Sweep(base=base, parts=tuple(parts), rules=self.rules)
