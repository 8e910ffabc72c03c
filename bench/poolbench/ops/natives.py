"""The further ops in JAX's and PyTorch's own functions: what Keras is compared with there."""

from __future__ import annotations

from typing import Any

from poolbench import Case
from poolbench.ops import adaptive_pool, masked_global_pool
from poolbench.ops.masked_global_pool import step_axis
from poolbench.ops.shared import function


@function(op=adaptive_pool.OP, name="jnp-slices", backend="jax")
@function(op=adaptive_pool.OP, name="torch-slices", backend="torch")
def slices_elsewhere(case: Case, xp: Any, x: Any) -> Any:
    """Slices by axis in JAX's or PyTorch's own functions."""
    reduce = xp.mean if case.reduction == "average" else xp.amax
    o, h, w = case.output, x.shape[1], x.shape[2]
    x = xp.stack([reduce(x[:, i * h // o : -(-(i + 1) * h // o)], 1) for i in range(o)], 1)
    return xp.stack([reduce(x[:, :, i * w // o : -(-(i + 1) * w // o)], 2) for i in range(o)], 2)


@function(op=adaptive_pool.OP, name="torch-adaptive_pool2d", backend="torch")
def torch_adaptive_pool2d(case: Case, torch: Any, x: Any) -> Any:
    """F.adaptive_avg_pool2d or adaptive_max_pool2d, on a view as NCHW."""
    pools = torch.nn.functional
    pool = pools.adaptive_avg_pool2d if case.reduction == "average" else pools.adaptive_max_pool2d
    return pool(x.movedim(-1, 1), case.output).movedim(1, -1)


@function(op=masked_global_pool.OP, name="jnp-where", backend="jax")
@function(op=masked_global_pool.OP, name="torch-where", backend="torch")
def where_elsewhere(case: Case, xp: Any, x: Any, mask: Any) -> Any:
    """A selection, then a sum over at least one step, or a maximum; 0 for an empty row."""
    valid = (mask != 0)[:, :, None] if step_axis(case) == 1 else (mask != 0)[:, None]
    if case.reduction == "average":
        total = xp.sum(xp.where(valid, x, 0), step_axis(case))
        return total / xp.clip(xp.sum(valid, step_axis(case)), 1)
    y = xp.amax(xp.where(valid, x, float("-inf")), step_axis(case))
    return xp.where(xp.any(valid, step_axis(case)), y, 0)
