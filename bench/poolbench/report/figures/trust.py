"""Figures on trust: accuracy, the spread of processes, the self-test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter

from poolbench.core.records import Selftest
from poolbench.core.text import format_share, join_names
from poolbench.report.cases import at_base
from poolbench.report.figures.style import (
    INK,
    End,
    Plot,
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
from poolbench.report.frame import RunFrame
from poolbench.report.medians import process_medians


def plot_accuracy(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """Plot error and speed against input size, for ops that round."""
    table = loaded.table
    rows = table[(table["op"] == op) & (table["device"] == device) & table["worst"].notna()]
    rows = rows[(rows["worst"] > 0) & (rows["max_relative"] > 0)]
    if rows.empty:
        return None
    dtype = str(rows.groupby("dtype")["max_relative"].max().idxmax())
    rows = rows[rows["dtype"] == dtype]
    if rows["mode"].nunique() > 1:
        rows = rows[rows["mode"] == rows["mode"].mode().iloc[0]]
    look = looks(loaded, op)
    fig, axes = figure(1, 2, 9.6, 4.2, sharey=True)
    ends: list[End] = []
    for name, line in rows.groupby("candidate", sort=False):
        colour, marker = look[name]
        by_size = line.groupby("nbytes")["max_relative"].max()
        axes[0][0].plot(by_size.index, by_size.values, marker=marker, color=colour, ms=4.5, lw=1.1)
        ends.append((float(by_size.iloc[-1]), str(name), colour))
        largest = line[line["nbytes"] == line["nbytes"].max()]
        axes[0][1].plot(largest["seconds"], largest["max_relative"], marker, color=colour, ms=6)
    limit = float((rows["max_relative"] / rows["worst"]).median())
    for axis in axes[0]:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.axhline(limit, color=INK, ls="--", lw=1.2)
    nbytes_axis(axes[0][0].xaxis, rows["nbytes"].tolist())
    axes[0][0].set_xlabel("input (bytes)")
    axes[0][0].set_ylabel("largest relative error")
    axes[0][1].set_xlabel("time per call, largest input")
    time_axis(axes[0][1].xaxis)
    axes[0][0].yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:.0e}" if v < 1e-4 else format_share(v))
    )
    label_ends(axes[0][0], [*ends, (limit, "tolerance", INK)])
    wrong = list(dict.fromkeys(rows.loc[rows["worst"] > 1, "candidate"]))
    message = (
        f"{join_names([short(n) for n in wrong])} {'is' if len(wrong) == 1 else 'are'} wrong"
        if wrong
        else "every candidate stays within the tolerance"
    )
    title = f"{title_of(op)} in {dtype}: {message}"
    finish(fig, title)
    return Plot(
        name="accuracy",
        title=title,
        caption=f"Against the float64 reference; on {device}, mode {rows['mode'].iloc[0]}. Right: the same errors "
        "beside the time. What is above the tolerance is never ranked.",
        figure=fig,
    )


def plot_spread(loaded: RunFrame, op: str, device: str) -> Plot | None:
    """Plot every sample of the base case over its candidate's median: one row per candidate, by process."""
    rows = right_rows(at_base(loaded, op, (), {"device": device}))
    rows, same = one_per_program(rows[~rows["stopped_early"]])
    if rows.empty:
        return None
    names = rows.sort_values("seconds", ascending=False)["candidate"].tolist()
    fig, axis = one_axis(1.6 + 0.4 * len(names))
    look = looks(loaded, op)
    spreads: dict[str, float] = {}
    for index, row in rows.iterrows():
        samples = loaded.samples[int(index)]
        y, colour = names.index(row["candidate"]), look[row["candidate"]][0]
        relative = np.asarray(samples.seconds) / row["seconds"]
        process = np.asarray(samples.process)
        kinds = np.unique(process)
        medians = process_medians(samples) / row["seconds"]
        spreads[row["candidate"]] = float(medians.max() / medians.min() - 1)
        for i, kind in enumerate(kinds):
            points = np.clip(relative[process == kind], 0.5, 2.0)
            offset = (i - (len(kinds) - 1) / 2) * 0.6 / len(kinds)
            axis.plot(
                points,
                np.full(len(points), y + offset),
                ".",
                ms=2.5,
                alpha=0.55,
                color=colour,
            )
            axis.plot([medians[i]], [y + offset], "|", ms=8, mew=1.6, color=INK)
    axis.set_yticks(range(len(names)), [short(name) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.axvline(1, color=INK, lw=0.8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2f}"))
    axis.set_xlabel("sample / the candidate's median")
    worst = max(spreads, key=lambda name: spreads[name])
    title = (
        f"{title_of(op)}: {short(worst)}'s processes differ most, by {format_share(spreads[worst])}"
    )
    finish(fig, title)
    return Plot(
        name="spread",
        title=title,
        caption="A dot is a block, a bar the median of a process. Rows are processes. Drawn at 0.5 or "
        "2.0 if beyond. " + settings(loaded, op, device, ()) + same,
        figure=fig,
    )


def plot_selftest(selftests: Sequence[Selftest]) -> Plot | None:
    """Plot verdicts by injected slowdown."""
    if not selftests:
        return None
    rows = sorted(selftests, key=lambda s: (s.margin, s.injected))
    fig, axis = one_axis(1.4 + 0.34 * len(rows))
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
    title = f"Self-test: {alarms} false alarms in {sum(s.comparisons for s in same)} comparisons of an op with itself"
    finish(fig, title)
    floor = max((s.noise_floor for s in same), default=math.nan)
    caption = (
        f"Noise floor (95th percentile of the A/A ratio): {format_share(floor) or 'not measured'}."
    )
    return Plot(name="selftest", title=title, caption=caption, figure=fig)
