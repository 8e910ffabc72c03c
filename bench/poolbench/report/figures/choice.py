"""What helps to choose: share of the bandwidth limit, speed over the baseline, break-even, support."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from poolbench.core.axes import STANDARD, axes_of
from poolbench.core.records import MatrixCell
from poolbench.core.text import format_share, join_names, significant
from poolbench.report.figures.style import (
    INK,
    MODES,
    Plot,
    dots,
    figure,
    finish,
    legend_below,
    names_of,
    right_rows,
    settings,
    short,
    title_of,
)
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import MODE_WORDS, at_base, base_values
from poolbench.report.tables import break_even_table


def plot_efficiency(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """Share of the memory's bandwidth limit that each candidate reaches, by mode."""
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
    fig = dots(
        rows, value="efficiency", low="efficiency_low", high="efficiency_high", hue="mode",
        label="bandwidth limit time / time, 95% interval", title=title, percent=True,
    )  # fmt: skip
    fig.axes[0].axvline(1, color=INK, ls="--", lw=1)
    return Plot(
        name="efficiency",
        title=title,
        caption="Bandwidth limit time: bytes read over the read bandwidth plus bytes written over the write bandwidth, "
        "both measured in the same rounds. " + settings(loaded, op, device, ("mode", "direction")),
        figure=fig,
    )


def plot_heatmap(loaded: RunFrame, op: str, device: str) -> Plot | None:
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


def plot_break_even(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """After how many calls compiling has paid for itself."""
    rows = break_even_table(loaded)
    if rows.empty:
        return None
    base = base_values(loaded.table, op)
    rows = rows[
        (rows["op"] == op) & (rows["device"] == device)
        & (rows["dtype"] == base["dtype"]) & (rows["direction"] == "forward") & (rows["threads"] == base["threads"])
        & (rows["cache"] == base["cache"])
    ]  # fmt: skip
    for name in axes_of(op):
        if name not in STANDARD and base.get(name) is not None:
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
    fig = dots(
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


STATE_COLOURS = {  # Okabe and Ito's, told apart without red against green
    "pass": "#56b4e9",
    "wrong": "#d55e00",
    "unsupported": "#e69f00",
    "error": "#cc79a7",
    "crashed": "#882255",
    "timeout": "#999933",
    "not_run": "#bbbbbb",
}


def plot_support(capabilities: Sequence[MatrixCell], op: str, device: str) -> Plot | None:
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
    legend_below(fig, {s.replace("_", " "): Patch(color=STATE_COLOURS[s]) for s in seen}, len(seen))
    clean = [
        n for n in names if all(c.state in ("pass", "not_run") for c in cells if c.candidate == n)
    ]
    title = f"{title_of(op)} on {device}: " + (
        f"{join_names([short(n) for n in clean[:3]])} {'pass' if len(clean) > 1 else 'passes'} every probe"
        if clean and len(clean) <= 3
        else f"{len(clean) or 'no'} of {len(names)} implementations pass every probe"
    )
    finish(fig, title, max(width, 5.5))
    return Plot(
        name="support",
        title=title,
        caption="One real probe a cell; the table below opens what was seen.",
        figure=fig,
    )
