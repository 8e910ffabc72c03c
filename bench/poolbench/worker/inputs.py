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
    """Return the op's inputs in declared order, in training followed by the gradient of its output."""
    return tuple(_repeat(spec, block) for spec, block in draw_inputs(case, seed))


def draw_inputs(case: Case, seed: int) -> list[tuple[TensorSpec, Array]]:
    """Return the spec of each of these inputs, and the flat values that fill it when they are repeated.

    Drawing as many normal numbers as the largest case holds takes longer than racing it.
    """
    generator = np.random.default_rng(seed)
    op = REGISTRY.ops[case.op]
    specs = [*op.inputs(case).values()]
    if case.direction == "training":
        specs.append(TensorSpec(op.output_shape(case), case.dtype))
    return [(spec, _draw(generator, spec)) for spec in specs]


FILLS: Mapping[str, Fill] = {
    "normal": lambda generator, count: generator.standard_normal(count),
    "relu": lambda generator, count: np.maximum(generator.standard_normal(count), 0.0),
    "uniform": lambda generator, count: generator.random(count),
    "integers": lambda generator, count: generator.integers(0, 100, count),
}


def fill(generator: np.random.Generator, spec: TensorSpec) -> Array:
    """Return one input as its spec describes it."""
    return _repeat(spec, _draw(generator, spec))


def write_repeated(array: Array, block: Array, begin: int, end: int) -> None:
    """Write into places `begin` to `end` of an array, counted flat, what repeating the block gives there."""
    flat = array.reshape(-1)
    for start in range(begin - begin % max(1, len(block)), end, max(1, len(block))):
        low, high = max(start, begin), min(start + len(block), end)
        flat[low:high] = block[low - start : high - start]


def _draw(generator: np.random.Generator, spec: TensorSpec) -> Array:
    count = int(np.prod(spec.shape, dtype=np.int64))
    if callable(spec.fill):  # the op's own; its values may have a structure that repetition breaks
        return np.array(spec.fill(generator, count), numpy_dtype(spec.dtype), order="C").reshape(-1)
    return FILLS[spec.fill](generator, min(count, BLOCK_LENGTH)).astype(numpy_dtype(spec.dtype))


def _repeat(spec: TensorSpec, block: Array) -> Array:
    count = int(np.prod(spec.shape, dtype=np.int64))
    whole = np.tile(block, count // max(1, len(block)) + 1) if count > len(block) else block
    return np.ascontiguousarray(whole[:count].reshape(spec.shape))
