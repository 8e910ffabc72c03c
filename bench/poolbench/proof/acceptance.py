"""`nox -s acceptance`: what the harness promises of real timings, held against this machine.

Each bar is an entry of BARS: what is required, and a function that judges the evidence. Evidence is
gathered once, when a bar first asks for it, so that `--only NAME` runs no more than that bar needs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.errors import StoreError, UsageError, WorkerFailure
from poolbench.core.records import Environment, TimeBreakdown
from poolbench.engine.aa import MARGIN, ProofError
from poolbench.machine.info import collect_environment
from poolbench.proof.evidence import PAIR_SECONDS, RESULTS, SCALES, Evidence, compare_journal
from poolbench.proof.judges import (
    Found,
    judge_alarms,
    judge_bias,
    judge_contention,
    judge_equal,
    judge_pairs,
    judge_power,
    judge_runs,
    judge_shares,
    judge_sleep,
    judge_time,
    judge_undecided,
    judge_widths,
)
from poolbench.store.journal import read_run

STORED = RESULTS / "reference-acceptance" / "acceptance.json"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One promise: what it requires, in words, and how the evidence is judged."""

    requirement: str
    judge: Callable[[Evidence], Found]


def _last_shares(evidence: Evidence) -> TimeBreakdown:
    found = read_run(evidence.default_run).of(TimeBreakdown)
    if not found:
        raise ProofError(f"{evidence.default_run.name} did not end by itself: it has no shares")
    return found[-1]


BARS: dict[str, Bar] = {
    "aa-alarms": Bar(
        requirement="an op with itself: FASTER or SLOWER in at most 1%",
        judge=lambda e: judge_alarms([*e.races, *e.tens]),
    ),
    "aa-undecided": Bar(
        requirement="an op with itself: UNDECIDED in at most 10%",
        judge=lambda e: judge_undecided([*e.races, *e.tens]),
    ),
    "slower-10": Bar(
        requirement="slowed by 10%: SLOWER at the default margin in at least 95%",
        judge=lambda e: judge_power(e.races, 0.10, MARGIN, 0.95),
    ),
    "slower-1": Bar(
        requirement="slowed by 1%: SLOWER at margin zero in at least 90%, 10 s a pair",
        judge=lambda e: judge_pairs(e.pairs, PAIR_SECONDS),
    ),
    "ten-equal": Bar(
        requirement="ten equal candidates: no sole winner",
        judge=lambda e: judge_equal(e.tens),
    ),
    "bias-cache": Bar(
        requirement="warm median within 5% of an uninterrupted loop, cache-resident",
        judge=lambda e: judge_bias(e.bias("cache-resident")),
    ),
    "bias-cache-xla": Bar(
        requirement="the same under XLA",
        judge=lambda e: judge_bias(e.bias("cache-resident, xla")),
    ),
    "bias-base": Bar(
        requirement="the same for the base case of the default sweep",
        judge=lambda e: judge_bias(e.bias("base case")),
    ),
    "bias-large": Bar(
        requirement="the same for a large op", judge=lambda e: judge_bias(e.bias("large"))
    ),
    "bias-threads": Bar(
        requirement="the same for an op of two threads alone among ops of one",
        judge=lambda e: judge_bias(e.bias("two threads")),
    ),
    "awake": Bar(
        requirement="processors that are kept awake make a call no slower",
        judge=lambda e: judge_sleep(e.sleep("cache-resident")),
    ),
    "two-runs": Bar(
        requirement="five quick runs, each with the next: their gap covers zero in 93% or more, no FASTER turns SLOWER",
        judge=lambda e: judge_runs(e.quick_runs),
    ),
    "quick-widths": Bar(
        requirement="a quick run: median half-width at most 8%",
        judge=lambda e: judge_widths([c for run in e.quick_runs for c in run.values()], 0.08, None),
    ),
    "busy-aa-alarms": Bar(
        requirement="one core half busy: an op with itself, FASTER or SLOWER in at most 1%",
        judge=lambda e: judge_alarms([*e.busy_races, *e.busy_tens]),
    ),
    "busy-aa-undecided": Bar(
        requirement="one core half busy: UNDECIDED in at most 10%",
        judge=lambda e: judge_undecided([*e.busy_races, *e.busy_tens]),
    ),
    "busy-slower-10": Bar(
        requirement="one core half busy: 10% found in at least 95%",
        judge=lambda e: judge_power(e.busy_races, 0.10, MARGIN, 0.95),
    ),
    "busy-slower-1": Bar(
        requirement="one core half busy: 1% found in at least 90%, 30 s a pair",
        judge=lambda e: judge_pairs(e.busy_pairs, 3 * PAIR_SECONDS),
    ),
    "busy-ten-equal": Bar(
        requirement="one core half busy: ten equal candidates, no sole winner",
        judge=lambda e: judge_equal(e.busy_tens),
    ),
    "busy-time": Bar(
        requirement="one core half busy: at most three times the time",
        judge=lambda e: judge_time(e.races, e.busy_races),
    ),
    "busy-seen": Bar(
        requirement="one core half busy: the contention is reported",
        judge=lambda e: judge_contention([*e.busy_races, *e.busy_tens]),
    ),
    "default-widths": Bar(
        requirement="a default run: median half-width at most 4%, UNDECIDED in at most 25%",
        judge=lambda e: judge_widths(list(compare_journal(e.default_run).values()), 0.04, 0.25),
    ),
    "default-again": Bar(
        requirement="two default runs: difference covers zero in 93% or more, no FASTER turns SLOWER",
        judge=lambda e: judge_runs(e.two_default_runs),
    ),
    "default-shares": Bar(
        requirement="a default run: 30% of the time or more is samples, 10% or less unaccounted for",
        judge=lambda e: judge_shares(_last_shares(e)),
    ),
}


