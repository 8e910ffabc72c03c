"""Format results/reference-backends, a long run of `nox -s bench-backends`, for docs/backends.md."""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from poolbench.core.candidate import split_contender
from poolbench.core.case import format_value
from poolbench.core.records import Measurement
from poolbench.core.text import format_share
from poolbench.matrix import PROBES
from poolbench.report.backends import (
    BACKENDS,
    Races,
    backend_and_mode,
    cost_tables,
    races_of,
    ratio_text,
    settings_table,
)
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame
from poolbench.store.journal import StoredRun, read_run

STORED = Path("results") / "reference-backends"
RACED = ("",)  # the runs of the tables


@functools.cache
def stored_run(root: Path, more: str = "") -> StoredRun:
    """Return the committed run, that of the further layers, or that of a known case."""
    return read_run(root / f"{STORED}{more}")


def _races(root: Path, *more: str) -> Races:
    return races_of(m for one in more for m in stored_run(root, one).measurements)


def cost_block(_: RunFrame, root: Path) -> str:
    """Return a table per op: what calls Keras over the framework's own function, by backend and mode."""
    tables = cost_tables(_races(root, *RACED))
    return "\n\n".join(f"**{op}**\n\n{as_markdown(table).strip()}" for op, table in tables.items())


def across_block(_: RunFrame, root: Path) -> str:
    """Return the times of other backends over TensorFlow's, of one candidate in the same rounds."""
    rows = [
        {"op": case.op, "input": format_value(case.shape), "pass": case.direction,
         "mode": case.mode, "candidate": candidate,
         "backends": f"{BACKENDS[label]} over TensorFlow", "time": ratio_text(m, found[candidate])}
        for case, found in _races(root, *RACED).items()
        for name, m in found.items()
        for candidate, label in (split_contender(name),)
        if label and candidate in found
    ]  # fmt: skip
    return as_markdown(pd.DataFrame(rows)).strip()


def settings_block(_: RunFrame, root: Path) -> str:
    """Return the settings that each worker's framework reported."""
    environment = stored_run(root).header.environment
    known = ("tensorflow-cpu", "tensorflow", "jax", "torch", "keras")
    versions = [
        f"{name} {environment.versions[name]}" for name in known if name in environment.versions
    ]
    table = as_markdown(settings_table(_races(root, ""))).strip()
    return f"{', '.join(versions)}; {environment.machine.get('processor')}.\n\n{table}"


def support_block(_: RunFrame, root: Path) -> str:
    """Return the support matrix' checks on JAX and PyTorch."""
    rows: dict[str, dict[str, str]] = {}
    for cell in stored_run(root, "-matrix").capabilities:
        row = rows.setdefault(cell.candidate, {"op": cell.op, "candidate": cell.candidate})
        row[PROBES[cell.probe].title] = f"{cell.state}: {cell.evidence}"
    return as_markdown(pd.DataFrame(rows.values())).strip()


def programs_block(_: RunFrame, root: Path) -> str:
    """Return the verdicts on pairs of candidates that XLA made one program of, by op and direction."""
    stored = json.loads((root / STORED / "programs.json").read_bytes())
    rows = []
    for race in stored["races"]:
        verdicts = Counter(pair["verdict"] for pair in race["pairs"])
        rows.append(
            {"op": race["op"], "direction": race["direction"], "candidates": race["candidates"],
             "programs": race["programs"], "pairs of one program": len(race["pairs"]),
             "called different": _false(race["pairs"]), "SAME": verdicts["SAME"],
             "undecided": verdicts["UNDECIDED"], **_spread(race["pairs"], 4)}
        )  # fmt: skip
    return as_markdown(pd.DataFrame(rows)).strip()


def _false(equal: list[dict[str, Any]]) -> int:
    """Return how many comparisons of equal sides have a verdict that says they differ."""
    return sum(one["verdict"] in ("FASTER", "SLOWER") for one in equal)


