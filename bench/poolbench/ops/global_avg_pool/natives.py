"""Global average pooling in JAX's and PyTorch's own functions: what Keras is compared with there."""

from __future__ import annotations

from typing import Any

from poolbench import Case
from poolbench.ops.global_avg_pool.sweeps import OP
from poolbench.ops.shared import channels_last, function, spatial_axes


@function(op=OP, name="jnp-mean", backend="jax")
@function(op=OP, name="torch-mean", backend="torch")
def mean(case: Case, xp: Any, x: Any) -> Any:
    """The mean over height and width."""
    return xp.mean(x, spatial_axes(case))


@function(op=OP, name="torch-adaptive_avg_pool2d", backend="torch")
def adaptive_avg_pool2d(case: Case, torch: Any, x: Any) -> Any:
    """F.adaptive_avg_pool2d to one pixel, on a view as NCHW."""
    maps = x.movedim(-1, 1) if channels_last(case) else x
    return torch.nn.functional.adaptive_avg_pool2d(maps, 1).flatten(1)
