"""`nox -s acceptance`: what the harness promises of real timings, held against this machine.

Each bar is an entry of BARS: what is required, and a function that judges the evidence. Evidence is
gathered once, when a bar first asks for it, so that `--only NAME` runs no more than that bar needs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from bench import workload
from bench.candidate import REGISTRY
from bench.case import Case, UsageError, make_case
from bench.environment import collect_environment
from bench.measurement import Environment, Measurement, Shares
from bench.proof.copies import (
    CopiesRace,
    Design,
    ProofError,
    count_verdicts,
    noise_floor,
    of_injected,
    race_copies,
    race_series,
    share_marked,
)
from bench.race import PROBE_TURN, Plan, block_calls
from bench.replica import Setting, Worker, WorkerFailure
from bench.run import LocalFleet
from bench.stats import Comparison, best_set, compare_run, difference, estimate
from bench.store import Run, StoreError, read_run

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path("results")
STORED = RESULTS / "reference-acceptance" / "acceptance.json"
SUITES = ("suites/test_depth_max_pool.py", "suites/test_global_avg_pool.py")
MARGIN = 0.05
PAIR_SECONDS = 10.0
QUICK_RUN_SECONDS = 600.0

# As a default run races: its plan, and about as many candidates as it has in a race. Four A/A comparisons
# and one slowdown of 10%.
RACE = Design(plain=4, slowdowns=(0.10,))
TEN = Design(plain=9)
# One slowdown of 1%, with the replicas and rounds that fit into ten seconds a pair: at margin zero each
# replica more makes the interval narrower.
PAIR = Design(
    plain=0,
    slowdowns=(0.01,),
    plan=Plan(replicas=12, max_replicas=12, allocations=2, rounds=400, budget_seconds=7.5),
)
# Beside a busy neighbour three times the time is allowed: twice the rounds, half of them done again.
BUSY_PAIR = replace(PAIR, plan=replace(PAIR.plan, rounds=800, budget_seconds=15.0))
# Processes differ: new ones after so many races, so that the bars hold between them too.
RACES_A_FLEET = 9


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much evidence is gathered."""

    races: int
    tens: int
    pairs: int
    busy_races: int
    busy_tens: int
    busy_pairs: int
    turns: int


SCALES = {
    "full": Scale(races=75, tens=20, pairs=30, busy_races=25, busy_tens=8, busy_pairs=10, turns=10),
    "quick": Scale(races=2, tens=1, pairs=2, busy_races=1, busy_tens=1, busy_pairs=1, turns=2),
}


# A warm block among rivals, against a loop of nothing else.


@dataclass(frozen=True, kw_only=True)
class Bias:
    """An op whose warm blocks are held against an uninterrupted loop, and its rivals."""

    case: Case
    subject: str
    rivals: tuple[str, ...]


def _bias(subject: str, rivals: tuple[str, ...], **fields: Any) -> Bias:
    case = make_case(op="depth_max_pool", pool_size=3, padding="valid", **fields)
    return Bias(case=case, subject=subject, rivals=rivals)


BIASES = {
    "cache-resident": _bias("max_pool", ("max_pool2d-view",), shape=(8, 28, 28, 96), mode="graph"),
    "cache-resident, xla": _bias(
        "reshape-reduce_max", ("max_pool",), shape=(8, 28, 28, 96), mode="xla"
    ),
    "base case": _bias(
        "layer-depth_max_pool",
        ("lambda-max_pool", "reshape-reduce_max", "transpose-reduce_max", "max_pool2d-view"),
        shape=(8, 56, 56, 96),
        mode="graph",
    ),
    "large": _bias("max_pool", ("max_pool2d-view",), shape=(32, 112, 112, 96), mode="graph"),
}
# A median of few blocks tells more of the machine than of the op.
BIAS_ROUNDS = 400
BIAS_TURN_SECONDS = 20.0
LOOP_BLOCKS = 3
PROBE = "ceiling-copy"


