"""Core distance, measured with a real partner process on the other processor."""

import os
import sys

import pytest
from poolbench.machine import core_distance
from poolbench.machine.core_distance import FAR, MOST_SAVED_SECONDS, WAKING_SECONDS, Placement

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


@pytest.fixture
def pair():
    cpus = sorted(os.sched_getaffinity(0))[:2]
    made = Placement((cpus[0], cpus[1]))
    yield made
    made.close()


def scripted(monkeypatch, pair, seconds):
    """What the reads say, one after the other; how often the processors were made to wake each other."""
    reads, wakes = iter(seconds), []
    monkeypatch.setattr(pair, "read_seconds", lambda: next(reads))
    wake = pair._wake_each_other

    def count():
        wakes.append(1)
        wake()

    monkeypatch.setattr(pair, "_wake_each_other", count)
    return wakes


def test_read_seconds_reads_data_of_the_other_processor(pair):
    pair._copy[:] = b"\xff" * len(pair._copy)
    assert pair.read_seconds() > 0
    assert not any(pair._copy)


def test_processors_that_are_near_are_left_alone_but_for_the_first_time(pair, monkeypatch):
    monkeypatch.setattr(core_distance, "WAKING_SECONDS", 0.001)
    wakes = scripted(monkeypatch, pair, [1.0, 1.2, 0.9 * FAR])
    assert [pair.gather() for _ in range(3)] == [False] * 3
    assert len(wakes) == 1


def test_processors_that_are_far_wake_each_other_until_they_are_near(pair, monkeypatch):
    monkeypatch.setattr(core_distance, "WAKING_SECONDS", 0.001)
    wakes = scripted(monkeypatch, pair, [1.0, 1.1 * FAR, 1.1 * FAR, 1.0])
    assert [pair.gather() for _ in range(2)] == [False] * 2
    assert len(wakes) == 3


def test_gather_distant_processors_stops_at_its_time_budget(pair, monkeypatch):
    monkeypatch.setattr(core_distance, "WAKING_SECONDS", 0.001)
    monkeypatch.setattr(core_distance, "MOST_SAVED_SECONDS", 0.003)
    monkeypatch.setattr(core_distance, "EARNED_SECONDS", 0.0002)
    pair._saved_seconds = 0.003
    wakes = scripted(monkeypatch, pair, [1.0] + [2 * FAR] * 100)
    assert not pair.gather()
    assert all(pair.gather() for _ in range(20))
    assert len(wakes) <= 3 + 20 * 0.2
    assert MOST_SAVED_SECONDS > 2 * WAKING_SECONDS


def test_gather_restores_affinity(pair):
    before = os.sched_getaffinity(0)
    pair.gather()
    assert os.sched_getaffinity(0) == before


def test_gather_without_partner_continues(pair, monkeypatch):
    monkeypatch.setattr(core_distance, "_placements", [pair])
    assert core_distance.gather() in (True, False)
    pair._partner.kill()
    pair._partner.wait()
    assert core_distance.gather() is None
    assert core_distance.gather() is None


@pytest.mark.parametrize(("virtual", "cpus"), [(False, {0, 1}), (True, {0}), (True, {0, 1, 2})])
def test_it_is_looked_for_on_virtual_machines_of_two_processors_only(monkeypatch, virtual, cpus):
    monkeypatch.setattr(core_distance, "_placements", [])
    monkeypatch.setattr(core_distance, "is_virtual", lambda: virtual)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cpus)
    assert core_distance.gather() is None
