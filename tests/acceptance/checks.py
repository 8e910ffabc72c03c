"""Check what poolbench promises about real timings on this machine (`nox -s acceptance`).

Each entry of CHECKS states a requirement and a function that judges the measurements. Measurements are
made when a check first needs them, so that `--only NAME` measures no more than that check uses.
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
from poolbench.store.journal import read_run

from acceptance.criteria import (
    Outcome,
    check_agreements,
    check_alarms,
    check_bias,
    check_contention,
    check_equal,
    check_falsely_slower,
    check_pairs,
    check_power,
    check_runs,
    check_shares,
    check_sleep,
    check_slowed_found,
    check_time,
    check_undecided,
    check_widths,
)
from acceptance.measurements import PAIR_SECONDS, RESULTS, SCALES, Measurements, compare_journal

STORED = RESULTS / "reference-acceptance" / "acceptance.json"


@dataclass(frozen=True, kw_only=True)
class Check:
    """State one requirement in words and the function that judges the measurements."""

    requirement: str
    judge: Callable[[Measurements], Outcome]


def _last_shares(measurements: Measurements) -> TimeBreakdown:
    found = read_run(measurements.default_run).of(TimeBreakdown)
    if not found:
        raise ProofError(
            f"{measurements.default_run.name} did not finish: it has no time breakdown"
        )
    return found[-1]


CHECKS: dict[str, Check] = {
    "aa-alarms": Check(
        requirement="A/A: FASTER or SLOWER in at most 1%",
        judge=lambda e: check_alarms([*e.races, *e.tens]),
    ),
    "aa-undecided": Check(
        requirement="A/A: UNDECIDED in at most 10%",
        judge=lambda e: check_undecided([*e.races, *e.tens]),
    ),
    "slower-10": Check(
        requirement="slowed by 10%: SLOWER at the default margin in at least 95%",
        judge=lambda e: check_power(e.races, 0.10, MARGIN, 0.95),
    ),
    "slower-1": Check(
        requirement="slowed by 1%: SLOWER at margin zero in at least 90%, 10 s a pair",
        judge=lambda e: check_pairs(e.pairs, PAIR_SECONDS),
    ),
    "ten-equal": Check(
        requirement="ten equal candidates: no sole winner",
        judge=lambda e: check_equal(e.tens),
    ),
    "bias-cache": Check(
        requirement="warm median within 5% of an uninterrupted loop, cache-resident",
        judge=lambda e: check_bias(e.bias("cache-resident")),
    ),
    "bias-cache-xla": Check(
        requirement="the same under XLA",
        judge=lambda e: check_bias(e.bias("cache-resident, xla")),
    ),
    "bias-base": Check(
        requirement="the same for the base case of the default sweep",
        judge=lambda e: check_bias(e.bias("base case")),
    ),
    "bias-large": Check(
        requirement="the same for a large op", judge=lambda e: check_bias(e.bias("large"))
    ),
    "bias-threads": Check(
        requirement="the same for an op of two threads alone among ops of one",
        judge=lambda e: check_bias(e.bias("two threads")),
    ),
    "awake": Check(
        requirement="disabling CPU idle states makes a call no slower",
        judge=lambda e: check_sleep(e.sleep("cache-resident")),
    ),
    "two-runs": Check(
        requirement="five quick runs, each with the next: their gap covers zero in 93% or more, no FASTER turns SLOWER",
        judge=lambda e: check_runs(e.quick_runs),
    ),
    "quick-widths": Check(
        requirement="a quick run: median half-width at most 8%",
        judge=lambda e: check_widths([c for run in e.quick_runs for c in run.values()], 0.08, None),
    ),
    "busy-aa-alarms": Check(
        requirement="one core half busy: A/A, FASTER or SLOWER in at most 1%",
        judge=lambda e: check_alarms([*e.busy_races, *e.busy_tens]),
    ),
    "busy-aa-undecided": Check(
        requirement="one core half busy: UNDECIDED in at most 10%",
        judge=lambda e: check_undecided([*e.busy_races, *e.busy_tens]),
    ),
    "busy-slower-10": Check(
        requirement="one core half busy: 10% found in at least 95%",
        judge=lambda e: check_power(e.busy_races, 0.10, MARGIN, 0.95),
    ),
    "busy-slower-1": Check(
        requirement="one core half busy: 1% found in at least 90%, 30 s a pair",
        judge=lambda e: check_pairs(e.busy_pairs, 3 * PAIR_SECONDS),
    ),
    "busy-ten-equal": Check(
        requirement="one core half busy: ten equal candidates, no sole winner",
        judge=lambda e: check_equal(e.busy_tens),
    ),
    "busy-time": Check(
        requirement="one core half busy: at most three times the time",
        judge=lambda e: check_time(e.races, e.busy_races),
    ),
    "busy-seen": Check(
        requirement="one core half busy: the contention is reported",
        judge=lambda e: check_contention([*e.busy_races, *e.busy_tens]),
    ),
    "default-widths": Check(
        requirement="a default run: median half-width at most 4%, UNDECIDED in at most 25%",
        judge=lambda e: check_widths(list(compare_journal(e.default_run).values()), 0.04, 0.25),
    ),
    "default-again": Check(
        requirement="default runs, each with the next: what is printed agrees in 93% or more, in no pair under 88%, no FASTER turns SLOWER",
        judge=lambda e: check_agreements(e.agreements),
    ),
    "default-compare": Check(
        requirement="compare of each with the next: names no candidate in at least 95%, and never two",
        judge=lambda e: check_falsely_slower(e.falsely_slower),
    ),
    "default-slowed": Check(
        requirement="compare, one candidate slowed by 25% in the later run: named in at least 95%",
        judge=lambda e: check_slowed_found(e.slowed_found),
    ),
    "default-shares": Check(
        requirement="a default run: 45% of the time or more is rounds, 10% or less unaccounted for",
        judge=lambda e: check_shares(_last_shares(e)),
    ),
}


# The stored result and the command.


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the last result of a check and the source it was run on."""

    name: str
    requirement: str
    found: str
    passed: bool
    seconds: float
    created: str
    source: dict[str, str | bool]
    figures: dict[str, Any] = {}


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the committed file: the last result of every check, all from one machine."""

    environment: Environment
    checks: tuple[CheckResult, ...]


def run_check(
    name: str, measurements: Measurements, source: Mapping[str, str | bool]
) -> CheckResult:
    """Run one check. If its measurements cannot be made, the check fails with the reason."""
    start = time.monotonic()
    try:
        found = CHECKS[name].judge(measurements)
    except (ProofError, WorkerFailure, StoreError, UsageError, subprocess.TimeoutExpired) as error:
        found = Outcome(text=f"not measured: {error}", passed=False)
    return CheckResult(
        name=name,
        requirement=CHECKS[name].requirement,
        found=found.text,
        passed=found.passed,
        seconds=round(time.monotonic() - start, 1),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        source=dict(source),
        figures=found.figures,
    )


def merge(old: Acceptance | None, new: Acceptance) -> Acceptance:
    """Return the new results and, if they are of the same machine, the old ones of other checks."""
    kept = old.checks if old and old.environment.machine == new.environment.machine else ()
    entries = {result.name: result for result in (*kept, *new.checks)}
    return replace_checks(new, tuple(entries[name] for name in CHECKS if name in entries))


def replace_checks(acceptance: Acceptance, checks: tuple[CheckResult, ...]) -> Acceptance:
    """Return a copy with these check results."""
    return msgspec.structs.replace(acceptance, checks=checks)


def read_stored(path: Path) -> Acceptance | None:
    """Return the stored result; None if no file can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Acceptance)
    except (OSError, msgspec.MsgspecError):
        return None


