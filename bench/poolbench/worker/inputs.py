"""Fill the inputs of a case. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from poolbench.core.case import Case
from poolbench.core.op import Fill, TensorSpec
from poolbench.core.registry import REGISTRY

Array = np.ndarray[Any, Any]
# Prime, so that no window or channel count is in phase with the repeated block.
BLOCK_LENGTH = 65_537


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a case's dtype; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return narrow
    return np.dtype(name)


def make_inputs(case: Case, seed: int) -> tuple[Array, ...]:
    """Return the op's inputs in declared order, in training followed by the gradient of its output.

    A small random block is repeated: drawing as many normal numbers as the largest case holds takes
    longer than racing it.
    """
    generator = np.random.default_rng(seed)
    op = REGISTRY.ops[case.op]
    inputs = tuple(fill(generator, spec) for spec in op.inputs(case).values())
    if case.direction == "forward":
        return inputs
    return *inputs, fill(generator, TensorSpec(op.output_shape(case), case.dtype))


FILLS: Mapping[str, Fill] = {
    "normal": lambda generator, count: generator.standard_normal(count),
    "relu": lambda generator, count: np.maximum(generator.standard_normal(count), 0.0),
    "uniform": lambda generator, count: generator.random(count),
    "integers": lambda generator, count: generator.integers(0, 100, count),
}


def fill(generator: np.random.Generator, spec: TensorSpec) -> Array:
    """Return one input as its spec describes it."""
    count = int(np.prod(spec.shape, dtype=np.int64))
    if callable(spec.fill):  # the op's own; its values may have a structure that repetition breaks
        values = spec.fill(generator, count).reshape(spec.shape)
        return np.array(values, numpy_dtype(spec.dtype), order="C")
    block = FILLS[spec.fill](generator, min(count, BLOCK_LENGTH)).astype(numpy_dtype(spec.dtype))
    whole = np.tile(block, count // max(1, len(block)) + 1) if count > len(block) else block
    return np.ascontiguousarray(whole[:count].reshape(spec.shape))
