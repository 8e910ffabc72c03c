"""The pytest plugin behind `poolbench run`: options, one fixture, one marker, the replay of samples.

Load it with `-p poolbench.pytest_plugin`. A session that collects no benchmark of poolbench is left as
it is. Nothing here imports TensorFlow: collection reads the sweeps, workers do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from poolbench.core.axes import BACKEND, STANDARD
from poolbench.core.case import Case, case_label
from poolbench.core.errors import UsageError
from poolbench.core.op import Op
from poolbench.core.registry import (
    REGISTRY,
    contender_names,
    load_builtin,
    load_candidates,
    parse_axis,
)
from poolbench.core.sweep import Sweep, SweepCase
from poolbench.options import OPTIONS, Asked

if TYPE_CHECKING:
    from poolbench.core.records import Measurement
    from poolbench.engine.run import Run
    from poolbench.pytest_run import RunSession

EXIT_UNUSABLE = 2


_ASKED = pytest.StashKey[Asked]()
_SESSION = pytest.StashKey["RunSession"]()
_REFUSED = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run, each with the prefix --poolbench-."""
    group = parser.getgroup("poolbench", "poolbench: benchmarks of alternative implementations")
    for option in OPTIONS:
        more: dict[str, Any] = {"action": "store_true"}
        if not option.flag:
            more = {"action": "append" if option.multiple else "store",
                    "metavar": option.metavar or option.type.name,
                    "default": [] if option.multiple else option.default}  # fmt: skip
        group.addoption(
            f"--poolbench-{option.name}", dest=f"poolbench_{option.key}",
            help=option.help.replace("%", "%%"), **more,
        )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Read the options and load the user's files of candidates."""
    config.addinivalue_line(
        "markers", "poolbench(op): benchmark each candidate of the op in each case of the sweep"
    )
    try:
        config.stash[_ASKED] = _read_options(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def _read_options(config: pytest.Config) -> Asked:
    options = {
        option.key: option.parse(config.getoption(f"poolbench_{option.key}")) for option in OPTIONS
    }
    options["check_only"] |= bool(getattr(config.option, "benchmark_disable", False))
    options["sweep"] = options["sweep"] or ("quick" if options["check_only"] else "default")
    if options["run"] and options["resume"]:
        raise UsageError("--poolbench-run names a new run, --poolbench-resume an old one: give one")
    files = tuple(load_candidates(name) for name in options["candidates"])
    found = Asked(options=options, files=files)
    found.axes(STANDARD)  # raise errors of values before collection
    return found


def asked(config: pytest.Config) -> Asked:
    """Return what the command line asks."""
    return config.stash[_ASKED]


def planned_cases(op: Op, sweep: str, axes: Mapping[str, tuple[Any, ...]]) -> list[SweepCase]:
    """Return an op's cases with the axes replaced, ordered by what a process fixes for its life."""
    chosen: Sweep = op.sweep(sweep)
    for name, values in axes.items():
        chosen = chosen.replace(name, values)
    return sorted(chosen.planned(), key=lambda planned: planned.case.threads)


def racing(op: Op, planned: SweepCase) -> list[str]:
    """Return the candidates of a case: those that the sweep names, and each one of the user's."""
    entries = REGISTRY.of(op.name)
    names = planned.candidates or tuple(entries)
    if unknown := [name for name in names if name not in entries]:
        raise UsageError(f"the sweep of {op.name} names {', '.join(unknown)}: no such candidate")
    return [name for name, entry in entries.items() if name in names or not entry.builtin]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a benchmark by the cases of the sweep and their candidates."""
    marker = metafunc.definition.get_closest_marker("poolbench")
    if marker is None or "poolbench" not in metafunc.fixturenames:
        return
    load_builtin()
    try:
        pairs = _pairs(asked(metafunc.config), *marker.args, **marker.kwargs)
    except (UsageError, TypeError) as error:
        # Raised here, it would be one traceback per suite.
        metafunc.config.stash.setdefault(_REFUSED, str(error))
        pairs = []
    ids = [f"{case_label(case)}-{name}" for case, name in pairs]
    metafunc.parametrize("poolbench", pairs, ids=ids, indirect=True)


def _pairs(asked: Asked, op: str) -> list[tuple[Case, str]]:
    """Return the cases of an op's sweep, each with every candidate that races in it."""
    chosen = asked.options["op"]
    if unknown := [name for name in (op, *chosen) if name not in REGISTRY.ops]:
        known = ", ".join(REGISTRY.ops)
        raise UsageError(f"no op {unknown[0]!r} is registered; there are {known}")
    if chosen and op not in chosen:
        return []
    found = REGISTRY.ops[op]
    axes = asked.axes([*STANDARD, *(axis.name for axis in found.axes)])
    planned = planned_cases(found, asked.options["sweep"], axes)
    backends = asked.axes([BACKEND.name]).get(BACKEND.name, ("tensorflow",))
    pairs = []
    entries = REGISTRY.of(op)
    for item in planned:
        names = set(racing(found, item))
        for name, entry in entries.items():
            # A sweep names TensorFlow's candidates; the other backends' own race too.
            if name in names or "tensorflow" not in entry.backends:
                pairs += [(item.case, one) for one in contender_names(item.case, name, backends)]
    return pairs


def pair_of(item: pytest.Item) -> tuple[Case, str] | None:
    """Return the case and the candidate of a benchmark; None for any other test."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    pair = params.get("poolbench")
    return pair if isinstance(pair, tuple) and item.get_closest_marker("poolbench") else None


# Last: a plugin that shuffles tests would have workers of one kind started again and again.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the benchmarks by case, and give each the clock that its samples will drive."""
    if not any("poolbench" in getattr(item, "fixturenames", ()) for item in items):
        return
    _refuse(config, {pair[0].op for item in items if (pair := pair_of(item))})
    if hasattr(config, "workerinput"):
        config.workeroutput["poolbench"] = True  # type: ignore[attr-defined]  # xdist's
        items[:] = []
        return
    benchmark = config.pluginmanager.hasplugin("benchmark")
    cases: dict[Case, int] = {}
    for item in items:
        if (pair := pair_of(item)) is None:
            continue
        cases.setdefault(pair[0], len(cases))
        if benchmark:
            group = f"{pair[0].op} {case_label(pair[0])}"
            item.add_marker(pytest.mark.benchmark(timer=ReplayClock(), group=group))
            if "benchmark" not in item.fixturenames:  # type: ignore[attr-defined]  # a function's
                item.fixturenames.append("benchmark")  # type: ignore[attr-defined]

    def place(item: pytest.Item) -> tuple[int, int]:
        pair = pair_of(item)
        return (-1, 0) if pair is None else (pair[0].threads or 0, cases[pair[0]])

    # A marked test without a pair is what pytest makes of an op that --op leaves out.
    items[:] = [i for i in items if pair_of(i) or i.get_closest_marker("poolbench") is None]
    if not items and (axes := asked(config).options["axis"]):
        raise pytest.UsageError(f"no case is left by --axis {' --axis '.join(axes)}")
    items.sort(key=place)


def _refuse(config: pytest.Config, ops: set[str]) -> None:
    """Refuse what collection found wrong, an axis of no collected op, and pytest-timeout."""
    if reason := config.stash.get(_REFUSED, ""):
        raise pytest.UsageError(reason)
    try:
        REGISTRY.check_ops()
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    for text in asked(config).options["axis"]:
        if reason := _axis_error(text, ops):
            raise pytest.UsageError(reason)
    if not config.pluginmanager.hasplugin("timeout"):
        return
    seconds = config.getoption("timeout", default=None) or config.getini("timeout")
    if float(seconds or 0) > 0:
        raise pytest.UsageError(
            "pytest-timeout would end a race in its middle: leave --timeout out "
            "(--poolbench-task-timeout limits each task of a worker)"
        )


def _axis_error(text: str, ops: set[str]) -> str:
    """Return why an axis cannot be asked of these ops; '' if it can."""
    try:
        name, _ = parse_axis(text)
    except UsageError as error:
        return str(error)
    owners = [op.name for op in REGISTRY.ops.values() if name in {axis.name for axis in op.axes}]
    if not ops or not owners or ops & set(owners):
        return ""
    return f"no op of this run has an axis {name!r}: --op {' or --op '.join(owners)}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the run where a benchmark was collected: its hooks, its journal, benchmark.json."""
    if not any("poolbench" in getattr(item, "fixturenames", ()) for item in session.items):
        return
    from poolbench.pytest_run import RunSession

    config = session.config
    run = RunSession(config, asked(config), filter(None, map(pair_of, session.items)))
    config.stash[_SESSION] = run
    config.pluginmanager.register(run, "poolbench-run")
    run.open_benchmark_json()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Learn that a process of pytest-xdist collected a benchmark."""
    if getattr(node, "workeroutput", {}).get("poolbench"):
        node.config.stash[_REFUSED] = (
            "poolbench: benchmarks share no processors with other tests; run without -n"
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End a session under pytest-xdist whose benchmarks were refused."""
    line = session.config.stash.get(_REFUSED, "")
    if line and session.config.pluginmanager.hasplugin("dsession"):
        session.config.get_terminal_writer().line(line)
        session.exitstatus = EXIT_UNUSABLE


class Benchmark:
    """The fixture `poolbench`: one candidate in one case, or the run itself.

    Attributes:
        case, candidate: what the test is parametrized by; None without the marker.
        options: what the command line asks, by name.
    """

    def __init__(self, request: pytest.FixtureRequest, session: RunSession) -> None:
        self.case: Case | None
        self.candidate: str | None
        self.case, self.candidate = getattr(request, "param", (None, None))
        self.options = session.asked.options
        self._request = request
        self._session = session

    def axis(self, name: str) -> tuple[Any, ...]:
        """Return the values that the command line gives an axis; () without any."""
        return self._session.asked.axes([name]).get(name, ())

    @property
    def check_only(self) -> bool:
        """Tell whether candidates are checked and not timed."""
        return bool(self.options["check_only"])

    @property
    def run(self) -> Run:
        """The run, for a test that measures something other than an op's cases."""
        if self.options["dry_run"]:
            pytest.skip("nothing is run (--dry-run)")
        return self._session.run

    def say(self, line: str) -> None:
        """Print a line, past pytest's capture."""
        self._session.say(line)

    def count_ahead(self) -> None:
        """Count the work of a test that has not run yet as done."""
        self._session.ahead += 1

    def replay(self) -> None:
        """Replay the candidate's samples into pytest-benchmark; skip or fail by its status.

        `unsupported` and a documented wrong answer or crash are expected results; every other status but
        `ok` fails the test.
        """
        if self.case is None or self.candidate is None:
            raise pytest.UsageError("poolbench.replay() needs the marker poolbench(op=...)")
        measurement = self._session.measurements(self.case)[self.candidate]
        extra = describe(measurement)
        if self._request.config.pluginmanager.hasplugin("benchmark"):
            seconds = measurement.samples.seconds
            benchmark: Any = self._request.getfixturevalue("benchmark")
            benchmark.extra_info.update(extra)
            benchmark.disabled |= not seconds  # an unused fixture would warn
            marker = self._request.node.get_closest_marker("benchmark")
            marker.kwargs["timer"].load(seconds)
            benchmark.pedantic(_nothing, rounds=max(1, len(seconds)))
        if measurement.status != "ok":
            self._session.not_ok.append(extra)
            _end(measurement)


@pytest.fixture
def poolbench(request: pytest.FixtureRequest) -> Benchmark:
    """Give the test its candidate and case; without the marker, the run."""
    return Benchmark(request, request.config.stash[_SESSION])


def _end(measurement: Measurement) -> None:
    """End a test whose candidate has no samples."""
    text = f"{measurement.status}: {measurement.reason}"
    if measurement.status in ("wrong", "crashed") and "documented" in measurement.flags:
        pytest.xfail(text)
    if measurement.status in ("unsupported", "not_run"):
        pytest.skip(text)
    tail = f"\n{measurement.tail}" if measurement.tail else ""
    pytest.fail(text + tail, pytrace=False)


def describe(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement without its samples, for benchmark.json."""
    return {
        "op": measurement.case.op,
        "case": case_label(measurement.case),
        "candidate": measurement.candidate,
        "status": measurement.status,
        "reason": measurement.reason,
        "flags": list(measurement.flags),
    }


def _nothing() -> None:
    """Stand for the call that pytest-benchmark times: the calls were made in the race."""


class ReplayClock:
    """A timer for pytest-benchmark under which each round takes as long as the next sample."""

    def __init__(self) -> None:
        self._moments: Iterator[float] = iter(())

    def __call__(self) -> float:
        return next(self._moments)

    def load(self, seconds: Sequence[float]) -> None:
        """Take the samples to replay."""
        # Each round starts at zero: sums over many rounds would lose digits of the samples.
        self._moments = iter([moment for sample in seconds for moment in (0.0, sample)])
