"""The effect of the choice on a whole model: each implementation in place, and pooling's share of a step.

`poolbench run network` runs this. One test is one race: a model, a direction, a batch size. The results
are in the run's journal and on its page.
"""

from __future__ import annotations

import pytest
from poolbench.models.results import Entry
from poolbench.models.study import run_entry
from poolbench.models.suite import entries_of
from poolbench.pytest_plugin import Benchmark, asked

FAILED = ("wrong", "error", "crashed", "out_of_memory", "timeout")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the races of the sweep."""
    entries = entries_of(asked(metafunc.config).options["sweep"])
    metafunc.parametrize("entry", entries, ids=[entry.label for entry in entries])


def test_network(entry: Entry, poolbench: Benchmark) -> None:
    """Every implementation runs in this model, or fails where that is documented; all agree."""
    records = run_entry(entry, poolbench.run, checks_only=poolbench.check_only)
    failed = [f"{r.op}={r.candidate} {r.status}: {r.reason}" for r in records if r.status in FAILED]
    assert not failed, "\n".join(failed)
