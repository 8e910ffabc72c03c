"""What earlier runs of a machine found: a summary of each, the prior that they give, how often they agreed.

A summary is derived from a journal and small: it outlives the journal, and reading fifty takes no time.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from poolbench.core.case import case_label
from poolbench.core.errors import UsageError
from poolbench.core.records import is_right
from poolbench.core.text import format_nbytes, format_share, one_line
from poolbench.report import ratios
from poolbench.report.environments import code_of, timing_facts
from poolbench.stats import batch, estimate
from poolbench.stats.estimate import Estimate
from poolbench.stats.prior import SHIPPED, Prior, RunTable, fit_prior, tabulate
from poolbench.stats.runs import Coverage, RunsEstimate, combine, coverage
from poolbench.stats.verdict import FASTER, SLOWER, compare_run
from poolbench.store.journal import StoredRun

SUMMARY = "summary.json"
REFERENCE_RUNS = "reference-runs"  # in results/: one summary a run, without journals
LIKE = 0.05  # |log ratio| below which two sides are alike
MARGIN = 0.05
# A prior of own runs over the shipped one, at least: a fit follows the bulk of the comparisons, and those that move
# most between runs lie beyond it. Without a bound `compare` called one of 172 slower in one of four pairs of runs.
NARROWEST = 0.7
MOST_NBYTES = 64 << 20  # of a summary; 100,000 comparisons are 25 MB
Key = tuple[str, str, str, str]


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate's log ratio to its baseline within one run.

    Attributes:
        op, case, node, candidate: what was compared; `case` is the case's label.
        eager, one_thread: its class (poolbench.stats.prior).
        log_ratio, standard_error, degrees, processes: of the estimate within the run.
    """

    op: str
    case: str
    node: str
    candidate: str
    eager: bool
    one_thread: bool
    log_ratio: Annotated[float, msgspec.Meta(ge=-50, le=50)]
    standard_error: Annotated[float, msgspec.Meta(ge=0, le=50)]
    degrees: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    processes: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]

    @property
    def key(self) -> Key:
        return self.op, self.case, self.node, self.candidate

    @property
    def estimate(self) -> Estimate:
        return estimate.from_error(
            self.log_ratio, self.standard_error, self.degrees, self.processes
        )


class RunSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The comparisons of one run, and where and with what code it was made.

    Attributes:
        run, created: the run's name; UTC, ISO 8601.
        code: digest of the package.
        machine: the fields on which a timing can depend, by name.
        comparisons: those with an interval.
    """

    run: str
    created: str
    code: str
    machine: dict[str, str | bool | int | float | None]
    comparisons: tuple[Comparison, ...]


def summarise(run: StoredRun) -> RunSummary:
    """Return the summary of a run."""
    right = {
        (m.case, m.node, m.candidate): m
        for m in run.measurements
        if m.kind == "candidate" and is_right(m)
    }
    pairs = [
        (m, right[m.case, m.node, m.baseline])
        for m in right.values()
        if m.candidate != m.baseline and (m.case, m.node, m.baseline) in right
        if not m.stopped_early
    ]
    found = batch.estimate_all([ratios.paired(*pair) for pair in pairs])
    comparisons = []
    for (m, _), one in zip(pairs, found, strict=True):
        if one.low is None:
            continue
        eager, one_thread = ratios.class_of(m)
        comparisons.append(
            Comparison(
                op=m.case.op, case=case_label(m.case), node=m.node, candidate=m.candidate,
                eager=eager, one_thread=one_thread, log_ratio=round(one.log_ratio, 6),
                standard_error=round(one.standard_error, 7), degrees=round(one.degrees, 3),
                processes=one.processes,
            )
        )  # fmt: skip
    head = run.header
    return RunSummary(
        run=head.run,
        created=head.created,
        code=code_of(head.environment),
        machine=timing_facts(head.environment),
        comparisons=tuple(comparisons),
    )


def write_summary(run: StoredRun, say: Callable[[str], object]) -> None:
    """Write a run's summary into its folder, none without comparisons; `say` takes a line where that fails."""
    found = summarise(run)
    if found.comparisons:
        text = msgspec.json.format(msgspec.json.encode(found), indent=0)
        try:
            (run.path / SUMMARY).write_bytes(text + b"\n")
        except OSError as error:  # the report needs none
            say(f"cannot write {run.path / SUMMARY}: {error.strerror}")


