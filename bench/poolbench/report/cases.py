"""Cases of a run: the base case of an op, the rows around it, and a case in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.axes import axes_of, is_usual, label_value
from poolbench.report.frame import axes_in

GROUP = ("op", "device", "mode", "direction")  # a row of the headline each
CHOSEN_BY = (*GROUP, "dtype", "shape")  # fields of the page's chooser
MODE_WORDS = {"xla": "with XLA", "graph": "in graph mode", "eager": "in eager mode"}


def base_values(table: pd.DataFrame, op: str) -> dict[str, object]:
    """Return for each axis the value that most of the op's cases have, around which the sweep varies."""
    cases = table[table["op"] == op].drop_duplicates("race")
    values: dict[str, object] = {}
    for name in axes_in(table):
        codes, found = pd.factorize(cases[name], use_na_sentinel=False)
        counts = np.bincount(codes)
        top = [plain(found[i]) for i in np.flatnonzero(counts == counts.max())]
        usual = [value for value in top if is_usual(op, name, value)]
        values[name] = usual[0] if usual else top[0]
    return values


def plain(value: object) -> object:
    """Return a pandas cell as Python's own type, None for a missing one."""
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.item() if hasattr(value, "item") else value


def at_base(
    table: pd.DataFrame, op: str, free: Iterable[str], fixed: Mapping[str, object] | None = None
) -> pd.DataFrame:
    """Return the op's rows in which every axis but `free` has its base value, or the one in `fixed`."""
    base = {**base_values(table, op), **(fixed or {})}
    free = set(free)
    keep = table["op"] == op
    for name, value in base.items():
        if name not in free:
            keep &= table[name].isna() if value is None else table[name] == value
    return table[keep]


def others_label(at: Mapping[str, Any]) -> str:
    """Return the settings that the chooser offers together: 'k3, valid', '1thread', ..."""
    op = str(at["op"])
    parts = []
    for name in axes_of(op):
        value: Any = None if name in CHOSEN_BY else plain(at.get(name))
        if value is not None and not is_usual(op, name, value):
            parts.append(label_value(op, name, value))
    return ", ".join(parts) or "as usual"


def case_words(at: Mapping[str, Any], base: Mapping[str, object]) -> str:
    """Return 'in eager mode, forward, 1x8x8x96': mode, direction, and where a row leaves the base case."""
    op = str(at["op"])
    parts = [MODE_WORDS.get(at["mode"], str(at["mode"])), str(at["direction"])]
    for name, usual in base.items():
        value: Any = plain(at[name])
        if name not in ("mode", "direction", "device") and value is not None and value != usual:
            parts.append(value if isinstance(value, str) else label_value(op, name, value))
    return ", ".join(parts)
