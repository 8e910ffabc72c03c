"""Format results/reference-backends, the run of `nox -s bench-backends`, for docs/backends.md."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
from poolbench.core.candidate import split_contender
from poolbench.core.case import Case, format_value
from poolbench.core.records import Measurement, is_right
from poolbench.core.text import format_seconds, format_share, with_interval
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame
from poolbench.report.programs import same_program, unlike
from poolbench.report.ratios import class_of, paired, pool
from poolbench.store.journal import StoredRun, read_run

STORED = Path("results") / "reference-backends"
NOTHING = "`nox -s bench-backends` has not been run on the reference machine."
# By op: the bare function of each framework, keras.ops, the layer, and the layer above a pooling kernel.
ROLES = {
    "depth_max_pool": (
        {"": "reshape-reduce_max", "jax": "jnp-max", "torch": "torch-amax"},
        ("keras-ops", "layer-depth_max_pool", "keras-stock"),
    ),
    "global_avg_pool": (
        {"": "reduce_mean", "jax": "jnp-mean", "torch": "torch-mean"},
        ("keras-ops", "layer-global_avg_pool", "keras-stock"),
    ),
}
BACKENDS = {"": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
MODES = {("jax", "xla"): "jit"}


@functools.cache
def stored_run(root: Path, more: str = "") -> StoredRun | None:
    """Return the committed run, or that of a known case; None where there is none."""
    folder = root / f"{STORED}{more}"
    return read_run(folder) if (folder / "journal.jsonl").exists() else None


def _races(run: StoredRun) -> dict[Case, dict[str, Measurement]]:
    races: dict[Case, dict[str, Measurement]] = {}
    for m in run.measurements:
        if m.kind == "candidate":
            races.setdefault(m.case, {})[m.candidate] = m
    return races


def _named(name: str, label: str) -> str:
    return f"{name}@{label}" if label else name


def _time_text(m: Measurement) -> str:
    return format_seconds(statistics.median(m.samples.seconds)) if is_right(m) else m.status


def ratio_text(one: Measurement | None, other: Measurement | None) -> str:
    """Return the time over another's with the interval of the next run, or why there is none."""
    if one is None or other is None:
        return ""
    for m in (one, other):
        if not is_right(m):
            return m.status
    if words := unlike(one, other):
        return words
    (over,), (own,) = pool([[paired(one, other)]], [class_of(one)])
    if one.stopped_early or over.next_run.low is None:
        return f"{own.ratio:.3g}x, stopped early"
    text = with_interval(over.mean.ratio, over.next_run.ratio_low, over.next_run.ratio_high)
    return f"same program, {text}" if same_program(one, other) else text


def cost_block(_: RunFrame, root: Path) -> str:
    """Return a table per op: keras.ops and Keras layers over the bare function, by backend and mode."""
    run = stored_run(root)
    if run is None:
        return NOTHING
    races = _races(run)
    parts = []
    for op, (bare, roles) in ROLES.items():
        rows = []
        for label, backend in BACKENDS.items():
            for case, found in races.items():
                base = found.get(_named(bare[label], label))
                if case.op != op or base is None:
                    continue
                mode = MODES.get((label, case.mode), str(case.mode))
                rows.append(
                    {"input": format_value(case.shape), "pass": case.direction, "backend": f"{backend}, {mode}",
                     "bare function": _time_text(base)}
                    | {name: ratio_text(found.get(_named(name, label)), base) for name in roles}
                )  # fmt: skip
        rows.sort(key=lambda row: (row["input"], row["pass"]))
        names = ", ".join(f"{BACKENDS[label]} `{name}`" for label, name in bare.items())
        parts.append(
            f"**{op}**; bare function: {names}.\n\n{as_markdown(pd.DataFrame(rows)).strip()}"
        )
    return "\n\n".join(parts)


def across_block(_: RunFrame, root: Path) -> str:
    """Return the times of other backends over TensorFlow's, of one candidate in the same rounds."""
    run = stored_run(root)
    if run is None:
        return NOTHING
    rows = []
    for case, found in _races(run).items():
        for name, m in found.items():
            candidate, label = split_contender(name)
            other = found.get(candidate)
            if label and other is not None:
                rows.append(
                    {"op": case.op, "input": format_value(case.shape), "pass": case.direction,
                     "mode": case.mode, "candidate": candidate,
                     "backends": f"{BACKENDS[label]} over TensorFlow", "time": ratio_text(m, other)}
                )  # fmt: skip
    return as_markdown(pd.DataFrame(rows)).strip()


