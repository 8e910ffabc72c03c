"""Detection of busy SMT siblings."""

import os
import sys

import pytest
from poolbench.machine import smt

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(smt, "_can_be_seen", lambda: True)
    monkeypatch.setattr(smt, "_least", [5e-6])


@pytest.mark.parametrize(
    ("seconds", "share"), [([5.1e-6, 6.9e-6], 0.0), ([9e-6, 5e-6], 0.5), ([9e-6, 8e-6], 1.0)]
)
def test_busy_share_loop_far_above_minimum_counts_as_busy(seen, monkeypatch, seconds, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: None)
    monkeypatch.setattr(smt.random, "sample", lambda cpus, count: cpus)
    monkeypatch.setattr(smt, "_loop_seconds", lambda cpu: seconds[cpu])
    assert smt.busy_share() == share


def test_busy_share_many_processors_tests_some(seen, monkeypatch):
    looked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: None)
    monkeypatch.setattr(smt, "_loop_seconds", lambda cpu: looked.append(cpu) or 5e-6)
    assert smt.busy_share() == 0.0
    assert len(set(looked)) == smt.MOST_LOOKED_AT


def test_busy_share_restores_affinity(seen):
    before = os.sched_getaffinity(0)
    assert 0.0 <= smt.busy_share() <= 1.0
    assert os.sched_getaffinity(0) == before


def test_the_loop_takes_longer_the_more_there_is_to_count(seen, monkeypatch):
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    short = min(smt._loop_seconds(cpu) for _ in range(20))
    monkeypatch.setattr(smt, "COUNTED", bytes(20 * len(smt.COUNTED)))
    long = min(smt._loop_seconds(cpu) for _ in range(20))
    os.sched_setaffinity(0, before)
    assert long > 5 * short


def test_busy_share_physical_machine_is_none(monkeypatch):
    monkeypatch.setattr(smt, "_can_be_seen", lambda: False)
    assert smt.busy_share() is None
