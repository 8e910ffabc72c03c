"""The models that `suites/test_network.py` races, by sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from poolbench.core.records import HEAD
from poolbench.core.registry import load_builtin
from poolbench.models.results import Entry
from poolbench.models.zoo import APPLICATIONS, Source

IMAGE = (96, 96, 3)
HEAD_IMAGE = (224, 224, 3)
Candidates = Mapping[str, tuple[str, ...]]
OPS = load_builtin().ops.values()
PLACED = {op.name: op.in_models for op in OPS if op.in_models}
COMPILED = {op.name: op.in_compiled_models for op in OPS if op.in_compiled_models}


def _textbook(direction: str, mode: str, candidates: Candidates) -> Entry:
    return Entry(
        name="textbook", source=Source(kind="textbook"), direction=direction, batch=32, mode=mode,
        candidates=candidates, budget_seconds=6.0,
        # Compiling a whole step for each implementation takes longer than all other races.
        replaced=mode == "graph",
    )  # fmt: skip


def _head(name: str, direction: str, batch: int, seconds: float, latency_calls: int = 0) -> Entry:
    source = Source(kind="head", name=name, image=HEAD_IMAGE)
    return Entry(
        name=f"{name}{HEAD}", source=source, direction=direction, batch=batch, candidates=PLACED,
        budget_seconds=seconds, latency_calls=latency_calls,
    )  # fmt: skip


def _whole(name: str, direction: str) -> Entry:
    source = Source(kind="application", name=name, image=IMAGE)
    return Entry(
        name=name, source=source, direction=direction, batch=4, replaced=False, candidates=PLACED
    )


def entries_of(sweep: str) -> list[Entry]:
    """Return the races of a sweep: 'quick', half a minute, or the default ones, at most six minutes on two cores."""
    if sweep == "quick":
        textbook = replace(_textbook("training", "graph", COMPILED), batch=16, budget_seconds=4.0)
        return [textbook, _head("mobilenetv2", "forward", 8, 1.0)]
    heads = (("forward", 1, 1.0, 2000), ("forward", 8, 1.0), ("forward", 64, 2.0), ("training", 32, 2.0))  # fmt: skip
    return [
        _textbook("forward", "graph", PLACED),
        _textbook("training", "graph", PLACED),
        _textbook("forward", "xla", COMPILED),
        *(_head(name, *fields) for name in APPLICATIONS for fields in heads),
        *(_whole(name, way) for name in APPLICATIONS for way in ("forward", "training")),
    ]
