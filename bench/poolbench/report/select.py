"""Selection of rows of a report by the values of a column: `--select mode=xla,graph`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from poolbench.core.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

Selection = Sequence[tuple[str, tuple[str, ...]]]


def select(table: pd.DataFrame, wanted: Selection) -> pd.DataFrame:
    """Return the rows whose columns have one of the wanted values.

    Raises:
        UsageError: there is no such column, or no row is left.
    """
    for name, values in wanted:
        if name not in table.columns:
            raise UsageError(
                f"no column {name!r}; there are {', '.join(table.columns)} (--select COLUMN=VALUE)"
            )
        table = table[[_as_text(value) in values for value in table[name]]]
        if table.empty:
            raise UsageError(f"no measurement has {name} in {', '.join(values)} (--select)")
    return table


def _as_text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
