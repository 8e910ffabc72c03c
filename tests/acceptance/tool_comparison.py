"""Compare poolbench with other timing tools on the same callables (`nox -s versus`).

A tool is judged by what happens when the same measurement is repeated. Each tool is therefore invoked
many times, each time in a fresh process, all tools in random order. The table shows the spread of a
real ratio, the spread of the ratio of an op to itself, and how often an injected slowdown is detected.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from poolbench.core.case import case_label
from poolbench.core.errors import UsageError
from poolbench.core.records import Environment
from poolbench.machine.info import collect_environment

from acceptance.tools import CALLABLES, CASE, NEEDS, TOOLS

STORED = Path("results") / "reference-versus" / "versus.json"
PICTURE = Path("docs") / "images" / "versus"
OURS = "ours"
ABLATION = "ours, one process"
INVOCATIONS = 20
# Timed calls per callable and invocation; what the tool does besides comes on top.
SECONDS = 0.5
TIMEOUT_SECONDS = 300.0
SPREAD_LIMIT = 1 / 2
FLOOR_LIMIT = 1 / 5


class Invocation(msgspec.Struct, frozen=True, kw_only=True):
    """Record one invocation of one tool.

    Attributes:
        tool: a key of TOOLS.
        turn: the number of the repetition.
        log_ratios: by statistic, then by callable: log of seconds per call over the baseline's.
        seconds: wall time, including the start of the process.
        reason: why the invocation produced no figures; '' if it did.
    """

    tool: str
    turn: int
    log_ratios: dict[str, dict[str, float]] = {}
    seconds: float
    reason: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Summarise the invocations of one tool by one of its statistics.

    Attributes:
        spread: standard deviation of the log ratio of two different ops.
        median_ratio: median ratio of two different ops.
        noise_floor: 95th percentile of the absolute log ratio of an op to itself.
        power: injected slowdown to the share of invocations that exceed the tool's own noise floor.
        seconds: median wall time of an invocation.
    """

    tool: str
    statistic: str
    invocations: int
    spread: float
    median_ratio: float
    noise_floor: float
    power: dict[str, float]
    seconds: float


class ToolComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the committed result.

    Attributes:
        timed_seconds: timed calls per callable and invocation, in seconds.
        missing: tools that were not installed.
    """

    environment: Environment
    created: str
    case: str
    timed_seconds: float
    invocations: tuple[Invocation, ...]
    summaries: tuple[Summary, ...]
    missing: tuple[str, ...] = ()
    wall_seconds: float


def installed_tools() -> list[str]:
    """Return the tools that are installed here."""
    return [tool for tool in TOOLS if tool not in NEEDS or importlib.util.find_spec(NEEDS[tool])]


def invoke(tool: str, turn: int, seconds: float) -> Invocation:
    """Run a tool once in a fresh process."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "acceptance.tools", tool, str(seconds)],
            capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        reason = f"no answer within {TIMEOUT_SECONDS:g} s"
        return Invocation(tool=tool, turn=turn, seconds=TIMEOUT_SECONDS, reason=reason)
    wall = round(time.perf_counter() - start, 2)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
        return Invocation(tool=tool, turn=turn, seconds=wall, reason=reason)
    found = json.loads(done.stdout.strip().splitlines()[-1])["log_ratios"]
    rounded = {s: {n: round(v, 6) for n, v in of.items()} for s, of in found.items()}
    return Invocation(tool=tool, turn=turn, log_ratios=rounded, seconds=wall)


def run_all(
    tools: Sequence[str],
    turns: int,
    run: Callable[[str, int], Invocation],
    progress: Callable[[str], None],
) -> Iterator[list[Invocation]]:
    """Invoke every tool once per turn, in random order, so that background load affects all alike.

    Yields all invocations so far, after each turn.
    """
    generator = random.Random(0)
    found: list[Invocation] = []
    for turn in range(turns):
        for tool in generator.sample(list(tools), len(tools)):
            found.append(run(tool, turn))
            said = found[-1].reason or ", ".join(
                f"{statistic} {of['view']:+.3f} A/A {of['copy']:+.4f}"
                for statistic, of in found[-1].log_ratios.items()
            )
            progress(f"{turn + 1}/{turns} {tool}: {said} ({found[-1].seconds:.0f} s)")
        yield found


