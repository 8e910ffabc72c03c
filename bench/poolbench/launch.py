"""Start pytest with the plugin: what `poolbench run` does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

from poolbench.core.errors import UsageError
from poolbench.core.plan import PRESETS, Plan
from poolbench.core.terminal import emit
from poolbench.engine.stops import Stops
from poolbench.options import OPTIONS
from poolbench.store.runs import check_run_name, has_journal, new_run_folder

PACKAGE = Path(__file__).parent
# Not benchmarks of ops: they run where they are named.
NAMED_ONLY = ("capabilities", "network")
# The ops that a bare run leaves out: they run with --op, in the sweep 'full', or where the suite is named.
FURTHER_OPS = "further_ops"
EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130
# Between repeated runs: a burst of load by others then seldom spans two.
PAUSE_SECONDS = 30
CHILD_END_SECONDS = 3.0  # that a run takes to end after Ctrl-C, with room


def suites_folder() -> Path:
    """Return the folder of the suites that ship: in an installation, else in the checkout."""
    folders = (PACKAGE / "suites", PACKAGE.parents[1] / "suites")
    return next(folder for folder in folders if folder.is_dir())


def find_suites(named: Sequence[str], *, all_ops: bool = False) -> list[str]:
    """Return the files of the named suites: paths as they are, names from those that ship.

    Without names, the suites of the ops that a bare run measures or, with `all_ops`, of every op.

    Raises:
        UsageError: there is no such file or suite.
    """
    shipped = {
        path.stem.removeprefix("test_"): path for path in sorted(suites_folder().glob("test_*.py"))
    }
    if not named:
        left_out = NAMED_ONLY if all_ops else (*NAMED_ONLY, FURTHER_OPS)
        return [str(path) for name, path in shipped.items() if name not in left_out]
    found = []
    for name in named:
        if name in shipped:  # also where a folder of that name is at hand: ./network
            found.append(str(shipped[name]))
        elif Path(name.partition("::")[0]).exists():
            found.append(name)
        elif Path(name).name in {path.name for path in shipped.values()}:
            found.append(str(suites_folder() / Path(name).name))  # suites/test_network.py elsewhere
        else:
            raise UsageError(f"no file or suite {name!r}; the suites are {', '.join(shipped)}")
    return found


def option_words(options: Mapping[str, Any], prefix: str = "--poolbench-") -> Iterator[str]:
    """Yield the options of a run as pytest's plugin takes them; with the prefix '--' as a command does."""
    if options.get("keyword"):
        yield from ("-k", options["keyword"])
    for option in OPTIONS:
        value = options.get(option.key)
        if option.flag:
            if value:
                yield f"{prefix}{option.name}"
        elif value is not None:
            for one in value if option.multiple else (value,):
                # Not 1e-05, which no option takes.
                text = f"{Decimal(repr(one)):f}" if isinstance(one, float) else one
                yield f"{prefix}{option.name}={text}"


def require_tensorflow(files: Sequence[str]) -> None:
    """Refuse to run the suites that ship where there is no TensorFlow.

    Raises:
        UsageError: it is not installed; the text says what to install.
    """
    ours = any(Path(file).parent == suites_folder() for file in files)
    if not ours or importlib.util.find_spec("tensorflow") is not None:
        return
    if sys.version_info >= (3, 14):
        raise UsageError(
            f"TensorFlow has no package for Python {sys.version_info[0]}.{sys.version_info[1]}: "
            "use Python 3.10 to 3.13"
        )
    raise UsageError("the suites need TensorFlow: in a checkout of poolbench, pip install '.[cpu]'")


