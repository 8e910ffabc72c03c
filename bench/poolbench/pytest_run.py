"""The run behind a pytest session: registered only where a benchmark was collected."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolbench.core.case import Case, case_label
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.plan import PRESETS, Plan
from poolbench.core.registry import baseline_of
from poolbench.core.terminal import poolbench_command
from poolbench.engine.progress import (
    Progress,
    describe_fastest,
    describe_shares,
    format_minutes,
    own_terminal,
)
from poolbench.engine.stops import Stops

if TYPE_CHECKING:
    from poolbench.core.records import Measurement
    from poolbench.engine.ray_cluster import RayScheduler
    from poolbench.engine.run import Run, RunOptions
    from poolbench.options import Asked

# The exit status of a run that the disk stopped: pytest's own for an error that is no test's.
EXIT_STOPPED = int(pytest.ExitCode.INTERNAL_ERROR)
STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


@dataclass(eq=False)
class Launcher:
    """The command that started pytest, and what it wants back; a plugin of the session.

    Attributes:
        words: of the command, as typed, its verb first; None where pytest itself was typed.
        folder: of the run, once it is over; None where nothing was stored.
        interrupted: whether Ctrl-C ended the session.
    """

    words: Sequence[str] | None = None
    folder: Path | None = None
    interrupted: bool = False

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Remember that Ctrl-C ended the session: pytest's exit status has other causes too."""
        self.interrupted = isinstance(excinfo.value, KeyboardInterrupt)


