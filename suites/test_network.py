"""Does the choice matter in a network: each implementation in place, and pooling's share.

`nox -s networks` runs this. One test is one race: a network, a direction, a batch size; what it found is in
the run's journal and on its page.
"""

from __future__ import annotations

import pytest
from poolbench.engine.run import Run
from poolbench.models.results import Entry
from poolbench.models.study import run_entry
from poolbench.models.suite import entries_of

FAILED = ("wrong", "error", "crashed", "out_of_memory", "timeout")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each race of the sweep."""
    entries = entries_of(metafunc.config.getoption("--sweep"))
    metafunc.parametrize("entry", entries, ids=[entry.label for entry in entries])


def test_network(entry: Entry, run_in_progress: Run, checks_only: bool) -> None:
    """Every implementation runs in this network, or fails where that is documented; all agree."""
    records = run_entry(entry, run_in_progress, checks_only=checks_only)
    failed = [f"{r.op}={r.candidate} {r.status}: {r.reason}" for r in records if r.status in FAILED]
    assert not failed, "\n".join(failed)
