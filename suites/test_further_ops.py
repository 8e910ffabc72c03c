"""The ops that a bare run leaves out: `poolbench run --op NAME`, or all of them by `poolbench run further_ops`."""

import pytest
from poolbench.pytest_plugin import Benchmark


@pytest.mark.poolbench(op="masked_global_pool")
def test_masked_global_pool(poolbench: Benchmark) -> None:
    """Masked global pooling."""
    poolbench.replay()


@pytest.mark.poolbench(op="spatial_max_pool")
def test_spatial_max_pool(poolbench: Benchmark) -> None:
    """Spatial max pooling."""
    poolbench.replay()


@pytest.mark.poolbench(op="global_max_pool")
def test_global_max_pool(poolbench: Benchmark) -> None:
    """Global max pooling."""
    poolbench.replay()


@pytest.mark.poolbench(op="gem_pool")
def test_gem_pool(poolbench: Benchmark) -> None:
    """Generalised mean pooling."""
    poolbench.replay()


@pytest.mark.poolbench(op="adaptive_pool")
def test_adaptive_pool(poolbench: Benchmark) -> None:
    """Adaptive pooling."""
    poolbench.replay()
