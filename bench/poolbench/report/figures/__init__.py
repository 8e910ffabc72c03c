"""Figures of a run: one message each, said in its title, in units, with intervals.

A plot is a function (loaded, op, device) -> Plot or None (the run holds too little for it). Every
figure has a constant number of marks per case shown, so that a run of any size is drawn as quickly.
"""

from __future__ import annotations

from poolbench.report.figures.by_axis import axis_makers, plot_mode_direction, plot_time_by_size
from poolbench.report.figures.choice import (
    plot_break_even,
    plot_heatmap,
    plot_profile,
    plot_roofline,
    plot_support,
)
from poolbench.report.figures.style import Maker, Plot, png_of, slug, styled, svg_of, title_of
from poolbench.report.figures.trust import plot_accuracy, plot_selftest, plot_spread
from poolbench.report.frame import RunFrame

__all__ = [
    "Plot", "makers", "plot_mode_direction", "plot_profile", "plot_selftest", "plot_support", "png_of", "slug",
    "styled", "svg_of", "title_of",
]  # fmt: skip


def makers(loaded: RunFrame) -> list[Maker]:
    """Return the makers of an op's figures in the order of the page."""
    return [
        plot_time_by_size("forward"),
        plot_time_by_size("training"),
        plot_roofline,
        plot_heatmap(xla=False),
        plot_heatmap(xla=True),
        plot_mode_direction,
        *axis_makers(loaded),
        plot_accuracy,
        plot_break_even,
        plot_spread,
    ]
