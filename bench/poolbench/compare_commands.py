"""The commands that compare: two sides in one race, two stored runs, and `poolbench bisect`."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from poolbench.core.errors import UsageError
from poolbench.core.terminal import emit
from poolbench.options import AXIS, DURATION, PERCENT, SWEEPS, Pattern

if TYPE_CHECKING:
    from poolbench.core.case import Case
    from poolbench.engine.pool import WorkerPool
    from poolbench.engine.sides import Builder, SideRequest

Command = TypeVar("Command", bound=Callable[..., Any])


class _Variable(Pattern):
    def read(self, found: re.Match[str]) -> tuple[str, str]:
        return found[1], found[2]


VARIABLE = _Variable(
    "NAME=VALUE", r"([A-Za-z_]\w*)=(.*)", "a variable, such as TF_ENABLE_ONEDNN_OPTS=0"
)
PACKAGE = Pattern("PKG==V", r"[A-Za-z0-9].*", "a requirement, such as tensorflow-cpu==2.20.0")
VERSIONS = Pattern("FIRST..LAST", r"\d\w*(\.\w+)*\.\.\d\w*(\.\w+)*", "versions such as 2.18..2.21")
SIDE_KINDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("", {"metavar": "REF"}, "{}: a commit, branch or tag{}."),
    ("-python", {"metavar": "PATH"}, "Interpreter of {}."),
    ("-with", {"type": PACKAGE, "multiple": True}, "Package in an environment of {}'s own."),
    ("-env", {"type": VARIABLE, "multiple": True}, "Environment variable of {}'s workers."),
)


def code_options(command: Command) -> Command:
    """Add the options that say which code is raced."""
    for option in (
        click.option("--install", multiple=True, metavar="WORD",
                     help="What pip installs in a new environment, run in the checkout. Default: the project."),
        click.option("--candidates", multiple=True, metavar="FILE",
                     help="A Python file that registers candidates or ops; each side reads its own copy."),
    ):  # fmt: skip
        command = option(command)
    return command


def side_options(command: Command) -> Command:
    """Add the options of `compare` that race two sides."""
    sides = [
        click.option(f"--{side}{ending}", f"{side}_{ending[1:] or 'ref'}", **more,
                     help=text.format(side, default))
        for side, default in (("base", ""), ("head", "; the working tree by default"))
        for ending, more, text in SIDE_KINDS
    ]  # fmt: skip
    more = (
        click.option("--sweep", type=click.Choice(SWEEPS), default="quick", help="Sweep of each op. Default: quick."),
        click.option("--op", "ops", multiple=True, metavar="NAME", help="This op alone; may be repeated."),
        click.option("--axis", type=AXIS, multiple=True, help="Replace the values of an axis."),
        click.option("--candidate", "names", multiple=True, metavar="NAME", help="This candidate alone."),
        click.option("--budget", type=DURATION, default="3min", help="Time of the whole, but for environments."),
    )  # fmt: skip
    command = code_options(command)
    for option in reversed((*sides, *more)):
        command = option(command)
    return command


# What `compare` takes of two stored runs alone.
STORED = ("base", "run", "allow_different", "programs_only", "selected", "out", "show")
OF_TIMES = ("allow_different", "margin", "kind", "selected", "out", "show")


def asks_for_sides(options: Mapping[str, Any]) -> bool:
    """Tell whether the options of `compare` name a side, rather than two stored runs.

    Raises:
        click.UsageError: an option of the other kind of comparison is given too.
    """
    racing = any(value for name, value in options.items() if name.startswith(("base_", "head_")))
    if racing:
        refuse_given(STORED, "two stored runs")
    else:
        refuse_given(options, "--base and --head")
    return racing


def refuse_given(names: Container[str], kind: str) -> None:
    """Refuse the options of another kind of comparison.

    Raises:
        click.UsageError: the command line gives one of these names.
    """
    context = click.get_current_context()
    usual = (click.core.ParameterSource.DEFAULT, None)
    for option in context.command.params:
        name = str(option.name)
        if name in names and context.get_parameter_source(name) not in usual:
            last = option.opts[-1]
            word = last if last.startswith("-") else option.human_readable_name
            raise click.UsageError(
                f"{word} is for {kind} alone, which is not what the rest asks for"
            )


def race_sides(options: Mapping[str, Any], *, margin: float, kind: str | None) -> int:
    """Race base against head and print the report; return 1 if something is slower, broke or answers otherwise.

    Raises:
        UsageError: a side cannot be built or started, or nothing is selected.
    """
    from poolbench.engine.side_by_side import Job, run_job
    from poolbench.report.side_by_side import FORMATS
    from poolbench.stats.side_by_side import Rule

    if kind not in (None, *FORMATS):
        raise UsageError(f"--format of a race is one of {', '.join(FORMATS)}; got {kind}")
    # The default is that of stored runs, which are less precise.
    source = click.get_current_context().get_parameter_source("margin")
    rule = Rule() if source == click.core.ParameterSource.DEFAULT else Rule(margin=margin)
    pairs = _select(options)
    builder = _builder(options)
    base, head = (builder.build(_request(options, side)) for side in ("base", "head"))
    job = Job(base=base, head=head, pairs=pairs, rule=rule, budget_seconds=options["budget"])
    with _pool() as pool:
        report = run_job(job, pool, say=say)
    emit(FORMATS[kind or "markdown"](report))
    return int(bool(report.found))


def compare_runs(
    base: str, run: str, results: Path, *, margin: float, allowed: Sequence[str], selected: Any, kind: str | None,
    out: Path | None, show: bool,
) -> int:  # fmt: skip
    """Compare two stored runs and print the table; return 1 if something is slower."""
    from poolbench.core.text import one_line
    from poolbench.report import compare as comparing
    from poolbench.report import compare_text
    from poolbench.report.history import prior_for
    from poolbench.report.select import select
    from poolbench.store.journal import read_run
    from poolbench.store.runs import find_run

    before, after = (read_run(find_run(results, name)) for name in (base, run))
    prior, _ = prior_for(before, before.path.absolute().parent, without=[after.header.run])
    found = comparing.compare_runs(before, after, margin=margin, allowed=allowed, prior=prior)
    if selected:
        found = comparing.keep(found, select(found.table, selected))
    emit(compare_text.FORMATS[kind or "markdown"](found).rstrip("\n"))
    if out or show:
        page = compare_text.write_page(found, out or after.path / "report")
        emit(f"page: {page}", err=True)
        if show:
            show_page(page)
    if found.slower:
        emit(one_line(compare_text.headline(found), 500), err=True)
    return int(bool(found.slower))


def compare_programs(base: str, run: str, results: Path) -> int:
    """Print which programs of two stored runs differ; return 1 if any does of one version of its compiler."""
    refuse_given(OF_TIMES, "a comparison of times")
    from poolbench.report import programs
    from poolbench.store.journal import read_run
    from poolbench.store.runs import find_run

    runs = [read_run(find_run(results, name)) for name in (base, run)]
    for one in runs:
        if one.dropped:
            say(f"{one.path.name}: {one.dropped}")
    found = programs.compare_programs(*runs)
    if not found.common:
        raise UsageError(f"no candidate of {base} has a program in {run}: nothing can be compared")
    emit("\n".join([found.summary, *found.changed]))
    return int(found.worse)


@click.command()
@click.argument("op")
@click.argument("candidate")
@click.argument("case")
@click.option("--good", metavar="REF", help="A commit that is fast.")
@click.option("--bad", metavar="REF", help="A later commit that is slower.")
@click.option(
    "--versions",
    nargs=2,
    type=(str, VERSIONS),
    metavar="PACKAGE FIRST..LAST",
    help="Released versions instead of commits: tensorflow-cpu 2.18..2.21.",
)
@click.option("--margin", type=PERCENT, default="2%", help="Smallest difference that counts.")
@click.option("--budget", type=DURATION, default="60", help="Longest time of one race.")
@code_options
def bisect(op: str, candidate: str, case: str, margin: float, **options: Any) -> None:
    """Find the commit or version in which a candidate became slower.

    CASE is a mode, or values of axes: graph, mode=xla,direction=training.
    """
    from poolbench.engine import bisect as engine
    from poolbench.stats.side_by_side import Rule

    pair = _one_case(op, candidate, case, options)
    builder = _builder(options)
    package, versions = options["versions"] or ("", "")
    if package:
        points = engine.released_versions(package, *versions.split(".."))
    elif options["good"] and options["bad"]:
        points = engine.commits_between(builder, options["good"], options["bad"])
    else:
        raise UsageError("bisect needs --good REF and --bad REF, or --versions PACKAGE FIRST..LAST")
    say(f"{len(points)} points, about {max(1, len(points) - 1).bit_length() + 1} races")
    with _pool() as pool:
        found = engine.Bisection(
            points, lambda point: engine.side_of(builder, package, point), pair, pool,
            rule=Rule(margin=margin), budget_seconds=options["budget"], say=say,
        ).run()  # fmt: skip
    names = [
        point if package else builder.git("log", "-1", "--format=%h %s", point)
        for point in found.first.split(" or ")
    ]
    ratio = found.ends.wall
    emit(
        f"{found.headline}: {' or '.join(names)}; {candidate} takes {ratio.ratio:.3f}x "
        f"[{ratio.ratio_low:.3f}, {ratio.ratio_high:.3f}] the time between the ends"
    )


def say(line: str) -> None:
    """Print a line on stderr."""
    emit(line, err=True)


def show_page(page: Path) -> None:
    """Open a page in the browser."""
    import webbrowser

    webbrowser.open(page.resolve().as_uri())


def _builder(options: Mapping[str, Any]) -> Builder:
    from poolbench.engine.sides import Builder

    files = [Path(name) for name in options["candidates"]]
    install = [word for text in options["install"] for word in text.split()]
    return Builder(Path.cwd(), candidates=files, install=install, say=say)


def _request(options: Mapping[str, Any], side: str) -> SideRequest:
    from poolbench.engine.sides import SideRequest

    return SideRequest(
        ref=options[f"{side}_ref"] or "",
        python=options[f"{side}_python"] or "",
        packages=options[f"{side}_with"],
        environment=options[f"{side}_env"],
    )


@contextmanager
def _pool() -> Iterator[WorkerPool]:
    from poolbench.engine.pool import WorkerPool
    from poolbench.machine.limits import total_memory_nbytes

    pool = WorkerPool((), total_memory_nbytes() * 3 // 4)
    try:
        yield pool
    finally:
        pool.close()


def _load(options: Mapping[str, Any], ops: Sequence[str]) -> None:
    """Register the ops that ship and the user's files; refuse an op that none of them registers."""
    from poolbench.core.registry import REGISTRY, load_builtin, load_candidates

    load_builtin()
    for name in options["candidates"]:
        load_candidates(name)
    REGISTRY.check_ops()
    if unknown := [name for name in ops if name not in REGISTRY.ops]:
        raise UsageError(f"no op {unknown[0]!r} is registered; there are {', '.join(REGISTRY.ops)}")


