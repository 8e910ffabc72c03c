"""Time per call along the axes of a case: size, mode and direction, and any other axis of the op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from poolbench.core.axes import axes_of, label_value
from poolbench.core.text import format_seconds, join_names, significant
from poolbench.report.cases import MODE_WORDS, at_base, base_values, plain
from poolbench.report.figures.style import (
    INK,
    MODES,
    End,
    Look,
    Maker,
    Plot,
    dots,
    figure,
    finish,
    kind_marks,
    label_ends,
    legend_below,
    looks,
    mark_candidates,
    nbytes_axis,
    one_axis,
    one_per_program,
    right_rows,
    settings,
    short,
    slug,
    time_axis,
    title_of,
    varied,
)
from poolbench.report.frame import RunFrame, axes_in

BARS = "Median time per call; bars span the processes' medians. "


def plot_time_by_size(direction: str) -> Maker:
    """Time against the input's bytes, a panel a mode, with the memory-bandwidth limit."""

    def make(loaded: RunFrame, op: str, device: str) -> Plot | None:
        rows = right_rows(
            at_base(loaded, op, ("shape", "mode"), {"device": device, "direction": direction})
        )
        rows = varied(rows, "nbytes")
        modes = [mode for mode in MODES if mode in set(rows["mode"])]
        if not modes:
            return None
        look = looks(loaded, op)
        fig, axes = figure(1, len(modes), 4.2 * len(modes) + 0.5, 4.3, sharex=True, sharey=True)
        ends, same = [], ""
        for axis, mode in zip(axes[0], modes, strict=True):
            panel, words = one_per_program(rows[rows["mode"] == mode].sort_values("nbytes"))
            same += words
            ends.append(_curves(axis, panel, "nbytes", look))
        for axis, mode, lines in zip(axes[0], modes, ends, strict=True):
            axis.set_title(MODE_WORDS[mode])
            axis.set_xlabel("input (bytes)")
            axis.set_xscale("log")
            axis.set_yscale("log")
            nbytes_axis(axis.xaxis, rows["nbytes"].tolist())
            time_axis(axis.yaxis)
            label_ends(axis, lines)
        axes[0][0].set_ylabel("time per call")
        title = f"{title_of(op)}, {direction}: {_size_message(rows, modes)}"
        finish(fig, title)
        return Plot(
            name=f"time-by-size-{direction}",
            title=title,
            caption=BARS
            + settings(loaded, op, device, ("shape", "mode", "direction"))
            + same.replace("One program", "With XLA one program"),
            figure=fig,
        )

    return make


def _size_message(rows: pd.DataFrame, modes: Sequence[str]) -> str:
    largest = rows[rows["nbytes"] == rows["nbytes"].max()]
    parts = []
    for mode in modes:
        panel = largest[largest["mode"] == mode]
        if len(panel) > 1:
            order = panel.sort_values("seconds")
            spread = float(order.iloc[-1]["seconds"] / order.iloc[0]["seconds"])
            parts.append(f"{significant(spread, 2)}x {MODE_WORDS[mode]}")
    if not parts:
        return "time grows with the input"
    return f"fastest and slowest differ by {join_names(parts)} at the largest input"


def plot_by_axis(name: str) -> Maker:
    """Plot time along one axis at the base case: lines if its values are sizes, else one mark per value."""

    def make(loaded: RunFrame, op: str, device: str) -> Plot | None:
        rows = right_rows(at_base(loaded, op, (name,), {"device": device}))
        rows, same = one_per_program(varied(rows[rows[name].notna()], name))
        if rows.empty:
            return None
        spread = rows.groupby("candidate")["seconds"].agg(lambda s: s.max() / s.min())
        most = str(spread.idxmax())
        words = name.replace("_", " ")
        title = (
            f"{title_of(op)}: {words} changes the time of {short(most)} most, "
            f"by {significant(float(spread.max()), 2)}x"
        )
        return Plot(
            name=f"by-{slug(name)}",
            title=title,
            caption=f"{BARS}{settings(loaded, op, device, (name,))}{same}",
            figure=_lines(rows, name, title, looks(loaded, op))
            if _is_ordinal(op, name, rows[name])
            else _marks(rows, name, title),
        )

    return make


def _is_ordinal(op: str, name: str, values: pd.Series) -> bool:
    """Return whether values are drawn along a scale: three sizes or more."""
    axis = axes_of(op).get(name)
    if axis is not None and axis.kind == "category":
        return False
    # 0 stands for all threads: it has no place along a scale.
    numeric = bool(pd.api.types.is_numeric_dtype(values)) and values.min() > 0
    return numeric and values.nunique() > 2


