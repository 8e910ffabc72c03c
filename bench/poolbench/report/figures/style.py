"""How figures are drawn: style, colours, axes, the marks that several share, and the files they become."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

from poolbench.core.axes import STANDARD, axes_of, is_usual
from poolbench.core.candidate import split_contender
from poolbench.core.registry import REGISTRY
from poolbench.core.text import format_nbytes, format_seconds, one_line
from poolbench.report.cases import base_values
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import answer

INK = "#1a1a1b"  # becomes currentColor on the page, so that figures follow light and dark
MODES = STANDARD["mode"].choices
# Distinguishable with any colour vision, on light and dark backgrounds.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#a5673f", "#8a6fdb")
GREY = "#8a8a8a"
Look = tuple[str, str]
End = tuple[float, str, str]  # of a line: value, name and colour
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h", "p")
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "figure.titlesize": 11,
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "font.family": "DejaVu Sans",
    "grid.color": "#80808055",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a candidate's name may hold a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure with what it shows.

    Attributes:
        name: file name without suffix; ours, never the data's.
        title: the message, in one sentence.
        caption: what is drawn, in which units, at which settings.
        figure: matplotlib's.
    """

    name: str
    title: str
    caption: str
    figure: Figure


Maker = Callable[[RunFrame, str, str], "Plot | None"]


@contextlib.contextmanager
def styled(**more: str) -> Iterator[None]:
    """Return a context in which figures are made in the report's style, and no warning stops them.

    There are two kinds: of names in a script that the font lacks, and of calls in seaborn that are deprecated.
    """
    with mpl.rc_context({**STYLE, **more}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def title_of(op: str) -> str:
    """Return the op's title; its name where it is not registered here."""
    entry = REGISTRY.ops.get(op)
    return one_line((entry.title if entry else "") or op, 60)


def slug(text: str) -> str:
    """Return at most forty letters that are safe in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "x"


def short(name: str) -> str:
    """Return a name as a label."""
    return one_line(name, 32)


@functools.lru_cache(maxsize=8)
def looks(loaded: RunFrame, op: str) -> dict[str, Look]:
    """Return colour and marker by candidate: the same in every figure of a run.

    Eight have a colour: the recommended ones, the baseline, then those raced most. The rest are grey.
    """
    rows = loaded.table[loaded.table["op"] == op]
    advice = [one for one in answer(loaded).recommendations.values() if one.op == op]
    first = [*(one.candidate for one in advice), *(one.over for one in advice if one.over)]
    counts = rows.loc[rows["right"], "candidate"].value_counts()
    order = dict.fromkeys([*first, *rows["baseline"], *counts.index, *rows["candidate"]])
    there = set(rows["candidate"])
    names = [name for name in order if name in there]
    return {
        name: (COLOURS[i] if i < len(COLOURS) else GREY, MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def kind_marks(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return marks for modes and settings, distinguished by shape; colour always means a candidate."""
    shapes = (
        {"marker": "o"}, {"marker": "s", "mfc": "none"}, {"marker": "^", "alpha": 0.6}, {"marker": "x"},
    )  # fmt: skip
    return {
        kind: {"color": INK, "linestyle": "none", **shapes[i % len(shapes)]}
        for i, kind in enumerate(kinds)
    }


def label_ends(axis: Axes, ends: Sequence[End]) -> None:
    """Write names at the right edge, at the heights of their lines' ends, spread to be legible.

    The axis has its limits and scales.
    """
    gap = 0.14 * axis.figure.dpi / axis.bbox.height  # a line of 8 points
    order = sorted(ends, key=lambda end: end[0])
    to_axis = axis.transData + axis.transAxes.inverted()
    heights = [float(to_axis.transform((1, value))[1]) for value, *_ in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(heights))):  # what was pushed out at the top comes back
        heights[i] = min(heights[i], max(top, gap * i))
        top = heights[i] - gap
    for (_, name, colour), at in zip(order, heights, strict=True):
        axis.annotate(
            short(name), (1.015, at), xycoords="axes fraction", va="center", fontsize=8, color=colour,
            annotation_clip=False,
        )  # fmt: skip


def settings(loaded: RunFrame, op: str, device: str, free: Sequence[str]) -> str:
    """Describe the axis values that a figure keeps fixed."""
    base = base_values(loaded, op)
    words = [
        f"{name.replace('_', ' ')} {value}"
        for name in axes_of(op)
        if name not in (*free, "device")
        and (value := base.get(name)) is not None
        and not is_usual(op, name, value)
    ]
    return f"On {device}; {', '.join(words)}."


def figure(
    rows: int, columns: int, width: float, height: float, **kwargs: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, shape (rows, columns), laid out so that nothing overlaps."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs)
    return fig, axes


def one_axis(height: float, width: float = 7.4) -> tuple[Figure, Any]:
    """Return a figure and its only axis."""
    fig, axes = figure(1, 1, width, height)
    return fig, axes[0][0]


def finish(fig: Figure, title: str) -> None:
    """Set the title, wrapped to the figure's width."""
    letters = int(fig.get_figwidth() * 9.5)
    fig.suptitle(textwrap.fill(title, letters), color=INK, fontweight="bold")


def legend_below(fig: Figure, handles: dict[str, Any], columns: int) -> None:
    """Draw one legend for all axes, below them."""
    if handles:
        fig.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=columns,
            handlelength=1.8, columnspacing=1.4,
        )  # fmt: skip


