"""Case: an op and a value for each of its axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from poolbench.core.axes import (
    STANDARD,
    Value,
    axes_of,
    format_value,
    is_declared,
    is_usual,
    label_value,
)
from poolbench.core.errors import UsageError


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fully specified problem; the value of an axis is an attribute: `case.mode`.

    Build one with `make_case`, which completes and checks the values.

    Attributes:
        op: name of the op.
        axes: a value for each axis; never changed in place, so that a case can be hashed.
    """

    op: str
    axes: dict[str, Value]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("op", "axes"):  # copying asks before these are set
            raise AttributeError(name)
        try:
            return self.axes[name]
        except KeyError:
            raise AttributeError(
                f"a case of {self.op} has no axis {name!r}; it has {', '.join(self.axes)}"
            ) from None

    def __hash__(self) -> int:
        return hash((self.op, frozenset(self.axes.items())))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an axis, or `default` where the op has no such axis."""
        return self.axes.get(name, default)

    def replace(self, **values: Value) -> Case:
        """Return the case with other values, which are taken as they are.

        Raises:
            UsageError: the case has no such axis.
        """
        if unknown := [name for name in values if name not in self.axes]:
            raise UsageError(
                f"a case of {self.op} has no axis {unknown[0]!r}; it has {', '.join(self.axes)}"
            )
        return Case(op=self.op, axes=self.axes | values)


def make_case(*, op: str, **values: object) -> Case:
    """Return a complete case whose values are checked: 'VALID' becomes 'valid', a list a tuple.

    The values of an op's own axes are checked once the op is registered; None leaves an axis out.

    Raises:
        UsageError: an unknown axis, a value that its axis does not take, or none where it has no default.
    """
    known = axes_of(op)
    given = {name: value for name, value in values.items() if value is not None}
    own = [name for name in (known if is_declared(op) else given) if name not in STANDARD]
    if unknown := [name for name in given if name not in {*own, *STANDARD}]:
        raise UsageError(f"{op} has no axis {unknown[0]!r}; it has {', '.join(known)}")
    complete: dict[str, Value] = {}
    for name in (*own, *STANDARD):
        axis = known.get(name)
        if name in given:
            complete[name] = axis.read(given[name]) if axis else _plain(name, given[name])
        elif axis is not None and axis.default is not None:
            complete[name] = axis.default
        else:
            raise UsageError(f"a case of {op} needs a value of {name} (--axis {name}=...)")
    return Case(op=op, axes=complete)


def _plain(name: str, value: object) -> Value:
    """Return a value of an axis that nothing is known of."""
    if isinstance(value, (list, tuple)):
        return tuple(int(size) for size in value)
    if isinstance(value, (str, bool, int, float)):
        return value
    raise UsageError(f"{name} must be text, a number or a shape; got {type(value).__name__}")


def case_label(case: Case, axes: Sequence[str] | None = None) -> str:
    """Return the case in one word: '32x56x56x96-k3-valid-float32-forward-graph-cpu:0'.

    Without `axes`, every axis of the case but those whose value only says "as usual" (all threads,
    warm caches), so that labels stay readable.
    """
    known = axes_of(case.op)
    names = [name for name in known if name in case.axes]
    names += [name for name in case.axes if name not in known]
    return "-".join(
        label_value(case.op, name, case.axes[name])
        for name in (axes or names)
        if name in case.axes and not (axes is None and is_usual(case.op, name, case.axes[name]))
    )


def case_slug(case: Case) -> str:
    """Return the case with its op, in letters that are safe in a file name: [A-Za-z0-9._-] only."""
    return re.sub(r"[^A-Za-z0-9._-]", ".", f"{case.op}-{case_label(case)}")[:200]


__all__ = ["Case", "Value", "case_label", "case_slug", "format_value", "make_case"]
