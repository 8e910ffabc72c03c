"""The figures of a run as files, and what the page needs of each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from poolbench.core.errors import reason_of
from poolbench.report import figures
from poolbench.report.figures.style import Plot
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import Answers
from poolbench.report.support import Support


def write_figures(
    loaded: RunFrame, answers: Answers, matrices: Sequence[Support], folder: Path
) -> list[dict[str, Any]]:
    """Write every figure that the run has data for, as SVG and PNG; return what the page shows of each.

    A figure that cannot be drawn leaves the others, and the page says which and why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("[0-9][0-9]*-*.svg"), *folder.glob("[0-9][0-9]*-*.png")):
        old.unlink()
    groups: list[dict[str, Any]] = []
    pairs = list(dict.fromkeys(zip(loaded.table["op"], loaded.table["device"], strict=True)))
    at = {(one.op, one.device): one for one in matrices}
    number = itertools.count(1)
    failed: list[str] = []

    def draw(make: Callable[[], Plot | None], op: str = "") -> list[dict[str, Any]]:
        try:
            with figures.styled():
                plot = make()
            return [_write_figure(plot, next(number), op, folder)] if plot else []
        except OSError:  # a full disk: the report fails as one
            raise
        except Exception as error:  # noqa: BLE001 (a plotting library's, of any kind: the page goes on without)
            failed.append(f"A figure could not be drawn: {reason_of(error)}.")
            return []

    for op, device in dict.fromkeys([*pairs, *at]):
        failed.clear()
        profile = draw(lambda: figures.plot_profile(loaded, answers, op, device), op)  # noqa: B023
        shown = [
            figure
            for maker in figures.makers(loaded)
            if (op, device) in pairs
            for figure in draw(lambda: maker(loaded, op, device), op)  # noqa: B023
        ]
        if (op, device) in at:
            matrix = at[op, device]
            shown += draw(lambda: figures.plot_support(matrix), op)  # noqa: B023
        notes = _direction_note(loaded, op), clock_note(loaded, op, device), *failed
        groups.append(
            {
                "op": op, "device": device, "title": figures.title_of(op), "profile": profile,
                "figures": shown, "failed": bool(failed), "anchor": f"figures-{len(groups)}",
                "note": " ".join(filter(None, notes)),
            }
        )  # fmt: skip
    failed.clear()
    selftest = draw(lambda: figures.plot_selftest(loaded.run.selftests))
    if selftest or failed:
        groups.append(
            {
                "op": "", "device": "", "title": "Self-test", "anchor": "figures-selftest",
                "note": " ".join(failed), "failed": bool(failed), "profile": [], "figures": selftest,
            }
        )  # fmt: skip
    return groups


def _direction_note(loaded: RunFrame, op: str) -> str:
    """Return a remark where an op was raced in one direction only."""
    directions = set(loaded.table.loc[loaded.table["op"] == op, "direction"])
    return (
        "Raced forward only: no training case of this op is in the run."
        if directions == {"forward"}
        else ""
    )


def clock_note(loaded: RunFrame, op: str, device: str) -> str:
    """Return by which clock the times on a GPU are; '' on a CPU."""
    table = loaded.table
    rows = table[(table["op"] == op) & (table["device"] == device) & table["right"]]
    by_wall = rows[rows["clock"] == "wall"]
    if len(by_wall) == len(rows):
        return ""
    text = "Times are by the device's own clock: a call from Python takes longer."
    if not by_wall.empty:
        names = ", ".join(sorted(set(by_wall["mode"] + " " + by_wall["candidate"])))
        text += f" By the wall's clock: {names}."
    return text


def _write_figure(plot: Plot, number: int, op: str, folder: Path) -> dict[str, Any]:
    name = "-".join([f"{number:02d}", plot.name, *([figures.slug(op)] if op else [])])
    png = figures.png_of(plot.figure)
    svg = figures.svg_of(plot.figure, name)
    standalone = '<?xml version="1.0" encoding="utf-8"?>\n' + svg
    (folder / f"{name}.svg").write_text(standalone, encoding="utf-8")
    (folder / f"{name}.png").write_bytes(png)
    return {
        "name": name,
        "title": plot.title,
        "caption": plot.caption,
        "svg": inline_svg(svg, plot.title),
    }


def inline_svg(svg: str, title: str) -> Markup:
    """Return our own SVG with a label for screen readers, scaled by the page instead of by its points."""
    head_end = svg.index(">")
    head = re.sub(r' (width|height)="[^"]*"', "", svg[:head_end])
    match = re.search(r' width="([0-9.]+)pt"', svg[:head_end])
    width = float(match.group(1)) if match else 600.0
    label = f' role="img" aria-label="{escape(title)}" style="width:{width * 1.2:.0f}px"'
    return Markup(head + label + svg[head_end:])  # noqa: S704  # matplotlib escapes its text
