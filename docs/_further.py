"""Format results/reference-OP, the default runs of the ops beside the main two, for docs/further-ops.md."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from poolbench.core.case import case_label
from poolbench.core.records import Measurement, TimeBreakdown, is_right
from poolbench.core.registry import input_nbytes
from poolbench.core.text import format_seconds, one_line
from poolbench.report.backends import races_of
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame, load
from poolbench.report.recommend import answer
from poolbench.report.tables import headline_table
from poolbench.stats import estimate
from poolbench.store.journal import JOURNAL

OPS = ("masked_global_pool", "adaptive_pool", "spatial_max_pool", "gem_pool", "global_max_pool")
OF_STOCK = ("layer-stock", "the stock layer, 8 MB and more")
# By op: the layer, its candidate, and what it replaces.
LAYERS = {
    "masked_global_pool": ("MaskedGlobalPooling1D", "layer-masked_global_pool", *OF_STOCK),
    "adaptive_pool": ("AdaptivePooling2D", "layer-adaptive_pool", *OF_STOCK),
    "gem_pool": (
        "GeMPooling2D",
        "layer-gem_pool",
        "pow",
        "`pow` in the input's own dtype, 4 MB and more",
    ),
}
LARGE_NBYTES = {"gem_pool": 4_000_000}
NOTHING = "`nox -s reference` has not run the further ops."


@functools.cache
def further_runs(root: Path) -> tuple[RunFrame, ...]:
    """Return the committed default runs of the further ops."""
    folders = [root / "results" / f"reference-{op}" for op in OPS]
    return tuple(load(folder) for folder in folders if (folder / JOURNAL).exists())


def _block(write: Callable[[tuple[RunFrame, ...]], str]) -> Callable[[RunFrame, Path], str]:
    def block(_: RunFrame, root: Path) -> str:
        found = further_runs(root)
        return write(found) if found else NOTHING

    return block


def _table(rows: list[dict[str, str]]) -> str:
    return as_markdown(pd.DataFrame(rows).fillna("")).strip()


def use_block(found: tuple[RunFrame, ...]) -> str:
    """Return what to use for each op, and how long each run took."""
    columns = [
        "op",
        "mode",
        "direction",
        "use",
        "time per call",
        "speed over the baseline",
        "fastest here",
    ]
    tables = [headline_table(loaded, answer(loaded)) for loaded in found]
    table = pd.concat(tables)[columns].map(lambda cell: one_line(str(cell), 80))
    walls = [
        f"`{loaded.run.measurements[0].case.op}` {format_seconds(loaded.run.of(TimeBreakdown)[-1].wall_seconds)}"
        for loaded in found
        if loaded.run.of(TimeBreakdown)
    ]
    return f"{as_markdown(table).strip()}\n\nWall time of each run: {', '.join(walls)}."


def layers_block(found: tuple[RunFrame, ...]) -> str:
    """Return the speed of each layer over the stock layer and over the fastest other right one, by mode."""
    rows = [row for loaded in found for row in _layer_rows(loaded)]
    return _table(rows) if rows else "No run of an op with a layer is committed."


def _seconds(m: Measurement) -> float:
    return statistics.median(m.samples.seconds)


def _layer_rows(loaded: RunFrame) -> Iterator[dict[str, str]]:
    limits = dict(zip(loaded.table["label"], loaded.table["bandwidth_limit_seconds"], strict=True))
    pairs: dict[tuple[str, ...], list[tuple[Measurement, Measurement]]] = {}
    for case, race in races_of(loaded.run.measurements).items():
        if case.op not in LAYERS:
            continue
        layer, name, replaced, words = LAYERS[case.op]
        own, stock = race.get(name), race.get(replaced)
        if own is None or not is_right(own):
            continue
        kind = f"{case.get('reduction') or case.get('exponent')} {case.dtype}"
        where = (layer, kind, str(case.mode), str(case.direction))
        large = input_nbytes(case) >= LARGE_NBYTES.get(case.op, 8_000_000)
        if stock is not None and is_right(stock) and large:
            pairs.setdefault((*where, words), []).append((stock, own))
        others = [m for m in race.values() if m is not own and is_right(m) and len(m.samples)]
        for over, some in (
            ("the fastest other right layer", [m for m in others if m.form == "layer"]),
            ("the fastest other right implementation", others),
        ):
            if some:
                pairs.setdefault((*where, over), []).append((min(some, key=_seconds), own))
    for about, both in sorted(pairs.items()):
        found = [estimate.estimate(other.samples, own.samples) for other, own in both]
        mean = estimate.geometric_mean(found)
        bounds = [_seconds(other) / limits[case_label(own.case)] for other, own in both]
        bounded = math.isfinite(mean.ratio_low)
        interval = f" [{mean.ratio_low:.2f}, {mean.ratio_high:.2f}]" if bounded else ""
        yield {
            **dict(zip(("layer", "of", "mode", "pass", "over"), about, strict=True)),
            "cells": str(len(both)),
            "speed": f"{mean.ratio:.2f}x" + interval,
            "worst": f"{min(one.ratio for one in found):.2f}x",
            "limit": f"{math.exp(statistics.fmean(map(math.log, bounds))):.2f}x" if all(b > 0 for b in bounds) else "",
        }  # fmt: skip


def wrong_block(found: tuple[RunFrame, ...]) -> str:
    """Return the implementations that are wrong or refused somewhere, with the error and the issue."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for loaded in found:
        for m in loaded.run.measurements:
            if m.kind == "candidate" and m.status not in ("ok", "implausible"):
                why, _, error = m.reason.partition(" [")
                key = (m.case.op, m.candidate, why)
                rows.setdefault(
                    key,
                    {"op": m.case.op, "implementation": m.candidate, "is": m.status, "where": case_label(m.case),
                     "why": why, "error": one_line(error.removesuffix("]"), 70), "issue": m.issue},
                )  # fmt: skip
    return _table(list(rows.values()))


BLOCKS = {
    "further-use": _block(use_block),
    "further-layers": _block(layers_block),
    "further-wrong": _block(wrong_block),
}
