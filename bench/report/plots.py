"""Figures of a run: one message each, said in its title, in units, with intervals.

A plot is a function (loaded, op, device) -> Plot or None (the run holds too little for it). Every
figure has a constant number of marks per case shown, so that a run of any size is drawn as quickly.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.candidate import REGISTRY
from bench.measurement import Capability, Selftest
from bench.report.choose import MODE_WORDS, at_base, base_values
from bench.report.load import Loaded, replica_medians
from bench.report.tables import break_even_table
from bench.report.text import (
    format_nbytes,
    format_seconds,
    format_share,
    join_names,
    one_line,
    significant,
)

INK = "#1a1a1b"  # becomes currentColor on the page, so that figures follow light and dark
MODES = ("eager", "graph", "xla")
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
STATE_COLOURS = {  # Okabe and Ito's, told apart without red against green
    "pass": "#56b4e9",
    "wrong": "#d55e00",
    "unsupported": "#e69f00",
    "error": "#cc79a7",
    "crashed": "#882255",
    "timeout": "#999933",
    "not_run": "#bbbbbb",
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


Maker = Callable[[Loaded, str, str], "Plot | None"]


def styled() -> Any:
    """A context in which figures are made in the report's style."""
    return mpl.rc_context(STYLE)


def title_of(op: str) -> str:
    """The op's heading; its name where nobody registered it here."""
    entry = REGISTRY.ops.get(op)
    return one_line((entry.title if entry else "") or op, 60)


