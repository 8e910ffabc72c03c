"""A comparison of two runs as text: headline, Markdown for a pull request, HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from poolbench.core.text import format_seconds, format_share, markdown_cell, with_interval
from poolbench.report.compare import ORDER, Compared, place_of
from poolbench.report.formats import WRITERS, as_markdown
from poolbench.report.template import fill_template
from poolbench.report.writing import writing_into

# A comment on a pull request has at most 65,536 characters: its tables have the first of these rows that fit.
COMMENT_LENGTH, ROWS_SHOWN = 65_536, (100, 30, 10)
FINER = "For finer ones, race both sides in one job: poolbench compare --base REF."


def changed_statuses(table: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements whose status changed, those that work now last."""
    rows = [
        (
            "works now" if row["status"] == "ok" else "broke" if row["base_status"] == "ok" else "changed",
            row["op"],
            row["candidate"],
            row["label"],
            row["base_status"],
            row["status"],
            row["note"],
        )
        for row in table[table["base_status"] != table["status"]].to_dict("records")
    ]  # fmt: skip
    order = {"broke": 0, "changed": 1, "works now": 2}
    rows.sort(key=lambda row: order[row[0]])
    names = ("change", "op", "candidate", "case", "before", "after", "why")
    return pd.DataFrame(rows, columns=list(names))


def verdict_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts as text, in the table's order."""
    rows = [
        {
            "verdict": row["verdict"].lower() or "not judged",
            "op": row["op"],
            "candidate": row["candidate"],
            "case": place_of(row),
            "time over base's": with_interval(row["ratio"], row["ratio_low"], row["ratio_high"]),
            "base": format_seconds(row["base_seconds"]),
            "run": format_seconds(row["seconds"]),
            "normalised by": row["normalizer"],
            "note": row["note"],
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


def summary(found: Compared) -> str:
    """Return 'Slower: 1. Faster: 0. Same: 40. Undecided: 3. Not judged: 2.'."""
    counts = Counter(found.table["verdict"])
    return " ".join(f"{name.capitalize() or 'Not judged'}: {counts[name]}." for name in ORDER)


def headline(found: Compared) -> str:
    """Return one sentence with the names that became slower."""
    slower = found.slower
    more = f"; and {len(slower) - 5} more" if len(slower) > 5 else ""
    return f"Slower: {'; '.join(slower[:5])}{more}." if slower else "Nothing became slower."


def method(found: Compared) -> list[str]:
    """Explain the figures and their resolution in short sentences."""
    text = [
        "Ratios are run over base, normalised by the other candidates or the bandwidth limit of the same rounds.",
        "Their 95% intervals hold what lies between two runs of one code.",
        f"The margin is {format_share(found.margin)}; at most 5% of the verdicts are expected to be false.",
    ]
    if math.isfinite(found.detectable):
        text.append(
            f"Half of these comparisons would have shown a slowdown of {format_share(found.detectable)}. {FINER}"
        )
    return text


def as_comment(found: Compared) -> str:
    """Return the comparison as Markdown for a pull request."""
    text = ""
    for rows in ROWS_SHOWN:
        text = _with_rows(found, rows)
        if len(text) <= COMMENT_LENGTH:
            break
    return text


def _with_rows(found: Compared, shown: int) -> str:
    judged = found.table
    clear = judged[judged["verdict"].isin(["SLOWER", "FASTER"])]
    rest = judged[~judged["verdict"].isin(["SLOWER", "FASTER"])]
    statuses = changed_statuses(judged)
    parts = [
        f"## {markdown_cell(found.run)} against {markdown_cell(found.base)}\n",
        f"**{markdown_cell(headline(found))}** {summary(found)}\n",
        " ".join(method(found)) + "\n",
    ]
    parts += [f"{markdown_cell(note)}\n" for note in found.notes]
    if found.differences:
        words = ", ".join(f"{d.name} ({d.before} | {d.after})" for d in found.differences)
        parts.append(f"Different, and allowed: {markdown_cell(words)}.\n")
    if len(clear):
        parts.append(f"### Slower and faster\n\n{_shown(clear, verdict_table, shown)}")
    if len(statuses):
        parts.append(f"### Statuses that changed\n\n{_shown(statuses, pd.DataFrame, shown)}")
    if len(found.cells):
        parts.append(
            f"### Limitations that came and went\n\n{_shown(found.cells, pd.DataFrame, shown)}"
        )
    if len(rest):
        parts.append(
            f"<details><summary>The other {len(rest)}</summary>\n\n{_shown(rest, verdict_table, shown)}\n</details>\n"
        )
    return "\n".join(parts)


def _shown(frame: pd.DataFrame, as_text: Callable[[pd.DataFrame], pd.DataFrame], shown: int) -> str:
    text = as_markdown(as_text(frame.head(shown)))
    left = len(frame) - shown
    return text + (f"\n{left} more rows: `--format csv` prints all.\n" if left > 0 else "")


def write_page(found: Compared, folder: Path) -> Path:
    """Write the comparison as one HTML file in the folder and return its path."""
    page = folder / "compare.html"
    context = {
        "found": found,
        "headline": headline(found),
        "summary": summary(found),
        "method": " ".join(method(found)),
        "statuses": changed_statuses(found.table),
        "verdicts": verdict_table(found.table),
    }
    with writing_into(folder):
        page.write_text(fill_template("compare.html", context), encoding="utf-8")
    return page


def _whole(write: Callable[[pd.DataFrame], str]) -> Callable[[Compared], str]:
    return lambda found: write(found.table)


FORMATS: dict[str, Callable[[Compared], str]] = {
    **{name: _whole(write) for name, write in WRITERS.items()},
    "markdown": as_comment,
}