def describe(entries: Sequence[CheckResult]) -> str:
    """Format the results: pass or fail, name, requirement, figures found."""
    width = max(len(result.name) for result in entries)
    lines = []
    for result in entries:
        lines.append(
            f"{'pass' if result.passed else 'FAIL'}  {result.name:<{width}}  {result.requirement}"
        )
        lines.append(f"      {'':<{width}}  {result.found} ({result.seconds:.0f} s)")
    failed = sum(not result.passed for result in entries)
    lines.append(f"{len(entries) - failed} of {len(entries)} checks hold")
    return "\n".join(lines)


def pick(words: Sequence[str]) -> list[str]:
    """Return the checks named by `words`: a full name, or the prefix of a group of names.

    Raises:
        UsageError: a word is no prefix of a check's name.
    """
    if not words:
        return list(CHECKS)
    meant: set[str] = set()
    for word in words:
        found = [word] if word in CHECKS else [name for name in CHECKS if name.startswith(word)]
        if not found:
            raise UsageError(
                f"no check is named {word!r}; choose from {', '.join(CHECKS)} (--only NAME)"
            )
        meant.update(found)
    return [name for name in CHECKS if name in meant]


def main(words: list[str]) -> int:
    """Run the checks: exit code 0 if all hold, 1 if one fails, 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="tests/acceptance checks", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], help="a check, or the prefix of several"
    )
    parser.add_argument("--quick", action="store_true", help="few measurements; stores nothing")
    parser.add_argument(
        "--default-run", action="append", default=[],
        help="the run for the default-* checks (the newest); several for those of pairs",
    )  # fmt: skip
    given = parser.parse_args(words)
    try:
        names = pick(given.only)
    except UsageError as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return 2
    environment = collect_environment({"cpu:0": "CPU"})
    measurements = Measurements(
        SCALES["quick" if given.quick else "full"],
        default_runs=given.default_run,
        progress=lambda line: print(line, flush=True),
    )
    entries = []
    for name in names:
        entries.append(run_check(name, measurements, environment.source))
        if not given.quick:
            store(
                merge(
                    read_stored(STORED), Acceptance(environment=environment, checks=(entries[-1],))
                )
            )
    print(describe(entries))
    return 0 if all(result.passed for result in entries) else 1


def store(acceptance: Acceptance) -> None:
    """Write the file atomically."""
    STORED.parent.mkdir(parents=True, exist_ok=True)
    part = STORED.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(acceptance), indent=1) + b"\n")
    part.replace(STORED)
