"""The pytest plugin: options, the fixtures of a suite, and the replay into pytest-benchmark.

Nothing here imports TensorFlow: collection reads the sweeps, workers do the rest.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poolbench.core.axes import STANDARD
from poolbench.core.candidate import Candidate
from poolbench.core.case import Case, case_label
from poolbench.core.errors import UsageError
from poolbench.core.op import Op
from poolbench.core.plan import PRESETS, Plan
from poolbench.core.registry import REGISTRY, parse_axis_early
from poolbench.core.sweep import Sweep, SweepCase

if TYPE_CHECKING:
    from poolbench.core.records import Measurement
    from poolbench.engine.ray_cluster import RayScheduler
    from poolbench.engine.run import Run, RunOptions

PACKAGE = Path(__file__).parent


SWEEPS = tuple(PRESETS)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The doors of `pytest suites`."""
    group = parser.getgroup("poolbench", "poolbench: races of candidates")
    add = group.addoption
    add(
        "--sweep",
        metavar="NAME",
        help=f"which sweep of each op: {', '.join(SWEEPS)}; quick with --benchmark-disable",
    )
    add(
        "--axis", action="append", default=[], metavar="NAME=V1,V2",
        help=f"replace an axis' values; axes: {', '.join(STANDARD)}",
    )  # fmt: skip
    add("--processes", help="fresh processes to start with (at least 1)")
    add("--precision", default="3%", help="half-width that is enough: 3%%")
    add("--margin", default="5%", help="equivalence margin of verdicts: 5%%")
    add("--budget", help="seconds of rounds that a race may take")
    add("--timeout-task", "--limit", default="60", dest="task_timeout",
        help="seconds that one task of a worker may take")  # fmt: skip
    add("--memory", help="memory a worker may hold: 8GiB; default: three quarters of the machine's")
    add("--run", dest="poolbench_run", metavar="NAME", help="name of the run under results/")
    add("--resume", metavar="NAME", help="go on with a run")
    add("--allow-different", action="append", default=[], metavar="NAME",
        help="a field in which a resumed run may differ: tensorflow, commit, ...")  # fmt: skip
    add(
        "--ray",
        metavar="ADDRESS",
        help="race on the nodes of a Ray cluster: HOST:PORT, ray://HOST:PORT or auto",
    )
    add(
        "--candidates",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that registers candidates",
    )
    add("--seed", default="0", help="of the inputs and the order of rounds")
    add("--plan", action="store_true", help="print the cases and the predicted time, run nothing")
    add("--exports", action="store_true", help="try TFLite and ONNX too, in the support matrix")
    add("--results", default="results", metavar="FOLDER", help="where runs are kept")


def _argument(pattern: str, example: str) -> Callable[[str], re.Match[str]]:
    def match(text: str) -> re.Match[str]:
        found = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
        if found is None:
            raise UsageError(f"takes something like {example}; got {text!r}")
        return found

    return match


def _whole(text: str) -> int:
    return int(_argument(r"[1-9]\d{0,3}", "5")(text)[0])


def _seconds(text: str) -> float:
    return float(_argument(r"(\d+(?:\.\d+)?)\s*s?", "10")(text)[1])


def _fraction(text: str) -> float:
    found = _argument(r"(\d+(?:\.\d+)?)\s*(%?)", "2%")(text)
    return float(found[1]) / (100 if found[2] else 1)


def _nbytes(text: str) -> int:
    found = _argument(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", "8GiB")(text)
    return int(float(found[1]) * 1024 ** "_kmgt".index(found[2].lower() or "_"))


def _integer(text: str) -> int:
    return int(_argument(r"-?\d{1,18}", "7")(text)[0])


def _sweep(text: str) -> str:
    if text not in SWEEPS:
        raise UsageError(f"takes one of {', '.join(SWEEPS)}; got {text!r}")
    return text


# Read here and not by argparse, which says what is wrong in three lines.
PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "sweep": ("--sweep", _sweep),
    "processes": ("--processes", _whole),
    "precision": ("--precision", _fraction),
    "margin": ("--margin", _fraction),
    "budget": ("--budget", _seconds),
    "task_timeout": ("--limit", _seconds),
    "memory": ("--memory", _nbytes),
    "seed": ("--seed", _integer),
}