def read_summaries(
    results: Path, say: Callable[[str], object] = lambda _: None
) -> list[RunSummary]:
    """Return the summaries of the runs in a folder, the oldest first; a copy of one does not confirm it.

    `say` takes a line about each that cannot be read: it is left out, as it can be made again.
    """
    found: dict[tuple[str, tuple[Comparison, ...]], RunSummary] = {}
    for path in [*results.glob(f"{REFERENCE_RUNS}/*.json"), *results.glob(f"*/{SUMMARY}")]:
        one = _read(path)
        if isinstance(one, RunSummary):
            found.setdefault((one.created, one.comparisons), one)
        else:
            say(f"{path.parent.name}/{path.name} is left out: {one}")
    return sorted(found.values(), key=lambda one: (one.created, one.run))


def _read(path: Path) -> RunSummary | str:
    """Return a summary, or why it cannot be used."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_NBYTES:
            return f"it is no file of up to {format_nbytes(MOST_NBYTES)}"
        found = msgspec.json.decode(path.read_bytes(), type=RunSummary)
    except (msgspec.MsgspecError, OSError, ValueError) as error:
        return one_line(str(error), 200)
    return found if found.comparisons else "it has no comparisons"


def alike(summaries: Iterable[RunSummary], one: RunSummary) -> list[RunSummary]:
    """Return those of the machine and the code of one."""
    return _alike(summaries, one.code, one.machine)


def _alike(
    summaries: Iterable[RunSummary], code: str, machine: Mapping[str, object]
) -> list[RunSummary]:
    return [s for s in summaries if s.code == code and s.machine == machine]


def prior_for(run: StoredRun, results: Path, *, without: Collection[str] = ()) -> tuple[Prior, int]:
    """Return the between-run prior for a run and how many runs of its machine and code gave it.

    The shipped prior, with 0, where there are fewer than two. `without` names runs to leave out.
    """
    head = run.header.environment
    known = _alike(read_summaries(results), code_of(head), timing_facts(head))
    known = [one for one in known if one.run not in without]
    if len(known) < 2:
        return SHIPPED, 0
    found = fit_prior([table_of(known)])
    if found is SHIPPED:  # they have no comparison in common
        return SHIPPED, 0
    least = {"base": NARROWEST, "slope": NARROWEST, "eager": 1.0, "one_thread": 1.0}
    wide = {n: max(getattr(found, n), share * getattr(SHIPPED, n)) for n, share in least.items()}
    return replace(found, **wide), len(known)


def table_of(summaries: Sequence[RunSummary]) -> RunTable:
    """Return the comparisons of runs of one machine: a row per comparison, a column per run."""
    by_run = [{one.key: one for one in summary.comparisons} for summary in summaries]
    first = _first_of(summaries)
    return tabulate(
        [[some[key].estimate if key in some else None for some in by_run] for key in first],
        eager=[one.eager for one in first.values()],
        one_thread=[one.one_thread for one in first.values()],
    )


def _first_of(summaries: Sequence[RunSummary]) -> dict[Key, Comparison]:
    """Return each comparison as the first run has it, in the order of the table's rows."""
    first: dict[Key, Comparison] = {}
    for summary in reversed(summaries):
        first |= {one.key: one for one in summary.comparisons}
    return first


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two runs of one machine agreed.

    Attributes:
        runs: their names.
        coverage: of the comparisons that both have.
        half_width, alike_half_width: medians of what a single run prints, of the mean; all, and like sides.
        reversed: FASTER in one run and SLOWER in the other.
    """

    runs: tuple[str, str]
    coverage: Coverage
    half_width: float
    alike_half_width: float
    reversed: int


def estimates_of(*summaries: RunSummary) -> dict[Key, RunsEstimate]:
    """Return what a run alone prints, or several runs of one machine together."""
    return dict(zip(_first_of(summaries), combine(table_of(summaries)), strict=True))


def runs_of_machine(run: StoredRun) -> list[tuple[RunSummary, dict[Key, RunsEstimate]]]:
    """Return the runs of a run's machine beside it, of any code, the oldest first, with what each alone prints."""
    machine = timing_facts(run.header.environment)
    like = [s for s in read_summaries(run.path.absolute().parent) if s.machine == machine]
    head = run.header
    if like and not any(head.run == one.run or head.created == one.created for one in like):
        like = sorted([*like, summarise(run)], key=lambda one: one.created)
    return [(one, estimates_of(one)) for one in like if one.comparisons]


