"""A user's op with two inputs of unlike rank and an axis of its own: y = activation(x @ w), in NumPy.

`pytest tests/candidates/dense_op.py --axis width=8,16` measures it.
"""

import numpy as np
import pytest
from poolbench import (
    Op,
    Sweep,
    TensorSpec,
    candidate,
    choice_axis,
    product,
    register,
    shape_axis,
    size_axis,
)

OP = "dense"


def inputs(case):
    return {
        "x": TensorSpec(case.batch_shape, case.dtype),
        "scale": TensorSpec((case.batch_shape[-1] * case.width,), case.dtype, fill="uniform"),
    }


def dense(case, x, scale):
    y = x @ scale.reshape(case.batch_shape[-1], case.width)
    return np.maximum(y, 0) if case.activation == "relu" else y


def vjp(case, dy, x, scale):
    if case.activation == "relu":
        dy = dy * (dense(case, x, scale) > 0)
    weights = scale.reshape(case.batch_shape[-1], case.width)
    flat = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
    return dy @ weights.T, flat.reshape(scale.shape)


register(
    Op(
        name=OP,
        title="Dense layer",
        axes=(
            shape_axis("batch_shape", (4, 8, 32), rank=3),
            size_axis("width"),
            choice_axis("activation", "none", "relu"),
        ),
        inputs=inputs,
        reference=dense,
        vjp=vjp,
        baseline="matmul",
        sweeps={"default": Sweep(product(width=[8, 64]), base={"mode": "eager"})},
    )
)


@candidate(op=OP, name="matmul", backends=("numpy",))
def matmul(case):
    """x @ w."""
    return lambda x, scale: dense(case, x, scale)


@candidate(op=OP, name="einsum", backends=("numpy",))
def einsum(case):
    """np.einsum, which does not call BLAS."""

    def call(x, scale):
        y = np.einsum("abk,kn->abn", x, scale.reshape(-1, case.width))
        return np.maximum(y, 0) if case.activation == "relu" else y

    return call


@candidate(op=OP, name="swapped", backends=("numpy",))
def swapped(case):
    """Wrong: the weights are read transposed."""
    return lambda x, scale: x @ scale.reshape(case.width, -1).T


@candidate(op=OP, name="tf-matmul")
def tf_matmul(case):
    """tf.matmul, with gradients of both inputs."""
    import tensorflow as tf

    def call(x, scale):
        y = tf.matmul(x, tf.reshape(scale, [case.batch_shape[-1], case.width]))
        return tf.nn.relu(y) if case.activation == "relu" else y

    return call


@pytest.mark.poolbench(op=OP)
def test_dense(poolbench):
    poolbench.replay()
