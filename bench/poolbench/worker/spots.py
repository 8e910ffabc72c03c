"""Check in every process that a candidate returns what the reference accepted, without a call more.

In the first process of a race each result on two sets of inputs is held against the reference
(`verify`), and its values at fixed random places are kept. A further process times its first rounds on
the set that it has not seen and the others on the timed one, both written into the same memory. Of each
candidate and set one untimed call, which is made anyway, is compared at those places.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from poolbench.core.registry import REGISTRY
from poolbench.worker import again
from poolbench.worker import check as checks
from poolbench.worker.backends import Array
from poolbench.worker.inputs import numpy_dtype
from poolbench.worker.outputs import Values
from poolbench.worker.session import OpenCase, Session

clock = perf_counter  # before any candidate's code is imported
# Of an array with one wrong value in a hundred, so many miss all of them once in 30,000 times.
PLACES = 1024


Samples = dict[str, dict[str, Values]]  # by the words of the inputs, by contender


@functools.cache
def places(size: int) -> Array:
    """Return the places of an output of so many values, all of few; the same ones in every process."""
    if size <= PLACES:
        return np.arange(size)
    return np.sort(np.random.default_rng(size).integers(0, size, PLACES))


def sample(result: Any) -> Values:
    """Return the values of a result at its places."""
    outputs = again.views(result)
    return Values(
        shapes=tuple(output.shape for output in outputs),
        dtypes=tuple(str(output.dtype) for output in outputs),
        data=tuple(np.ravel(output)[places(output.size)].tobytes() for output in outputs),
    )


def difference(opened: OpenCase, found: Values, accepted: Values) -> str:
    """Return how a result differs from one that the reference accepted; '' within twice the bound."""
    if found.kinds != accepted.kinds:
        return f"it returned {found.kinds}, and {accepted.kinds} in the first process"
    case = opened.case
    bounds = [
        checks.bound_for(REGISTRY.ops[case.op], case),
        checks.BOUNDS.get(case.dtype, checks.EXACT),
    ]
    for number, dtype in enumerate(found.dtypes):
        actual, expected = (
            np.frombuffer(one.data[number], numpy_dtype(dtype)) for one in (found, accepted)
        )
        apart = checks.compare(actual, expected, bounds[min(number, 1)])
        # Either lies within the bound of the correct value.
        if apart.worst > 2.0:
            return (
                f"{'a gradient' if number else 'y'} is not what the reference accepted in the first process: "
                f"error up to {apart.absolute:.3g}, {apart.worst:.3g} times the bound"
            )
    return ""


@dataclass
class Spots:
    """What candidates have to return in this process, and what they have.

    Attributes:
        expected: what the first process accepted.
        unseen: whether the inputs are now those that this process had not seen.
        done: contenders that were compared, by the words of the inputs.
        seen: results of the last batch.
        changed: whether a candidate changed the inputs in place.
    """

    expected: Samples
    unseen: bool = False
    done: dict[str, set[str]] = field(
        default_factory=lambda: {again.FRESH: set(), again.OLD: set()}
    )
    seen: dict[str, Values] = field(default_factory=dict)
    changed: bool = False

    @property
    def words(self) -> str:
        """Return which inputs are timed now."""
        return again.FRESH if self.unseen else again.OLD

    @property
    def due(self) -> bool:
        """Tell whether the last batch left something to compare."""
        return self.unseen or bool(self.seen)

    def pending(self, words: str) -> Mapping[str, Values]:
        """Return what is expected of the contenders that were not compared on these inputs."""
        expected = self.expected.get(words, {})
        return {name: one for name, one in expected.items() if name not in self.done[words]}

    def wants(self, name: str) -> bool:
        """Tell whether a result of this contender is to be kept."""
        return name not in self.seen and name in self.pending(self.words)

    def enter(self, name: str, result: Any) -> None:
        """Keep a result until the batch has ended."""
        self.seen[name] = sample(result)

    def start(self, opened: OpenCase) -> None:
        """Write inputs that this process has not seen into the memory of the timed ones."""
        if not self.unseen:
            again.change_values(opened)
            self.unseen = True

    def settle(self, opened: OpenCase) -> dict[str, str]:
        """Compare the results of a batch, and go on with the timed inputs; return the errors by name."""
        words, errors = self.words, {}
        for name, found in self.seen.items():
            if reason := difference(opened, found, self.expected[words][name]):
                errors[name] = f"{words}: {reason}"
        self.done[words] |= self.seen.keys()
        self.seen.clear()
        if (errors or self.unseen) and again.changed_inputs(opened):
            # Results on what another candidate has changed are no evidence; `verify` finds out which one it was.
            self.changed, errors = True, {}
        if self.unseen:
            again.restore_values(opened)
            self.unseen = False
        return errors


def accepted(session: Session) -> Samples:
    """Return the samples of the results that the reference accepted in this process."""
    found: Samples = session.extras.setdefault("accepted", {})
    return found


def expectations(session: Session) -> Spots | None:
    """Return what candidates have to return in this process; None in a race's first one."""
    found: Spots | None = session.extras.get("spots")
    return found


def expect(session: Session, expected: Samples) -> float:
    """Compare this process's results with the first one's, beginning with unseen inputs; return the seconds it took."""
    start = clock()
    found = session.extras["spots"] = Spots(expected=expected)
    if expected.get(again.FRESH):
        found.start(session.open)
    return clock() - start
