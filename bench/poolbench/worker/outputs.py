"""Read what a contender returns, so that two workers' results for the same inputs can be compared."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.core.registry import REGISTRY
from poolbench.worker import check
from poolbench.worker.backends import Array, to_numpy
from poolbench.worker.inputs import numpy_dtype
from poolbench.worker.session import Session


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """Values of each output of a call, as plain data.

    Attributes:
        shapes, dtypes: of each output.
        data: its values, or those at some places, in memory order.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    data: tuple[bytes, ...]

    @property
    def kinds(self) -> str:
        """Return dtype and shape of each output: 'float32[8, 96], float32[8, 28, 28, 96]'."""
        pairs = zip(self.dtypes, self.shapes, strict=True)
        return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in pairs)


class Outputs(Values, frozen=True, kw_only=True):
    """All outputs of one call of a contender.

    Attributes:
        inputs: digest of the inputs.
    """

    inputs: str

    def arrays(self) -> list[Array]:
        """Return the outputs."""
        fields = zip(self.data, self.dtypes, self.shapes, strict=True)
        return [
            np.frombuffer(data, numpy_dtype(dtype)).reshape(shape) for data, dtype, shape in fields
        ]


def read_outputs(session: Session, name: str) -> Outputs:
    """Call a contender of the open case once; return its outputs."""
    opened = session.open
    call, arguments = opened.bound(name)
    with opened.backend.on(opened.device):
        result = call(*arguments)
        opened.backend.synchronize(opened.device)
    outputs = [to_numpy(v) for v in (result if isinstance(result, (tuple, list)) else (result,))]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in opened.host))
    return Outputs(
        inputs=digest.hexdigest()[:16],
        shapes=tuple(array.shape for array in outputs),
        dtypes=tuple(str(array.dtype) for array in outputs),
        data=tuple(array.tobytes() for array in outputs),
    )


def difference(case: Case, base: Outputs, head: Outputs) -> str:
    """Return how head's outputs differ from base's by more than the case's tolerance; '' if they do not."""
    if base.inputs != head.inputs:
        return "their inputs differ: op or generator of inputs changed"
    if (base.shapes, base.dtypes) != (head.shapes, head.dtypes):
        return f"{base.kinds} became {head.kinds}"
    # y's, and the gradients'.
    bounds = check.bound_for(REGISTRY.ops[case.op], case), check.BOUNDS.get(case.dtype, check.EXACT)
    pairs = enumerate(zip(head.arrays(), base.arrays(), strict=True))
    worst = max(
        (check.compare(*pair, bounds[min(place, 1)]).worst for place, pair in pairs), default=0.0
    )
    return f"outputs differ by {worst:.3g} times the tolerance" if worst > 1.0 else ""