def time_loop(name: str, lead_in: int, calls: int, blocks: int) -> list[float]:
    """Seconds a call in each of `blocks` blocks that follow each other at once; in a worker."""
    return [
        workload.time_block(name, lead_in if number == 0 else 0, calls).seconds
        for number in range(blocks)
    ]


def measure_bias(bias: Bias, turns: int, worker: Worker, block_seconds: float) -> list[float]:
    """For each turn the warm median over the median of an uninterrupted loop, taken round by round.

    Raises:
        ProofError: a runner could not be opened.
    """
    limit = 120.0
    worker.call(workload.open_case, bias.case, 0, timeout=limit)
    names = (bias.subject, *bias.rivals)
    blocks: dict[str, Callable[..., tuple[int, int]]] = {}
    for name in (*names, PROBE):
        runner = worker.call(
            functools.partial(workload.open_runner, check=True), name, timeout=limit
        )
        if runner.status != "ok":
            raise ProofError(f"{name}: {runner.status}: {runner.reason}")
        nbytes = runner.read_nbytes + runner.written_nbytes
        blocks[name] = functools.partial(
            block_calls, runner.call_seconds, block_seconds, nbytes=nbytes
        )
    generator = random.Random(0)
    ratios = []
    for _ in range(turns):
        warm: list[float] = []
        loop: list[float] = []
        end = time.perf_counter() + BIAS_TURN_SECONDS
        for number in range(BIAS_ROUNDS):
            if warm and time.perf_counter() > end:
                break
            # As in a race: probes last, in each third round, and a longer lead-in behind them. The rival that
            # goes before stands between the loop and the op, which would else find all as it has left it.
            shuffled = generator.sample(names, len(names))
            order = [bias.rivals[0], *shuffled, *[PROBE] * (number % PROBE_TURN == 0)]
            visits = []
            for place, name in enumerate(order):
                cold = place == 0 and number % PROBE_TURN == 1
                lead_in, calls = blocks[name](cold=cold)
                visits.append(workload.Visit(name=name, lead_in=lead_in, calls=calls))
            stretch = worker.call(workload.time_stretch, visits, timeout=limit)
            warm.append(stretch.blocks[1 + shuffled.index(bias.subject)].seconds)
            lead_in, calls = blocks[bias.subject]()
            # A lead-in that is several times a block's: whatever a block may miss, this has.
            loop += worker.call(
                time_loop, bias.subject, 4 * lead_in, calls, LOOP_BLOCKS, timeout=limit
            )
        ratios.append(statistics.median(warm) / statistics.median(loop))
    worker.call(workload.close_case, timeout=limit)
    return ratios


# A neighbour on the machine.


