"""The command line of report.py. Every import that costs is inside the command that needs it."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

EXIT_SLOWER, EXIT_UNUSABLE = 1, 2
FORMATS = ("markdown", "csv", "html", "json")
EPILOG = """\
commands:
  report.py [RUN]                render a run: page, figures, tables (the newest; the reference run on a fresh clone)
  report.py compare BASE RUN     a verdict for each measurement; exit 0 nothing slower, 1 something slower, 2 unusable
  report.py import FILE          a plain pytest-benchmark JSON as a run
  report.py support [RUN]        print the support matrix as Markdown (--write: docs/support.md of the reference run)
  report.py readme [--check]     fill the generated blocks of README.md and docs/ from results/reference/

`report.py COMMAND --help` says more. A run is a folder, or its name under results/.
"""


class Unusable(Exception):  # noqa: N818 - it is said of the input
    """The input cannot be used; the text is one line that says why and what to do."""


def parse_margin(text: str) -> float:
    """0.05 from '5%' or '0.05'.

    Raises:
        argparse.ArgumentTypeError: it is neither, or not within 0 and 100%.
    """
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a margin is like 5% or 0.05; got {text!r}")
    return value


def parse_select(text: str) -> tuple[str, tuple[str, ...]]:
    """('op', ('depth_max_pool',)) from 'op=depth_max_pool'; several values are separated by commas."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise argparse.ArgumentTypeError(f"--select takes COLUMN=VALUE[,VALUE...]; got {text!r}")
    return name.strip(), tuple(value.strip() for value in values.split(","))


def main(arguments: Sequence[str], root: Path) -> int:
    """Run a command; the exit code. `root` is the repository, which holds results/."""
    arguments = list(arguments)
    collecting = gc.isenabled()
    gc.disable()  # a large run is millions of objects that live to the end: to block them again is time lost
    try:
        return _run(arguments, root)
    finally:
        if collecting:
            gc.enable()


def _run(arguments: list[str], root: Path) -> int:
    command = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if command is not None:
            return command(arguments[1:], root)
        return render_command(arguments, root)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if _is_input_error(error):
            print(f"report.py: {_line(error)}", file=sys.stderr)
            return EXIT_UNUSABLE
        raise


def _is_input_error(error: Exception) -> bool:
    from poolbench.core.errors import StoreError, UsageError

    return isinstance(error, (Unusable, StoreError, UsageError, OSError))


