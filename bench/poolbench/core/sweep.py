"""Sweeps: the cases of an op that a run measures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from poolbench.core.axes import Value, axes_of
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError

Rule = Callable[[Case], bool]


@dataclass(frozen=True, kw_only=True)
class SweepPart:
    """A set of cases: axes that are multiplied or zipped, and the candidates that compete in them.

    Attributes:
        axes: axis name to its values.
        zipped: step through the axes together (of equal length) instead of multiplying them.
        candidates: names that compete in these cases; empty: every candidate of the op.
    """

    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    zipped: bool = False
    candidates: tuple[str, ...] = ()

    def rows(self) -> Iterable[dict[str, Value]]:
        """Yield one dict of axis values per case.

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


def product(*, candidates: Sequence[str] = (), **axes: Sequence[Value]) -> SweepPart:
    """Return every combination of the axes' values."""
    return SweepPart(axes={k: tuple(v) for k, v in axes.items()}, candidates=tuple(candidates))


def zipped(*, candidates: Sequence[str] = (), **axes: Sequence[Value]) -> SweepPart:
    """Return the axes' first values together, then their second, and so on."""
    part = replace(product(candidates=candidates, **axes), zipped=True)
    list(part.rows())  # raise the error of unequal lengths where the sweep is written
    return part


@dataclass(frozen=True, kw_only=True)
class SweepCase:
    """A case of a sweep and the candidates that compete in it (empty: all of the op)."""

    case: Case
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """Parts that vary a base case, and rules that exclude combinations.

    Attributes:
        parts: one part, or several.
        base: values of the axes that a part does not vary; other axes take their default. `Op.sweep`
            completes them to a Case.
        rules: a case is excluded if one of them returns False.
    """

    parts: tuple[SweepPart, ...] | SweepPart = SweepPart()
    base: Mapping[str, Any] | Case = field(default_factory=dict, kw_only=True)
    rules: tuple[Rule, ...] = field(default=(), kw_only=True)

    def _each_part(self) -> tuple[SweepPart, ...]:
        return (self.parts,) if isinstance(self.parts, SweepPart) else self.parts

    def for_op(self, op: str) -> Sweep:
        """Return the sweep with its base completed to a case of the op."""
        if isinstance(self.base, Case):
            return self
        first: dict[str, Any] = {}
        for part in self._each_part():
            for name, values in part.axes.items():
                # An axis without a default must vary somewhere: its first value serves as the base's.
                if (axis := axes_of(op).get(name)) is not None and axis.default is None:
                    first.setdefault(name, values[0])
        return replace(self, base=make_case(op=op, **(first | dict(self.base))))

    @property
    def base_case(self) -> Case:
        """The base as a Case.

        Raises:
            UsageError: the sweep is not bound to an op; `Op.sweep` binds it.
        """
        if not isinstance(self.base, Case):
            raise UsageError("a sweep has cases once its op is known; take it from Op.sweep(NAME)")
        return self.base

    def planned(self) -> list[SweepCase]:
        """Return the cases, each once, in the order of the parts; equal cases pool their candidates."""
        found: dict[Case, tuple[str, ...]] = {}
        base = self.base_case
        for part in self._each_part():
            for row in part.rows():
                case = make_case(op=base.op, **(base.axes | row))
                if not all(rule(case) for rule in self.rules):
                    continue
                if case not in found:
                    found[case] = part.candidates
                elif found[case] and part.candidates:
                    found[case] = tuple(dict.fromkeys(found[case] + part.candidates))
                else:  # one of the two parts takes all candidates
                    found[case] = ()
        return [SweepCase(case=case, candidates=names) for case, names in found.items()]

    def cases(self) -> list[Case]:
        """Return the cases, each once."""
        return [planned.case for planned in self.planned()]

    def replace(self, axis: str, values: Sequence[Value]) -> Sweep:
        """Return the sweep with the values of an axis replaced, for `--axis NAME=V1,V2`.

        The values replace the axis wherever it varies and the first becomes the base case's. An axis that
        varies nowhere is multiplied with every part. A sweep whose op lacks the axis stays as it is.
        """
        base = self.base_case
        if axis not in base.axes:
            return self
        declared = axes_of(base.op).get(axis)
        values = tuple(declared.read(value) if declared else value for value in values)
        varies = any(axis in part.axes for part in self._each_part())
        parts = []
        for part in self._each_part():
            if varies and axis not in part.axes:
                parts.append(part)
            elif part.zipped:  # what belongs together stays together, once for each value
                count = max((len(some) for some in part.axes.values()), default=1)
                parts += [
                    replace(part, axes={**part.axes, axis: (value,) * count}) for value in values
                ]
            else:
                parts.append(replace(part, axes={**part.axes, axis: values}))
        return Sweep(tuple(parts), base=base.replace(**{axis: values[0]}), rules=self.rules)
