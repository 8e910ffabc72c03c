"""Format the figures of the reference run as the text blocks of README.md and docs/."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from _stored import alarms, machine_text
from poolbench.core.case import Case, make_case
from poolbench.core.plan import Plan
from poolbench.core.records import Measurement, is_right
from poolbench.core.registry import input_nbytes
from poolbench.core.text import format_nbytes, format_seconds, format_share, one_line, significant
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame
from poolbench.report.history import (
    LIKE,
    REFERENCE_RUNS,
    RunSummary,
    agreements,
    alike,
    estimates_of,
    read_summaries,
)
from poolbench.report.recommend import answer
from poolbench.report.tables import headline_table, network_sentence
from poolbench.report.terminal import headline_text
from poolbench.stats import estimate
from poolbench.stats.planning import START_SECONDS, predict_seconds
from poolbench.store.journal import MAX_NBYTES, encode_line
from scipy import stats

LARGE_NBYTES = 8_000_000
LAYER, TEXTBOOK, OP = "layer-depth_max_pool", "lambda-max_pool", "depth_max_pool"
MEAN_LAYER, MEAN_OP = "layer-global_avg_pool", "global_avg_pool"
PREDICTED_CANDIDATES = 14
POOLED_RUNS = 3
COMPARED_MEANS = ("lambda-reduce_mean", "avg_pool2d")


def headline_block(loaded: RunFrame, root: Path) -> str:
    """Return the headline table and the machine that it was measured on."""
    del root
    table = headline_table(loaded, answer(loaded))
    columns = [
        "op", "mode", "direction", "use", "time per call", "speed over the baseline",
        "speed over the textbook", "of bandwidth limit",
    ]  # fmt: skip
    environment = loaded.run.header.environment
    machine, versions = environment.machine, environment.versions
    where = (
        f"{machine_text(machine)}"
        f"{', CPU idle states disabled' if machine.get('idle_states_disabled') else ''}; TensorFlow "
        f"{versions.get('tensorflow-cpu') or versions.get('tensorflow')}, Keras {versions.get('keras')}"
    )
    small = table[columns].map(lambda cell: one_line(str(cell), 80))
    return f"{as_markdown(small).strip()}\n\nOn {where}; each at its op's base case (`python report.py reference`)."


def output_block(loaded: RunFrame, root: Path) -> str:
    """Return the first lines that a run prints at its end: those of graph mode."""
    del root
    heading, *rows = headline_text(loaded).splitlines()
    return "\n".join(["```", heading, *(row for row in rows if "  graph  " in row), "```"])


def short_answer_block(loaded: RunFrame, root: Path) -> str:
    """Return what to use for the two shipped ops, with the figures of the reference run."""
    del root
    layer = {mode: _speeds(_over_lambda(loaded, mode))["speed"] for mode in ("graph", "xla")}
    mean = {
        row["mode"]: row["speed"].split()[0]
        for row in _mean_rows(loaded)
        if (row["direction"], row["candidate"]) == ("forward", "avg_pool2d")
    }
    environment = loaded.run.header.environment
    return (
        "- **Depthwise max pooling**: use [`DepthMaxPool2D`](bench/poolbench/layers.py). On "
        f"{machine_text(environment.machine)}, it is {layer['graph']} as fast as a `Lambda` around `tf.nn.max_pool` in "
        f"graph mode and {layer['xla']} with XLA, forward, for inputs of 8 MB and more. Unlike the `Lambda` it trains "
        "and runs on a GPU without XLA, and reloads in Keras' safe mode.\n"
        "- **Global average pooling**: use `GlobalAveragePooling2D`. `tf.nn.avg_pool2d` is "
        f"{mean['graph']} as fast in graph mode, but {mean['xla']} with XLA, and wrong in float16. On a GPU without "
        "XLA, take two one-axis means ([recipes](docs/recipes.md)).\n"
        "- If pooling takes under 2% of your training step (`poolbench which model.keras` measures it), choose by the "
        "[support matrix](docs/support.md), not by speed."
    )


def selftest_block(loaded: RunFrame, root: Path) -> str:
    """Return how often an op beside itself was judged unlike itself, and how often runs agreed."""
    del loaded
    text = ""
    if (found_alarms := alarms(root)) is not None:
        machine, count, total = found_alarms
        most = stats.binomtest(count, total, alternative="less").proportion_ci(0.95).high
        text = (
            f"An op raced against itself on {machine}: {count} false alarms in {total} comparisons, so at "
            f"most {most:.1%} at 95% confidence."
        )
    if groups := reference_runs(root):
        found = agreements(groups[-1])
        inside = sum(one.coverage.inside for one in found)
        comparisons = sum(one.coverage.comparisons for one in found)
        text += (
            f" Consecutive default runs agreed in {inside} of {comparisons} comparisons "
            f"({format_share(inside / comparisons)}, expected {found[0].coverage.nominal:.0%})."
        )
    return text.strip() or "Neither `nox -s acceptance` nor two default runs are committed."


def reference_runs(root: Path) -> list[list[RunSummary]]:
    """Return the committed summaries of default runs, a group for each machine and code, the oldest first."""
    known = read_summaries(root / "results")
    known = [
        one for one in known if (root / "results" / REFERENCE_RUNS / f"{one.run}.json").exists()
    ]
    groups = [alike(known, one) for one in known]
    return [some for at, some in enumerate(groups) if len(some) > 1 and some not in groups[:at]]


def runs_block(loaded: RunFrame, root: Path) -> str:
    """Return tables of consecutive default runs: how many comparisons agreed, and how wide they were."""
    del loaded
    tables = [_runs_table(runs) for runs in reference_runs(root)]
    return "\n\n".join(tables) or "No two runs of one code are committed."


def _runs_table(runs: Sequence[RunSummary]) -> str:
    rows = [
        {
            "runs": f"{one.created[:16]} and {other.created[11:16]}".replace("T", " "),
            "agree": f"{found.coverage.inside} of {found.coverage.comparisons}",
            "share": format_share(found.coverage.observed),
            "median half-width": format_share(found.half_width),
            "of like sides": format_share(found.alike_half_width),
            "FASTER turned SLOWER": found.reversed,
        }
        for (one, other), found in zip(itertools.pairwise(runs), agreements(runs), strict=True)
    ]
    machine = machine_text(runs[-1].machine)
    table = as_markdown(pd.DataFrame(rows)).strip()
    return (
        f"Default runs of one code on {machine}, each with the next; 95% are expected to agree:\n\n{table}\n\n"
        f"{_pooled_text(runs)}{_predicted_text(runs)}"
    )


def _predicted_text(runs: Sequence[RunSummary]) -> str:
    """Return how often a run's ratio lay where the earlier ones together expected it; '' of two runs."""
    inside = []
    for at in range(2, len(runs)):
        expected = estimates_of(*runs[:at])
        for one in runs[at].comparisons:
            next_run = expected[one.key].next_run if one.key in expected else None
            if next_run and next_run.low is not None and next_run.high is not None:
                inside.append(next_run.low <= one.log_ratio <= next_run.high)
    if not inside:
        return ""
    return (
        f" Of the ratios of each run from the third on, {format_share(statistics.mean(inside))} lay where the runs "
        "before it, together, expect 95%."
    )