def keep_busy(period_seconds: float = 0.2) -> None:
    """Use one core for half of the time, for as long as the process that asked for it is there."""
    asker = os.getppid()
    while os.getppid() == asker:
        end = time.perf_counter() + period_seconds / 2
        while time.perf_counter() < end:
            pass
        time.sleep(period_seconds / 2)


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process keeps one core busy for half of the time."""
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# Evidence, gathered when first asked for.


@dataclass(frozen=True, kw_only=True)
class TwoRuns:
    """Two complete quick runs, one after the other."""

    first: Mapping[tuple[Case, str], Comparison]
    second: Mapping[tuple[Case, str], Comparison]


class Evidence:
    """What has been measured so far in this acceptance."""

    def __init__(
        self, scale: Scale, *, default_run: str | None, progress: Callable[[str], None]
    ) -> None:
        self.scale = scale
        self._default_run = default_run
        self._progress = progress

    def _series(self, design: Design, count: int, label: str) -> list[CopiesRace]:
        races: list[CopiesRace] = []
        while len(races) < count:
            fleet = LocalFleet((), None)
            try:
                fleet.use(Setting(), design.plan.replicas)
                first = len(races)
                some = min(RACES_A_FLEET, count - first)
                for race in race_series(lambda n: race_copies(design, fleet, first + n), some):  # noqa: B023 (used up within the turn)
                    races.append(race)
                    self._progress(f"{label}: {len(races)} of {count}, {race.seconds:.1f} s")
            finally:
                fleet.close()
        return races

    @functools.cached_property
    def races(self) -> list[CopiesRace]:
        return self._series(RACE, self.scale.races, "races of copies")

    @functools.cached_property
    def tens(self) -> list[CopiesRace]:
        return self._series(TEN, self.scale.tens, "races of ten")

    @functools.cached_property
    def pairs(self) -> list[CopiesRace]:
        return self._series(PAIR, self.scale.pairs, "pairs at 1%")

    @functools.cached_property
    def busy_races(self) -> list[CopiesRace]:
        with busy_neighbour():
            return self._series(RACE, self.scale.busy_races, "races beside a busy neighbour")

    @functools.cached_property
    def busy_tens(self) -> list[CopiesRace]:
        with busy_neighbour():
            return self._series(TEN, self.scale.busy_tens, "races of ten beside a busy neighbour")

    @functools.cached_property
    def busy_pairs(self) -> list[CopiesRace]:
        with busy_neighbour():
            return self._series(BUSY_PAIR, self.scale.busy_pairs, "pairs beside a busy neighbour")

    @functools.cached_property
    def two_runs(self) -> TwoRuns:
        stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
        found = []
        for number in (1, 2):
            name = f"{stamp}-acceptance-{number}"
            self._progress(f"quick run {number} of 2: {name}")
            run_quick(name)
            found.append(compare_journal(RESULTS / name))
        return TwoRuns(first=found[0], second=found[1])

    @functools.cached_property
    def default_run(self) -> Path:
        return find_default_run(RESULTS, self._default_run)

    def bias(self, name: str) -> list[float]:
        """Ratios of warm median to loop, one a turn."""
        worker = Worker(Setting())
        try:
            ratios = measure_bias(BIASES[name], self.scale.turns, worker, Plan().block_seconds)
        finally:
            worker.close()
        self._progress(f"bias, {name}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
        return ratios


def run_quick(name: str) -> None:
    """A complete quick run of both ops.

    Raises:
        ProofError: pytest could not run it.
    """
    # 1: some candidate failed its test, which is a result of the run like any other.
    words = ("-m", "pytest", *SUITES, "-q", "--benchmark-quiet", "--sweep", "quick", "--run", name)
    done = subprocess.run(  # noqa: S603
        [sys.executable, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=QUICK_RUN_SECONDS,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        tail = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it printed nothing"]
        raise ProofError(f"the quick run {name} ended with code {done.returncode}: {tail[0]}")


def compare_journal(folder: Path) -> dict[tuple[Case, str], Comparison]:
    """Every right candidate's comparison to its baseline, with the run's verdicts."""
    return compare_measurements(read_run(folder).measurements)


def compare_measurements(
    measurements: Sequence[Measurement],
) -> dict[tuple[Case, str], Comparison]:
    """As compare_journal, from the measurements; settled ones have no interval and are left out."""
    timed = {(m.case, m.candidate): m for m in measurements if m.status == "ok" and len(m.samples)}
    pairs = {
        key: estimate(m.samples, timed[m.case, m.baseline].samples)
        for key, m in timed.items()
        if m.kind == "candidate" and not m.settled and m.candidate != m.baseline
        and (m.case, m.baseline) in timed
    }  # fmt: skip
    return compare_run({key: found for key, found in pairs.items() if found.degrees > 0}, MARGIN)


def find_default_run(results: Path, name: str | None) -> Path:
    """The named run, else the newest complete default run.

    Raises:
        ProofError: there is none.
    """
    if name:
        return results / name
    journals = sorted(results.glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    for path in reversed(journals):
        with contextlib.suppress(StoreError):
            run = read_run(path.parent)
            asked = run.header.options.get("sweep")
            if asked == "default" and run.of(Shares) and not planned_cases() - cases_of(run):
                return path.parent
    raise ProofError("no complete default run is there: make one by nox -s bench-cpu")


def planned_cases() -> set[Case]:
    """The cases of the default sweeps of the ops that ship."""
    import bench.ops  # noqa: F401 (registers them)

    return {case for op in REGISTRY.ops.values() for case in op.sweep("default").cases()}


def cases_of(run: Run) -> set[Case]:
    """The cases that a run has measured."""
    return {measurement.case for measurement in run.measurements}


# Judgements.


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a bar's judgement came to; figures are what it rests on."""

    text: str
    passed: bool
    figures: dict[str, Any] = {}


