"""Find the commit or the released version in which a candidate became slower."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from poolbench.core.case import Case
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.program import Program
from poolbench.core.registry import REGISTRY
from poolbench.core.text import one_line
from poolbench.engine.contenders import backend_of, worker_spec
from poolbench.engine.side_by_side import PROCESSES, Pool, merge, start_workers
from poolbench.engine.sides import Builder, Side, SideRequest
from poolbench.engine.versions import BASE, HEAD, Shared, VersionsRace
from poolbench.stats.estimate import Estimate
from poolbench.stats.side_by_side import Outcome, Rule, SideBySide


@dataclass(frozen=True, kw_only=True)
class NearerTo(Rule):
    """Decides whether a step is as slow as the bad end (SLOWER) or as fast as the good one (SAME).

    Attributes:
        middle: half of the log ratio of the two ends.
    """

    middle: float = 0.0

    def judge(self, found: Estimate) -> Outcome:
        """Return the verdict of one clock."""
        if found.low is None or found.high is None:
            return "UNDECIDED"
        if found.low > self.middle:
            return "SLOWER"
        return "SAME" if found.high < self.middle else "UNDECIDED"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One point that was judged: 'slower', 'as before' or 'cannot be judged', how, and the seconds that it took.

    Not `certain` is the nearer end at the end of the time, a guess.
    """

    name: str
    verdict: str
    how: str
    seconds: float
    certain: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result: the first slower point, the last one before it, the ratio of the two ends, and the steps."""

    first: str
    before: str
    ends: SideBySide
    steps: tuple[Step, ...]

    @property
    def headline(self) -> str:
        """What the first slower point is called: a guess where points were judged without certainty."""
        guesses = sum(not step.certain for step in self.steps)
        return (
            f"a guess ({guesses} of {len(self.steps)} points not certain; --budget)"
            if guesses
            else "first slower"
        )


class ClosablePool(Pool, Protocol):
    """A pool whose workers of one kind can be ended."""

    def release(self, spec: WorkerSpec) -> None:
        """End the workers of this kind."""


class Bisection:
    """Bisects the points between a good and a bad one.

    Args:
        points: in order; the first is good, the last is bad.
        make_side: builds the side of a point.
        pair: case and candidate.
        pool: provides workers.
        rule: decides whether the ends differ.
        budget_seconds: of each race; that of the ends has twice the time.
        say: prints progress.
        clock: reads the time.
    """

    def __init__(
        self,
        points: Sequence[str],
        make_side: Callable[[str], Side],
        pair: tuple[Case, str],
        pool: ClosablePool,
        *,
        rule: Rule | None = None,
        budget_seconds: float = 60.0,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._points = list(points)
        self._make_side = make_side
        self._case, self._candidate = pair
        self._kind = worker_spec(
            self._case, backend_of([REGISTRY.candidates[self._case.op, self._candidate]])
        )
        self._pool = pool
        self._rule = rule or Rule()
        self._budget_seconds = budget_seconds
        self._say, self._clock = say, clock
        self._good = merge(make_side(self._points[0]).worker, self._kind)
        self._programs: dict[bool, Program | None] = {}
        self.steps: list[Step] = []

    def run(self) -> Found:
        """Return the first slower point.

        Raises:
            UsageError: the ends do not differ, or cannot be compared.
        """
        ends, programs, _ = self._race(self._points[-1], self._rule, 2 * self._budget_seconds)
        if ends.verdict != "SLOWER":
            size = (
                f"; it would have found {100 * ends.detectable:.0f}%"
                if ends.detectable < 10
                else ""
            )
            raise UsageError(
                f"{self._points[-1]} is not slower than {self._points[0]}: {ends.reason or ends.verdict.lower()}"
                f" after {ends.visits} visits{size} (--budget)"
            )
        self._programs = dict(zip((False, True), programs, strict=True))
        self._enter(self._points[-1], True, f"{ends.wall.ratio:.3f}x", 0.0)
        rule = NearerTo(margin=self._rule.margin, alpha=self._rule.alpha, looks=self._rule.looks,
                        middle=ends.wall.log_ratio / 2)  # fmt: skip
        good, bad = 0, len(self._points) - 1
        skipped: set[int] = set()
        while left := [at for at in range(good + 1, bad) if at not in skipped]:
            at = min(left, key=lambda place: abs(2 * place - good - bad))
            slower = self._judge(self._points[at], rule)
            if slower is None:
                skipped.add(at)
            elif slower:
                bad = at
            else:
                good = at
        between = [self._points[at] for at in range(good + 1, bad)]
        first = " or ".join([*between, self._points[bad]])
        return Found(first=first, before=self._points[good], ends=ends, steps=tuple(self.steps))

    def _judge(self, point: str, rule: NearerTo) -> bool | None:
        """Return whether a point is slow; None if it cannot be judged."""
        start = self._clock()
        try:
            found, (_, program), told = self._race(point, rule, self._budget_seconds)
        except UsageError as error:  # it cannot be installed or started
            reason = str(error).removeprefix(f"{point}: ")
            return self._enter(point, None, reason, self._clock() - start)
        seconds = self._clock() - start
        if told and not found.reason:
            slower = _hash(program) == _hash(self._programs[True])
            return self._enter(
                point, slower, f"the program of {'the bad' if slower else 'the good'} end", seconds
            )
        if found.reason or not found.visits:
            return self._enter(point, None, found.reason or "no time was left to race it", seconds)
        # Out of time: the nearer end is the better guess, and the line says how sure it is.
        slower = found.wall.log_ratio > rule.middle
        certain = found.verdict != "UNDECIDED"
        how = f"{found.wall.ratio:.3f}x{'' if certain else ', not certain'}"
        return self._enter(point, slower, how, seconds, certain=certain)

    def _enter(
        self, point: str, slower: bool | None, how: str, seconds: float, *, certain: bool = True
    ) -> bool | None:
        words = {True: "slower", False: "as before", None: "cannot be judged"}
        step = Step(name=point, verdict=words[slower], how=how, seconds=seconds, certain=certain)
        self.steps.append(step)
        self._say(f"{step.name}: {step.verdict} ({step.how}), {step.seconds:.0f} s")
        return slower

    def _race(
        self, point: str, rule: Rule, seconds: float
    ) -> tuple[SideBySide, tuple[Program | None, Program | None], bool]:
        """Race a point against the good end, unless its program tells.

        Returns:
            The comparison, the programs of both, and whether they told.
        """
        try:
            head = merge(self._make_side(point).worker, self._kind)
        except UsageError as error:
            raise UsageError(f"{point}: {error}") from None
        race = VersionsRace(
            self._case, self._candidate, base=self._good, head=head, rule=rule, programs=True
        )
        spec = race.spec_of(HEAD)
        until = self._clock() + seconds
        workers = Shared(self._pool, PROCESSES)
        try:
            start_workers(self._pool, {BASE: self._good, HEAD: spec}, 1)
            fine = race.check(workers)
            programs = race.programs.get(BASE), race.programs.get(HEAD)
            known = {_hash(program) for program in self._programs.values()} - {""}
            told = len(known) == 2 and _hash(programs[1]) in known
            found = race.compare()
            while fine and not told and not race.finished and self._clock() < until:
                if race.visits < PROCESSES:
                    self._pool.prepare((self._good, spec), race.visits + 1, keep_others=True)
                if race.visit(workers):
                    found = race.compare()
                    if found.verdict != "UNDECIDED":
                        break
            else:
                found = race.compare()
        except WorkerFailure as failure:
            raise UsageError(f"{point}: {failure.reason}") from None
        finally:
            self._pool.release(spec)
        return found, programs, told


def _hash(program: Program | None) -> str:
    return f"{program.key} {program.hash}" if program else ""


def released_versions(package: str, first: str, last: str) -> list[str]:
    """Return the released versions of a package from '2.18' to '2.21', both included, in order.

    Raises:
        UsageError: the index has fewer than two of them, or cannot be asked.
    """
    from packaging.version import InvalidVersion, Version

    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "pip", "index", "versions", package],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"the index did not list the versions of {package} in 120 s") from None
    if done.returncode:
        why = one_line((done.stderr.strip().splitlines() or ["it says nothing"])[-1], 200)
        raise UsageError(f"pip cannot list the versions of {package}: {why}")
    listed = re.search(r"Available versions: (.*)", done.stdout)
    found = []
    try:
        low, high = Version(first), Version(last)
        for text in listed[1].split(",") if listed else ():
            version = Version(text.strip())
            # 2.18 includes 2.18.1: only the parts that are given count.
            cut = Version(".".join(map(str, version.release[: len(high.release)])))
            if low <= version and cut <= high:
                found.append(version)
    except InvalidVersion as error:
        raise UsageError(f"--versions takes PACKAGE FIRST..LAST: {error}") from None
    if len(found) < 2:
        raise UsageError(
            f"the index has fewer than two versions of {package} from {first} to {last}"
        )
    return [str(version) for version in sorted(found)]


def commits_between(builder: Builder, good: str, bad: str) -> list[str]:
    """Return the commits from a good one to a bad one, the first parents alone.

    Raises:
        UsageError: the good one is no ancestor of the bad one.
    """
    first, last = builder.commit(good), builder.commit(bad)
    between = builder.git(
        "rev-list", "--reverse", "--first-parent", "--ancestry-path", f"{first}..{last}"
    ).split()
    if not between:
        raise UsageError(f"{good} is no ancestor of {bad}")
    return [first, *between]


def side_of(builder: Builder, package: str, point: str) -> Side:
    """Return the side of a commit, or of a version where a package is named."""
    request = SideRequest(packages=(f"{package}=={point}",)) if package else SideRequest(ref=point)
    return builder.build(request)