def time_axis(axis: Any) -> None:
    """Logarithmic seconds, labelled '1 ms', '10 µs'."""
    log_axis(axis, format_seconds)


def log_axis(axis: Any, label: Callable[[float], str]) -> None:
    """A logarithmic axis with a handful of labels, be it over five decades or a tenth of one.

    To be called once the data is drawn and the scale is set.
    """
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    if decades < 0.6:
        axis.set_major_locator(MaxNLocator(4))
    else:
        subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.5 else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=15))
    axis.set_minor_locator(FixedLocator([]))  # fifty ticks take longer to draw than the lines
    axis.set_major_formatter(FuncFormatter(lambda v, _: _plain_zeros(label(v))))


def _plain_zeros(text: str) -> str:
    """Return '1 ms' from '1.00 ms'."""
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda found: found[1] if found[1] != "." else "", text)


def nbytes_axis(axis: Any, values: Sequence[float]) -> None:
    """Make an axis of logarithmic bytes with ticks at powers of sixteen, labelled '1 MiB'."""
    values = [value for value in values if value > 0] or [1]
    low, high = math.floor(math.log2(min(values)) / 4), math.ceil(math.log2(max(values)) / 4)
    axis.set_major_locator(FixedLocator([2.0 ** (4 * i) for i in range(low, high + 1)]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _plain_zeros(format_nbytes(v))))
    axis.set_minor_locator(FixedLocator([]))


def varied(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the rows of candidates that were raced at two or more values of the axis."""
    return rows[rows.groupby("candidate")[axis].transform("nunique") > 1]


def one_per_program(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return rows without those of a program that an earlier candidate has too, and words for the caption.

    With XLA only, and only where the programs of two candidates are equal in all of these cases.
    """
    if rows.empty or set(rows["mode"]) != {"xla"}:
        return rows, ""
    groups: dict[object, list[str]] = {}
    for name, some in rows.groupby("candidate", sort=False):
        programs = frozenset(zip(some["race"], some["program"], strict=True))
        known = all(some["program"]) and all(some["right"])
        key = (programs, split_contender(str(name))[1]) if known else name
        groups.setdefault(key, []).append(str(name))
    same = [" = ".join(names) for names in groups.values() if len(names) > 1]
    firsts = [names[0] for names in groups.values()]
    words = f" One program, shown once: {'; '.join(same)}." if same else ""
    return rows[rows["candidate"].isin(firsts)], words


def right_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that may be ranked."""
    return rows[rows["right"] & rows["seconds"].notna()]


def mark_candidates(
    axis: Axes,
    rows: pd.DataFrame,
    names: Sequence[str],
    value: str,
    hue: str,
    marks: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Plot candidates (down) and a value with its interval (across); return the marks by value of `hue`."""
    place = {name: i for i, name in enumerate(names)}
    drawn: dict[str, Any] = {}
    for i, (kind, look) in enumerate(marks.items()):
        part = rows[rows[hue] == kind]
        if part.empty:
            continue
        offset = (i - (len(marks) - 1) / 2) * 0.22
        y = [place[name] + offset for name in part["candidate"]]
        below = (part[value] - part[f"{value}_low"]).clip(lower=0).fillna(0)
        above = (part[f"{value}_high"] - part[value]).clip(lower=0).fillna(0)
        drawn[kind] = axis.errorbar(
            part[value], y, xerr=[below, above], ms=5, elinewidth=1.2, capsize=2, **look
        )
    axis.set_yticks(range(len(names)), [short(name) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    return drawn


def dots(
    rows: pd.DataFrame,
    *,
    value: str,
    hue: str,
    label: str,
    title: str,
    formatter: Callable[[float], str],
) -> Figure:
    """Plot candidates (down) and a value with its interval (across), one marker per value of `hue`."""
    names = list(dict.fromkeys(rows.sort_values(value)["candidate"]))
    found = set(rows[hue])
    kinds = [kind for kind in MODES if kind in found] if hue == "mode" else sorted(found)
    fig, axis = one_axis(1.5 + 0.34 * len(names))
    drawn = mark_candidates(axis, rows, names, value, hue, kind_marks(kinds))
    axis.set_xlabel(label)
    axis.set_xscale("log")
    log_axis(axis.xaxis, formatter)
    if len(kinds) > 1:
        legend_below(fig, drawn, len(kinds))
    finish(fig, title)
    return fig


def svg_of(fig: Figure, salt: str) -> str:
    """Return the figure as SVG text in currentColor, with ids that begin with the salt."""
    out = io.StringIO()
    with styled(**{"svg.hashsalt": salt}):
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{salt}-", text)
    return text.replace(INK, "currentColor")


def png_of(fig: Figure) -> bytes:
    """Return the figure as PNG on white; its layout is computed here, because savefig would draw twice for it."""
    out = io.BytesIO()
    with styled():
        if layout := fig.get_layout_engine():
            layout.execute(fig)
        # "none" would leave a placeholder, which makes savefig draw twice.
        fig.set_layout_engine(None)
        fig.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()
