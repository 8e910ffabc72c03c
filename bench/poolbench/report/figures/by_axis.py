"""What the time does as one axis of a case changes: size, window, padding, mode, direction, threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.ticker import FixedLocator

from poolbench.core.text import format_seconds, join_names, significant
from poolbench.report.figures.style import (
    INK,
    MODES,
    Maker,
    Plot,
    curve,
    dots,
    figure,
    finish,
    legend_below,
    names_of,
    nbytes_axis,
    palette,
    right_rows,
    settings,
    short,
    time_axis,
    title_of,
    varied,
)
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import MODE_WORDS, at_base, base_values


def plot_time_by_size(direction: str) -> Maker:
    """Time against the input's bytes, a panel a mode, with the memory's bandwidth limit."""

    def make(loaded: RunFrame, op: str, device: str) -> Plot | None:
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
                handles[short(name)] = curve(axis, line, "nbytes", look[name])
            bandwidth_limit = (
                panel.dropna(subset="bandwidth_limit_seconds")
                .groupby("nbytes")["bandwidth_limit_seconds"]
                .median()
            )
            if len(bandwidth_limit):
                (mark,) = axis.plot(
                    bandwidth_limit.index, bandwidth_limit.values, "--", color=INK, lw=1.4
                )
                handles["memory's bandwidth limit"] = mark
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
            caption="Median time a call; bars span the processes' medians. "
            + settings(loaded, op, device, ("shape", "mode", "direction")),
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
            parts.append(f"{significant(spread, 2)}x {MODE_WORDS.get(mode, mode)}")
    if not parts:
        return "time grows with the input"
    return f"fastest and slowest differ by {join_names(parts)} at the largest input"


def plot_divisor(loaded: RunFrame, op: str, device: str) -> Plot | None:
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
        handles[short(name)] = curve(axis, line, "pool_size", look[name])
    bandwidth_limit = (
        rows.dropna(subset="bandwidth_limit_seconds")
        .groupby("pool_size")["bandwidth_limit_seconds"]
        .median()
    )
    if len(bandwidth_limit):
        (handles["memory's bandwidth limit"],) = axis.plot(
            bandwidth_limit.index, bandwidth_limit.values, "--", color=INK, lw=1.4
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
    caption = "Median time a call; bars span the processes' medians. " + settings(
        loaded, op, device, ("pool_size",)
    )
    return Plot(name="divisor", title=title, caption=caption, figure=fig)


def plot_padding(loaded: RunFrame, op: str, device: str) -> Plot | None:
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
    fig = dots(
        rows, value="seconds", low="seconds_low", high="seconds_high", hue="setting",
        label="time a call (bars span the processes' medians)", title=title, log=True, formatter=format_seconds,
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


def _direction_shapes(loaded: RunFrame, op: str, device: str) -> dict[str, str]:
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


def plot_mode_direction(loaded: RunFrame, op: str, device: str) -> Plot | None:
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
        caption="Median time a call; bars span the processes' medians. A missing mark: not right or not supported "
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


def plot_threads(loaded: RunFrame, op: str, device: str) -> Plot | None:
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
    fig = dots(
        rows, value="seconds", low="seconds_low", high="seconds_high", hue="setting",
        label="time a call (bars span the processes' medians)", title=title, log=True, formatter=format_seconds,
    )  # fmt: skip
    return Plot(
        name="threads", title=title, caption=settings(loaded, op, device, ("threads",)), figure=fig
    )