def settings_block(_: RunFrame, root: Path) -> str:
    """Return the settings that each worker's framework reported."""
    run = stored_run(root)
    if run is None:
        return NOTHING
    rows: dict[str, dict[str, str]] = {}
    for case, found in _races(run).items():
        for name, m in found.items():
            label = split_contender(name)[1]
            if m.settings:
                key = f"{BACKENDS[label]}, {MODES.get((label, case.mode), case.mode)}"
                rows.setdefault(key, {"backend": key} | dict(sorted(m.settings.items())))
    versions = run.header.environment.versions
    known = ("tensorflow-cpu", "tensorflow", "jax", "torch", "keras")
    words = ", ".join(f"{name} {versions[name]}" for name in known if name in versions)
    table = pd.DataFrame([rows[key] for key in sorted(rows)]).fillna("")
    return f"{words}; {run.header.environment.machine.get('processor')}.\n\n{as_markdown(table).strip()}"


def aa_block(_: RunFrame, root: Path) -> str:
    """Return how often two equal workers of one backend got a false verdict, and the resolution."""
    path = root / STORED / "aa.json"
    if not path.exists():
        return "`python tests/acceptance backends` has not been run on the reference machine."
    stored = json.loads(path.read_bytes())
    rows: list[dict[str, Any]] = []
    for label, backend in BACKENDS.items():
        some = [o for o in stored["comparisons"] if o["backend"] == (label or "tensorflow")]
        if some:
            false = sum(o["verdict"] in ("FASTER", "SLOWER") for o in some)
            rows.append(
                {"backend": backend, "comparisons": len(some), "false verdicts": false,
                 "median half-width": format_share(statistics.median(o["half_width"] for o in some)),
                 "largest ratio": f"{max(max(o['ratio'], 1 / o['ratio']) for o in some):.3g}"}
            )  # fmt: skip
    total = sum(row["comparisons"] for row in rows)
    false = sum(row["false verdicts"] for row in rows)
    return (
        f"{false} false verdicts in {total} comparisons at a margin of {format_share(stored['margin'])}.\n\n"
        + as_markdown(pd.DataFrame(rows)).strip()
    )


def cases_block(_: RunFrame, root: Path) -> str:
    """Return the known cases, each reproduced or refuted, with intervals."""
    cases = (
        ("keras#22561", "", _overhead),
        ("keras#23649", "-23649", _layout),
        ("tensorflow#57057", "-57057", _half),
    )
    runs = {more: stored_run(root, more) for _, more, _ in cases}
    return "\n".join(
        f"- {describe(run)}"
        if (run := runs[more]) is not None
        else f"- **{issue}** is not measured yet."
        for issue, more, describe in cases
    )


def _overhead(run: StoredRun) -> str:
    """Return the time of Keras over PyTorch's own function, smallest and base input."""
    words = []
    for case, found in _races(run).items():
        layer, bare = found.get("layer-global_avg_pool@torch"), found.get("torch-mean@torch")
        if layer is None or bare is None or case.direction != "forward":
            continue
        added = 1e6 * (
            statistics.median(layer.samples.seconds) - statistics.median(bare.samples.seconds)
        )
        words.append(
            f"{ratio_text(layer, bare)} at {format_value(case.shape)} ({added:+.0f} us per call)"
        )
    return (
        "**keras#22561, Keras is slower than plain PyTorch**: time of `GlobalAveragePooling2D` over that of "
        f"`x.mean((1, 2))`, eager and forward: {'; '.join(words)}."
    )


def _layout(run: StoredRun) -> str:
    words = []
    for case, found in _races(run).items():
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


def _half(run: StoredRun) -> str:
    words = []
    for case, found in _races(run).items():
        for name, m in found.items():
            candidate, label = split_contender(name)
            if candidate not in ("layer-global_avg_pool", "reduce_mean") or m.accuracy is None:
                continue
            mode = MODES.get((label, case.mode), case.mode)
            words.append(f"{BACKENDS[label]} {mode} `{candidate}` {m.status}")
    shape = format_value(next(iter(_races(run))).shape)
    return (
        f"**tensorflow#57057, the average in mixed precision on a CPU**, float16 at {shape}, against the reference: "
        f"{', '.join(words)}."
    )


BLOCKS = {
    "backends-cases": cases_block,
    "backends-cost": cost_block,
    "backends-across": across_block,
    "backends-settings": settings_block,
    "backends-aa": aa_block,
}