def _pooled_text(runs: Sequence[RunSummary]) -> str:
    """Return how wide the intervals are that several of these runs give together."""
    texts = []
    for count in sorted({min(POOLED_RUNS, len(runs)), len(runs)}):
        found = estimates_of(*runs[:count]).values()
        means = [one.mean for one in found if one.mean.degrees > 0]
        like = [one.half_width for one in means if abs(one.log_ratio) < LIKE]
        texts.append(
            f"{format_share(statistics.median(one.half_width for one in means))} for the first {count} "
            f"({format_share(statistics.median(like))} for like sides)"
        )
    return f"Median half-width where runs are reported together: {', '.join(texts)}."


def network_block(loaded: RunFrame, root: Path) -> str:
    """Return pooling's share of a training step in whole models."""
    del root
    return network_sentence(loaded.run.networks) or "The reference run holds no networks."


def _races(loaded: RunFrame, op: str, mode: str) -> dict[Case, dict[str, Measurement]]:
    """Return the measurements of each race of an op in a mode, by candidate name."""
    races: dict[Case, dict[str, Measurement]] = {}
    for m in loaded.run.measurements:
        if m.case.op == op and m.case.mode == mode and m.kind == "candidate":
            races.setdefault(m.case, {})[m.candidate] = m
    return races


def _mean_rows(loaded: RunFrame) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for mode, direction in itertools.product(("eager", "graph", "xla"), ("forward", "training")):
        races = [
            race
            for case, race in _races(loaded, MEAN_OP, mode).items()
            if case.direction == direction and is_right(race[MEAN_LAYER])
        ]
        for name in COMPARED_MEANS:
            pairs = [(race[name], race[MEAN_LAYER]) for race in races if name in race]
            right = [
                estimate.estimate(layer.samples, m.samples) for m, layer in pairs if is_right(m)
            ]
            if not pairs:
                continue
            counts = {"cells": str(len(pairs)), "correct": str(len(right))}
            about = {"mode": mode, "direction": direction, "candidate": name}
            rows.append({**about, **counts, **_speeds(right)})
    return rows