def at_most(share: float, count: int, total: int) -> bool:
    """Whether count is at most a share of total; false of nothing."""
    return total > 0 and count <= share * total + 1e-9


def judge_alarms(races: Sequence[CopiesRace]) -> Found:
    """A/A: false alarms in at most 1%."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    alarms = counts["FASTER"] + counts["SLOWER"]
    return Found(
        text=f"{alarms} of {len(same)}; noise floor {noise_floor(same):.2%}",
        passed=at_most(0.01, alarms, len(same)),
        figures={**counts, "noise_floor": noise_floor(same), "blocks_marked": share_marked(races)},
    )


def judge_undecided(races: Sequence[CopiesRace]) -> Found:
    """A/A: undecided in at most 10%."""
    same = of_injected(races, 0.0)
    counts = count_verdicts(same, MARGIN)
    width = statistics.median(one.found.half_width for one in same)
    return Found(
        text=f"{counts['UNDECIDED']} of {len(same)}; median half-width {width:.2%}",
        passed=at_most(0.10, counts["UNDECIDED"], len(same)),
        figures={**counts, "median_half_width": width},
    )


def judge_power(
    races: Sequence[CopiesRace], injected: float, margin: float, required: float
) -> Found:
    """A known slowdown gets SLOWER often enough."""
    slowed = of_injected(races, injected)
    counts = count_verdicts(slowed, margin)
    missed = len(slowed) - counts["SLOWER"]
    return Found(
        text=f"{counts['SLOWER']} of {len(slowed)}",
        passed=at_most(1 - required, missed, len(slowed)),
        figures={**counts, "log_ratios": [round(one.found.log_ratio, 5) for one in slowed]},
    )


def judge_pairs(races: Sequence[CopiesRace], seconds: float) -> Found:
    """1% at margin zero in at least 90%; a pair that takes longer than it may has not found it."""
    slowed = [(race, one) for race in races for one in of_injected([race], 0.01)]
    slower = [race.seconds for race, one in slowed if one.verdict(0.0) == "SLOWER"]
    in_time = sum(taken <= seconds for taken in slower)
    longest = max(race.seconds for race in races)
    return Found(
        text=f"{in_time} of {len(slowed)} in time, {len(slower)} in all; {longest:.1f} s for the longest",
        passed=at_most(0.10, len(slowed) - in_time, len(slowed)),
        figures={
            "in_time": in_time,
            "slower": len(slower),
            "pairs": len(slowed),
            "longest_seconds": longest,
            "log_ratios": [round(one.found.log_ratio, 5) for _, one in slowed],
            "half_widths": [round(one.found.half_width, 5) for _, one in slowed],
        },
    )


def judge_equal(races: Sequence[CopiesRace]) -> Found:
    """Ten equal candidates: no race has a sole winner."""
    sizes = [len(best_set(race.equal)) for race in races]
    return Found(
        text=f"{sizes.count(1)} sole winners in {len(sizes)} races; smallest set {min(sizes)}",
        passed=1 not in sizes,
        figures={"sizes": sizes},
    )


def judge_two_runs(runs: TwoRuns) -> Found:
    """The difference of the two runs' log ratios covers zero, and no FASTER turns SLOWER."""
    keys = runs.first.keys() & runs.second.keys()
    covered = turned = 0
    for key in keys:
        one, other = runs.first[key], runs.second[key]
        gap = difference(one.estimate, other.estimate)
        covered += gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high
        turned += {one.verdict, other.verdict} == {"FASTER", "SLOWER"}
    return Found(
        text=f"covers zero in {covered} of {len(keys)}; {turned} turned",
        passed=at_most(0.07, len(keys) - covered, len(keys)) and not turned,
        figures={"covered": covered, "comparisons": len(keys), "turned": turned},
    )