def _spread(equal: list[dict[str, Any]], digits: int) -> dict[str, str]:
    """Return cells: how wide and how far from 1 comparisons of equal sides are."""
    return {
        "median half-width": format_share(statistics.median(one["half_width"] for one in equal)),
        "largest ratio": f"{max(max(one['ratio'], 1 / one['ratio']) for one in equal):.{digits}g}",
    }


def aa_block(_: RunFrame, root: Path) -> str:
    """Return how often two equal workers of one backend got a false verdict, and the resolution."""
    stored = json.loads((root / STORED / "aa.json").read_bytes())
    rows: list[dict[str, Any]] = []
    for label, backend in BACKENDS.items():
        some = [o for o in stored["comparisons"] if o["backend"] == (label or "tensorflow")]
        if some:
            rows.append(
                {"backend": backend, "comparisons": len(some), "false verdicts": _false(some), **_spread(some, 3)}
            )  # fmt: skip
    total = sum(row["comparisons"] for row in rows)
    false = sum(row["false verdicts"] for row in rows)
    return (
        f"{false} false verdicts in {total} comparisons at a margin of {format_share(stored['margin'])}.\n\n"
        + as_markdown(pd.DataFrame(rows)).strip()
    )


def cases_block(_: RunFrame, root: Path) -> str:
    """Return the known cases, each reproduced or refuted, with intervals."""
    found = (
        _overhead(_races(root, "")),
        _layout(_races(root, "-23649")),
        _half(_races(root, "-57057")),
    )
    return "\n".join(f"- {words}" for words in found)


def _overhead(races: Races) -> str:
    """Return the time of Keras over PyTorch's own function, smallest and base input."""
    words = [
        f"{ratio_text(layer, own)} at {format_value(case.shape)} "
        f"({1e6 * (_median(layer) - _median(own)):+.0f} us per call)"
        for case, found in races.items()
        if case.direction == "forward" and "torch-mean@torch" in found
        for layer, own in ((found["layer-global_avg_pool@torch"], found["torch-mean@torch"]),)
    ]
    return (
        "**keras#22561, Keras is slower than plain PyTorch**: time of `GlobalAveragePooling2D` over that of "
        f"`x.mean((1, 2))`, eager and forward: {'; '.join(words)}."
    )


def _median(m: Measurement) -> float:
    return statistics.median(m.samples.seconds)


def _layout(races: Races) -> str:
    words = []
    for case, found in races.items():
        layer, view = found["layer-MaxPooling2D@torch"], found["torch-max_pool2d@torch"]
        copies = layer.program.operations.count("aten.clone") if layer.program else 0
        one = ratio_text(found["torch-one-copy@torch"], view)
        words.append(
            f"{ratio_text(layer, view)} at {format_value(case.shape)} with {copies} `aten.clone` per call "
            f"(one copy before the pooling alone: {one})"
        )
    return (
        "**keras#23649, PyTorch pooling copies the layout**: `MaxPooling2D(2)` in channels_last over "
        f"`F.max_pool2d` on a view: {'; '.join(words)}."
    )


def _half(races: Races) -> str:
    words = [
        f"{backend_and_mode(case, label)} `{candidate}` {m.status}"
        for case, found in races.items()
        for name, m in found.items()
        for candidate, label in (split_contender(name),)
        if candidate in ("layer-global_avg_pool", "reduce_mean") and m.accuracy is not None
    ]
    shape = format_value(next(iter(races)).shape)
    return (
        f"**tensorflow#57057, the average in mixed precision on a CPU**, float16 at {shape}, against the reference: "
        f"{'; '.join(words)}."
    )


BLOCKS = {
    "backends-cases": cases_block,
    "backends-cost": cost_block,
    "backends-across": across_block,
    "backends-settings": settings_block,
    "backends-support": support_block,
    "backends-aa": aa_block,
    "backends-programs": programs_block,
}