def slug(text: str) -> str:
    """Letters that are safe in a file name, and no more than forty of them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "x"


def short(name: str) -> str:
    """A name as a label."""
    return one_line(name, 32)


def palette(names: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Colour and marker by candidate; markers go on where the ten colours begin again."""
    colours = sns.color_palette("colorblind", 10)
    return {name: (colours[i % 10], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def names_of(loaded: Loaded, op: str) -> list[str]:
    """The op's candidates in the order of the run: their colours are the same in every figure."""
    table = loaded.table
    return list(dict.fromkeys(table.loc[table["op"] == op, "candidate"]))


def settings(loaded: Loaded, op: str, device: str, free: Sequence[str]) -> str:
    """The base values that a figure holds still, in words."""
    base = {**base_values(loaded.table, op), "device": device}
    words = []
    for name in ("shape", "dtype", "pool_size", "padding", "direction", "mode", "threads"):
        value = base[name]
        if name in free or value is None:
            continue
        words.append(
            f"{name.replace('_', ' ')} {'all' if name == 'threads' and value == 0 else value}"
        )
    return f"On {device}; {', '.join(words)}."


def figure(
    rows: int, columns: int, width: float, height: float, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure of axes, shape (rows, columns), laid out so that nothing overlaps."""
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs)
    return fig, axes


def finish(fig: Figure, title: str, width: float) -> None:
    """The title above, wrapped to the figure's width."""
    fig.suptitle(textwrap.fill(title, int(width * 9.5)), color=INK, fontweight="bold")


def legend_below(fig: Figure, handles: dict[str, Any], columns: int) -> None:
    """One legend for all axes, under them."""
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
    axis.set_minor_locator(
        # Not all nine of a decade: drawing fifty ticks takes longer than drawing the lines.
        FixedLocator([]) if decades < 0.6 else LogLocator(10, (2.0, 5.0), numticks=15)
    )
    axis.set_major_formatter(FuncFormatter(lambda v, _: _plain_zeros(label(v))))
    axis.set_minor_formatter(NullFormatter())


def _plain_zeros(text: str) -> str:
    """'1 ms' from '1.00 ms'."""
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda found: found[1] if found[1] != "." else "", text)


def nbytes_axis(axis: Any, values: Sequence[float]) -> None:
    """Logarithmic bytes with ticks at powers of sixteen, labelled '1 MiB'."""
    low, high = math.floor(math.log2(min(values)) / 4), math.ceil(math.log2(max(values)) / 4)
    axis.set_major_locator(FixedLocator([2.0 ** (4 * i) for i in range(low, high + 1)]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: _plain_zeros(format_nbytes(v))))
    axis.set_minor_locator(FixedLocator([]))


def varied(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Rows of the candidates that were raced at two values of the axis or more: one point shows no effect."""
    return rows[rows.groupby("candidate")[axis].transform("nunique") > 1]


def right_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Those that may be ranked."""
    return rows[rows["right"] & rows["seconds"].notna()]


def plot_time_by_size(direction: str) -> Maker:
    """Time against the input's bytes, a panel a mode, with the memory's ceiling."""

    def make(loaded: Loaded, op: str, device: str) -> Plot | None:
        rows = right_rows(
            at_base(loaded.table, op, ("shape", "mode"), {"device": device, "direction": direction})
        )
        rows = varied(rows, "nbytes")
        modes = [mode for mode in MODES if mode in set(rows["mode"])]
        if not modes:
            return None
        look = palette(names_of(loaded, op))
        width = 3.1 * len(modes) + 0.6
        fig, axes = figure(1, len(modes), width, 4.3, sharex=True, sharey=True)
        handles: dict[str, Any] = {}
        for axis, mode in zip(axes[0], modes, strict=True):
            panel = rows[rows["mode"] == mode].sort_values("nbytes")
            for name, line in panel.groupby("candidate", sort=False):
                handles[short(name)] = _line(axis, line, "nbytes", look[name])
            ceiling = (
                panel.dropna(subset="ceiling_seconds").groupby("nbytes")["ceiling_seconds"].median()
            )
            if len(ceiling):
                (mark,) = axis.plot(ceiling.index, ceiling.values, "--", color=INK, lw=1.4)
                handles["memory's ceiling"] = mark
            axis.set_title(MODE_WORDS.get(mode, mode))
            axis.set_xlabel("input (bytes)")
            axis.set_xscale("log")
            axis.set_yscale("log")
            nbytes_axis(axis.xaxis, rows["nbytes"].tolist())
            time_axis(axis.yaxis)
        axes[0][0].set_ylabel("time a call")
        legend_below(fig, handles, max(2, len(modes)))
        title = f"{title_of(op)}, {direction}: {_size_message(rows, modes)}"
        finish(fig, title, width)
        return Plot(
            name=f"time-by-size-{direction}",
            title=title,
            caption="Median time a call; bars span the replicas' medians. "
            + settings(loaded, op, device, ("shape", "mode", "direction")),
            figure=fig,
        )

    return make


def _line(axis: Axes, line: pd.DataFrame, x: str, look: tuple[Any, str]) -> Any:
    colour, marker = look
    low = (line["seconds"] - line["seconds_low"]).clip(lower=0)
    high = (line["seconds_high"] - line["seconds"]).clip(lower=0)
    return axis.errorbar(
        line[x], line["seconds"], yerr=[low, high], color=colour, marker=marker, ms=4, lw=1.1, elinewidth=0.9,
        capsize=1.5,
    )  # fmt: skip


def _size_message(rows: pd.DataFrame, modes: Sequence[str]) -> str:
    largest = rows[rows["nbytes"] == rows["nbytes"].max()]
    parts = []
    for mode in modes:
        panel = largest[largest["mode"] == mode]
        if len(panel) > 1:
            order = panel.sort_values("seconds")
            spread = float(order.iloc[-1]["seconds"] / order.iloc[0]["seconds"])
            parts.append(f"{significant(spread, 2)}x {MODE_WORDS.get(mode, mode)}")
    if not parts:
        return "time grows with the input"
    return f"fastest and slowest differ by {join_names(parts)} at the largest input"


def plot_efficiency(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Share of the memory's ceiling that each candidate reaches, by mode."""
    rows = at_base(loaded.table, op, ("mode",), {"device": device, "direction": "forward"})
    rows = right_rows(rows)
    rows = rows[rows["efficiency"].notna()]
    if rows.empty:
        return None
    best = rows.loc[rows["efficiency"].idxmax()]
    title = (
        f"{title_of(op)}: {short(best['candidate'])} {MODE_WORDS.get(best['mode'], best['mode'])} reaches "
        f"{format_share(best['efficiency'])} of what the memory allows"
    )
    fig = _dots(
        rows, value="efficiency", low="efficiency_low", high="efficiency_high", hue="mode",
        label="ceiling time / time, 95% interval", title=title, percent=True,
    )  # fmt: skip
    fig.axes[0].axvline(1, color=INK, ls="--", lw=1)
    return Plot(
        name="efficiency",
        title=title,
        caption="Ceiling time: bytes read over the read bandwidth plus bytes written over the write bandwidth, "
        "both measured in the same rounds. " + settings(loaded, op, device, ("mode", "direction")),
        figure=fig,
    )


def _dots(
    rows: pd.DataFrame,
    *,
    value: str,
    low: str,
    high: str,
    hue: str,
    label: str,
    title: str,
    percent: bool = False,
    log: bool = False,
    formatter: Callable[[float], str] | None = None,
) -> Figure:
    """Candidates down, a value with its interval across, one colour and marker a value of `hue`."""
    names = list(dict.fromkeys(rows.sort_values(value)["candidate"]))
    kinds = (
        [kind for kind in MODES if kind in set(rows[hue])]
        if hue == "mode"
        else sorted(set(rows[hue]))
    )
    width = 7.4
    fig, axes = figure(1, 1, width, 1.5 + 0.34 * len(names))
    axis = axes[0][0]
    look = palette([str(kind) for kind in kinds])
    place = {name: i for i, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        part = rows[rows[hue] == kind]
        offset = (i - (len(kinds) - 1) / 2) * 0.22
        y = [place[name] + offset for name in part["candidate"]]
        below = (part[value] - part[low]).clip(lower=0).fillna(0)
        above = (part[high] - part[value]).clip(lower=0).fillna(0)
        colour, marker = look[str(kind)]
        handles[str(kind)] = axis.errorbar(
            part[value],
            y,
            xerr=[below, above],
            fmt=marker,
            color=colour,
            ms=5,
            elinewidth=1.2,
            capsize=2,
        )
    axis.set_yticks(range(len(names)), [short(name) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel(label)
    if log:
        axis.set_xscale("log")
        log_axis(axis.xaxis, formatter or significant)
    else:
        axis.set_xlim(left=0)
    if percent:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}%"))
    if len(kinds) > 1:
        legend_below(fig, handles, len(kinds))
    finish(fig, title, width)
    return fig


def plot_divisor(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Time against the window, at the base case."""
    rows = varied(
        right_rows(at_base(loaded.table, op, ("pool_size",), {"device": device})), "pool_size"
    )
    if rows.empty:
        return None
    look = palette(names_of(loaded, op))
    width = 7.4
    fig, axes = figure(1, 1, width, 4.2)
    axis = axes[0][0]
    handles = {}
    for name, line in rows.sort_values("pool_size").groupby("candidate", sort=False):
        handles[short(name)] = _line(axis, line, "pool_size", look[name])
    ceiling = rows.dropna(subset="ceiling_seconds").groupby("pool_size")["ceiling_seconds"].median()
    if len(ceiling):
        (handles["memory's ceiling"],) = axis.plot(
            ceiling.index, ceiling.values, "--", color=INK, lw=1.4
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted(int(k) for k in rows["pool_size"].unique())
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.xaxis.set_minor_locator(FixedLocator([]))
    time_axis(axis.yaxis)
    axis.set_xlabel("window along the depth (channels)")
    axis.set_ylabel("time a call")
    legend_below(fig, handles, 3)
    spread = rows.groupby("candidate")["seconds"].agg(lambda s: s.max() / s.min())
    most = str(spread.idxmax())
    title = f"{title_of(op)}: the window changes {short(most)} most, by {significant(float(spread.max()), 2)}x"
    finish(fig, title, width)
    caption = "Median time a call; bars span the replicas' medians. " + settings(
        loaded, op, device, ("pool_size",)
    )
    return Plot(name="divisor", title=title, caption=caption, figure=fig)


def plot_padding(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Time with valid and with same padding, for depths that the window divides and does not."""
    table = loaded.table
    rows = right_rows(at_base(table, op, ("padding", "shape"), {"device": device}))
    base = base_values(table, op)
    if rows.empty or rows["padding"].isna().all() or base["pool_size"] is None:
        return None
    depth = rows["shape"].str.rsplit("x", n=1).str[1].astype(int)
    divides = depth % int(str(base["pool_size"])) == 0
    near = rows["nbytes"].between(*_within(rows, str(base["shape"])))
    rows = rows[near].assign(
        setting=[
            f"{p}, depth {d}" for p, d in zip(rows["padding"][near], depth[near], strict=True)
        ],
        divides=divides[near],
    )
    rows = varied(rows, "setting")
    if rows.empty:
        return None
    counts = rows.groupby("candidate")["seconds"].agg(lambda s: s.max() / s.min())
    most = str(counts.idxmax())
    title = f"{title_of(op)}: padding costs {short(most)} most, up to {significant(float(counts.max()), 2)}x"
    fig = _dots(
        rows, value="seconds", low="seconds_low", high="seconds_high", hue="setting",
        label="time a call (bars span the replicas' medians)", title=title, log=True, formatter=format_seconds,
    )  # fmt: skip
    return Plot(
        name="padding",
        title=title,
        caption="Depths that the window does not divide need padding or lose their tail. "
        + settings(loaded, op, device, ("padding", "shape")),
        figure=fig,
    )


def _within(rows: pd.DataFrame, shape: str) -> tuple[float, float]:
    size = rows.loc[rows["shape"] == shape, "nbytes"]
    middle = float(size.iloc[0]) if len(size) else float(rows["nbytes"].max())
    return 0.9 * middle, 1.1 * middle


def _direction_shapes(loaded: Loaded, op: str, device: str) -> dict[str, str]:
    """Direction to the shape at which most of its modes were raced: training's may be a smaller one."""
    table = loaded.table
    rows = table[(table["op"] == op) & (table["device"] == device)]
    base = base_values(table, op)["shape"]
    found = {}
    for direction in ("forward", "training"):
        cases = at_base(rows, op, ("mode", "shape"), {"device": device, "direction": direction})
        if cases.empty:
            continue
        modes = cases.groupby("shape")["mode"].nunique()
        most = modes[modes == modes.max()].index
        found[direction] = str(base) if base in most else str(most[-1])
    return found


def plot_mode_direction(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Time by mode, a panel a direction, at the base case."""
    shapes = _direction_shapes(loaded, op, device)
    rows = pd.concat(
        right_rows(
            at_base(
                loaded.table,
                op,
                ("mode",),
                {"device": device, "direction": direction, "shape": shape},
            )
        )
        for direction, shape in shapes.items()
    )
    directions = [d for d in shapes if d in set(rows["direction"])]
    if not directions or rows["mode"].nunique() < 2:
        return None
    names = list(dict.fromkeys(rows.sort_values("seconds", ascending=False)["candidate"]))
    place = {name: i for i, name in enumerate(names)}
    width = 4.2 * len(directions) + 1
    fig, axes = figure(1, len(directions), width, 1.7 + 0.36 * len(names), sharey=True)
    look = palette(list(MODES))
    handles: dict[str, Any] = {}
    for axis, direction in zip(axes[0], directions, strict=True):
        for i, mode in enumerate(MODES):
            part = rows[(rows["direction"] == direction) & (rows["mode"] == mode)]
            if part.empty:
                continue
            colour, marker = look[mode]
            low = (part["seconds"] - part["seconds_low"]).clip(lower=0)
            high = (part["seconds_high"] - part["seconds"]).clip(lower=0)
            handles[MODE_WORDS[mode]] = axis.errorbar(
                part["seconds"], [place[n] + (i - 1) * 0.22 for n in part["candidate"]], xerr=[low, high],
                fmt=marker, color=colour, ms=5, elinewidth=1.2, capsize=2,
            )  # fmt: skip
        axis.set_xscale("log")
        time_axis(axis.xaxis)
        axis.set_title(f"{direction}, {shapes[direction]}")
        axis.set_xlabel("time a call")
        axis.set_yticks(range(len(names)), [short(name) for name in names])
        axis.set_ylim(-0.6, len(names) - 0.4)
    legend_below(fig, handles, 3)
    title = f"{title_of(op)}: {_mode_message(rows)}"
    finish(fig, title, width)
    return Plot(
        name="mode-direction",
        title=title,
        caption="Median time a call; bars span the replicas' medians. A missing mark: not right or not supported "
        "there. " + settings(loaded, op, device, ("mode", "direction", "shape")),
        figure=fig,
    )


def _mode_message(rows: pd.DataFrame) -> str:
    best = rows.loc[rows.groupby(["direction", "mode"])["seconds"].idxmin()]
    parts = []
    for direction, group in best.groupby("direction", sort=True):
        top = group.sort_values("seconds").iloc[0]
        parts.append(
            f"{direction} is quickest {MODE_WORDS.get(top['mode'], top['mode'])} ({format_seconds(top['seconds'])})"
        )
    return ", ".join(parts)


def plot_threads(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Time on one thread and on all."""
    rows = varied(
        right_rows(at_base(loaded.table, op, ("threads",), {"device": device})), "threads"
    )
    if rows.empty:
        return None
    rows = rows.assign(
        setting=[
            f"{int(n)} thread{'s' if n > 1 else ''}" if n else "all threads"
            for n in rows["threads"]
        ]
    )
    wide = rows.pivot_table(index="candidate", columns="threads", values="seconds")
    gain = (wide[1] / wide[0]).dropna() if {0, 1} <= set(wide.columns) else pd.Series(dtype=float)
    what = (
        f"all threads make {short(str(gain.idxmax()))} {significant(float(gain.max()), 2)}x as fast as one, "
        f"{short(str(gain.idxmin()))} {significant(float(gain.min()), 2)}x"
        if len(gain) > 1
        else "time by number of threads"
    )
    title = f"{title_of(op)}: {what}"
    fig = _dots(
        rows, value="seconds", low="seconds_low", high="seconds_high", hue="setting",
        label="time a call (bars span the replicas' medians)", title=title, log=True, formatter=format_seconds,
    )  # fmt: skip
    return Plot(
        name="threads", title=title, caption=settings(loaded, op, device, ("threads",)), figure=fig
    )


def plot_heatmap(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Speed over the baseline, candidates down, mode, direction and size across."""
    table = loaded.table
    rows = at_base(table, op, ("shape", "mode", "direction"), {"device": device})
    if rows.empty or rows["race"].nunique() < 2:
        return None
    sizes = rows.drop_duplicates("shape").sort_values("nbytes")["shape"].tolist()
    names = [name for name in names_of(loaded, op) if name in set(rows["candidate"])]
    panels = [
        (direction, mode)
        for direction in ("forward", "training")
        for mode in MODES
        if ((rows["direction"] == direction) & (rows["mode"] == mode)).any()
    ]
    if len(sizes) > 8:  # an even choice keeps the cells readable; the table holds all
        sizes = [sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, 8)]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = 1.9 + columns * (0.42 * len(sizes) + 0.35)
    fig, axes = figure(lines, columns, max(width, 6.5), lines * (0.27 * len(names) + 0.55) + 1.7)
    limit = _speed_limit(rows)
    for i, axis in enumerate(axes.ravel()):
        if i >= len(panels):
            axis.set_visible(False)
            continue
        direction, mode = panels[i]
        panel = rows[(rows["direction"] == direction) & (rows["mode"] == mode)]
        bottom, left = i + columns >= len(panels), i % columns == 0
        _heat(axis, panel, names, sizes, limit, bottom, left)
        axis.set_title(f"{direction}, {mode}")
    title = (
        f"{title_of(op)}: speed over the baseline, {short(str(rows['baseline'].iloc[0]))}, by size"
    )
    finish(fig, title, max(width, 6.5))
    return Plot(
        name="speed-up",
        title=title,
        caption="2.0: twice as fast. A letter: no ratio, for its status is u unsupported, w wrong, e error, c crashed, "
        "m out of memory, t timeout; empty: not raced there. "
        + settings(loaded, op, device, ("shape", "mode", "direction")),
        figure=fig,
    )


STATUS_LETTERS = {
    "unsupported": "u", "wrong": "w", "error": "e", "crashed": "c", "out_of_memory": "m", "timeout": "t",
    "not_run": "n",
}  # fmt: skip


def _speed_limit(rows: pd.DataFrame) -> float:
    logs = np.abs(np.log2(rows["ratio"].dropna().to_numpy(dtype=float)))
    return float(np.clip(logs.max() if len(logs) else 1.0, 0.5, 4.0))


def _heat(
    axis: Axes,
    panel: pd.DataFrame,
    names: Sequence[str],
    sizes: Sequence[str],
    limit: float,
    bottom: bool,
    left: bool,
) -> None:
    grid = np.full((len(names), len(sizes)), np.nan)
    text = np.full(grid.shape, "", dtype=object)
    for row in panel.itertuples(index=False):
        if row.shape not in sizes:
            continue
        at = names.index(row.candidate), sizes.index(row.shape)
        if math.isfinite(row.ratio):
            grid[at] = -math.log2(row.ratio)
            text[at] = significant(1 / row.ratio, 2)
        else:
            text[at] = STATUS_LETTERS.get(row.status, "")
    sns.heatmap(
        grid, ax=axis, annot=False, cmap="PuOr", center=0, vmin=-limit, vmax=limit, cbar=False,
        xticklabels=False, yticklabels=False, linewidths=0.5, linecolor="#80808033",
    )  # fmt: skip
    axis.grid(False)
    for (i, j), word in np.ndenumerate(text):
        value = grid[i, j]
        if word:
            dark = math.isfinite(value) and abs(value) > 0.62 * limit
            colour = "white" if dark else ("#111111" if math.isfinite(value) else INK)
            axis.text(j + 0.5, i + 0.5, word, ha="center", va="center", fontsize=7.2, color=colour)
    axis.set_xticks(
        np.arange(len(sizes)) + 0.5, [s if bottom else "" for s in sizes], rotation=45, ha="right", fontsize=7.5,
        rotation_mode="anchor",
    )  # fmt: skip
    axis.set_yticks(
        np.arange(len(names)) + 0.5,
        [short(n) if left else "" for n in names],
        rotation=0,
        fontsize=8,
    )
    axis.tick_params(length=0)


def plot_accuracy(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Error against spatial size beside speed, for ops whose error grows with the window (global average)."""
    table = loaded.table
    rows = table[(table["op"] == op) & (table["device"] == device) & table["worst"].notna()]
    if op == "depth_max_pool" or rows.empty or not (rows["worst"] > 0).any():
        return None
    rows = rows[rows["max_relative"] > 0]
    if rows.empty:
        return None
    parts = rows["shape"].str.split("x", expand=True).astype(int)
    rows = rows.assign(positions=parts[1] * parts[2])
    dtype = str(rows.groupby("dtype")["max_relative"].max().idxmax())
    rows = rows[rows["dtype"] == dtype]
    if rows["mode"].nunique() > 1:
        rows = rows[rows["mode"] == rows["mode"].mode().iloc[0]]
    look = palette(names_of(loaded, op))
    width = 8.6
    fig, axes = figure(1, 2, width, 4.2, sharey=True)
    handles: dict[str, Any] = {}
    for name, line in rows.groupby("candidate", sort=False):
        colour, marker = look[name]
        by_size = line.groupby("positions")["max_relative"].max()
        (handles[short(name)],) = axes[0][0].plot(
            by_size.index, by_size.values, marker=marker, color=colour, ms=4.5, lw=1.1
        )
        largest = line[line["nbytes"] == line["nbytes"].max()]
        axes[0][1].plot(largest["seconds"], largest["max_relative"], marker, color=colour, ms=6)
    bounds = rows["max_relative"] / rows["worst"]
    limit = float(bounds.median())
    for axis in axes[0]:
        axis.set_xscale("log")
        axis.set_yscale("log")
        handles["bound of a right answer"] = axis.axhline(limit, color=INK, ls="--", lw=1.2)
    ticks = sorted(set(rows["positions"]))
    axes[0][0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0][0].xaxis.set_minor_locator(FixedLocator([]))
    axes[0][0].set_xlabel("positions averaged (H x W)")
    axes[0][0].set_ylabel("largest relative error")
    axes[0][1].set_xlabel("time a call, largest input")
    time_axis(axes[0][1].xaxis)
    axes[0][0].yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:.0e}" if v < 1e-4 else format_share(v))
    )
    legend_below(fig, handles, 3)
    wrong = list(dict.fromkeys(rows.loc[rows["worst"] > 1, "candidate"]))
    message = (
        f"{join_names([short(n) for n in wrong])} {'is' if len(wrong) == 1 else 'are'} wrong"
        if wrong
        else "every candidate stays within the bound"
    )
    title = f"{title_of(op)} in {dtype}: {message}"
    finish(fig, title, width)
    return Plot(
        name="accuracy",
        title=title,
        caption=f"Against the float64 oracle; on {device}, mode {rows['mode'].iloc[0]}. Right: the same errors "
        "beside the time. What is above the bound is never ranked.",
        figure=fig,
    )


def plot_break_even(loaded: Loaded, op: str, device: str) -> Plot | None:
    """After how many calls compiling has paid for itself."""
    rows = break_even_table(loaded)
    if rows.empty:
        return None
    base = base_values(loaded.table, op)
    rows = rows[
        (rows["op"] == op) & (rows["device"] == device) & (rows["shape"] == base["shape"])
        & (rows["dtype"] == base["dtype"]) & (rows["direction"] == "forward") & (rows["threads"] == base["threads"])
        & (rows["distribution"] == base["distribution"]) & (rows["cache"] == base["cache"])
    ]  # fmt: skip
    for name in ("pool_size", "padding"):
        if base[name] is not None:
            rows = rows[rows[name] == base[name]]
    paid = rows[rows["calls"].notna()]
    if paid.empty:
        return None
    never = [
        f"{short(r.candidate)} ({r.mode})"
        for r in rows[rows["calls"].isna()].itertuples(index=False)
    ]
    low, high = float(paid["calls"].min()), float(paid["calls"].max())
    title = f"{title_of(op)}: compiling pays after {low:.0f} to {high:.0f} calls" + (
        ", where it pays at all" if never else ""
    )
    fig = _dots(
        paid.assign(low=math.nan, high=math.nan), value="calls", low="low", high="high", hue="mode",
        label="calls until the first call's cost is won back over eager", title=title, log=True,
        formatter=lambda v: f"{v:.0f}",
    )  # fmt: skip
    caption = "First call: trace and compile. " + settings(
        loaded, op, device, ("mode", "direction")
    )
    if never:
        caption += f" Never, for it is no faster than eager: {join_names(never)}."
    return Plot(name="break-even", title=title, caption=caption, figure=fig)


def plot_spread(loaded: Loaded, op: str, device: str) -> Plot | None:
    """Every sample of the base case over its candidate's median, a row a candidate, replicas apart."""
    rows = right_rows(at_base(loaded.table, op, (), {"device": device}))
    rows = rows[~rows["settled"]]
    if rows.empty:
        return None
    names = rows.sort_values("seconds", ascending=False)["candidate"].tolist()
    width = 7.4
    fig, axes = figure(1, 1, width, 1.6 + 0.4 * len(names))
    axis = axes[0][0]
    colours = sns.color_palette("colorblind", 10)
    spreads: dict[str, float] = {}
    for index, row in rows.iterrows():
        samples = loaded.samples[int(index)]
        y = names.index(row["candidate"])
        relative = np.asarray(samples.seconds) / row["seconds"]
        replica = np.asarray(samples.replica)
        kinds = np.unique(replica)
        medians = replica_medians(samples) / row["seconds"]
        spreads[row["candidate"]] = float(medians.max() / medians.min() - 1)
        for i, kind in enumerate(kinds):
            points = np.clip(relative[replica == kind], 0.5, 2.0)
            offset = (i - (len(kinds) - 1) / 2) * 0.6 / max(1, len(kinds))
            axis.plot(
                points,
                np.full(len(points), y + offset),
                ".",
                ms=2.5,
                alpha=0.55,
                color=colours[i % 10],
            )
            axis.plot([medians[i]], [y + offset], "|", ms=8, mew=1.6, color=colours[i % 10])
    axis.set_yticks(range(len(names)), [short(name) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.axvline(1, color=INK, lw=0.8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2f}"))
    axis.set_xlabel("sample / the candidate's median")
    worst = max(spreads, key=lambda name: spreads[name])
    title = (
        f"{title_of(op)}: {short(worst)}'s replicas differ most, by {format_share(spreads[worst])}"
    )
    finish(fig, title, width)
    return Plot(
        name="spread",
        title=title,
        caption="A dot is a block, a bar a replica's median, a colour a replica (a fresh process); drawn at 0.5 or "
        "2.0 if beyond. " + settings(loaded, op, device, ()),
        figure=fig,
    )


def plot_support(capabilities: Sequence[Capability], op: str, device: str) -> Plot | None:
    """The support matrix."""
    cells = [c for c in capabilities if c.op == op and c.device == device]
    if not cells:
        return None
    probes = list(dict.fromkeys(c.probe for c in cells))
    names = list(dict.fromkeys(c.candidate for c in cells))
    states = list(STATE_COLOURS)
    grid = np.full((len(names), len(probes)), np.nan)
    for cell in cells:
        grid[names.index(cell.candidate), probes.index(cell.probe)] = states.index(cell.state)
    width = 2.6 + 0.36 * len(probes)
    fig, axes = figure(1, 1, max(width, 5.5), 2.4 + 0.27 * len(names))
    axis = axes[0][0]
    sns.heatmap(
        grid, ax=axis, cmap=ListedColormap(list(STATE_COLOURS.values())), vmin=-0.5, vmax=len(states) - 0.5,
        cbar=False, xticklabels=False, yticklabels=False, linewidths=0.8, linecolor="#80808055",
    )  # fmt: skip
    axis.grid(False)
    for (i, j), value in np.ndenumerate(grid):
        if math.isfinite(value) and value > 0:  # a letter beside the colour, for those who see none
            axis.text(
                j + 0.5,
                i + 0.5,
                states[int(value)][0],
                ha="center",
                va="center",
                fontsize=7.5,
                color="#111111",
            )
    axis.set_xticks(
        np.arange(len(probes)) + 0.5,
        [short(p) for p in probes],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    axis.set_yticks(np.arange(len(names)) + 0.5, [short(n) for n in names], rotation=0)
    axis.tick_params(length=0)
    seen = [s for s in states if any(c.state == s for c in cells)]
    from matplotlib.patches import Patch

    legend_below(fig, {s.replace("_", " "): Patch(color=STATE_COLOURS[s]) for s in seen}, len(seen))
    clean = [
        n for n in names if all(c.state in ("pass", "not_run") for c in cells if c.candidate == n)
    ]
    title = f"{title_of(op)} on {device}: " + (
        f"{join_names([short(n) for n in clean[:3]])} {'pass' if len(clean) > 1 else 'passes'} every probe"
        if clean and len(clean) <= 3
        else f"{len(clean) or 'no'} of {len(names)} spellings pass every probe"
    )
    finish(fig, title, max(width, 5.5))
    return Plot(
        name="support",
        title=title,
        caption="One real probe a cell; the table below opens what was seen.",
        figure=fig,
    )


def plot_selftest(selftests: Sequence[Selftest]) -> Plot | None:
    """Verdicts by injected slowdown."""
    if not selftests:
        return None
    rows = sorted(selftests, key=lambda s: (s.margin, s.injected))
    width = 7.4
    fig, axes = figure(1, 1, width, 1.4 + 0.34 * len(rows))
    axis = axes[0][0]
    kinds = (
        ("faster", "#0173b2"),
        ("same", "#949494"),
        ("undecided", "#ece133"),
        ("slower", "#d55e00"),
    )
    labels = [
        f"{'A/A' if s.injected == 0 else format_share(s.injected) + ' slower'}, margin {format_share(s.margin)}"
        for s in rows
    ]
    left = np.zeros(len(rows))
    for kind, colour in kinds:
        shares = np.array([getattr(s, kind) / max(1, s.comparisons) for s in rows])
        axis.barh(range(len(rows)), shares, left=left, color=colour, label=kind.upper(), height=0.7)
        left += shares
    axis.set_yticks(range(len(rows)), labels)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}%"))
    axis.set_xlabel("share of comparisons with each verdict")
    handles, names = axis.get_legend_handles_labels()
    legend_below(fig, dict(zip(names, handles, strict=True)), 4)
    same = [s for s in rows if s.injected == 0]
    alarms = sum(s.faster + s.slower for s in same)
    title = f"Selftest: {alarms} false alarms in {sum(s.comparisons for s in same)} comparisons of an op with itself"
    finish(fig, title, width)
    floor = max((s.noise_floor for s in same), default=math.nan)
    caption = (
        f"Noise floor (95th percentile of the A/A ratio): {format_share(floor) or 'not measured'}."
    )
    return Plot(name="selftest", title=title, caption=caption, figure=fig)


MAKERS: tuple[Maker, ...] = (
    plot_time_by_size("forward"),
    plot_time_by_size("training"),
    plot_heatmap,
    plot_efficiency,
    plot_mode_direction,
    plot_divisor,
    plot_padding,
    plot_threads,
    plot_accuracy,
    plot_break_even,
    plot_spread,
)


def svg_of(fig: Figure, salt: str) -> str:
    """The figure as SVG text whose ink is currentColor and whose ids begin with the salt."""
    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a name in a script that the font lacks is no reason to stop
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{salt}-", text)
    return text.replace(INK, "currentColor")


def png_of(fig: Figure) -> bytes:
    """The figure as PNG on white; it is laid out by this, and stays so, for laying out costs a drawing."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fig.savefig(out, format="png", dpi=130, facecolor="white")
    fig.set_layout_engine(None)  # "none" would leave a placeholder, for which savefig draws twice
    return out.getvalue()