class RunSession:
    """The run of a session's benchmarks: the hooks that begin it, show it and end it."""

    def __init__(
        self, config: pytest.Config, asked: Asked, pairs: Iterable[tuple[Case, str]]
    ) -> None:
        self.asked = asked
        self.not_ok: list[dict[str, Any]] = []
        self.ahead = 0  # tests whose work is done before they run: cells of the support matrix
        self._config = config
        self._cases: dict[Case, tuple[str, ...]] = {}
        for case, name in pairs:
            self._cases[case] = (*self._cases.get(case, ()), name)
        self._raced: dict[Case, dict[str, Measurement]] = {}
        self._run: Run | None = None
        self._progress: Progress | None = None
        self._stops = Stops()
        self.unwritten = ""  # what the disk refused

    @property
    def run(self) -> Run:
        """The run, begun at the first call."""
        if self._run is None:
            try:
                self._run = self._begin()
            except UsageError as error:
                raise pytest.UsageError(str(error)) from None
        return self._run

    def results(self) -> Path:
        """Return the folder that holds the runs."""
        return Path(self._config.invocation_params.dir, self.asked.options["results"])

    def _begin(self) -> Run:
        from poolbench.core.registry import user_files
        from poolbench.engine.run import Run, RunOptions
        from poolbench.machine.limits import total_memory_nbytes
        from poolbench.store.runs import new_run_folder

        given, plan = self.asked.options, plan_of(self.asked.options)
        name, results = given["resume"] or given["run"], self.results()
        options = RunOptions(
            folder=results / name if name else new_run_folder(results, given["sweep"]),
            plan=plan,
            asked={
                "sweep": given["sweep"],
                "axes": list(given["axis"]),
                "processes": plan.processes,
                "budget_seconds": plan.budget_seconds,
                "precision": given["precision"],
                "margin": given["margin"],
                "limit_seconds": given["task_timeout"],
                "memory_nbytes": given["memory"],
            },
            files=user_files(self.asked.files),
            memory_nbytes=given["memory"] or total_memory_nbytes() * 3 // 4,
            resume=given["resume"] is not None,
            allow_different=given["allow_different"],
        )
        run = Run(options, progress=self.say, remote=_find_cluster(given, options, self.say))
        run.expect(list(self._cases))
        for case, names in self._cases.items():
            run.ahead(case, names, baseline=baseline_of(case, names))
        return run

    def measurements(self, case: Case) -> dict[str, Measurement]:
        """Return the case's measurements by candidate; the first call runs the race."""
        if case in self._raced:
            return self._raced[case]
        names = self._cases[case]
        baseline = baseline_of(case, names)
        if self.asked.options["check_only"]:
            self._raced[case] = self.run.check(case, names)
            return self._raced[case]
        if self._progress is not None:
            self._progress.now = f"{case.op} {case_label(case)}"
        try:
            found = self.run.race(case, names, baseline=baseline)
        except UsageError as error:
            pytest.exit(str(error), returncode=int(pytest.ExitCode.USAGE_ERROR))
        except StoreError as error:
            pytest.exit(str(error), returncode=EXIT_STOPPED)
        self._raced[case] = found
        self._show(case, describe_fastest(found, baseline))
        return found

    def _show(self, case: Case, fastest: str) -> None:
        """Print a race's result, and what is left."""
        line = f"{case.op} {case_label(case)}: {fastest}"
        if self._progress is None:
            self.say(line)
            return
        self._progress.advance()
        left = self._progress.left_seconds()
        more = f"; about {format_minutes(left)} left" if left else ""
        self.say(f"[{self._progress.done}/{self._progress.total}] {line}{more}")

    def say(self, line: str) -> None:
        """Print a line of progress, past pytest's capture."""
        if self._progress is not None:
            self._progress.say(line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        capture: Any = self._config.pluginmanager.getplugin("capturemanager")
        if self._config.pluginmanager.getplugin("terminalreporter") is None:
            return
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            writer = self._config.get_terminal_writer()
            if writer.width_of_current_line:
                writer.line()
            writer.line(line)
            writer.flush()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Print the races and stop, with --dry-run; otherwise show what is to come, and how it goes."""
        if session.config.option.collectonly:
            return None
        if not self._cases:
            self._count_tests(session)
            return None
        from poolbench.stats import planning

        plan = plan_of(self.asked.options)
        seconds = planning.predict_seconds(self._cases, plan)
        predicted = f"{len(self._cases)} races, about {format_minutes(seconds)}"
        if self.asked.options["dry_run"]:
            for case, names in self._cases.items():
                self.say(f"{case.op} {case_label(case)}: {', '.join(names)}")
            self.say(f"{predicted}; nothing was run (--dry-run)")
            return True
        if not self.asked.options["check_only"]:
            self.say(predicted)
            self.say(planning.resolution_text(self.results(), plan))
            self._progress = Progress(
                len(self._cases), write=self._write, predicted_seconds=seconds,
                terminal=own_terminal(), partial=lambda: self._run.under_way() if self._run else 0.0,
            )  # fmt: skip
            self._progress.now = "starting worker processes"
            self._progress.start()
        return None

    def _count_tests(self, session: pytest.Session) -> None:
        """Show how many tests are done where none is a race: of models, or of the support matrix."""
        if self.asked.options["check_only"] or self.asked.options["dry_run"]:
            return
        self._progress = progress = Progress(
            len(session.items), write=self._write, terminal=own_terminal(),
            partial=lambda: max(0, self.ahead - progress.done),
        )  # fmt: skip
        self._progress.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Show the test that runs."""
        if self._progress is not None and not self._cases:
            self._progress.now = nodeid.rpartition("::")[2]

    def pytest_runtest_logfinish(self) -> None:
        """Count the test as done."""
        if self._progress is not None and not self._cases:
            self._progress.advance()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.TestReport, config: pytest.Config
    ) -> tuple[str, str, str] | None:
        """Print no letter for a test: the races have lines of their own."""
        if config.option.verbose > 0 or not isinstance(report, pytest.TestReport):
            return None
        if hasattr(report, "wasxfail") or (report.passed and report.when != "call"):
            return None
        return report.outcome, "", "FAILED" if report.failed else ""

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        """Stop where the disk refuses: a measurement that cannot be stored is not worth its time."""
        if call.excinfo is not None and isinstance(call.excinfo.value, StoreError):
            pytest.exit(str(call.excinfo.value), returncode=EXIT_STOPPED)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Show where the run was stopped, not every frame: to read their sources takes seconds."""
        self._stops.ignore()
        if isinstance(excinfo.value, KeyboardInterrupt):
            excinfo.traceback = excinfo.traceback[-1:]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """End the run: workers, journal, and its last line."""
        self._stops.ignore()  # a second Ctrl-C would leave workers behind
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._run is not None:
            self._finish(session, self._run)
            self._run = None
        self._stops.restore()

    def _finish(self, session: pytest.Session, run: Run) -> None:
        stopped = session.exitstatus in STOPPED or bool(session.shouldfail or session.shouldstop)
        shares = run.shares()
        try:
            run.close(finished=not stopped)
        except (StoreError, OSError) as error:
            self.unwritten = self.unwritten or str(error)
        if self.unwritten:
            self.say(self.unwritten)
            session.exitstatus = EXIT_STOPPED
            stopped = True
        if self.asked.options["check_only"]:
            return
        folder = run.options.folder.absolute()
        launcher = find_launcher(session.config)
        if stopped:
            kept = run.kept()
            where = f"{kept} are kept in {folder}" if kept else "nothing was stored yet"
            self.say(f"{where}; go on with:")
            self.say(resume_command(session.config.invocation_params, launcher, folder.name))
        elif run.done:
            self.say(describe_shares(shares.seconds, shares.wall_seconds))
            if launcher is None:
                command = f"{poolbench_command()} report {shlex.quote(str(folder))}"
                self.say(f"stored; render it with: {command}")
        if launcher is not None and not stopped:
            launcher.folder = folder

    def open_benchmark_json(self) -> None:
        """Open the journal; have pytest-benchmark write benchmark.json beside it, unless another file is given."""
        self._stops.handle()  # before anything that takes time
        config, options = self._config, self.asked.options
        benchmarks = getattr(config, "_benchmarksession", None)
        skipped = benchmarks is not None and benchmarks.skip
        if config.option.collectonly or options["dry_run"] or options["check_only"] or skipped:
            return
        try:
            self.run.prepare()  # what is wrong with the journal is found before anything is run
        except (UsageError, StoreError) as error:
            raise pytest.UsageError(str(error)) from None
        if not self._cases or benchmarks is None or benchmarks.disabled or benchmarks.json:
            return
        path = self.run.options.folder / "benchmark.json"
        benchmarks.json = str(path)
        benchmarks.save_json = partial(_save_json, self, benchmarks.save_json, path)

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add the candidates without samples, which pytest-benchmark leaves out; remove the host's name."""
        output_json["machine_info"].pop("node", None)
        output_json["poolbench"] = {"not_ok": self.not_ok}