def summarise(invocations: Sequence[Invocation]) -> list[Summary]:
    """Return one summary per tool and statistic that has at least two invocations."""
    groups: dict[tuple[str, str], list[Invocation]] = {}
    for one in invocations:
        for statistic in one.log_ratios:
            groups.setdefault((one.tool, statistic), []).append(one)
    return [
        _summarise(tool, statistic, group)
        for (tool, statistic), group in groups.items()
        if len(group) >= 2
    ]


def _summarise(tool: str, statistic: str, group: Sequence[Invocation]) -> Summary:
    values = {
        name: np.array([one.log_ratios[statistic][name] for one in group])
        for name in group[0].log_ratios[statistic]
    }
    floor = float(np.quantile(np.abs(values["copy"]), 0.95))
    return Summary(
        tool=tool,
        statistic=statistic,
        invocations=len(group),
        spread=float(values["view"].std(ddof=1)),
        median_ratio=float(np.exp(np.median(values["view"]))),
        noise_floor=floor,
        power={
            f"{CALLABLES[name][1]:g}": float(np.mean(of > floor))
            for name, of in values.items()
            if CALLABLES[name][1]
        },
        seconds=float(np.median([one.seconds for one in group])),
    )


def best_other_tool(summaries: Sequence[Summary], figure: str) -> Summary | None:
    """Return the summary of the other tool that has the smallest `figure`; None without one."""
    tools = [one for one in summaries if one.tool not in (OURS, ABLATION)]
    return min(tools, key=lambda one: float(getattr(one, figure)), default=None)


def judge(summaries: Sequence[Summary]) -> list[tuple[str, bool]]:
    """Return each criterion as text with the figures found, and whether it holds."""
    ours = next((one for one in summaries if one.tool == OURS), None)
    verdicts = []
    for figure, limit, what in (
        ("spread", SPREAD_LIMIT, "spread of a real ratio"),
        ("noise_floor", FLOOR_LIMIT, "95th percentile of the A/A log ratio"),
    ):
        tool = best_other_tool(summaries, figure)
        if ours is None or tool is None:
            verdicts.append((f"{what}: nothing to compare", False))
            continue
        mine, other = float(getattr(ours, figure)), float(getattr(tool, figure))
        text = (
            f"{what}: {mine:.2%}, best other tool {other:.2%} ({tool.tool}, {tool.statistic}): "
            f"{mine / other:.2f} of it, at most {limit:g} is required"
        )
        verdicts.append((text, mine <= limit * other))
    return verdicts


def describe(summaries: Sequence[Summary]) -> str:
    """Format the summaries as a table: poolbench first, then by spread."""
    rows = [("tool", "statistic", "real ratio", "spread", "A/A p95", "1%", "5%", "seconds")]
    order = sorted(summaries, key=lambda one: (one.tool not in (OURS, ABLATION), one.spread))
    rows += [
        (
            one.tool, one.statistic, f"{one.median_ratio:.3f}", f"{one.spread:.2%}",
            f"{one.noise_floor:.2%}", f"{one.power.get('0.01', 0):.0%}",
            f"{one.power.get('0.05', 0):.0%}", f"{one.seconds:.0f}",
        )
        for one in order
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def label_of(one: Summary) -> str:
    """Return the tool's name, with the statistic if it offers several."""
    return one.tool if one.tool in (OURS, ABLATION) else f"{one.tool} ({one.statistic})"


def plot(comparison: ToolComparison) -> Any:
    """Plot the deviation of each invocation's ratios from the tool's own median, by tool."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    order = sorted(comparison.summaries, key=lambda s: (s.tool not in (OURS, ABLATION), s.spread))
    rows = [
        {
            "tool": label_of(one),
            "kind": kind,
            "percent": 100 * (np.exp(i.log_ratios[one.statistic][name] - centre) - 1),
            "ours": one.tool in (OURS, ABLATION),
        }
        for one in order
        for kind, name, centre in (
            ("real", "view", np.log(one.median_ratio)),
            ("itself", "copy", 0.0),
        )
        for i in comparison.invocations
        if i.tool == one.tool and one.statistic in i.log_ratios
    ]
    frame = pd.DataFrame(rows)
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 1.6 + 0.42 * len(order)), sharey=True)
    titles = {
        "real": "two different ops: deviation from the median",
        "itself": "an op and itself: deviation from 1",
    }
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        sns.stripplot(
            data=frame[frame["kind"] == kind], x="percent", y="tool", hue="ours", legend=False,
            palette={True: "#0173b2", False: "#949494"}, jitter=0.22, size=4.5, alpha=0.8, ax=axis,
        )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(-1.3 * frame["percent"].abs().max(), 1.3 * frame["percent"].abs().max())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:+g}%" if value else "0")
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("deviation (linear to 1%, then logarithmic)")
        axis.set_ylabel("")
        axis.grid(axis="x", alpha=0.3)
    ours = next((s for s in order if s.tool == OURS), None)
    tool = best_other_tool(order, "spread")
    if ours and tool:
        figure.suptitle(
            f"A repeated measurement moves a ratio by {ours.spread:.1%} with poolbench, "
            f"by {tool.spread:.1%} with the next best tool",
            fontsize=11,
        )
    figure.tight_layout()
    return figure


def draw(comparison: ToolComparison, picture: Path) -> None:
    """Write the figure as SVG and PNG."""
    figure = plot(comparison)
    picture.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        metadata: Mapping[str, None] = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(picture.with_suffix(suffix), dpi=160, metadata=metadata)


def read_stored(path: Path = STORED) -> ToolComparison:
    """Return the stored result.

    Raises:
        UsageError: there is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ToolComparison)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path} cannot be read ({error}): run nox -s versus first") from None


