"""The models that `suites/test_network.py` races, by sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from poolbench.core.records import HEAD
from poolbench.core.registry import load_builtin
from poolbench.models.results import Entry
from poolbench.models.zoo import APPLICATIONS, Source

IMAGE = (96, 96, 3)
TEXTBOOK = Source(kind="textbook")
HEAD_IMAGE = (224, 224, 3)
OPS = load_builtin().ops.values()
PLACED = {op.name: op.in_models for op in OPS if op.in_models}
COMPILED = {op.name: op.in_compiled_models for op in OPS if op.in_compiled_models}


def _head(name: str, direction: str, batch: int, **fields: Any) -> Entry:
    source = Source(kind="head", name=name, image=HEAD_IMAGE)
    return Entry(
        name=f"{name}{HEAD}",
        source=source,
        direction=direction,
        batch=batch,
        candidates=PLACED,
        **fields,
    )


def _whole(name: str, direction: str, **fields: Any) -> Entry:
    source = Source(kind="application", name=name, image=IMAGE)
    return Entry(
        name=name,
        source=source,
        direction=direction,
        batch=4,
        replaced=False,
        candidates=PLACED,
        **fields,
    )


def default_entries() -> list[Entry]:
    """Return the races of `nox -s networks`: at most six minutes on two cores."""
    textbook = [
        Entry(
            name="textbook", source=TEXTBOOK, direction=direction, batch=32, mode=mode,
            candidates=placed, budget_seconds=6.0,
            # Compiling a whole step for each implementation takes longer than all other races.
            replaced=mode == "graph",
        )
        for direction, mode, placed in (
            ("forward", "graph", PLACED), ("training", "graph", PLACED), ("forward", "xla", COMPILED)
        )
    ]  # fmt: skip
    heads = [
        entry
        for name in APPLICATIONS
        for entry in (
            _head(name, "forward", 1, latency_calls=2000, budget_seconds=1.0),
            _head(name, "forward", 8, budget_seconds=1.0),
            _head(name, "forward", 64, budget_seconds=2.0),
            _head(name, "training", 32, budget_seconds=2.0),
        )
    ]
    whole = [
        _whole(name, direction) for name in APPLICATIONS for direction in ("forward", "training")
    ]
    return textbook + heads + whole


def quick_entries() -> list[Entry]:
    """Return one model and one head: half a minute."""
    return [
        Entry(
            name="textbook", source=TEXTBOOK, direction="training", batch=16, candidates=COMPILED
        ),
        _head("mobilenetv2", "forward", 8, budget_seconds=1.0),
    ]


ENTRIES: dict[str, Callable[[], list[Entry]]] = {"default": default_entries, "quick": quick_entries}


def entries_of(sweep: str) -> list[Entry]:
    """Return the races of a sweep, or the default ones."""
    return ENTRIES.get(sweep, default_entries)()
