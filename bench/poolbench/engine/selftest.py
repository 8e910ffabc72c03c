"""Measure false alarms, power and noise floor on this machine (`nox -s selftest`).

It races copies of one op, whose true ratios are known. The records go to the journal of the newest run, or of
the named one. The report of that run then withholds verdicts below the noise floor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from poolbench.core.case import case_label
from poolbench.core.errors import StoreError, UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import Selftest
from poolbench.core.terminal import emit
from poolbench.engine.aa import (
    MARGIN,
    CopiesRace,
    Design,
    ProofError,
    count_verdicts,
    noise_floor,
    of_injected,
    race_copies,
    race_series,
    share_marked,
    source_of,
)
from poolbench.engine.progress import Progress, own_terminal
from poolbench.engine.run import Run, RunOptions
from poolbench.store.journal import JOURNAL, read_header
from poolbench.store.runs import COMPARED_OPTIONS, new_run_folder, newest_run

SECONDS = 110.0
# As many as fit: one A/A comparison in twenty exceeds the floor, so few comparisons say little about it.
RACES = 20
# (injected, margin): one record each. A/A uses the default margin, injected slowdowns margin zero, where the
# interval alone decides.
RECORDS = ((0.0, MARGIN), (0.01, 0.0), (0.02, 0.0), (0.05, 0.0), (0.10, 0.0), (0.10, MARGIN))
DESIGN = Design(
    plain=5,  # with the baseline and the slowed copies, about as many as in a race of a sweep
    slowdowns=(0.01, 0.02, 0.05, 0.10),
)


def summarise(races: Sequence[CopiesRace], design: Design, seconds: float) -> list[Selftest]:
    """Return one record for each entry of RECORDS that the races cover."""
    floor = noise_floor(of_injected(races, 0.0))
    records = []
    for injected, margin in RECORDS:
        compared = of_injected(races, injected)
        if not compared:
            continue
        counts = count_verdicts(compared, margin)
        figures: dict[str, float | int | str | None] = {
            "case": f"{design.case.op} {case_label(design.case)}",
            "processes": design.plan.processes,
            "allocations": design.plan.allocations,
            "races": len(races),
            "blocks_contended": round(share_marked(races), 4),
        }
        if not injected:
            alarms_at_zero = count_verdicts(compared, 0.0)
            figures["alarms_at_margin_zero"] = alarms_at_zero["FASTER"] + alarms_at_zero["SLOWER"]
        records.append(
            Selftest(
                injected=injected,
                margin=margin,
                comparisons=len(compared),
                faster=counts["FASTER"],
                slower=counts["SLOWER"],
                same=counts["SAME"],
                undecided=counts["UNDECIDED"],
                noise_floor=round(floor, 6),
                seconds=round(seconds, 1),
                kind="injected" if injected else "aa",
                power=round(counts["SLOWER"] / len(compared), 4) if injected else None,
                figures=figures,
            )
        )
    return records


def describe(records: Sequence[Selftest]) -> str:
    """Describe the records, one line each, and the noise floor."""
    lines = []
    for record in records:
        n, margin = record.comparisons, f"margin {record.margin:.0%}"
        if record.kind == "aa":
            alarms, at_zero = record.faster + record.slower, record.figures["alarms_at_margin_zero"]
            lines.append(
                f"an op with itself, {margin}: {alarms} false alarms in {n} comparisons "
                f"({record.same} SAME, {record.undecided} UNDECIDED); at margin 0% {at_zero}, "
                f"where {0.05 * n:.0f} are to be expected"
            )
        else:
            lines.append(
                f"slower by {record.injected:.0%}, {margin}: SLOWER in {record.slower} of {n} "
                f"(power {record.power:.0%}), FASTER in {record.faster}"
            )
    last = records[-1]
    contended = last.figures["blocks_contended"]
    assert isinstance(contended, float)
    lines.append(
        f"noise floor: {last.noise_floor:.2%} (95th percentile of the A/A log ratio); "
        f"{contended:.0%} of the blocks under contention; {last.seconds:.0f} s"
    )
    return "\n".join(lines)


def open_run(results: Path, name: str | None) -> Run:
    """Return the run to append to: the named one, else the newest if it is of this machine, else a new one.

    Raises:
        UsageError, StoreError: the named run cannot be continued.
    """
    folder = results / name if name else newest_run(results)
    if folder is not None and (folder / JOURNAL).exists():
        # Another commit does not make another machine.
        # Neither do the options of the run's races, or a user's files.
        try:
            files = {*read_header(folder).environment.source} - {"code"}
            allowed = ("commit", "dirty", *COMPARED_OPTIONS, *files)
            return _start(RunOptions(folder=folder, resume=True, allow_different=allowed))
        except (UsageError, StoreError) as error:
            if name:
                raise
            emit(f"not added to {folder.name}: {error}")
    folder = results / name if name else new_run_folder(results, "selftest")
    return _start(RunOptions(folder=folder, plan=DESIGN.plan, asked={"sweep": "selftest"}))


def _start(options: RunOptions) -> Run:
    """Return a run with its journal open and its workers started, so that errors appear before the races."""
    bench = Run(options)
    try:
        bench.prepare()
        bench.worker(WorkerSpec(), DESIGN.plan.processes - 1)
        bench.journal()
    except BaseException:
        bench.close()
        raise
    return bench


def run_selftest(results: Path, name: str | None, *, seconds: float = SECONDS) -> str:
    """Race copies within a time limit, add the records to a run, and describe them.

    Args:
        results: folder that holds the runs.
        name: of the run to add to; None for the newest.
        seconds: longest time to take.

    Raises:
        UsageError, StoreError: the copies cannot be raced, or the run cannot be continued.
    """
    start = time.monotonic()
    try:
        source_of(DESIGN)
        with open_run(results, name) as bench:
            records = run(bench, until=start + seconds, start=start)
            for record in records:
                bench.append(record)
    except (ProofError, WorkerFailure) as error:
        raise UsageError(f"selftest: {error}") from None
    return f"{describe(records)}\nwritten to {bench.options.folder.name}"


def run(bench: Run, *, until: float, start: float) -> list[Selftest]:
    """Race copies in the run's workers until there are enough, or the time is over."""
    races = []
    limit = until - time.monotonic()
    with Progress(
        RACES, write=emit, predicted_seconds=limit, most_seconds=limit, terminal=own_terminal()
    ) as progress:
        progress.now = "copies of one op"
        for race in race_series(
            lambda number: race_copies(DESIGN, bench, number), RACES, until=until
        ):
            races.append(race)
            progress.advance()
    return summarise(races, DESIGN, time.monotonic() - start)
