"""Figures to choose by: profile, roofline, speed over the baseline, break-even, support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from poolbench.core.text import format_share, join_names, significant
from poolbench.report.cases import MODE_WORDS, at_base, base_values
from poolbench.report.figures.style import (
    COLOURS,
    GREY,
    INK,
    MODES,
    Maker,
    Plot,
    dots,
    figure,
    finish,
    label_ends,
    legend_below,
    looks,
    nbytes_axis,
    one_axis,
    one_per_program,
    right_rows,
    settings,
    short,
    time_axis,
    title_of,
)
from poolbench.report.frame import RunFrame, axes_in
from poolbench.report.recommend import Answers
from poolbench.report.support import Support
from poolbench.report.tables import break_even_table

NEAR, FARTHEST = 1.1, 10.0  # factors of the best: what counts as near, and where the profile ends


def plot_profile(loaded: RunFrame, answers: Answers, op: str, device: str) -> Plot | None:
    """Performance profile (Dolan and More 2002): share of cases within a factor of the best."""
    profile = answers.profiles.get((op, device), {})
    advice = answers.recommendations.get((op, device))
    if advice is None or advice.all_cases < 2 or len(profile) < 2:
        return None
    look = looks(loaded, op)
    share = {name: float(np.mean(np.array(v) <= NEAR)) for name, v in profile.items()}
    names = sorted(profile, key=lambda name: (name != advice.candidate, -share[name]))
    shown = [name for name in names if look[name][0] != GREY or len(names) <= len(COLOURS)]
    fig, axis = one_axis(3.6)
    ends = []
    for name in reversed(shown):
        values = np.sort(profile[name])
        inside = values[values <= FARTHEST]
        x = np.concatenate([[1.0], inside, [FARTHEST]])
        y = np.concatenate([[0.0], np.arange(1, len(inside) + 1), [len(inside)]]) / len(values)
        first = name == advice.candidate
        axis.step(x, y, where="post", color=look[name][0], lw=2.4 if first else 1.2)
        ends.append((float(y[-1]), name, look[name][0]))
    axis.set_xscale("log")
    axis.set_xlim(1, FARTHEST)
    axis.set_ylim(0, 1.03)
    ticks = [1, 1.25, 1.5, 2, 3, 5, 10]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}%"))
    axis.set_xlabel("time over the best one's in the same case")
    axis.set_ylabel("share of cases")
    label_ends(axis, ends)
    near = sum(loss.ratio[0] <= NEAR for loss in advice.losses)
    title = (
        f"{title_of(op)}: {short(advice.candidate)} is within {NEAR - 1:.0%} of the best "
        f"in {near} of {advice.all_cases} cases"
    )
    finish(fig, title)
    caption = (
        "Higher and further left is better. A case that failed, was wrong, or was faster than the memory "
        "allows counts as never. Drawn: what was raced in at least half of the cases."
    )
    return Plot(name="profile", title=title, caption=caption, figure=fig)


def plot_roofline(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """Bytes moved against time in all cases, with the measured memory-bandwidth limit."""
    table = loaded.table
    rows = right_rows(table[(table["op"] == op) & (table["device"] == device)])
    limit = rows.dropna(subset="bandwidth_limit_seconds")
    limit = limit.groupby("moved_nbytes")["bandwidth_limit_seconds"].median()
    if len(limit) < 2:
        return None
    look = looks(loaded, op)
    fig, axis = one_axis(4.6)
    handles: dict[str, Any] = {}
    for name in reversed(look):  # the first ones on top
        part = rows[rows["candidate"] == name]
        colour, marker = look[name]
        (mark,) = axis.plot(
            part["moved_nbytes"], part["seconds"], marker, color=colour, ms=4.5, alpha=0.85
        )
        if len(part) and colour != GREY:
            handles[short(name)] = mark
    (mark,) = axis.plot(limit.index, limit.values, "--", color=INK, lw=1.4)
    handles["memory-bandwidth limit"] = mark
    axis.set_xscale("log")
    axis.set_yscale("log")
    nbytes_axis(axis.xaxis, rows["moved_nbytes"].tolist())
    time_axis(axis.yaxis)
    axis.set_xlabel("bytes that a call must move")
    axis.set_ylabel("time per call")
    legend_below(fig, dict(reversed(handles.items())), 3)
    best = rows.loc[rows["efficiency"].idxmax()]
    title = (
        f"{title_of(op)}: {short(best['candidate'])} comes nearest to the memory-bandwidth limit, "
        f"{format_share(best['efficiency'])} of it {MODE_WORDS.get(best['mode'], best['mode'])}"
    )
    finish(fig, title)
    caption = (
        f"All cases on {device}, a mark each. The limit is bytes over the bandwidth that probes reached "
        "in the same rounds, from 1 MiB up."
    )
    return Plot(name="roofline", title=title, caption=caption, figure=fig)


def plot_heatmap(*, xla: bool) -> Maker:
    """Speed over the baseline, candidates down, mode, direction and size across; with XLA, programs down."""

    def make(loaded: RunFrame, op: str, device: str) -> Plot | None:
        rows = at_base(loaded, op, ("shape", "mode", "direction"), {"device": device})
        if rows["race"].nunique() < 2 or "shape" not in rows or rows["shape"].isna().all():
            return None
        rows, same = one_per_program(rows[(rows["mode"] == "xla") == xla])
        if rows.empty:
            return None
        sizes = rows.drop_duplicates("shape").sort_values("nbytes")["shape"].tolist()
        table, found = loaded.table, set(rows["candidate"])
        order = dict.fromkeys(table.loc[table["op"] == op, "candidate"])
        names = [name for name in order if name in found]
        places = set(zip(rows["direction"], rows["mode"], strict=True))
        panels = [(d, m) for d in ("forward", "training") for m in MODES if (d, m) in places]
        if len(sizes) > 8:  # an even choice keeps the cells readable; the table holds all
            sizes = [sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, 8)]
        columns = min(2, len(panels))
        lines = math.ceil(len(panels) / columns)
        width = max(1.9 + columns * (0.42 * len(sizes) + 0.35), 6.5)
        fig, axes = figure(lines, columns, width, lines * (0.27 * len(names) + 0.55) + 1.7)
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
        over = short(str(rows["baseline"].iloc[0]))
        title = f"{title_of(op)}{' with XLA' * xla}: speed over the baseline, {over}, by size"
        finish(fig, title)
        return Plot(
            name="speed-up-xla" if xla else "speed-up",
            title=title,
            caption="2.0: twice as fast. A letter is a status without a ratio: u unsupported, w wrong, e error, "
            "c crashed, m out of memory, t timeout, i faster than the memory allows. Empty: not raced there."
            f"{same} {settings(loaded, op, device, ('shape', 'mode', 'direction'))}",
            figure=fig,
        )

    return make


STATUS_LETTERS = {
    "unsupported": "u", "wrong": "w", "error": "e", "crashed": "c", "out_of_memory": "m", "timeout": "t",
    "implausible": "i",
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
            dark = abs(value) > 0.62 * limit
            colour = "white" if dark else ("#111111" if math.isfinite(value) else INK)
            axis.text(
                j + 0.5, i + 0.5, word, ha="center", va="center", fontsize=7.2, color=colour, clip_on=True,
                in_layout=False,
            )  # fmt: skip
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
    base = {**base_values(loaded, op), "device": device, "direction": "forward"}
    keep = rows["op"] == op
    for name in axes_in(loaded.table):
        if name != "mode":
            keep &= rows[name] == ("" if base[name] is None else base[name])
    rows = rows[keep]
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
        paid.assign(calls_low=math.nan, calls_high=math.nan), value="calls", hue="mode",
        label="calls until the first call's cost is won back over eager", title=title,
        formatter=lambda v: f"{v:.0f}",
    )  # fmt: skip
    caption = "First call: trace and compile. " + settings(
        loaded, op, device, ("mode", "direction")
    )
    if never:
        caption += f" Never, for it is no faster than eager: {join_names(never)}."
    return Plot(name="break-even", title=title, caption=caption, figure=fig)


STATE_COLOURS = {  # Okabe and Ito's, distinguishable with colour-vision deficiency
    "pass": "#56b4e9",
    "wrong": "#d55e00",
    "unsupported": "#e69f00",
    "error": "#cc79a7",
    "crashed": "#882255",
    "timeout": "#999933",
    "not_run": "#bbbbbb",
}


def plot_support(matrix: Support) -> Plot:
    """The support matrix."""
    cells = matrix.cells
    probes = list(dict.fromkeys(c.probe for c in cells))
    names = list(dict.fromkeys(c.candidate for c in cells))
    states = list(STATE_COLOURS)
    grid = np.full((len(names), len(probes)), np.nan)
    for cell in cells:
        grid[names.index(cell.candidate), probes.index(cell.probe)] = states.index(cell.state)
    fig, axis = one_axis(2.4 + 0.27 * len(names), max(2.6 + 0.36 * len(probes), 5.5))
    sns.heatmap(
        grid, ax=axis, cmap=ListedColormap(list(STATE_COLOURS.values())), vmin=-0.5, vmax=len(states) - 0.5,
        cbar=False, xticklabels=False, yticklabels=False, linewidths=0.8, linecolor="#80808055",
    )  # fmt: skip
    axis.grid(False)
    for (i, j), value in np.ndenumerate(grid):
        if value > 0:  # a letter beside the colour, for readers without colour vision
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
    clean = [n for n in names if matrix.of(n) and not matrix.caveats(n)]
    title = f"{title_of(matrix.op)} on {matrix.device}: " + (
        f"{join_names([short(n) for n in clean])} {'pass' if len(clean) > 1 else 'passes'} every probe"
        if 0 < len(clean) <= 3
        else f"{len(clean) or 'no'} of {len(names)} implementations pass every probe"
    )
    finish(fig, title)
    return Plot(
        name="support",
        title=title,
        caption="One real probe a cell; the table below opens what was seen.",
        figure=fig,
    )
