"""Check candidates again after timing, on inputs that they have not seen.

New values are written into the memory of the inputs that were timed, so that what remembers its
answer by the inputs' identity, by their shape, by a few of their values, or by the number of its
calls gives an old answer now. Half of the values stay: reading only some of them is not enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poolbench.core.errors import reason_of
from poolbench.core.registry import REGISTRY
from poolbench.worker import check as checks
from poolbench.worker.backends import Array, to_numpy
from poolbench.worker.inputs import draw_inputs, write_repeated
from poolbench.worker.session import OpenCase

# Random checks take this share of the timed work.
SHARE = 0.005
# Approximate cost of new inputs, the reference and one comparison on a processor of 2024.
SECONDS_PER_NBYTE = 10e-9
MIN_SECONDS = 0.001
CHANCE = random.Random()  # its own: a candidate may seed the module's
FRESH = "on inputs that it had not seen"
OLD = "on the inputs that were timed"


@dataclass
class Recheck:
    """One set of inputs, and the results of candidates for them.

    Attributes:
        words: which inputs they are.
        answers: the reference's; None: these inputs are only compared, not what is returned.
        accepted: outputs that were found correct; equal ones need no second comparison.
    """

    words: str
    answers: checks.Answers | None
    accepted: list[tuple[Array, ...]] = field(default_factory=list)

    def judge(self, opened: OpenCase, result: Any) -> str:
        """Return the error of a result or of its call; '' if both are correct."""
        try:
            return self._judge(opened, result)
        except Exception as error:  # noqa: BLE001 (an unreadable result is an error)
            return f"after timing, {self.words}: {reason_of(error)}"

    def _judge(self, opened: OpenCase, result: Any) -> str:
        values = result if isinstance(result, tuple) else (result,)
        outputs = views(result)
        if changed_inputs(opened):
            write(opened)
            return f"it changed its inputs in place, {self.words}"
        if any(lies_in(value, given) for value in values for given in opened.inputs):
            return "what it returns lies in the memory of its inputs"
        if self.answers is None or any(
            all(map(same_bits, outputs, known)) for known in self.accepted
        ):
            return ""
        verdict = checks.judge(self.answers, outputs)
        if verdict.reason:
            return f"after timing, {self.words}: {verdict.reason}"
        self.accepted.append(tuple(output.copy() for output in outputs))
        return ""


def rechecks(
    opened: OpenCase, *, fresh: bool = True, old: bool = True, number: int = 0
) -> Iterator[Recheck]:
    """Yield each set of inputs, written into the memory of the timed inputs; those of another number are others."""
    op = REGISTRY.ops.get(opened.case.op)
    if fresh and op is not None and not opened.brings_inputs:
        try:
            change_values(opened, number)
            answers = checks.Answers(op=op, case=opened.case, inputs=opened.host, names_ties=False)
            yield Recheck(FRESH, answers)
        finally:
            restore_values(opened)
    if old:
        yield Recheck(OLD, opened.answers)


def change_values(opened: OpenCase, number: int = 0) -> None:
    """Replace the middle half of the values of all inputs by others, which the number decides.

    An input that the op fills itself is replaced as a whole: half of it may break what its values are to each other.

    It is done in place, on the host too: memory that is touched for the first time costs more than
    all else here.
    """
    _replace_values(opened, opened.seed + 1_000_003 * (number + 1))


def restore_values(opened: OpenCase) -> None:
    """Undo `change_values`."""
    _replace_values(opened, opened.seed)


def _replace_values(opened: OpenCase, seed: int) -> None:
    for array, (spec, block) in zip(opened.host, draw_inputs(opened.case, seed), strict=True):
        begin = 0 if callable(spec.fill) else array.size // 4
        write_repeated(array, block, begin, max(begin + 1, array.size - begin))
    write(opened)


def write(opened: OpenCase) -> None:
    """Write the host's values into the inputs' own memory; allocate new memory where that fails."""
    if not all(map(opened.backend.overwrite, opened.inputs, opened.host)):
        opened.inputs = opened.backend.put(opened.host, opened.device)


def changed_inputs(opened: OpenCase) -> bool:
    """Return whether an input differs from the host's copy of it."""
    pairs = zip(opened.inputs, opened.host, strict=True)
    return not all(same_bits(_view(value), array) for value, array in pairs)


def views(result: Any) -> tuple[Array, ...]:
    """Return the outputs of a call, y or (y, gradients), on the host."""
    return tuple(map(_view, result if isinstance(result, tuple) else (result,)))


def _view(value: Any) -> Array:
    """Return an array on the host, without the copy that TensorFlow makes of a tensor in host memory."""
    return np.asarray(value) if type(value).__name__ == "EagerTensor" else to_numpy(value)


def same_bits(one: Array, other: Array) -> bool:
    """Return whether two arrays are equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Eight bytes at a time are compared eight times as fast as one.
    width = np.uint8 if one.nbytes % 8 else np.uint64
    return np.array_equal(np.ravel(one).view(width), np.ravel(other).view(width))


def lies_in(value: Any, given: Any) -> bool:
    """Return whether a NumPy result shares memory with an input."""
    both = isinstance(value, np.ndarray) and isinstance(given, np.ndarray)
    return both and np.may_share_memory(value, given)


def is_due(opened: OpenCase, seconds: float) -> bool:
    """Return by chance whether to check now, after so many timed seconds: on average within the share."""
    nbytes = sum(array.nbytes for array in opened.host)
    usual = opened.recheck_seconds / max(1, opened.rechecked)
    cost = max(usual, SECONDS_PER_NBYTE * nbytes, MIN_SECONDS)
    return not opened.brings_inputs and CHANCE.random() * cost <= SHARE * seconds
