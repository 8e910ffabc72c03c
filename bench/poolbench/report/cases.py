"""Cases of a run: the base case of an op, the rows around it, and a case in words."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.axes import axes_of, is_usual, label_value
from poolbench.report.frame import RunFrame, axes_in

GROUP = ("op", "device", "mode", "direction")  # a row of the headline each
CHOSEN_BY = (*GROUP, "dtype", "shape")  # fields of the page's chooser
MODE_WORDS = {"xla": "with XLA", "graph": "in graph mode", "eager": "in eager mode",
              "compile": "with torch.compile"}  # fmt: skip


@functools.lru_cache(maxsize=2)  # every figure asks
def _codes(loaded: RunFrame) -> dict[str, tuple[np.ndarray[Any, Any], list[object]]]:
    """Return for the op and each axis the rows' values as codes, and the values: codes compare quickly."""
    found = {}
    for name in ("op", *axes_in(loaded.table)):
        codes, values = pd.factorize(loaded.table[name], use_na_sentinel=False)
        found[name] = codes, [plain(value) for value in values]
    return found


def _rows_at(loaded: RunFrame, name: str, value: object) -> np.ndarray[Any, Any]:
    """Return by row whether it has this value of an axis."""
    codes, values = _codes(loaded)[name]
    return np.asarray(codes == (values.index(value) if value in values else -1))


@functools.lru_cache(maxsize=32)
def base_values(loaded: RunFrame, op: str) -> Mapping[str, object]:
    """Return for each axis the value that most of the op's cases have, around which the sweep varies."""
    rows = np.flatnonzero(_rows_at(loaded, "op", op))
    rows = rows[np.unique(loaded.table["race"].to_numpy()[rows], return_index=True)[1]]
    values: dict[str, object] = {}
    for name in axes_in(loaded.table):
        codes, known = _codes(loaded)[name]
        there, first, counts = np.unique(codes[rows], return_index=True, return_counts=True)
        most = np.flatnonzero(counts == counts.max())
        top = [known[there[i]] for i in most[np.argsort(first[most])]]
        values[name] = next((value for value in top if is_usual(op, name, value)), top[0])
    return values


def at_base(
    loaded: RunFrame, op: str, free: Collection[str], fixed: Mapping[str, object] | None = None
) -> pd.DataFrame:
    """Return the op's rows in which every axis but `free` has its base value, or the one in `fixed`."""
    keep = _rows_at(loaded, "op", op)
    for name, value in {**base_values(loaded, op), **(fixed or {})}.items():
        if name not in free:
            keep &= _rows_at(loaded, name, value)
    return loaded.table[keep]


def plain(value: object) -> object:
    """Return a pandas cell as Python's own type, None for a missing one."""
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.item() if hasattr(value, "item") else value


def others(at: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes that the chooser offers together, where they have no usual value."""
    op = str(at["op"])
    values = {name: plain(at.get(name)) for name in axes_of(op) if name not in CHOSEN_BY}
    known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return {name: value for name, value in known.items() if not is_usual(op, name, value)}


def others_label(at: Mapping[str, Any]) -> str:
    """Return these settings in words: 'k3, valid', '1thread', ..."""
    op = str(at["op"])
    words = [label_value(op, name, value) for name, value in others(at).items()]
    return ", ".join(words) or "as usual"


def case_words(at: Mapping[str, Any], base: Mapping[str, object]) -> str:
    """Return 'in eager mode, forward, 1x8x8x96': mode, direction, and where a row leaves the base case."""
    op = str(at["op"])
    parts = [MODE_WORDS.get(at["mode"], str(at["mode"])), str(at["direction"])]
    for name, usual in base.items():
        value: Any = plain(at[name])
        if name not in ("mode", "direction", "device") and value is not None and value != usual:
            parts.append(value if isinstance(value, str) else label_value(op, name, value))
    return ", ".join(parts)
