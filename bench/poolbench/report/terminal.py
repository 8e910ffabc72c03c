"""A run's answer as a few lines of text for a terminal."""

from __future__ import annotations

import io

from poolbench.core.text import format_share, one_line, with_interval
from poolbench.report.frame import RunFrame
from poolbench.report.ratios import NO_TEXTBOOK, NOT_RACED
from poolbench.report.recommend import answer
from poolbench.report.tables import HeadlineRow, headline_rows, textbook_text, time_text

MOST_ROWS = 8  # of the table: with heading and remarks ten lines
WIDTH = 140  # a line that a terminal wraps is read; one that is cut is lost
# The modes that matter less make room first.
LESS = ("eager", "xla")
NOTHING = "No measurement of this run is right and timed: nothing is ranked."


def interval_line(loaded: RunFrame) -> str:
    """Return in one line what the intervals are, and where the between-run variance comes from."""
    source = "the shipped prior" if loaded.source == "prior" else loaded.source
    return f"Intervals: 95% of the next run's values on this machine; between-run variance from {source}."


def headline_text(loaded: RunFrame) -> str:
    """Return a table with a row per op, mode and direction, and a description of its intervals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = headline_rows(loaded, answer(loaded))
    if not rows:
        return NOTHING
    shown = _shorten(loaded, rows)
    devices = {loaded.row(one.row)["device"] for one in rows}
    place = ["device"] if len(devices) > 1 else []
    table = Table(box=None, pad_edge=False, header_style="")
    headings = (
        "op", *place, "mode", "pass", "recommended", "time/call", "vs textbook", "vs best",
        "% of bandwidth",
    )  # fmt: skip
    for name in headings:
        table.add_column(name, no_wrap=True)
    for one in shown:
        at = loaded.row(one.row)
        cells = (
            at["op"], *(at[name] for name in place), at["mode"], at["direction"], at["candidate"],
            time_text(at), _textbook(at),
            _rank(one, at["candidate"]) or with_interval(*one.loss).split(" ")[0],
            format_share(at["efficiency"]),
        )  # fmt: skip
        table.add_row(*(Text(one_line(str(cell), 40)) for cell in cells))
    out = io.StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    more = f" {len(rows) - len(shown)} more rows are on the page." if len(rows) > len(shown) else ""
    return "\n".join([*lines, interval_line(loaded) + more])


def _rank(one: HeadlineRow, name: str) -> str:
    """Return 'fastest' or 'tied' for one of the best; '' for another."""
    if name not in one.choice.best:
        return ""
    return "fastest" if len(one.choice.best) == 1 else "tied"


def _textbook(at: dict[str, object]) -> str:
    reason = str(at["textbook_reason"])
    if not reason:
        return textbook_text(at)
    if reason == NO_TEXTBOOK:
        return ""
    return "textbook not raced" if reason.endswith(NOT_RACED) else "textbook does not run"


def _shorten(loaded: RunFrame, rows: list[HeadlineRow]) -> list[HeadlineRow]:
    """Return at most MOST_ROWS rows: of eager mode and XLA fewer, then the first ones."""
    for mode in LESS:
        if len(rows) > MOST_ROWS:
            rest = [one for one in rows if loaded.row(one.row)["mode"] != mode]
            rows = rest or rows
    return rows[:MOST_ROWS]
