"""The command `poolbench`. What a command needs is imported when it runs, so that --help stays quick.

Exit codes: 0 fine, 1 found something (slower, failed), 2 asked wrongly or unusable, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poolbench.compare_commands import (
    Command,
    asks_for_sides,
    bisect,
    compare_programs,
    compare_runs,
    race_sides,
    say,
    show_page,
    side_options,
)
from poolbench.core.terminal import emit, poolbench_command
from poolbench.options import AXIS, COLUMN, COUNT, DURATION, OPTIONS, PERCENT, RUN

if TYPE_CHECKING:
    from poolbench.store.journal import StoredRun

EXIT_FOUND, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130
FORMATS = ("markdown", "csv", "json", "html")


class Main(click.Group):
    """A group of commands that print an error in one line and return their exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and end the process with its exit code."""
        for stream in (sys.stdout, sys.stderr):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")  # an ASCII terminal shows any name
        run = super().main
        code = self._run(lambda: run(args, prog_name, complete_var, standalone_mode=False, **extra))
        if standalone_mode:
            sys.exit(code)
        return code

    @staticmethod
    def _run(command: Callable[[], Any]) -> int:
        from poolbench.core.errors import StoreError, UsageError, WorkerFailure

        try:
            return int(command() or 0)
        except (KeyboardInterrupt, click.Abort):
            return EXIT_INTERRUPTED
        except click.exceptions.NoArgsIsHelpError as error:
            emit(error.format_message())
            return EXIT_UNUSABLE
        except click.ClickException as error:
            reason = _describe(error)
        except (StoreError, UsageError, WorkerFailure) as error:
            reason = str(error)
        except OSError as error:
            named = error.filename is not None
            reason = f"cannot use {error.filename}: {error.strerror}" if named else str(error)
        from poolbench.core.text import one_line

        emit(f"poolbench: {one_line(reason, 500)}", err=True)
        return EXIT_UNUSABLE


def _describe(error: click.ClickException) -> str:
    if isinstance(error, click.BadParameter) and error.param is not None and error.message:
        return f"{error.param.opts[0]}: {error.message}"
    return error.format_message()


@click.group(
    cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="poolbench")
def main() -> None:
    """Benchmark alternative implementations of the same operation against each other.

    Each is checked for correctness, timed in interleaved rounds beside the others, and compared with
    a confidence interval. A RUN is a folder, or its name under results/.
    """
    from poolbench.engine import cleanup

    cleanup.remove_orphans(Path(tempfile.gettempdir()))


def results_option(command: Command) -> Command:
    """Add --results to a command."""
    return click.option(
        "--results", type=click.Path(path_type=Path), default="results", envvar="POOLBENCH_RESULTS",
        metavar="FOLDER", help="Folder that holds the runs. Default: ./results.",
    )(command)  # fmt: skip


def table_options(command: Command) -> Command:
    """Add the options that the commands share which print a table or write a page."""
    for option in (
        click.option("--open", "show", is_flag=True, help="Open the page in the browser."),
        click.option("--out", type=click.Path(path_type=Path), help="Write the page into this folder."),
        click.option("--select", "selected", type=COLUMN, multiple=True,
                     help="Keep these measurements alone: op=..., mode=xla,graph, status=ok."),
        click.option("--format", "kind", type=click.Choice(FORMATS), help="Print the table in this format."),
        click.option("--margin", type=PERCENT, default="5%", help="Equivalence margin of the verdicts."),
    ):  # fmt: skip
        command = option(command)
    return results_option(command)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Suspend the garbage collector: a large run is millions of objects that live to the end."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def run_options(*left_out: str) -> Callable[[Command], Command]:
    """Add the options of a run to a command, but for some."""

    def add(command: Command) -> Command:
        command = click.option(
            "-k", "keyword", metavar="EXPRESSION", help="Run the matching tests alone."
        )(command)
        for option in reversed(OPTIONS):
            if option.name in left_out:
                continue
            if option.name == "results":
                command = results_option(command)
                continue
            more: dict[str, Any] = {"is_flag": True} if option.flag else {
                "type": option.type, "metavar": option.metavar, "multiple": option.multiple,
                "default": None if option.multiple else option.default,
            }  # fmt: skip
            command = click.option(f"--{option.name}", option.key, help=option.help, **more)(
                command
            )
        return command

    return add


@main.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]... [-- PYTEST_ARGUMENT...]")
@click.option("--repeat", type=COUNT, default=1,
              help="Whole runs, which share the time of one and are reported together.")  # fmt: skip
@run_options()
def run(suites: Sequence[str], repeat: int, **options: Any) -> int:
    """Benchmark the candidates of two ops, or of the given suites, and render the report.

    A SUITE is a file, a folder, or the name of one that ships: further_ops, network, capabilities.
    --op NAME runs any op; --sweep full runs all ops.
    """
    if repeat == 1:
        return _run_suites(suites, options)
    from poolbench.launch import launch_repeated

    folders, code = launch_repeated(suites, options, repeat)
    if code in (0, EXIT_FOUND):
        with _no_collection():
            _report(folders, options["margin"])
    return code


@main.command()
@run_options(*"op sweep processes budget precision margin ray-address dry-run check-only".split())
def matrix(**options: Any) -> int:
    """Check what each candidate supports: modes, dtypes, shapes, saving, threads, exports."""
    return _run_suites(["capabilities"], options)


def _run_suites(suites: Sequence[str], options: dict[str, Any]) -> int:
    from poolbench.launch import launch

    folder, code = launch(suites, options, words=sys.argv[1:])
    if folder is not None and code in (0, EXIT_FOUND):
        with _no_collection():
            from poolbench.report.history import write_summary
            from poolbench.store.journal import read_run

            stored = read_run(folder)
            write_summary(stored, say)
            _report([stored], options.get("margin", 0.05))
        emit(f"{poolbench_command()} report --open {shlex.quote(str(folder))}")
    return code


@main.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@table_options
def report(
    runs: Sequence[str], margin: float, kind: str | None, selected: Any, out: Path | None,
    show: bool, results: Path,
) -> None:  # fmt: skip
    """Render a run, or several of one machine and code as one. Default: the newest run."""
    if kind and (out or show):
        raise click.UsageError("--format prints a table: leave out --out and --open")
    with _no_collection():
        from poolbench.store.runs import find_run

        folders = [find_run(results, name, say) for name in runs or (None,)]
        _report(folders, margin, kind, selected, out, show=show)


def _report(
    places: Sequence[Path | StoredRun],
    margin: float,
    kind: str | None = None,
    selected: Any = (),
    out: Path | None = None,
    *,
    show: bool = False,
) -> None:
    from poolbench.report.frame import load
    from poolbench.report.select import select

    loaded = load(*places, margin=margin)
    for one in loaded.runs:
        if one.dropped:
            emit(f"{one.path.name}: {one.dropped}", err=True)
    if selected:
        loaded = loaded.keep(list(select(loaded.table, selected).index))
    if kind:
        from poolbench.report.formats import WRITERS
        from poolbench.report.tables import measurement_table

        table = loaded.table if kind in ("csv", "json") else measurement_table(loaded.table)
        emit(WRITERS[kind](table).rstrip("\n"))
        return
    from poolbench.report.page import render

    written = render(loaded, out or loaded.run.path / "report")
    emit(f"{written.headline}\npage: {written.page}")
    if show:
        show_page(written.page)


@main.command()
@click.argument("base", required=False)
@click.argument("run", required=False)
@click.option("--allow-different", multiple=True, metavar="FIELD",
              help="Compare although this field of the environment differs.")  # fmt: skip
@click.option("--programs-only", is_flag=True,
              help="Compare what the compiler made of the candidates of two runs, and no times.")  # fmt: skip
@side_options
@table_options
def compare(
    base: str | None, run: str | None, allow_different: Sequence[str], programs_only: bool, margin: float,
    kind: str | None, selected: Any, out: Path | None, show: bool, results: Path, **sides: Any,
) -> int:  # fmt: skip
    """Race base against head of a git checkout (--base REF), or compare two stored runs.

    Exit 1 if something became slower; with --base also if it broke or answers otherwise. Two runs recorded apart
    cannot tell a small difference of the code from one of the hour; --base REF races both sides in one job.
    """
    if asks_for_sides(sides):
        return race_sides(sides, margin=margin, kind=kind)
    if base is None or run is None:
        raise click.UsageError(
            f"Missing argument '{'RUN' if base else 'BASE'}': two runs, or --base REF"
        )
    with _no_collection():
        if programs_only:
            return compare_programs(base, run, results)
        return compare_runs(
            base, run, results, margin=margin, allowed=allow_different, selected=selected, kind=kind, out=out,
            show=show,
        )  # fmt: skip


main.add_command(bisect)


@main.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--run", type=RUN, help="Name of the run. Default: from the file's name.")
@results_option
def import_command(file: Path, run: str | None, results: Path) -> None:
    """Make a run of a pytest-benchmark JSON file, and render it."""
    from poolbench.report.frame import load
    from poolbench.report.page import render
    from poolbench.store.pytest_benchmark import import_file

    folder = import_file(file, results, run)
    written = render(load(folder), folder / "report")
    emit(f"run: {folder}\npage: {written.page}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SIZES",
              help="Sizes that the model leaves open: 224x224x3, image=224x224x3.")  # fmt: skip
@click.option(
    "--batch", type=COUNT, help="Batch size. Default: the file's, or 32, or less for a large model."
)
@click.option("--direction", type=click.Choice(["training", "forward"]), default="training")
@click.option("--mode", type=click.Choice(["graph", "xla", "eager"]), default="graph")
@click.option("--trust", is_flag=True, help="Run the Python code of the file's Lambdas.")
@click.option("--custom", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="A Python file that defines classes of the model.")  # fmt: skip
@click.option("--write", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the model with the advised replacement: out.keras.")  # fmt: skip
@click.option("--processes", type=COUNT, default=3, help="Fresh processes, at least 2.")
@click.option("--budget", type=DURATION, default=12.0, help="Seconds of rounds of six processes.")
def which(model: Path, **asked: Any) -> int:
    """Recommend implementations for the pooling layers of a saved Keras model."""
    from poolbench.models.advise import advise

    return advise(model, **asked, say=emit)


@main.command()
@click.argument("words", nargs=-1, metavar="[OP|MODE|CANDIDATE]...")
@click.option("--axis", "axes", type=AXIS, multiple=True, help="Values of an axis.")
@click.option("--run", type=RUN, help="Run that gets the traces. Default: the newest with the op.")
@click.option(
    "--candidates", multiple=True, metavar="FILE", help="A file that registers candidates."
)
@results_option
def trace(
    words: Sequence[str],
    axes: Sequence[str],
    run: str | None,
    candidates: Sequence[str],
    results: Path,
) -> int:
    """Record a trace of each selected candidate; exit 1 where none could be recorded."""
    from poolbench.engine.tracing import record_selection

    # Absolute, so that the command which it prints last works from any folder.
    results = results.absolute()
    return record_selection(words, axes=axes, run=run or "", candidates=candidates, results=results)


@main.command()
@click.argument("run", required=False, type=RUN)
@click.option("--host", default="127.0.0.1", help="Address to serve at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to serve at. Default: a free one.",
)
@results_option
def tensorboard(run: str | None, host: str, port: int, results: Path) -> int:
    """Open the traces of a run in TensorBoard. Default: the newest run that has any."""
    from poolbench.report.tensorboard import view

    return view(results, run or "", host=host, port=port, say=emit)


@main.command()
@click.option("--run", type=RUN, help="Run that the result is added to. Default: the newest.")
@click.option("--seconds", type=DURATION, default=110.0, help="Longest time to take.")
@click.option("--runs", is_flag=True, help="Say how often the runs of one machine and code agree.")
@results_option
def selftest(run: str | None, seconds: float, runs: bool, results: Path) -> None:
    """Measure false alarms, detectable slowdowns and the noise floor on this machine."""
    if runs:
        from poolbench.report.history import describe_history

        emit(describe_history(results, say))
        return
    from poolbench.engine.selftest import run_selftest

    emit(run_selftest(results, run, seconds=seconds))


@main.command()
def devices() -> None:
    """Print the devices that TensorFlow sees, one per line."""
    from poolbench.core.plan import WorkerSpec
    from poolbench.worker.backends import BACKENDS

    backend = BACKENDS["tensorflow"]
    backend.start(WorkerSpec())
    emit("\n".join(backend.devices()))