def judge_widths(comparisons: Sequence[Comparison], most: float, undecided: float | None) -> Found:
    """The median half-width, and how many comparisons are undecided."""
    if not comparisons:
        return Found(text="no comparison has an interval", passed=False)
    width = statistics.median(one.estimate.half_width for one in comparisons)
    open_ones = sum(one.verdict == "UNDECIDED" for one in comparisons)
    n = len(comparisons)
    few = undecided is None or at_most(undecided, open_ones, n)
    return Found(
        text=f"median half-width {width:.2%}; {open_ones} of {n} UNDECIDED",
        passed=width <= most and few,
        figures={"median_half_width": width, "undecided": open_ones, "comparisons": n},
    )


def judge_shares(shares: Shares) -> Found:
    """Of the time after the workers' start: recorded samples, and what nothing accounts for."""
    wall = shares.wall_seconds - shares.seconds.get("start", 0.0)
    samples = shares.seconds.get("samples", 0.0) / wall
    other = shares.seconds.get("other", 0.0) / wall
    return Found(
        text=f"samples {samples:.0%}, unaccounted for {other:.1%}",
        passed=samples >= 0.30 and other <= 0.10,
        figures=dict(shares.seconds) | {"wall_seconds": shares.wall_seconds},
    )


def judge_bias(ratios: Sequence[float]) -> Found:
    """Each turn's warm median within 5% of the loop's."""
    off = max((abs(ratio - 1) for ratio in ratios), default=1.0)
    middle, turns = statistics.median(ratios), len(ratios)
    return Found(
        text=f"median {middle:.3f}, farthest {off:.1%} off in {turns} turns",
        passed=off <= 0.05,
        figures={"ratios": [round(ratio, 4) for ratio in ratios]},
    )


def judge_time(quiet: Sequence[CopiesRace], busy: Sequence[CopiesRace]) -> Found:
    """A race beside a busy neighbour takes at most three times as long."""
    times = statistics.mean(r.seconds for r in busy) / statistics.mean(r.seconds for r in quiet)
    return Found(text=f"{times:.2f} times", passed=times <= 3, figures={"times": times})


def judge_contention(races: Sequence[CopiesRace]) -> Found:
    """The contention is seen: in most blocks, and as processor time of others."""
    marked = share_marked(races)
    others = [race.contention.others for race in races if race.contention.others is not None]
    seen = statistics.median(others) if others else 0.0
    return Found(
        text=f"{marked:.0%} of the blocks marked; others used {seen:.2f} of a processor",
        # Half of one core, less what the counters' steps of 10 ms may hide.
        passed=marked >= 0.5 and seen >= 0.25,
        figures={"marked": marked, "others": seen},
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One promise: what it requires, in words, and how the evidence is judged."""

    requirement: str
    judge: Callable[[Evidence], Found]


def _last_shares(evidence: Evidence) -> Shares:
    found = read_run(evidence.default_run).of(Shares)
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
    "two-runs": Bar(
        requirement="two quick runs: difference covers zero in 93% or more, no FASTER turns SLOWER",
        judge=lambda e: judge_two_runs(e.two_runs),
    ),
    "quick-widths": Bar(
        requirement="a quick run: median half-width at most 8%",
        judge=lambda e: judge_widths(list(e.two_runs.first.values()), 0.08, None),
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
    parser.add_argument("--default-run", help="the run for the default-* bars (the newest)")
    given = parser.parse_args(words)
    try:
        names = pick(given.only)
    except UsageError as error:
        print(f"acceptance: {error}", file=sys.stderr)  # noqa: T201
        return 2
    environment = collect_environment({"cpu:0": "CPU"})
    evidence = Evidence(
        SCALES["quick" if given.quick else "full"],
        default_run=given.default_run,
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