def _parse_options(config: pytest.Config) -> None:
    """Put values in the place of the options' texts.

    Raises:
        UsageError: an option's value is bad.
    """
    for name, (flag, parse) in PARSERS.items():
        text = getattr(config.option, name, None)
        if isinstance(text, str):
            try:
                setattr(config.option, name, parse(text))
            except UsageError as error:
                raise UsageError(f"{flag} {error}") from None


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, load the user's files, and send benchmark.json to the run's folder."""
    # A candidate that cannot run leaves pytest-benchmark's fixture unused: that is its result.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.addinivalue_line("markers", "op(name): the op whose cases and candidates a test races")
    if config.option.sweep is None:
        disabled = getattr(config.option, "benchmark_disable", False)
        config.option.sweep = "quick" if disabled else "default"  # a check need not be long
    try:
        _parse_options(config)
        config.stash[_SETUP] = _read_options(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


@dataclass
class _Setup:
    """What the command line asked, and the run once it has begun."""

    axes: list[tuple[str, tuple[Any, ...]]]
    files: tuple[Path, ...]
    bench: Run | None = None
    plan: dict[Case, tuple[str, ...]] | None = None
    races: int = 0
    started: float = 0.0
    spent: float = 0.0


_SETUP = pytest.StashKey[_Setup]()


def _read_options(config: pytest.Config) -> _Setup:
    from poolbench.core.registry import import_file

    axes = [parse_axis_early(text) for text in config.getoption("--axis")]
    if config.getoption("--ray") is None:
        _refuse_kinds(str(v) for name, values in axes if name == "device" for v in values)
    files = []
    for name in config.getoption("--candidates"):
        path = Path(name).resolve()
        if not path.is_file():
            raise UsageError(f"--candidates takes a Python file; there is no {name}")
        try:
            import poolbench.ops  # noqa: F401 (registers the ops)

            import_file(path)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 (a file may raise anything)
            raise UsageError(
                f"--candidates {name} cannot be loaded: {type(error).__name__}: {error}"
            ) from None
        files.append(path)
    return _Setup(axes=axes, files=tuple(files))


def planned_cases(
    op: Op, sweep: str, axes: Sequence[tuple[str, tuple[Any, ...]]]
) -> list[SweepCase]:
    """An op's cases with the axes replaced, ordered by what a process fixes for its life."""
    chosen: Sweep = op.sweep(sweep)
    for name, values in axes:
        chosen = chosen.replace(name, values)
    return sorted(chosen.planned(), key=lambda planned: planned.case.threads)


