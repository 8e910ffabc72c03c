"""Pools: one call of a model's pooling, and its description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poolbench.core.axes import Shape
from poolbench.core.case import Case
from poolbench.core.registry import REGISTRY
from poolbench.models.probe import Finding, Form


class Pool(Finding, frozen=True, kw_only=True):
    """One call of a model's pooling, and what it was found to be.

    Attributes:
        names: of the layer or operation; of a sequence, of all its operations.
        kind: its class, or those of the sequence.
        title: what it computes, for the reader.
        given, made: shapes of its input and output, with N.
        dtype: of its input.
    """

    names: tuple[str, ...]
    kind: str
    title: str
    given: Shape
    made: Shape
    dtype: str = "float32"

    @property
    def layer(self) -> str:
        """Return the name of its operation, the last one of a sequence."""
        return self.names[-1]

    @property
    def key(self) -> str:
        """The pool in one word, the same at every batch size."""
        return pool_key(self.names, self.given)

    @property
    def op(self) -> str:
        """Return the name of the op, '' if no shipped op covers the pool."""
        return self.form.op if self.form else ""

    def case(self, **fields: Any) -> Case:
        """Return the op's case that this call is."""
        assert self.form is not None
        return self.form.case(self.given, self.dtype, **fields)


def pool_key(names: Sequence[str], given: Shape) -> str:
    """Return 'reshape,max:24x24x12' from the names and the input's shape."""
    return f"{','.join(names)}:{'x'.join(map(str, given[1:]))}"


def title_of(form: Form, given: Shape, made: Shape) -> str:
    """Say what a form computes: 'depthwise max pooling of 3, same'."""
    op = REGISTRY.ops[form.op]
    usual = {axis.name: axis.default for axis in op.axes if axis.choices}
    parameters = {name: v for name, v in form.parameters.items() if usual.get(name) != v}
    text = (op.title.lower() or form.op) + (f" of {form.sizes[0]}" if form.sizes else "")
    pooled = [
        i for i in range(1, len(given)) if len(given) == len(made) and made[i] == 1 < given[i]
    ]
    # The axis that `made` lacks.
    lost = [i for i in range(1, len(given)) if (*given[:i], *given[i + 1 :]) == made][-1:]
    if not parameters and [len(given) - 1] in (pooled, lost):
        text += " over all channels"
    elif lost == [1] and len(given) == 3:
        text += " over time"
    notes = [value for value in parameters.values() if value not in form.sizes]
    if form.data_format == "channels_first" and not form.is_view(given):
        notes.append("channels_first")
    if pooled:
        notes.append("dimensions kept")
    return ", ".join([text, *map(str, notes)])
