"""Global average pooling: every implementation in every case of the sweep."""

from collections.abc import Callable

import pytest


@pytest.mark.op("global_avg_pool")
def test_global_avg_pool(replay: Callable[[], None]) -> None:
    """One candidate in one case: right, and timed in the case's race."""
    replay()