def racing(op: Op, planned: SweepCase) -> list[str]:
    """Who races in a case: those that the sweep names, and every one of the user's own."""
    entries = REGISTRY.of(op.name)
    names = planned.candidates or tuple(entries)
    if unknown := [name for name in names if name not in entries]:
        raise UsageError(
            f"the sweep of {op.name} names {', '.join(unknown)}, which nobody registered"
        )
    return [name for name, entry in entries.items() if name in names or not entry.builtin]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a suite's test by case and by candidate, separately.

    Jointly, pytest would set up the session-scoped race again for every candidate.
    """
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None or "replay" not in metafunc.fixturenames:
        return
    import poolbench.ops  # noqa: F401 (registers the ops)

    op = REGISTRY.ops.get(marker.args[0])
    if op is None:
        raise pytest.UsageError(
            f"no op {marker.args[0]!r} is registered; there are {', '.join(REGISTRY.ops)}"
        )
    setup = metafunc.config.stash[_SETUP]
    try:
        planned = planned_cases(op, metafunc.config.getoption("--sweep"), setup.axes)
        plan = {item.case: tuple(racing(op, item)) for item in planned}
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    setup.plan = (setup.plan or {}) | plan
    names = [name for name in REGISTRY.of(op.name) if any(name in row for row in plan.values())]
    metafunc.parametrize("case", list(plan), ids=case_label, indirect=True, scope="session")
    metafunc.parametrize("candidate", names)


def _refuse_kinds(devices: Iterable[str]) -> None:
    """Refuse a kind of accelerator where there is no fleet that could know it."""
    for device in devices:
        if not device.partition(":")[2].isdigit():
            raise UsageError(
                f"{device} names a kind of accelerator in a fleet (--ray ADDRESS); on this machine "
                "devices are numbered: --axis device=gpu:0"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the pairs that the sweep races, and give each the clock that its samples will drive."""
    setup = config.stash[_SETUP]
    for name, _ in setup.axes:  # the ops of all suites are known now
        if name not in REGISTRY.axis_names():
            raise pytest.UsageError(REGISTRY.unknown_axis(name))
    kept = []
    for item in items:
        pair = _pair(item)
        if pair is None:
            kept.append(item)
        elif setup.plan is not None and pair[1] in setup.plan[pair[0]]:
            clock = make_replay_clock()
            item.add_marker(pytest.mark.benchmark(timer=clock, group=_group(pair[0])))
            kept.append(item)
    # Workers of one setting serve all of its races; another setting takes fresh ones, ten seconds' wait.
    items[:] = sorted(kept, key=_threads)


def _threads(item: pytest.Item) -> int:
    pair = _pair(item)
    return 0 if pair is None else pair[0].threads or 0


def _pair(item: pytest.Item) -> tuple[Case, str] | None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    if item.get_closest_marker("op") is None or "case" not in params or "candidate" not in params:
        return None
    return params["case"], params["candidate"]


def _group(case: Case) -> str:
    return f"{case.op} {case_label(case)}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """The races to come: the selected candidates of each case."""
    setup = session.config.stash[_SETUP]
    selected: dict[Case, tuple[str, ...]] = {}
    for item in session.items:
        if (pair := _pair(item)) is not None:
            selected[pair[0]] = (*selected.get(pair[0], ()), pair[1])
    setup.plan = selected
    if not selected or session.config.option.collectonly or session.config.getoption("--plan"):
        return
    _open_benchmark_json(session.config)


def _open_benchmark_json(config: pytest.Config) -> None:
    """Have pytest-benchmark write benchmark.json into the run's folder, unless told otherwise."""
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is None or benchmarks.json or benchmarks.disabled:
        return
    bench = _bench(config)
    _prepare(bench)
    benchmarks.json = str(bench.options.folder / "benchmark.json")


def _prepare(bench: Run) -> None:
    """Open the run's journal before anything is run: what is wrong with it is found out now."""
    from poolbench.core.errors import StoreError

    try:
        bench.prepare()
    except (UsageError, StoreError) as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --plan, print the races and stop; otherwise say what is to come."""
    config = session.config
    setup = config.stash[_SETUP]
    if not setup.plan or session.config.option.collectonly:
        return None
    from poolbench.stats import planning

    plan = _plan(config)
    seconds = planning.predict_seconds(setup.plan, plan)
    if not config.getoption("--plan"):
        if not _checks_only(config):
            _say(config, f"{len(setup.plan)} races, about {format_minutes(seconds)}")
            results = config.rootpath / config.getoption("--results")
            _say(config, planning.resolution_text(results, plan))
        setup.started = time.monotonic()
        return None
    for case, names in setup.plan.items():
        _say(config, f"{_group(case)}: {', '.join(names)}")
    _say(
        config,
        f"{len(setup.plan)} races, about {format_minutes(seconds)}; nothing was run (--plan)",
    )
    return True


def format_minutes(seconds: float) -> str:
    """'8 min' or '40 s'."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _checks_only(config: pytest.Config) -> bool:
    benchmarks = getattr(config, "_benchmarksession", None)
    return benchmarks is not None and bool(benchmarks.disabled)


