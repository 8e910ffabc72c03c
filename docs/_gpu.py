"""Format the figures of the runs on GPUs, results/reference-<gpu>/, for README.md and docs/gpu.md."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
from poolbench.core.case import Case
from poolbench.core.records import Measurement, is_right
from poolbench.core.text import format_bandwidth, format_seconds, one_line
from poolbench.machine.nvml import is_gpu
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame, load
from poolbench.report.medians import median, process_medians
from poolbench.report.ratios import paired
from poolbench.report.recommend import answer
from poolbench.report.tables import headline_table
from poolbench.stats import estimate
from poolbench.store.journal import JOURNAL, read_run

DEPTH, MEAN = "depth_max_pool", "global_avg_pool"
LAYER, PINNED = "layer-depth_max_pool", "cpu-pinned-max_pool"
MEAN_LAYER, MEAN_TEXTBOOK = "layer-global_avg_pool", "lambda-reduce_mean"
NARROW = ("float16", "bfloat16")
BASE = "32x56x56x96"
PROBED = ((32, 56, 56, 96), (32, 112, 112, 96))
# reduce_mean over NHWC changes its kernel between these two batches.
BORDER = ("12x112x112x64", "13x112x112x64")


@functools.cache
def gpu_runs(root: Path) -> tuple[RunFrame, ...]:
    """Return the committed runs whose machine had a GPU."""
    folders = [path.parent for path in sorted((root / "results").glob(f"reference-*/{JOURNAL}"))]
    return tuple(
        load(folder)
        for folder in folders
        if any(map(is_gpu, read_run(folder).header.environment.devices))
    )


def gpu_block(_: RunFrame, root: Path) -> str:
    """Return the headline table of each GPU and the lead of DepthMaxPool2D there."""
    parts = []
    for loaded in gpu_runs(root):
        table = headline_table(loaded, answer(loaded))
        table = table[table["device"].map(is_gpu)]
        columns = [
            "op", "mode", "direction", "use", "time per call", "speed over the baseline",
            "of bandwidth limit", "fastest here",
        ]  # fmt: skip
        small = table[columns].map(lambda cell: one_line(str(cell), 80))
        parts.append(f"{_where(loaded)}\n\n{as_markdown(small).strip()}\n\n{_lead(loaded)}")
    return "\n\n".join(parts) or "No GPU has been measured yet."


def _where(loaded: RunFrame) -> str:
    environment = loaded.run.header.environment
    names = sorted({name for device, name in environment.devices.items() if is_gpu(device)})
    versions = environment.versions
    return (
        f"On {' and '.join(names)} (driver {versions.get('nvidia-driver', 'unknown')}, TensorFlow "
        f"{versions.get('tensorflow')}), `results/{loaded.run.path.name}/`, at each op's base case:"
    )


def _lead(loaded: RunFrame) -> str:
    """Return the speed of DepthMaxPool2D over the fastest other correct layer, by mode and direction."""
    races: dict[Case, dict[str, Measurement]] = {}
    for m in loaded.run.measurements:
        if m.case.op == DEPTH and is_gpu(m.case.device) and m.kind == "candidate":
            races.setdefault(m.case, {})[m.candidate] = m
    found: dict[str, list[estimate.Estimate]] = {}
    for race in races.values():
        layer = race.get(LAYER)
        if layer is None or not is_right(layer) or layer.clock == "wall":
            continue
        others = [
            m
            for m in race.values()
            if m.form == "layer" and m is not layer and is_right(m) and m.clock == "device"
        ]
        if others:
            best = min(others, key=lambda m: m.device_seconds or 0.0)
            where = "with XLA" if layer.case.mode == "xla" else "without XLA"
            key = f"{where}, {layer.case.direction}"
            found.setdefault(key, []).append(estimate.estimate(*paired(best, layer)))
    words = []
    for key, estimates in found.items():
        mean = estimate.geometric_mean(estimates)
        cells = f"{len(estimates)} case{'s' if len(estimates) > 1 else ''}"
        words.append(
            f"{key} {mean.ratio:.2f}x [{mean.ratio_low:.2f}, {mean.ratio_high:.2f}] over {cells}"
        )
    pinned = [
        race[PINNED]
        for case, race in races.items()
        if PINNED in race and is_right(race[PINNED]) and case.mode == "graph"
    ]
    beside = "".join(
        f" Pinned to the CPU it takes {format_seconds(median(process_medians(m.samples)))}."
        for m in pinned[:1]
    )
    return (
        "Speed of `DepthMaxPool2D` over the fastest other correct layer by the device's clock, geometric means: "
        f"{'; '.join(words)}. Without XLA the Lambda does not run on a GPU and is not counted.{beside}"
    )


def gpu_bandwidth_block(_: RunFrame, root: Path) -> str:
    """Return the memory bandwidth of each GPU, warm and cold, small and large."""
    rows = []
    for loaded in gpu_runs(root):
        names = loaded.run.header.environment.devices
        for m in loaded.run.measurements:
            if m.kind != "probe" or m.clock != "device" or m.case.op != DEPTH:
                continue
            if m.case.mode != "graph" or m.case.dtype != "float32" or m.case.direction != "forward":
                continue
            if m.case.get("pool_size") != 3 or m.case.shape not in PROBED:
                continue
            nbytes = m.read_nbytes + m.written_nbytes
            rows.append(
                {
                    "device": names[m.case.device],
                    "probe": m.candidate.removeprefix("bandwidth-"),
                    "bytes moved": f"{nbytes / 1e6:.0f} MB",
                    "cache": m.case.cache,
                    "bandwidth": format_bandwidth(nbytes / (m.device_seconds or float("nan"))),
                }
            )
    if not rows:
        return "No GPU has been measured yet."
    return as_markdown(pd.DataFrame(rows)).strip()


def gpu_means_block(_: RunFrame, root: Path) -> str:
    """Return the two tables of the global mean: float16 layers and the change of kernel."""
    return "\n\n".join(_mean_tables(loaded) for loaded in gpu_runs(root)) or (
        "No GPU has been measured yet."
    )


def _mean_tables(loaded: RunFrame) -> str:
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for m in loaded.run.measurements:
        case = m.case
        plain = case.op == MEAN and case.direction == "forward" and case.cache == "warm"
        if m.kind != "candidate" or not is_right(m) or m.device_seconds is None:
            continue
        if plain and is_gpu(case.device):
            shape = "x".join(map(str, case.shape))
            key = (shape, case.dtype, case.mode)
            times.setdefault(key, {})[m.candidate] = m.device_seconds
    narrow = [
        {
            "dtype": dtype, "mode": mode,
            "GlobalAvgPool2D": format_seconds(found[MEAN_LAYER]),
            "reduce_mean": format_seconds(found[MEAN_TEXTBOOK]),
            "layer over reduce_mean": f"{found[MEAN_LAYER] / found[MEAN_TEXTBOOK]:.2f}",
        }
        for (shape, dtype, mode), found in times.items()
        if shape == BASE and dtype in NARROW and {MEAN_LAYER, MEAN_TEXTBOOK} <= found.keys()
    ]  # fmt: skip
    border = [
        {"shape": shape, **{name: format_seconds(seconds) for name, seconds in found.items()}}
        for (shape, dtype, mode), found in times.items()
        if shape in BORDER and (dtype, mode) == ("float32", "graph")
    ]
    edge = [times.get((shape, "float32", "graph"), {}).get(MEAN_LAYER) for shape in BORDER]
    words = (
        f"\n\n`GlobalAvgPool2D` takes {edge[1] / edge[0]:.0f} times as long for the second shape as for the first."
        if edge[0] and edge[1]
        else ""
    )
    return (
        f"{as_markdown(pd.DataFrame(narrow)).strip()}\n\n{as_markdown(pd.DataFrame(border)).strip()}"
        + words
    )