def agree(first: RunSummary, second: RunSummary) -> Agreement:
    """Compare two runs as a reader of their reports would.

    Raises:
        UsageError: they have no comparison in common.
    """
    one, other = estimates_of(first), estimates_of(second)
    both = [key for key in one if key in other]
    if not both:
        raise UsageError(f"{first.run} and {second.run} have no comparison in common")
    verdicts = [
        compare_run({key: found.mean for key, found in some.items()}, MARGIN)
        for some in (one, other)
    ]
    widths = {key: one[key].mean.half_width for key in both}
    near = [width for key, width in widths.items() if abs(one[key].mean.log_ratio) < LIKE]
    return Agreement(
        runs=(first.run, second.run),
        coverage=coverage([(one[key], other[key]) for key in both]),
        half_width=statistics.median(widths.values()),
        alike_half_width=statistics.median(near) if near else float("nan"),
        reversed=sum({some[key].verdict for some in verdicts} == {FASTER, SLOWER} for key in both),
    )


def agreements(summaries: Sequence[RunSummary]) -> list[Agreement]:
    """Return the agreement of each run with the next."""
    return [agree(one, other) for one, other in itertools.pairwise(summaries)]


def describe_history(results: Path, say: Callable[[str], object]) -> str:
    """Return nominal beside observed coverage of the newest machine's runs, a line per pair.

    Raises:
        UsageError: there are no two runs of one machine and code.
    """
    summaries = read_summaries(results, say)
    known = next(
        (some for one in reversed(summaries) if len(some := alike(summaries, one)) > 1), []
    )
    raced = [(one, set(_first_of([one]))) for one in known]
    raced = [(one, keys) for one, keys in raced if keys & raced[-1][1]]
    pairs = itertools.pairwise(raced)
    found = [agree(one, other) for (one, mine), (other, its) in pairs if mine & its]
    if not found:
        raise UsageError(
            f"how often runs agree needs two runs of one machine, code and op in {results.name}; got "
            f"{len(summaries)} summaries of unlike ones: `poolbench run --repeat 2`"
        )
    machine = known[-1].machine
    lines = [f"{len(raced)} runs of {machine.get('processor', 'this machine')}, one code"]
    lines += [
        f"{a.runs[0]} and {a.runs[1]}: {a.coverage.inside} of {a.coverage.comparisons} agree "
        f"({format_share(a.coverage.observed)}), half-width {format_share(a.half_width)}, of like sides "
        f"{format_share(a.alike_half_width)}, {a.reversed} FASTER and SLOWER"
        for a in found
    ]
    inside = sum(a.coverage.inside for a in found)
    count = sum(a.coverage.comparisons for a in found)
    worst = min(a.coverage.observed for a in found)
    lines.append(
        f"together: {inside} of {count} comparisons agree ({format_share(inside / count)}, expected "
        f"{found[0].coverage.nominal:.0%}); the worst pair {format_share(worst)}"
    )
    return "\n".join(lines)
