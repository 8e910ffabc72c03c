"""Depthwise max pooling: every implementation in every case of the sweep."""

from collections.abc import Callable

import pytest


@pytest.mark.op("depth_max_pool")
def test_depth_max_pool(replay: Callable[[], None]) -> None:
    """One candidate in one case: right, and timed in the case's race."""
    replay()
