"""Ctrl-C and SIGTERM: raised once, not in an import, again where the exception was dropped."""

import importlib
import signal
import sys
import time

import pytest
from poolbench.engine import stops
from poolbench.engine.stops import Stops


@pytest.fixture
def handled(monkeypatch):
    """A handler for this process, whose waits are short."""
    monkeypatch.setattr(stops, "LOST_SECONDS", 0.3)
    before = [signal.getsignal(number) for number in stops.NUMBERS]
    handled = Stops()
    handled.handle()
    yield handled
    handled.restore()
    assert [signal.getsignal(number) for number in stops.NUMBERS] == before


class Dropped:
    """An object in whose destructor a signal comes."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", stops.NUMBERS)
def test_signal_interrupts_a_wait_once(handled, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    for later in stops.NUMBERS:
        signal.raise_signal(later)
    handled.ignore()
    time.sleep(0.4)  # nothing comes again


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_dropped_in_a_destructor_comes_again(handled):
    begin = time.monotonic()
    dropped = Dropped()
    del dropped  # Python prints the exception and goes on
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20)
    assert 0.2 < time.monotonic() - begin < 10


@pytest.mark.parametrize(("seconds", "whole"), [(0.1, True), (20, False)])
def test_signal_waits_for_the_end_of_an_import_but_not_for_ever(
    handled, tmp_path, monkeypatch, seconds, whole
):
    (tmp_path / "half_way.py").write_text(
        f"import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep({seconds})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20 if importlib.import_module("half_way") else 0)
    assert (sys.modules.pop("half_way", None) is not None) == whole
