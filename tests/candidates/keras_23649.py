"""Max pooling over height and width in channels_last: does Keras copy the layout on PyTorch (keras#23649)?

`poolbench run tests/candidates/keras_23649.py --axis backend=torch --axis mode=eager`
"""

import numpy as np
import pytest
from poolbench import KERAS, Op, Sweep, TensorSpec, candidate, product, register, shape_axis

OP = "max_pool_2x2"


def reference(case, x):
    """Return the maximum of each 2 x 2 window, channels last."""
    n, h, w, c = case.shape
    return np.max(x.reshape(n, h // 2, 2, w // 2, 2, c), axis=(2, 4))


register(
    Op(
        name=OP,
        axes=(shape_axis("shape", (32, 112, 112, 64), rank=4),),
        inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
        reference=reference,
        baseline="torch-max_pool2d",
        sweeps={"default": Sweep(product(shape=[(32, 112, 112, 64), (1, 8, 8, 64)]))},
    )
)


@candidate(op=OP, name="layer-MaxPooling2D", form="layer", backends=KERAS)
def layer(case):
    """keras.layers.MaxPooling2D in channels_last."""
    import keras

    return keras.layers.MaxPooling2D(2, data_format="channels_last", dtype=case.dtype)


@candidate(op=OP, name="torch-max_pool2d", backends=("torch",))
def view(case):
    """F.max_pool2d on the view as NCHW, whose strides are those of channels_last: nothing is copied."""
    import torch

    pool = torch.nn.functional.max_pool2d
    return lambda x: pool(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


@candidate(op=OP, name="torch-one-copy", backends=("torch",))
def one_copy(case):
    """The same with a copy to NCHW first."""
    import torch

    pool = torch.nn.functional.max_pool2d
    return lambda x: pool(x.permute(0, 3, 1, 2).contiguous(), 2).permute(0, 2, 3, 1)


@pytest.mark.poolbench(op=OP)
def test_max_pool_2x2(poolbench):
    """Race the candidates."""
    poolbench.replay()