# What is kept and shown.


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A bar's last result, with what it was run on."""

    name: str
    requirement: str
    found: str
    passed: bool
    seconds: float
    created: str
    source: dict[str, str | bool]
    figures: dict[str, Any] = {}


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """The file that is committed: the last result of every bar, all from one machine."""

    environment: Environment
    bars: tuple[Entry, ...]


def judge_bar(name: str, evidence: Evidence, source: Mapping[str, str | bool]) -> Entry:
    """Run one bar; evidence that cannot be had is a bar that fails, with the reason."""
    start = time.monotonic()
    try:
        found = BARS[name].judge(evidence)
    except (ProofError, WorkerFailure, StoreError, UsageError, subprocess.TimeoutExpired) as error:
        found = Found(text=f"not measured: {error}", passed=False)
    return Entry(
        name=name,
        requirement=BARS[name].requirement,
        found=found.text,
        passed=found.passed,
        seconds=round(time.monotonic() - start, 1),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        source=dict(source),
        figures=found.figures,
    )


def merge(old: Acceptance | None, new: Acceptance) -> Acceptance:
    """The new entries, and the old ones of other bars if they are this machine's."""
    kept = old.bars if old and old.environment.machine == new.environment.machine else ()
    entries = {entry.name: entry for entry in (*kept, *new.bars)}
    return replace_bars(new, tuple(entries[name] for name in BARS if name in entries))


def replace_bars(acceptance: Acceptance, bars: tuple[Entry, ...]) -> Acceptance:
    """The same with other bars."""
    return msgspec.structs.replace(acceptance, bars=bars)


def read_stored(path: Path) -> Acceptance | None:
    """What the file holds; None if there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Acceptance)
    except (OSError, msgspec.MsgspecError):
        return None


def describe(entries: Sequence[Entry]) -> str:
    """The table: name, pass or fail, requirement and what was found."""
    width = max(len(entry.name) for entry in entries)
    lines = []
    for entry in entries:
        lines.append(
            f"{'pass' if entry.passed else 'FAIL'}  {entry.name:<{width}}  {entry.requirement}"
        )
        lines.append(f"      {'':<{width}}  {entry.found} ({entry.seconds:.0f} s)")
    failed = sum(not entry.passed for entry in entries)
    lines.append(f"{len(entries) - failed} of {len(entries)} bars hold")
    return "\n".join(lines)


def pick(words: Sequence[str]) -> list[str]:
    """The bars that the words name: a bar, or a group of bars by the beginning of its name.

    Raises:
        UsageError: a word that begins no bar's name.
    """
    if not words:
        return list(BARS)
    meant: set[str] = set()
    for word in words:
        found = [word] if word in BARS else [name for name in BARS if name.startswith(word)]
        if not found:
            raise UsageError(f"there is no bar {word!r}; there are {', '.join(BARS)} (--only NAME)")
        meant.update(found)
    return [name for name in BARS if name in meant]


def main(words: list[str]) -> int:
    """The door: 0 if every bar holds, 1 if one fails, 2 if it was asked wrongly."""
    parser = argparse.ArgumentParser(prog="acceptance", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="a bar, or how some begin")
    parser.add_argument("--quick", action="store_true", help="little evidence, nothing is stored")
    parser.add_argument(
        "--default-run", action="append", default=[],
        help="the run for the default-* bars (the newest); twice for default-again",
    )  # fmt: skip
    given = parser.parse_args(words)
    try:
        names = pick(given.only)
    except UsageError as error:
        print(f"acceptance: {error}", file=sys.stderr)  # noqa: T201
        return 2
    environment = collect_environment({"cpu:0": "CPU"})
    evidence = Evidence(
        SCALES["quick" if given.quick else "full"],
        default_runs=given.default_run,
        progress=lambda line: print(line, flush=True),  # noqa: T201
    )
    entries = []
    for name in names:
        entries.append(judge_bar(name, evidence, environment.source))
        if not given.quick:
            store(
                merge(read_stored(STORED), Acceptance(environment=environment, bars=(entries[-1],)))
            )
    print(describe(entries))  # noqa: T201
    return 0 if all(entry.passed for entry in entries) else 1


def store(acceptance: Acceptance) -> None:
    """Write the file, whole or not at all."""
    STORED.parent.mkdir(parents=True, exist_ok=True)
    part = STORED.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(acceptance), indent=1) + b"\n")
    part.replace(STORED)