def _plan(config: pytest.Config) -> Plan:
    """What the sweep and the options ask of each race."""
    asked = {
        "processes": config.getoption("--processes"),
        "budget_seconds": config.getoption("--budget"),
    }
    return Plan(
        **dict(PRESETS[config.getoption("--sweep")])
        | {name: value for name, value in asked.items() if value is not None},
        precision=config.getoption("--precision"),
        margin=config.getoption("--margin"),
        timeout_seconds=config.getoption("task_timeout"),
        seed=config.getoption("--seed"),
    )


def _bench(config: pytest.Config) -> Run:
    """The run, begun at the first call."""
    setup = config.stash[_SETUP]
    if setup.bench is None:
        setup.bench = _begin(config, setup)
    return setup.bench


def _begin(config: pytest.Config, setup: _Setup) -> Run:
    import psutil

    from poolbench.engine.run import Run, RunOptions
    from poolbench.store.runs import RUN_NAME, new_run_folder

    plan = _plan(config)
    results = config.rootpath / config.getoption("--results")
    name = config.getoption("--resume") or config.getoption("poolbench_run")
    if name and not RUN_NAME.fullmatch(name):
        raise pytest.UsageError(f"a run's name is letters, digits, '.', '_', '-'; got {name!r}")
    sweep = config.getoption("--sweep")
    options = RunOptions(
        folder=results / name if name else new_run_folder(results, sweep),
        plan=plan,
        asked={
            "sweep": sweep,
            "axes": list(config.getoption("--axis")),
            "processes": plan.processes,
            "budget_seconds": plan.budget_seconds,
            "precision": config.getoption("--precision"),
            "margin": config.getoption("--margin"),
            "limit_seconds": config.getoption("task_timeout"),
            "memory_nbytes": config.getoption("--memory"),
        },
        files=user_files(setup.files),
        memory_nbytes=config.getoption("--memory") or psutil.virtual_memory().total * 3 // 4,
        resume=config.getoption("--resume") is not None,
        allow_different=tuple(config.getoption("--allow-different")),
    )
    fleet = _fleet(config, options)
    bench = Run(options, progress=lambda line: _say(config, line), remote=fleet)
    bench.expect(list(setup.plan or ()))
    for case, names in (setup.plan or {}).items():
        entries = [REGISTRY.candidates[case.op, name] for name in names]
        bench.ahead(case, entries, baseline=REGISTRY.ops[case.op].baseline)
    return bench


def _fleet(config: pytest.Config, options: RunOptions) -> RayScheduler | None:
    """The cluster of --ray; None where the races are this machine's."""
    address = config.getoption("--ray")
    if address is None or _checks_only(config):
        return None
    from poolbench.engine.ray_cluster import RayScheduler

    try:
        return RayScheduler(
            address,
            files=options.files,
            memory_nbytes=config.getoption("--memory"),
            progress=lambda line: _say(config, line),
        )
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def user_files(named: Sequence[Path]) -> tuple[Path, ...]:
    """The files, beyond the package, that registered an op or a candidate: workers import them too."""
    registered = [op.file for op in REGISTRY.ops.values()]
    registered += [entry.file for entry in REGISTRY.candidates.values()]
    files = [*named, *(Path(file).resolve() for file in registered)]
    return tuple(dict.fromkeys(file for file in files if PACKAGE not in file.parents))


def _say(config: pytest.Config, line: str) -> None:
    """A line to the terminal, past pytest's capture."""
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if reporter is None:
        return
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        writer = config.get_terminal_writer()
        if writer.width_of_current_line:
            writer.line()
        writer.line(line)
        writer.flush()


@dataclass(frozen=True, kw_only=True)
class Raced:
    """A race that has been run: its case and its measurements by candidate."""

    case: Case
    measurements: dict[str, Measurement]


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line of progress, past pytest's capture."""
    return lambda line: _say(request.config, line)


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Case:
    """The case that the test's race is about."""
    found: Case = request.param
    return found