def _line(error: Exception) -> str:
    from poolbench.core.text import one_line

    return one_line(str(error), 500)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--margin", type=parse_margin, default=0.05, help="equivalence margin of the verdicts (5%%)"
    )
    parser.add_argument("--format", choices=FORMATS, help="print the table in this format")
    parser.add_argument(
        "--select", type=parse_select, action="append", default=[], metavar="COLUMN=VALUE",
        help="keep only these measurements: op=..., mode=xla,graph, candidate=..., status=ok",
    )  # fmt: skip
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def render_command(arguments: list[str], root: Path) -> int:
    """`report.py [RUN]`."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Read a run of poolbench.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's folder or name (default: the newest)"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")
    _common(parser)
    options = parser.parse_args(arguments)

    from poolbench.report.frame import find_run, load

    folder = find_run(root / "results", options.run)
    loaded = load(folder, margin=options.margin)
    if loaded.run.dropped:
        print(f"{folder.name}: {loaded.run.dropped}", file=sys.stderr)
    if options.format:
        from poolbench.report.tables import WRITERS, measurement_table

        table = select(loaded.table, options.select)
        shown = table if options.format in ("csv", "json") else measurement_table(table)
        sys.stdout.write(WRITERS[options.format](shown))
        return 0
    from dataclasses import replace

    from poolbench.report.page import render

    if options.select:
        kept = select(loaded.table, options.select).index
        loaded = replace(
            loaded,
            table=loaded.table.loc[kept].reset_index(drop=True),
            samples=[loaded.samples[i] for i in kept],
            bandwidth_limits={
                new: loaded.bandwidth_limits[old]
                for new, old in enumerate(kept)
                if old in loaded.bandwidth_limits
            },
        )
    written = render(loaded, options.out or folder / "report")
    print(written.headline)
    print(f"page: {written.page}")
    if options.open:
        import webbrowser

        webbrowser.open(written.page.resolve().as_uri())
    return 0


def select(table: pd.DataFrame, wanted: Sequence[tuple[str, tuple[str, ...]]]) -> pd.DataFrame:
    """The rows whose columns have one of the values.

    Raises:
        Unusable: there is no such column, or nothing is left.
    """
    for name, values in wanted:
        if name not in table.columns:
            raise Unusable(
                f"no column {name!r}; there are {', '.join(table.columns)} (--select COLUMN=VALUE)"
            )
        table = table[[_as_text(value) in values for value in table[name]]]
        if table.empty:
            raise Unusable(f"no measurement has {name} in {', '.join(values)} (--select)")
    return table


def _as_text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def compare_command(arguments: list[str], root: Path) -> int:
    """`report.py compare BASE RUN`."""
    parser = argparse.ArgumentParser(
        prog="report.py compare",
        description="What changed between two runs. Exit 0: nothing slower; 1: something slower; 2: unusable.",
    )
    parser.add_argument("base", metavar="BASE", help="the run to compare with")
    parser.add_argument("run", metavar="RUN", help="the run to judge")
    parser.add_argument(
        "--allow-different", action="append", default=[], metavar="NAME",
        help="compare although this field of the environment differs",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="also write a page with the comparison into this folder"
    )
    _common(parser)
    options = parser.parse_args(arguments)

    from poolbench.core.text import one_line
    from poolbench.report import compare
    from poolbench.report.frame import find_run
    from poolbench.store.journal import read_run

    base, run = (read_run(find_run(root / "results", name)) for name in (options.base, options.run))
    found = compare.compare_runs(base, run, margin=options.margin, allowed=options.allow_different)
    if options.select:
        found = compare.keep(found, select(found.table, options.select))
    sys.stdout.write(compare.FORMATS[options.format or "markdown"](found))
    if options.out or options.open:
        page = compare.write_page(found, options.out or run.path / "report")
        print(f"page: {page}", file=sys.stderr)
        if options.open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
    slower = found.slower
    if slower:
        print(one_line(compare.headline(found), 500), file=sys.stderr)
    return EXIT_SLOWER if slower else 0


def import_command(arguments: list[str], root: Path) -> int:
    """`report.py import FILE`."""
    parser = argparse.ArgumentParser(
        prog="report.py import",
        description="Make a run of a plain pytest-benchmark JSON, and render it.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="what `pytest --benchmark-json=FILE` wrote"
    )
    parser.add_argument("--run", metavar="NAME", help="the run's name (default: from the file's)")
    options = parser.parse_args(arguments)

    from poolbench.report.frame import load
    from poolbench.report.page import render
    from poolbench.store.pytest_benchmark import import_file

    folder = import_file(options.file, root / "results", options.run)
    written = render(load(folder), folder / "report")
    print(f"run: {folder}")
    print(f"page: {written.page}")
    return 0


def support_command(arguments: list[str], root: Path) -> int:
    """`report.py support [RUN]`."""
    parser = argparse.ArgumentParser(
        prog="report.py support", description="The support matrix as Markdown."
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="default: the reference run")
    parser.add_argument(
        "--write", action="store_true", help="write docs/support.md instead of printing"
    )
    options = parser.parse_args(arguments)

    from poolbench.report.frame import find_run
    from poolbench.report.readme import support_page
    from poolbench.store.journal import read_run

    run = read_run(find_run(root / "results", options.run or "reference"))
    text = support_page([run])
    if options.write:
        path = root / "docs" / "support.md"
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(root)}")
    else:
        sys.stdout.write(text)
    return 0


def readme_command(arguments: list[str], root: Path) -> int:
    """`report.py readme [--check]`."""
    parser = argparse.ArgumentParser(
        prog="report.py readme",
        description="Fill the generated blocks of README.md and docs/ from results/reference/.",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a block is out of date"
    )
    options = parser.parse_args(arguments)

    from poolbench.report.readme import fill

    stale = fill(root, check=options.check)
    for name in stale:
        print(f"{'out of date' if options.check else 'wrote'}: {name}")
    return 1 if options.check and stale else 0


COMMANDS: dict[str, Callable[[list[str], Path], int]] = {
    "compare": compare_command,
    "import": import_command,
    "support": support_command,
    "readme": readme_command,
}
