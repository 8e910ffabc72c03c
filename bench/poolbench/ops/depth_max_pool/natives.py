"""Depthwise max pooling in JAX's and PyTorch's own functions: what Keras is compared with there."""

from __future__ import annotations

from typing import Any

import numpy as np

from poolbench import Case, candidate
from poolbench.ops.depth_max_pool.op import kept, paddings, windows
from poolbench.ops.depth_max_pool.sweeps import OP
from poolbench.ops.shared import channel_axis


def _grouped(case: Case) -> tuple[list[int], int]:
    """Return the shape of x with its channels as (windows, k), and the axis of k."""
    n, h, w, _ = case.shape
    count, axis = windows(case)[0], channel_axis(case)
    shape = [n, h, w]
    shape[axis:axis] = [count, case.pool_size]
    return shape, axis + 1


@candidate(op=OP, name="jnp-max", backends=("jax",))
def jnp_max(case: Case) -> Any:
    """jnp.reshape to (..., C/k, k), jnp.max over the last axis."""
    import jax.numpy as jnp

    shape, axis = _grouped(case)

    def reshape_max(x: Any) -> Any:
        if case.padding == "same":
            x = jnp.pad(x, paddings(case), constant_values=-jnp.inf)
        return jnp.max(x[kept(case)].reshape(shape), axis=axis)

    return reshape_max


@candidate(op=OP, name="lax-reduce_window", backends=("jax",))
def lax_reduce_window(case: Case) -> Any:
    """jax.lax.reduce_window over the depth."""
    from jax import lax

    window = tuple(case.pool_size if i == channel_axis(case) else 1 for i in range(4))

    def pool(x: Any) -> Any:
        lowest = np.array(-np.inf, x.dtype)  # a constant: JAX differentiates no other
        return lax.reduce_window(x, lowest, lax.max, window, window, paddings(case))

    return pool


def _padding(case: Case) -> Any:
    """Return a function of a tensor that pads it with the lowest value; without padding, itself."""
    import torch

    if case.padding != "same":
        return lambda x: x
    widths = [size for pair in reversed(paddings(case)) for size in pair]
    return lambda x: torch.nn.functional.pad(x, widths, value=-float("inf"))


@candidate(op=OP, name="torch-amax", backends=("torch",))
def torch_amax(case: Case) -> Any:
    """torch.reshape to (..., C/k, k), torch.amax over the last axis."""
    pad, whole, (shape, axis) = _padding(case), kept(case), _grouped(case)
    return lambda x: pad(x)[whole].reshape(shape).amax(axis)


@candidate(op=OP, name="torch-max_pool1d", backends=("torch",))
def torch_max_pool1d(case: Case) -> Any:
    """F.max_pool1d over the channels of the view (N*H*W, 1, C)."""
    import torch

    pad, axis, k = _padding(case), channel_axis(case), case.pool_size

    def pool_channels(x: Any) -> Any:
        rows = pad(x).movedim(axis, -1)
        y = torch.nn.functional.max_pool1d(rows.reshape(-1, 1, rows.shape[-1]), k)
        return y.reshape(*rows.shape[:-1], -1).movedim(-1, axis)

    return pool_channels
