"""`nox -s versus`: the same callables timed by other tools and by us, again and again from nothing.

A figure is worth what it is when somebody measures it again. So every tool is invoked many times, each
time in a fresh process, all tools in turn in random order, and what is shown is how far its figures
spread: of a real ratio, of the ratio of an op to itself, and what of an injected slowdown stands out.
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
from poolbench.proof.peers import CALLABLES, CASE, NEEDS, TOOLS

STORED = Path("results") / "reference-versus" / "versus.json"
PICTURE = Path("docs") / "images" / "versus"
OURS = "ours"
ABLATION = "ours, one process"
INVOCATIONS = 20
# Timed calls of each callable in one invocation, whatever the tool does besides.
SECONDS = 0.5
TIMEOUT_SECONDS = 300.0
SPREAD_BAR = 1 / 2
FLOOR_BAR = 1 / 5


class Invocation(msgspec.Struct, frozen=True, kw_only=True):
    """One invocation of one tool.

    Attributes:
        tool: a key of TOOLS; turn: which repetition.
        log_ratios: by statistic, then by callable, of seconds a call over the baseline's.
        seconds: wall time, process start included.
        reason: why there are no figures; '' if there are.
    """

    tool: str
    turn: int
    log_ratios: dict[str, dict[str, float]] = {}
    seconds: float
    reason: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What the invocations of one tool came to by one of its statistics.

    Attributes:
        spread: standard deviation of the real log ratio.
        median_ratio: of the real ratio.
        noise_floor: 95th percentile of the size of the A/A log ratio.
        power: injected share to the share of invocations in which it stood out from the tool's own
            noise floor.
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


class Versus(msgspec.Struct, frozen=True, kw_only=True):
    """The file that is committed.

    Attributes:
        timed_seconds: of each callable in each invocation.
        missing: tools that are not installed.
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
    """The tools that can take part here."""
    return [tool for tool in TOOLS if tool not in NEEDS or importlib.util.find_spec(NEEDS[tool])]


def invoke(tool: str, turn: int, seconds: float) -> Invocation:
    """Run a tool once in a fresh process."""
    start = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "poolbench.proof.peers", tool, str(seconds)],
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
    """Every tool once in each turn, in random order: no tool has the quiet hour to itself.

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
    """One summary for each tool and statistic with at least two invocations."""
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


def best_peer(summaries: Sequence[Summary], figure: str) -> Summary | None:
    """The peer, by whichever of its statistics, that does best in a figure; None without peers."""
    peers = [one for one in summaries if one.tool not in (OURS, ABLATION)]
    return min(peers, key=lambda one: float(getattr(one, figure)), default=None)


def judge(summaries: Sequence[Summary]) -> list[tuple[str, bool]]:
    """Each bar in words with what was found, and whether it holds."""
    ours = next((one for one in summaries if one.tool == OURS), None)
    verdicts = []
    for figure, bar, what in (
        ("spread", SPREAD_BAR, "spread of a real ratio"),
        ("noise_floor", FLOOR_BAR, "95th percentile of the A/A log ratio"),
    ):
        peer = best_peer(summaries, figure)
        if ours is None or peer is None:
            verdicts.append((f"{what}: nothing to compare", False))
            continue
        mine, other = float(getattr(ours, figure)), float(getattr(peer, figure))
        text = (
            f"{what}: {mine:.2%}, best peer {other:.2%} ({peer.tool}, {peer.statistic}): "
            f"{mine / other:.2f} of it, at most {bar:g} is required"
        )
        verdicts.append((text, mine <= bar * other))
    return verdicts


def describe(summaries: Sequence[Summary]) -> str:
    """The table, ours first, then by spread."""
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
    """The tool with the statistic where it offers several."""
    return one.tool if one.tool in (OURS, ABLATION) else f"{one.tool} ({one.statistic})"


def plot(versus: Versus) -> Any:
    """Each invocation's real ratio, and its A/A ratio, off the tool's own median; by tool."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns

    order = sorted(versus.summaries, key=lambda s: (s.tool not in (OURS, ABLATION), s.spread))
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
        for i in versus.invocations
        if i.tool == one.tool and one.statistic in i.log_ratios
    ]
    frame = pd.DataFrame(rows)
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 1.6 + 0.42 * len(order)), sharey=True)
    titles = {
        "real": "a real ratio, off its median",
        "itself": "an op over itself, off 1",
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
    peer = best_peer(order, "spread")
    if ours and peer:
        figure.suptitle(
            f"Measured again from nothing, a ratio moves by {ours.spread:.1%} here, "
            f"by {peer.spread:.1%} with the steadiest peer",
            fontsize=11,
        )
    figure.tight_layout()
    return figure


def draw(versus: Versus, picture: Path) -> None:
    """Write the figure as SVG and PNG."""
    figure = plot(versus)
    picture.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        metadata: Mapping[str, None] = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(picture.with_suffix(suffix), dpi=160, metadata=metadata)


def read_stored(path: Path = STORED) -> Versus:
    """The stored result.

    Raises:
        UsageError: there is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Versus)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{path} cannot be read ({error}): run nox -s versus first") from None


def main(words: list[str]) -> int:
    """The door: 0 if both bars hold, 1 if one does not, 2 if it was asked wrongly."""
    parser = argparse.ArgumentParser(prog="versus", description=__doc__)
    parser.add_argument("--invocations", type=int, default=INVOCATIONS, help="of each tool")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timed, of each callable")
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
        print(f"versus: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for versus in measure(tools, given.invocations, given.seconds):
        if not given.trial:  # after each turn: all together take most of an hour
            STORED.parent.mkdir(parents=True, exist_ok=True)
            STORED.write_bytes(msgspec.json.format(msgspec.json.encode(versus), indent=1) + b"\n")
    print(describe(versus.summaries))  # noqa: T201
    verdicts = judge(versus.summaries)
    for text, holds in verdicts:
        print(f"{'pass' if holds else 'FAIL'}  {text}")  # noqa: T201
    for tool in versus.missing:
        print(f"not installed, left out: {tool}")  # noqa: T201
    if not given.trial:
        draw(versus, PICTURE)
    return 0 if all(holds for _, holds in verdicts) else 1


def pick(words: Sequence[str], turns: int) -> list[str]:
    """The tools that the words name; all that are installed without words.

    Raises:
        UsageError: one is unknown or not installed, or the turns are too few to have a spread.
    """
    if turns < 2:
        raise UsageError(f"--invocations must be a whole number from 2, for a spread; got {turns}")
    installed = installed_tools()
    for word in words:
        if word not in installed:
            raise UsageError(f"tool must be one of {', '.join(installed)}; got {word!r} (--tool)")
    return [tool for tool in installed if not words or tool in words]


def measure(tools: Sequence[str], turns: int, seconds: float) -> Iterator[Versus]:
    """Run all invocations; yields what they come to, after each turn."""
    start = time.monotonic()
    environment = collect_environment({"cpu:0": "CPU"})
    for invocations in run_all(
        tools,
        turns,
        lambda tool, turn: invoke(tool, turn, seconds),
        lambda line: print(line, flush=True),  # noqa: T201
    ):
        yield Versus(
            environment=environment,
            created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            case=f"{CASE.op} {case_label(CASE)}",
            timed_seconds=seconds,
            invocations=tuple(invocations),
            summaries=tuple(summarise(invocations)),
            missing=tuple(tool for tool in TOOLS if tool not in installed_tools()),
            wall_seconds=round(time.monotonic() - start, 1),
        )