def plan_of(asked: Mapping[str, Any]) -> Plan:
    """Return what the sweep and the options ask of each race."""
    given = {"processes": asked["processes"], "budget_seconds": asked["budget"]}
    return Plan(
        **dict(PRESETS[asked["sweep"]]) | {k: v for k, v in given.items() if v is not None},
        precision=asked["precision"],
        margin=asked["margin"],
        timeout_seconds=asked["task_timeout"],
        seed=asked["seed"],
    )


def _find_cluster(
    asked: Mapping[str, Any], options: RunOptions, say: Callable[[str], None]
) -> RayScheduler | None:
    """Return the cluster of --ray-address; None where the races are this machine's."""
    address = asked["ray_address"]
    if address is None or asked["check_only"]:
        return None
    from poolbench.engine.ray_cluster import RayScheduler

    return RayScheduler(address, files=options.files, memory_nbytes=asked["memory"], progress=say)


def _save_json(
    session: RunSession, save: Callable[[Any], None], path: Path, output: dict[str, Any]
) -> None:
    """Write benchmark.json, unless the disk refuses: a resumed run makes it of the journal."""
    try:
        save(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        session.unwritten = f"cannot write {path.name}: {error.strerror or error}"


def find_launcher(config: pytest.Config) -> Launcher | None:
    """Return the command that started this session; None where pytest itself was typed."""
    found = (p for p in config.pluginmanager.get_plugins() if isinstance(p, Launcher))
    return next(found, None)


def resume_command(
    invocation: pytest.Config.InvocationParams, launcher: Launcher | None, name: str
) -> str:
    """Return the command that goes on with a run, from any folder."""
    prefix = "--poolbench-" if launcher is None else "--"
    words = invocation.args if launcher is None else launcher.words or ()
    kept: list[str] = []
    skip = False
    for word in map(str, words):
        named = word.partition("=")[0] in (f"{prefix}run", f"{prefix}resume")
        if not skip and not named:
            kept.append(word)
        skip = not skip and named and "=" not in word
    # Behind "--" are pytest's own words.
    at = kept.index("--") if "--" in kept else len(kept)
    more = shlex.join([*kept[:at], f"{prefix}resume", name, *kept[at:]])
    # The words of a command begin with its verb: run, matrix.
    start = poolbench_command() if launcher else f"{shlex.quote(sys.executable)} -m pytest"
    return f"cd {shlex.quote(str(invocation.dir))} && {start} {more}"