@pytest.fixture(scope="session")
def race(case: Case, request: pytest.FixtureRequest) -> Raced:
    """The case's race, run once: its selected candidates, the baseline and the bandwidth limit probes."""
    config = request.config
    setup = config.stash[_SETUP]
    assert setup.plan is not None
    op = REGISTRY.ops[case.op]
    entries: list[Candidate] = [REGISTRY.candidates[case.op, name] for name in setup.plan[case]]
    bench = _bench(config)
    if _checks_only(config):
        return Raced(case=case, measurements=bench.check(case, entries))
    from poolbench.core.errors import StoreError

    start = time.monotonic()
    try:
        measurements = bench.race(case, entries, baseline=op.baseline)
    except UsageError as error:
        pytest.exit(str(error), returncode=4)
    except StoreError as error:
        pytest.exit(str(error), returncode=EXIT_STOPPED)
    setup.races += 1
    setup.spent += time.monotonic() - start
    _say(config, _progress_line(setup, case, measurements, op))
    return Raced(case=case, measurements=measurements)


def _progress_line(setup: _Setup, case: Case, measurements: dict[str, Measurement], op: Op) -> str:
    assert setup.plan is not None
    done = setup.races + (setup.bench.under_way() if setup.bench else 0.0)
    left = setup.spent / done * (len(setup.plan) - done)
    return (
        f"[{setup.races}/{len(setup.plan)}] {_group(case)}: {fastest_line(measurements, op.baseline)}"
        + (f"; about {format_minutes(left)} left" if left else "")
    )


def fastest_line(measurements: dict[str, Measurement], baseline: str) -> str:
    """'fastest keras-stock, 0.71 of reshape-reduce_max' over the right ones, or that none is right."""
    from poolbench.engine.recorder import middle

    times = {
        name: middle(m.samples.seconds)
        for name, m in measurements.items()
        if m.status == "ok" and len(m.samples) and "faster-than-limit" not in m.flags
    }
    if not times:
        return "no right candidate"
    best = min(times, key=lambda name: times[name])
    if baseline not in times or best == baseline:
        return f"fastest {best}"
    return f"fastest {best}, {times[best] / times[baseline]:.2f} of {baseline}"


@pytest.fixture(scope="session")
def run_in_progress(request: pytest.FixtureRequest) -> Run:
    """The run, for a suite that races something else than an op's cases; skipped by --plan."""
    if request.config.getoption("--plan"):
        pytest.skip("nothing is run (--plan)")
    return _bench(request.config)


@pytest.fixture(scope="session")
def checks_only(request: pytest.FixtureRequest) -> bool:
    """Whether --benchmark-disable asks for checks without times."""
    return _checks_only(request.config)


@pytest.fixture
def replay(
    race: Raced, candidate: str, benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[], None]:
    """Replays the candidate's samples into pytest-benchmark; skips or fails with its status.

    `unsupported` and a documented wrong answer are results that were expected; every other status but
    `ok` fails the test.
    """

    def run() -> None:
        measurement = race.measurements[candidate]
        benchmark.extra_info.update(_extra(measurement))
        outcome = OUTCOMES.get(measurement.status, pytest.fail)
        if measurement.status == "wrong" and "documented" in measurement.flags:
            outcome = pytest.xfail
        if measurement.status != "ok":
            request.config.stash.setdefault(_NOT_RUN, []).append(_extra(measurement))
            text = f"{measurement.status}: {measurement.reason}"
            if outcome is pytest.fail:
                pytest.fail(
                    text + (f"\n{measurement.tail}" if measurement.tail else ""), pytrace=False
                )
            outcome(text)
        seconds = measurement.samples.seconds
        marker = request.node.get_closest_marker("benchmark")
        marker.kwargs["timer"].load(seconds)
        benchmark.pedantic(_nothing, rounds=max(1, len(seconds)))

    return run