def _curves(axis: Axes, rows: pd.DataFrame, x: str, look: Mapping[str, Look]) -> list[End]:
    """Plot time over a column, a line per candidate, with the bandwidth limit; return the lines' ends."""
    ends = []
    for name, line in rows.sort_values(x).groupby("candidate", sort=False):
        colour, marker = look[str(name)]
        places, seconds = line[x].to_numpy(dtype=float), line["seconds"].to_numpy()
        # One path with gaps for all bars: a path per bar takes longer to write than all the rest.
        bars = [line["seconds_low"], line["seconds_high"], np.full(len(line), np.nan)]
        axis.plot(places.repeat(3), np.stack(bars, axis=1).ravel(), color=colour, lw=0.9)
        axis.plot(places, seconds, color=colour, marker=marker, ms=4, lw=1.1)
        ends.append((float(seconds[-1]), str(name), colour))
    limit = rows.dropna(subset="bandwidth_limit_seconds")
    limit = limit.groupby(x)["bandwidth_limit_seconds"].median()
    if len(limit) > 1:
        axis.plot(limit.index, limit.values, "--", color=INK, lw=1.4)
        ends.append((float(limit.iloc[-1]), "memory-bandwidth limit", INK))
    return ends


def _lines(rows: pd.DataFrame, name: str, title: str, look: Mapping[str, Look]) -> Figure:
    fig, axis = one_axis(4.2)
    ends = _curves(axis, rows, name, look)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted(rows[name].unique())
    axis.set_xticks(ticks, [str(plain(tick)) for tick in ticks])
    axis.xaxis.set_minor_locator(FixedLocator([]))
    time_axis(axis.yaxis)
    axis.set_xlabel(name.replace("_", " "))
    axis.set_ylabel("time per call")
    label_ends(axis, ends)
    finish(fig, title)
    return fig


def _marks(rows: pd.DataFrame, name: str, title: str) -> Figure:
    values: list[Any] = [plain(value) for value in rows[name]]
    labels = [label_value(op, name, value) for op, value in zip(rows["op"], values, strict=True)]
    return dots(
        rows.assign(setting=labels), value="seconds", hue="setting", title=title,
        label="time per call (bars span the processes' medians)", formatter=format_seconds,
    )  # fmt: skip


def _direction_shapes(loaded: RunFrame, op: str, device: str) -> dict[str, dict[str, str]]:
    """Return by direction the shape at which most of its modes were raced: training's may be a smaller one.

    {} stands for an op that has no axis `shape`: then the base values hold for all of its axes.
    """
    base = base_values(loaded, op).get("shape")
    found: dict[str, dict[str, str]] = {}
    if base is None:
        rows = loaded.table
        rows = rows[(rows["op"] == op) & (rows["device"] == device)]
        return {direction: {} for direction in rows["direction"].unique()}
    for direction in ("forward", "training"):
        cases = at_base(loaded, op, ("mode", "shape"), {"device": device, "direction": direction})
        if cases.empty:
            continue
        modes = cases.groupby("shape")["mode"].nunique()
        most = modes[modes == modes.max()].index
        found[direction] = {"shape": str(base) if base in most else str(most[-1])}
    return found


def plot_mode_direction(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """Time by mode, a panel a direction, at the base case."""
    shapes = _direction_shapes(loaded, op, device)
    if not shapes:
        return None
    rows = pd.concat(
        right_rows(
            at_base(loaded, op, ("mode",), {"device": device, "direction": direction, **shape})
        )
        for direction, shape in shapes.items()
    )
    directions = [d for d in shapes if d in set(rows["direction"])]
    if not directions or rows["mode"].nunique() < 2:
        return None
    names = list(dict.fromkeys(rows.sort_values("seconds", ascending=False)["candidate"]))
    width, height = 4.2 * len(directions) + 1, 1.7 + 0.36 * len(names)
    fig, axes = figure(1, len(directions), width, height, sharey=True)
    modes = set(rows["mode"])
    marks = {mode: mark for mode, mark in kind_marks(MODES).items() if mode in modes}
    handles: dict[str, Any] = {}
    for axis, direction in zip(axes[0], directions, strict=True):
        panel = rows[rows["direction"] == direction]
        drawn = mark_candidates(axis, panel, names, "seconds", "mode", marks)
        handles |= {MODE_WORDS[mode]: mark for mode, mark in drawn.items()}
        axis.set_xscale("log")
        time_axis(axis.xaxis)
        axis.set_title(", ".join([direction, *shapes[direction].values()]))
        axis.set_xlabel("time per call")
    legend_below(fig, handles, 3)
    title = f"{title_of(op)}: {_mode_message(rows)}"
    finish(fig, title)
    return Plot(
        name="mode-direction",
        title=title,
        caption=f"{BARS}A missing mark: not right, or not supported there. "
        + settings(loaded, op, device, ("mode", "direction", "shape")),
        figure=fig,
    )


def _mode_message(rows: pd.DataFrame) -> str:
    best = rows.loc[rows.groupby(["direction", "mode"])["seconds"].idxmin()]
    parts = []
    for direction, group in best.groupby("direction", sort=True):
        top = group.sort_values("seconds").iloc[0]
        parts.append(
            f"{direction} is fastest {MODE_WORDS.get(top['mode'], top['mode'])} ({format_seconds(top['seconds'])})"
        )
    return ", ".join(parts)


def axis_makers(loaded: RunFrame) -> list[Maker]:
    """Return a maker per axis; modes and directions have a figure of their own, shapes two."""
    names = axes_in(loaded.table)
    return [plot_by_axis(n) for n in names if n not in ("shape", "mode", "direction", "device")]