def means_block(loaded: RunFrame, root: Path) -> str:
    """Return the speed of each global mean over Keras' layer, by mode and direction."""
    del root
    rows = _mean_rows(loaded)
    text = as_markdown(pd.DataFrame(rows)).strip()
    return (
        "Speed over `GlobalAvgPool2D` in the reference run, geometric means over the cells where the implementation is "
        f"correct, with 95% intervals:\n\n{text}"
    )


def trace_summary_block(loaded: RunFrame, root: Path) -> str:
    """Return the trace summaries of the reference run, in graph mode, forward."""
    del root
    rows = []
    for trace_summary in loaded.run.trace_summaries:
        case = trace_summary.case
        if (case.op, case.mode, case.direction, trace_summary.status) != (
            OP,
            "graph",
            "forward",
            "ok",
        ):
            continue
        parts = [part for part in trace_summary.parts if part["kind"] in ("tf_op", "hlo")]
        # Prefer the compiled code to the operation that contains it: it is more specific.
        largest = max(parts, key=lambda part: (float(part["seconds"]), part["kind"] == "hlo"))
        rows.append(
            {
                "candidate": trace_summary.candidate,
                "time per step": format_seconds(trace_summary.step_seconds),
                "largest operation": str(largest["name"]),
                "share of step": f"{float(largest['seconds']) / trace_summary.step_seconds:.0%}",
                "threads busy": f"{trace_summary.threads_busy:.1f}"
                if trace_summary.threads_busy
                else "",
                "peak memory": f"{trace_summary.peak_nbytes / 2**20:.1f} MiB"
                if trace_summary.peak_nbytes
                else "",
            }
        )
    if not rows:
        return "The reference run holds no traces."
    return as_markdown(pd.DataFrame(rows)).strip()


def predicted_block(loaded: RunFrame, root: Path) -> str:
    """Return how long runs of many cases take, by the estimate of --dry-run."""
    del root
    plan = Plan()
    case = make_case(op=OP, shape=(1, 8, 8, 96), pool_size=3)
    names = tuple(str(number) for number in range(PREDICTED_CANDIDATES))
    starts = plan.processes * START_SECONDS
    race = predict_seconds({case: names}, plan) - starts
    measurements = loaded.run.measurements
    nbytes = sum(len(encode_line(m)) for m in measurements) / len({m.case for m in measurements})
    rows = [
        {
            "cases": f"{count:,}",
            "one node": _span(starts + count * race),
            "ten nodes": _span(starts + count * race / 10),
            "journal": format_nbytes(count * nbytes),
        }
        for count in (50, 1_000, 10_000)
    ]
    return (
        f"For K = {PREDICTED_CANDIDATES}, R = {plan.processes}, B = {plan.budget_seconds:g} s and small inputs a race "
        f"takes {race:.0f} s. A journal is read up to {format_nbytes(MAX_NBYTES)}, which is about "
        f"{significant(MAX_NBYTES / nbytes, 2)} races like those of the reference run:\n\n"
        f"{as_markdown(pd.DataFrame(rows)).strip()}"
    )


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{significant(seconds / 3600, 2)} h"


def _over_lambda(loaded: RunFrame, mode: str) -> list[estimate.Estimate]:
    """Return the layer's speed over the Lambda in each large case that both run forward."""
    pairs = [
        (race[TEXTBOOK], race[LAYER])
        for case, race in _races(loaded, OP, mode).items()
        if case.direction == "forward" and input_nbytes(case) >= LARGE_NBYTES
        if {TEXTBOOK, LAYER} <= race.keys() and is_right(race[TEXTBOOK]) and is_right(race[LAYER])
    ]
    return [estimate.estimate(textbook.samples, layer.samples) for textbook, layer in pairs]


def _speeds(found: Sequence[estimate.Estimate]) -> dict[str, str]:
    """Return the columns of speed-ups: geometric mean with interval, and the smallest."""
    if not found:
        return {"speed": "", "worst": ""}
    mean = estimate.geometric_mean(found)
    interval = f" [{mean.ratio_low:.2f}, {mean.ratio_high:.2f}]"
    return {
        "speed": f"{mean.ratio:.2f}x" + (interval if math.isfinite(mean.ratio_low) else ""),
        "worst": f"{min(e.ratio for e in found):.2f}x",
    }