OUTCOMES: dict[str, Callable[..., Any]] = {"unsupported": pytest.skip, "not_run": pytest.skip}
_NOT_RUN = pytest.StashKey[list[dict[str, Any]]]()


def _nothing() -> None:
    """What pytest-benchmark calls: the calls themselves were made in the race."""


def _extra(measurement: Measurement) -> dict[str, Any]:
    return {
        "op": measurement.case.op,
        "case": case_label(measurement.case),
        "candidate": measurement.candidate,
        "status": measurement.status,
        "reason": measurement.reason,
        "flags": list(measurement.flags),
    }


def make_replay_clock() -> Callable[[], float]:
    """A timer for pytest-benchmark under which each round takes as long as the next loaded sample."""
    moments: Iterator[float] = iter(())

    def clock() -> float:
        return next(moments)

    def load(seconds: Sequence[float]) -> None:
        nonlocal moments
        moments = _moments(seconds)

    clock.load = load  # type: ignore[attr-defined]
    return clock


def _moments(seconds: Sequence[float]) -> Iterator[float]:
    # Every round starts at zero: sums over many rounds would lose digits of the samples.
    for sample in seconds:
        yield 0.0
        yield sample


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Leave the host's name out of benchmark.json."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add what did not run, with status and reason; pytest-benchmark keeps only what did."""
    del benchmarks
    output_json["poolbench"] = {"not_ok": config.stash.get(_NOT_RUN, [])}


def pytest_exception_interact(call: pytest.CallInfo[Any]) -> None:
    """Stop where the disk refuses: what is not written down need not be measured."""
    from poolbench.core.errors import StoreError

    if call.excinfo is not None and isinstance(call.excinfo.value, StoreError):
        pytest.exit(str(call.excinfo.value), returncode=EXIT_STOPPED)


@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Show where the run was stopped, and not every frame: to read their sources takes seconds."""
    if isinstance(excinfo.value, KeyboardInterrupt):
        excinfo.traceback = excinfo.traceback[-1:]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the run: workers, journal, and its last line."""
    from poolbench.core.errors import StoreError

    setup = session.config.stash.get(_SETUP, None)
    if setup is None or setup.bench is None:
        return
    bench = setup.bench
    stopped = session.exitstatus in STOPPED
    setup.bench = None
    shares = bench.shares()
    with _ignoring_interrupts():  # a second Ctrl-C would leave workers behind
        try:
            bench.close(finished=not stopped)
        except StoreError as error:
            _say(session.config, str(error))
            stopped = True
    if _checks_only(session.config):
        return
    name = bench.options.folder.name
    if stopped:
        _say(
            session.config,
            f"{len(bench.done)} measurements are kept in results/{name}; go on with:",
        )
        _say(session.config, resume_command(session.config.invocation_params.args, name))
    elif bench.done:
        _say(session.config, shares_line(shares.seconds, shares.wall_seconds))
        _say(session.config, f"stored in results/{name}; render it with: python report.py {name}")


# The exit status of a run that the disk stopped: pytest's own for an error that is no test's.
EXIT_STOPPED = int(pytest.ExitCode.INTERNAL_ERROR)
STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def resume_command(words: Sequence[str], name: str) -> str:
    """The command that goes on with a run that was started with these words."""
    kept: list[str] = []
    skip = False
    for word in map(str, words):
        flag = word.partition("=")[0]
        if not skip and flag not in ("--run", "--resume"):
            kept.append(word)
        skip = not skip and word in ("--run", "--resume")
    python = Path(sys.executable)
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "pytest", *kept, "--resume", name])


def shares_line(seconds: dict[str, float], wall_seconds: float) -> str:
    """'wall 512 s: samples 41%, warmup 22%, ...'."""
    parts = ", ".join(
        f"{kind} {100 * value / max(wall_seconds, 1e-9):.0f}%"
        for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f"wall {wall_seconds:.0f} s: {parts}"
