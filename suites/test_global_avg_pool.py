"""Global average pooling: every implementation in every case of the sweep."""

import pytest
from poolbench.pytest_plugin import Benchmark


@pytest.mark.poolbench(op="global_avg_pool")
def test_global_avg_pool(poolbench: Benchmark) -> None:
    """One candidate in one case: correct, and timed in the case's race."""
    poolbench.replay()