def _select(options: Mapping[str, Any]) -> tuple[tuple[Case, str], ...]:
    """Return the cases and candidates that the options select.

    Raises:
        UsageError: an op, axis or candidate does not exist, or nothing is left.
    """
    from poolbench.core.registry import REGISTRY, parse_axis
    from poolbench.pytest_plugin import planned_cases, racing

    _load(options, options["ops"])
    axes = dict(parse_axis(text) for text in options["axis"])
    # As in a run: further ops where they are named, by a candidate of theirs too, and in the full sweep.
    every = options["names"] or options["sweep"] == "full"
    usual = [op.name for op in REGISTRY.ops.values() if every or not op.further]
    pairs = [
        (planned.case, name)
        for op in REGISTRY.ops.values()
        if op.name in (options["ops"] or usual)
        for planned in planned_cases(op, options["sweep"], axes)
        for name in racing(op, planned)
        if name in (options["names"] or (name,))
    ]
    if not pairs:
        raise UsageError("no case has such a candidate (--op, --candidate)")
    return tuple(pairs)


def _one_case(op: str, candidate: str, case: str, options: Mapping[str, Any]) -> tuple[Case, str]:
    """Return the case that 'graph' or 'mode=graph,pool_size=2' names, on the base of the quick sweep."""
    from poolbench.core.registry import REGISTRY, parse_axis

    _load(options, [op])
    if (op, candidate) not in REGISTRY.candidates:
        raise UsageError(
            f"{op} has no candidate {candidate!r}; there are {', '.join(REGISTRY.of(op))}"
        )
    words = [word if "=" in word else f"mode={word}" for word in case.split(",") if word]
    values: dict[str, Any] = {}
    for name, some in map(parse_axis, words):
        if name in values or len(some) > 1:
            raise UsageError(f"bisect races one case: give one value of {name}; got {case}")
        values[name] = some[0]
    return REGISTRY.ops[op].sweep("quick").base_case.replace(**values), candidate
