"""Global average pooling in JAX's and PyTorch's own functions: what Keras is compared with there."""

from __future__ import annotations

from typing import Any

from poolbench import Case, candidate
from poolbench.ops.global_avg_pool.sweeps import OP
from poolbench.ops.shared import spatial_axes


@candidate(op=OP, name="jnp-mean", backends=("jax",))
def jnp_mean(case: Case) -> Any:
    """jnp.mean over height and width."""
    import jax.numpy as jnp

    axes = spatial_axes(case)
    return lambda x: jnp.mean(x, axis=axes)


@candidate(op=OP, name="torch-mean", backends=("torch",))
def torch_mean(case: Case) -> Any:
    """torch.mean over height and width."""
    axes = spatial_axes(case)
    return lambda x: x.mean(axes)


@candidate(op=OP, name="torch-adaptive_avg_pool2d", backends=("torch",))
def torch_adaptive_avg_pool2d(case: Case) -> Any:
    """F.adaptive_avg_pool2d to one pixel, on a view as NCHW."""
    import torch

    pool = torch.nn.functional.adaptive_avg_pool2d
    first = case.data_format == "channels_first"
    return lambda x: pool(x if first else x.movedim(-1, 1), 1).flatten(1)
