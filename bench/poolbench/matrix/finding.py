"""What a step of a check finds, and the features of an op that a check may require."""

from __future__ import annotations

import msgspec

from poolbench.core.op import Op
from poolbench.core.records import CellState

Figures = dict[str, float | int | str | None]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what one step of a check found; plain data, so that it can leave the worker."""

    state: CellState
    evidence: str = ""
    figures: Figures = {}
    issue: str = ""


def features(op: Op) -> frozenset[str]:
    """Return what checks may require of an op: the names of its axes, 'one-input', 'image' and 'ties'.

    'image': its one input has four dimensions, those of the axis `shape` (N, H, W, C).
    'ties': elements of a window may tie, as for a maximum, which is exact in every dtype.
    """
    case = op.make_case()
    specs = list(op.inputs(case).values())
    found = set(op.axis_names)
    if op.check_gradient.window_sum is not None:
        found.add("ties")
    if len(specs) == 1:
        found.add("one-input")
        shape = case.get("shape")
        if isinstance(shape, tuple) and len(shape) == 4 and sorted(shape) == sorted(specs[0].shape):
            found.add("image")
    return frozenset(found)
