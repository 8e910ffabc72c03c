"""Progress on a terminal and in a log, with a fake clock."""

import io
from types import SimpleNamespace

import pytest
from poolbench.core.case import make_case
from poolbench.core.records import Measurement, Samples
from poolbench.engine.progress import Progress, describe_fastest, describe_shares, format_minutes
from poolbench.options import Asked
from poolbench.pytest_run import RunSession


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    return []


def make(clock, lines, **options):
    return Progress(10, write=lines.append, clock=clock, **options)


def test_progress_log_is_silent_for_less_than_half_a_minute(clock, lines):
    progress = make(clock, lines)
    for clock.seconds in range(30):
        progress.tick()
    assert lines == []


def test_progress_log_says_a_line_every_half_minute(clock, lines):
    progress = make(clock, lines, predicted_seconds=100)
    for clock.seconds in range(61):
        progress.tick()
    assert lines == [
        "0 of 10 done, 30 s elapsed, about 70 s left; starting",
        "0 of 10 done, 60 s elapsed, about 40 s left; starting",
    ]


def test_progress_line_of_its_own_is_a_sign_of_life(clock, lines):
    progress = make(clock, lines)
    clock.seconds = 29
    progress.say("raced")
    clock.seconds = 50
    progress.tick()
    assert lines == ["raced"]


def test_progress_time_left_comes_from_the_work_done(clock, lines):
    progress = make(clock, lines, predicted_seconds=1000)
    progress.advance(2)
    clock.seconds = 60
    assert progress.left_seconds() == pytest.approx(240)
    progress.advance(8)
    assert progress.describe() == "10 of 10 done, 60 s elapsed; starting"


def test_progress_time_left_is_never_beyond_the_end(clock, lines):
    progress = make(clock, lines, most_seconds=100)
    progress.advance(2)
    clock.seconds = 60
    assert progress.left_seconds() == pytest.approx(40)
    clock.seconds = 100
    assert progress.left_seconds() is None


def test_progress_counts_unfinished_work_and_never_falls(clock, lines):
    partial = [0.5]
    progress = make(clock, lines, partial=lambda: partial[0])
    assert progress.share() == pytest.approx(0.05)
    partial[0] = 0.0
    assert progress.share() == pytest.approx(0.05)


def test_progress_partial_that_changes_meanwhile_is_left_out(clock, lines):
    def changes():
        raise RuntimeError("dictionary changed size during iteration")

    assert make(clock, lines, partial=changes).share() == 0.0


def test_progress_terminal_shows_a_bar_at_once_and_keeps_lines(clock, lines):
    terminal = io.StringIO()
    with make(clock, lines, terminal=terminal) as progress:
        assert "0 of 10 done" in terminal.getvalue()
        progress.say("[1/10] raced [bold]")
        progress.now = "depth_max_pool 8x56x56x96"
        progress.tick()
        shown = terminal.getvalue()
    assert "[1/10] raced [bold]" in shown
    assert "depth_max_pool" in shown
    assert lines == []
    progress.stop()  # a second time


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (89, "89 s"), (480, "8 min")])
def test_format_minutes(seconds, text):
    assert format_minutes(seconds) == text


def test_describe_shares_names_the_largest_first():
    assert describe_shares({"a": 1, "b": 3}, 4) == "wall 4 s: b 75%, a 25%"


def measured(*seconds, **fields):
    return Measurement(
        case=make_case(op="pool"), candidate="", samples=Samples(seconds=seconds),
        **{"status": "ok"} | fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({"fast": measured(1.0, 9.0, 1.0)}, "fastest fast, 0.50 of base"),
        ({"slow": measured(3.0)}, "fastest base"),
        ({"base": measured(), "fast": measured(1.0)}, "fastest fast"),
        ({"wrong": measured(1.0, status="wrong")}, "fastest base"),
        ({"folded": measured(1.0, flags=("faster-than-limit",))}, "fastest base"),
        ({"base": measured(2.0, status="error")}, "no correct candidate"),
    ],
)
def test_describe_fastest_is_over_the_correct_candidates(others, text):
    assert describe_fastest({"base": measured(2.0), **others}, "base") == text


def test_run_session_without_races_counts_tests_and_what_is_done_ahead(monkeypatch):
    monkeypatch.setattr("poolbench.pytest_run.own_terminal", lambda: None)
    asked = Asked(options={"check_only": False, "dry_run": False}, files=())
    session = RunSession(SimpleNamespace(option=SimpleNamespace(collectonly=False)), asked, [])
    session.pytest_runtestloop(SimpleNamespace(config=session._config, items=[1, 2, 3, 4]))
    progress = session._progress
    try:
        session.pytest_runtest_logstart("suites/test_network.py::test_network[a]")
        assert (
            progress.describe().startswith("0 of 4 done")
            and "test_network[a]" in progress.describe()
        )
        for _ in range(3):  # the first test fills three cells
            session.ahead += 1
        assert progress.share() == 0.75
        session.pytest_runtest_logfinish()
        assert progress.done == 1 and progress.share() == 0.75
    finally:
        progress.stop()


@pytest.mark.parametrize(
    ("kept", "says"),
    [("2 cells of the matrix", "2 cells of the matrix are kept in "), ("", "nothing was stored yet; ")],
)  # fmt: skip
def test_run_session_interrupted_says_what_is_kept(tmp_path, lines, kept, says):
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(get_plugins=list),
        invocation_params=SimpleNamespace(args=(), dir=tmp_path),
    )
    run = SimpleNamespace(
        options=SimpleNamespace(folder=tmp_path / "night"), kept=lambda: kept, shares=dict,
        close=lambda *, finished: None,
    )  # fmt: skip
    session = RunSession(config, Asked(options={"check_only": False}, files=()), [])
    session.say = lines.append
    ended = SimpleNamespace(
        config=config, exitstatus=pytest.ExitCode.INTERRUPTED, shouldfail=False, shouldstop=False
    )
    session._finish(ended, run)
    assert lines[0].startswith(says)
    assert lines[0].endswith("; go on with:")
    assert lines[1].endswith("--poolbench-resume night")
