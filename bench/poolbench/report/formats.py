"""Format tables as Markdown, CSV, HTML and JSON; text of a run neither ends a cell nor starts markup."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd

from poolbench.core.text import markdown_cell

# The first characters of a formula; some spreadsheets skip white space, some know the wide signs of Japanese.
FORMULAS = tuple("=+-@\t\n\uff1d\uff0b\uff0d\uff20")


def as_table(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> pd.DataFrame:
    """Return a table with text as Python objects: pandas' own type of text takes ten times as long to iterate."""
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pd.DataFrame(
        {
            name: pd.Series(column, dtype=object if str in set(map(type, column)) else None)
            for name, column in zip(names, columns, strict=True)
        }
    )


def rows_of(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Return the rows as tuples of Python's own types; pandas takes several times as long."""
    columns = [frame[name].tolist() for name in frame.columns]
    return list(zip(*columns, strict=True))


def as_markdown(frame: pd.DataFrame, *, markup: Collection[str] = ()) -> str:
    """Format a GitHub table; cells are escaped, because names and errors are untrusted.

    Not so those of the columns in `markup`: they are Markdown, and ours.
    """
    if frame.empty:
        return "(nothing)\n"
    out = ["| " + " | ".join(markdown_cell(str(name)) for name in frame.columns) + " |"]
    out.append("|" + "---|" * len(frame.columns))
    writers = [_cell if name in markup else _escaped_cell for name in frame.columns]
    out += [
        "| " + " | ".join(write(value) for write, value in zip(writers, row, strict=True)) + " |"
        for row in rows_of(frame)
    ]
    return "\n".join(out) + "\n"


def as_csv(frame: pd.DataFrame) -> str:
    """Format as CSV; a cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")  # pandas' own takes three times as long
    writer.writerow(map(_csv_cell, frame.columns))
    writer.writerows([_csv_cell(value) for value in row] for row in rows_of(frame))
    return out.getvalue()


def _csv_cell(value: object) -> object:
    if isinstance(value, str):
        value = value.replace("\r", "\\r")  # unquoted by Python's writer, it would begin a row
        return f"'{value}" if value.startswith(FORMULAS) else value
    return "" if isinstance(value, float) and math.isnan(value) else value


def as_html(frame: pd.DataFrame) -> str:
    """Format a plain HTML table, escaped."""
    return str(frame.to_html(index=False, escape=True, border=0, na_rep=""))


def as_json(frame: pd.DataFrame) -> str:
    """Format one JSON object per row; non-finite numbers are null."""
    rows = [
        {str(name): _json_cell(value) for name, value in zip(frame.columns, row, strict=True)}
        for row in rows_of(frame)
    ]
    return json.dumps(rows, ensure_ascii=True, allow_nan=False, indent=1) + "\n"


def _json_cell(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _escaped_cell(value: object) -> str:
    return markdown_cell(_cell(value))


WRITERS: dict[str, Callable[[pd.DataFrame], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "html": as_html,
    "json": as_json,
}