def launch(
    suites: Sequence[str], options: Mapping[str, Any], *, words: Sequence[str]
) -> tuple[Path | None, int]:
    """Run suites under pytest; return the run's folder, None where nothing was stored, and the exit code.

    Args:
        suites: as `find_suites` takes them. From the first word with a dash on, they are pytest's own arguments:
            a word with a dash comes from behind `--`.
        options: of the run, by name.
        words: the command line, for the command that goes on with the run.

    Raises:
        UsageError: a suite is not there, or cannot run here.
    """
    all_ops = bool(options.get("op")) or options.get("sweep") == "full"
    names = list(takewhile(lambda word: not word.startswith("-"), suites))
    given = suites[len(names) :]
    files = find_suites(names, all_ops=all_ops)
    require_tensorflow(files)
    for file in options.get("candidates") or ():
        if not Path(file).is_file():
            raise UsageError(f"--candidates takes a Python file; there is no {file}")

    import pytest

    from poolbench.pytest_run import Launcher

    results = Path(options["results"]).absolute()
    launcher = Launcher(words=words)
    # pytest's memory of failed tests serves its own arguments, such as --last-failed, alone.
    cache = (
        ["-o", f"cache_dir={results / '.pytest_cache'}"] if given else ["-p", "no:cacheprovider"]
    )
    status = pytest.main(
        [
            *files, "-p", "poolbench.pytest_plugin", "-q", "--no-header", "--import-mode=importlib",
            # The user's own configuration of pytest is for tests: coverage, parallel processes, ...
            "-o", "addopts=", "--benchmark-quiet", f"--benchmark-storage=file://{os.devnull}",
            *cache, f"--rootdir={Path.cwd()}", *option_words({**options, "results": results}), *given,
        ],
        plugins=[launcher],
    )  # fmt: skip
    # pytest's other exit statuses: errors of collection, internal and usage errors, no tests.
    code = int(status) if status in (0, 1) else EXIT_UNUSABLE
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and options.get("keyword"):
        emit(f"no test matches -k {options['keyword']}", err=True)
    return launcher.folder, EXIT_INTERRUPTED if launcher.interrupted else code


def launch_repeated(
    suites: Sequence[str], options: Mapping[str, Any], repeat: int
) -> tuple[list[Path], int]:
    """Run suites several times, each in processes of its own; return the folders and the highest exit code.

    The runs share the time of the rounds of one, so that they cost little more than one. Ctrl-C and SIGTERM end
    the present run, and no other one begins.

    Raises:
        UsageError: the options are of a single run.
    """
    if options.get("resume") or options.get("dry_run") or options.get("check_only"):
        raise UsageError("--repeat measures anew: leave out --resume, --dry-run and --check-only")
    sweep = options.get("sweep") or "default"
    budget = options.get("budget") or replace(Plan(), **PRESETS[sweep]).budget_seconds
    results = Path(options["results"]).absolute()
    name = options.get("run") or new_run_folder(results, sweep).name
    for number in range(1, repeat + 1):
        if has_journal(results / check_run_name(f"{name}-{number}")):
            raise UsageError(f"{name}-{number} holds a run already: choose another --run")

    codes: dict[Path, int] = {}
    stops = Stops()
    stops.handle()
    try:
        for number in range(1, repeat + 1):
            if number > 1:
                time.sleep(PAUSE_SECONDS)
            run = f"{name}-{number}"
            own = {**options, "run": run, "budget": budget / repeat, "results": results}
            words = ["run", *option_words(own, "--"), "--", *suites]
            code = call_child([sys.executable, "-m", "poolbench", *words], stops)
            codes[results / run] = code
            if code not in (0, 1):
                break
        highest = max(codes.values())
    except KeyboardInterrupt:
        highest = EXIT_INTERRUPTED
    finally:
        stops.restore()
    if highest == EXIT_INTERRUPTED:
        stored = [folder.name for folder, code in codes.items() if code in (0, 1)]
        emit(f"interrupted; whole runs stored: {', '.join(stored) or 'none'}")
    return list(codes), highest


def call_child(words: Sequence[str], stops: Stops) -> int:
    """Run a command and return its exit code, as a shell does.

    Raises:
        KeyboardInterrupt: the command has ended, because this process was interrupted.
    """
    child = subprocess.Popen(words)  # noqa: S603 (this program itself)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        stops.ignore()
        # A terminal sends Ctrl-C to the child too, which then ends by itself; `kill` does not.
        try:
            child.wait(CHILD_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise
    return code if code >= 0 else 128 - code  # killed by a signal