def main(words: list[str]) -> int:
    """Run the comparison: exit code 0 if both criteria hold, 1 if one fails, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="tests/acceptance tools", description=__doc__)
    parser.add_argument("--invocations", type=int, default=INVOCATIONS, help="invocations per tool")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timed seconds per callable")
    parser.add_argument("--tool", action="append", default=[], help="only these tools")
    parser.add_argument("--trial", action="store_true", help="store nothing")
    parser.add_argument("--plot", action="store_true", help="draw the stored result again")
    given = parser.parse_args(words)
    try:
        if given.plot:
            draw(read_stored(), PICTURE)
            return 0
        tools = pick(given.tool, given.invocations)
    except UsageError as error:
        print(f"tool comparison: {error}", file=sys.stderr)
        return 2
    for comparison in measure(tools, given.invocations, given.seconds):
        if not given.trial:  # after each turn: the whole comparison takes most of an hour
            STORED.parent.mkdir(parents=True, exist_ok=True)
            STORED.write_bytes(
                msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n"
            )
    print(describe(comparison.summaries))
    verdicts = judge(comparison.summaries)
    for text, holds in verdicts:
        print(f"{'pass' if holds else 'FAIL'}  {text}")
    for tool in comparison.missing:
        print(f"not installed, left out: {tool}")
    if not given.trial:
        draw(comparison, PICTURE)
    return 0 if all(holds for _, holds in verdicts) else 1


def pick(words: Sequence[str], turns: int) -> list[str]:
    """Return the named tools, or all installed tools if none is named.

    Raises:
        UsageError: a tool is unknown or not installed, or fewer than two turns are asked for.
    """
    if turns < 2:
        raise UsageError(f"--invocations must be a whole number from 2, for a spread; got {turns}")
    installed = installed_tools()
    for word in words:
        if word not in installed:
            raise UsageError(f"tool must be one of {', '.join(installed)}; got {word!r} (--tool)")
    return [tool for tool in installed if not words or tool in words]


def measure(tools: Sequence[str], turns: int, seconds: float) -> Iterator[ToolComparison]:
    """Run all invocations; yield the result so far after each turn."""
    start = time.monotonic()
    environment = collect_environment({"cpu:0": "CPU"})
    for invocations in run_all(
        tools,
        turns,
        lambda tool, turn: invoke(tool, turn, seconds),
        lambda line: print(line, flush=True),
    ):
        yield ToolComparison(
            environment=environment,
            created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            case=f"{CASE.op} {case_label(CASE)}",
            timed_seconds=seconds,
            invocations=tuple(invocations),
            summaries=tuple(summarise(invocations)),
            missing=tuple(tool for tool in TOOLS if tool not in installed_tools()),
            wall_seconds=round(time.monotonic() - start, 1),
        )
