"""Which implementation to use: for each race the set not shown slower, and the one recommended of it."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.axes import axes_of, is_usual, label_value
from poolbench.core.candidate import Candidate
from poolbench.core.registry import REGISTRY, Registry
from poolbench.core.text import (
    format_seconds,
    format_share,
    format_times,
    inverse,
    join_names,
    significant,
    with_interval,
)
from poolbench.machine.nvml import is_gpu
from poolbench.report.frame import RunFrame, axes_in, red_cells
from poolbench.stats import estimate

GROUP = ("op", "device", "mode", "direction")  # one line of the headline each
CHOSEN_BY = (*GROUP, "dtype", "shape")  # what the page's chooser asks for
NO_CODE = 1 << 20  # code that is not at hand sorts after all that is


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer of one race.

    Attributes:
        race: its number; `row` the table's row of the recommended candidate, `fastest_row` of the fastest.
        fastest: the right candidate with the least time.
        best: the candidates not shown slower than the best, the fastest first.
        recommended: of these the one with the fewest red cells, then the shortest code.
        alone: only one candidate was right, so that nothing was chosen.
    """

    race: int
    row: int
    fastest_row: int
    fastest: str
    best: tuple[str, ...]
    recommended: str
    alone: bool


def recommend(
    op: str, best: Sequence[str], red: Mapping[tuple[str, str], int], registry: Registry = REGISTRY
) -> str:
    """Of equals the one with the fewest red cells, then the shortest code, then the fastest."""
    return min(best, key=lambda name: (red.get((op, name), 0), code_length(op, name, registry)))


def code_length(op: str, name: str, registry: Registry = REGISTRY) -> int:
    """Characters of the candidate's code."""
    entry = registry.candidates.get((op, name))
    if entry is None:
        return NO_CODE
    try:
        return len(_code(entry))
    except (OSError, TypeError):
        return NO_CODE


def snippet(op: str, name: str, registry: Registry = REGISTRY) -> str:
    """Code to copy: the builder and what it needs of its module; '' where its file is not at hand."""
    entry = registry.candidates.get((op, name))
    if entry is None:
        return ""
    imports: dict[str, str] = {}
    sources: dict[str, str] = {}
    try:
        _collect(entry.build, imports, sources)
    except (OSError, TypeError):
        return ""
    head = ["from __future__ import annotations", "", "from types import SimpleNamespace"]
    return "\n".join([*head, *imports.values()]) + "\n\n\n".join(["", *sources.values()])


def _collect(
    function: Callable[..., Any], imports: dict[str, str], sources: dict[str, str]
) -> None:
    """Add a function's source, and before it that of all it uses; what is not ours is imported."""
    name = function.__name__
    sources[name] = ""  # two that call each other are each written once
    for used in _global_names(function.__code__):
        value = function.__globals__.get(used)
        if inspect.ismodule(value):
            imports[used] = f"import {value.__name__} as {used}"
        elif inspect.isfunction(value) and _is_ours(value, function):
            if used not in sources:
                _collect(value, imports, sources)
        elif inspect.isfunction(value) or inspect.isclass(value):
            imports[used] = f"from {value.__module__} import {used}"
        elif isinstance(value, (str, int, float, tuple)):
            imports[used] = f"{used} = {value!r}"
    del sources[name]
    sources[name] = _undecorated(inspect.getsource(function)).rstrip()


def _is_ours(value: Any, function: Callable[..., Any]) -> bool:
    return bool(
        value.__module__ == function.__module__ or value.__module__.startswith("poolbench.")
    )


def _global_names(code: types.CodeType) -> list[str]:
    """Global names that a function and those within it load, in the order of the text."""
    own = [str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return list(dict.fromkeys([*own, *(name for one in inner for name in _global_names(one))]))


def _undecorated(source: str) -> str:
    """The function without a decorator, which would register it with this project."""
    start = re.search(r"^def ", source, flags=re.MULTILINE)
    return source[start.start() :] if start else source


def call(at: Mapping[str, Any], name: str, registry: Registry = REGISTRY) -> str:
    """The lines after the snippet: the case of a row as plain values, and the built callable."""
    op = str(at["op"])
    entry = registry.candidates.get((op, name))
    if entry is None:
        return ""
    values = {axis: _plain(at[axis]) for axis in axes_of(op) if axis in at}
    if "shape" in values:
        values["shape"] = tuple(int(part) for part in str(values["shape"]).split("x"))
    fields = ", ".join(f"{axis}={value!r}" for axis, value in {"op": op, **values}.items())
    return f"case = SimpleNamespace({fields})\npool = {entry.build.__name__}(case)  # y = pool(x)"


@functools.lru_cache
def _code(entry: Candidate) -> str:
    """Its source text, which takes a millisecond to cut out of its file."""
    return entry.code


def choices(loaded: RunFrame, registry: Registry = REGISTRY) -> list[Choice]:
    """One choice a race that has a right candidate, in the order of the races."""
    red = red_cells(loaded.run.capabilities)
    table = loaded.table
    right = table[table["right"] & table["seconds"].notna()]
    names = table["candidate"].tolist()
    ops = table["op"].tolist()
    races = {
        race: _in_order(table, _by_one_clock(table, right.index[rows].tolist()))
        for race, rows in right.groupby("race", sort=True).indices.items()
    }
    estimates = _estimates(loaded, races.values())
    found = []
    for race, index in races.items():
        op = str(ops[index[0]])
        best = _best_rows(loaded, index, estimates)
        best_names = tuple(names[row] for row in best)
        chosen = recommend(op, best_names, red, registry)
        found.append(
            Choice(
                race=int(race),
                row=best[best_names.index(chosen)],
                fastest_row=best[0],
                fastest=best_names[0],
                best=best_names,
                recommended=chosen,
                alone=len(index) == 1,
            )
        )
    return found


def _by_one_clock(table: pd.DataFrame, rows: Sequence[int]) -> list[int]:
    """On a GPU the rows that its own clock timed: who goes on on the host cannot be compared with them."""
    clocks = table["clock"].to_numpy()
    return [row for row in rows if clocks[row] == "device"] or list(rows)


def _in_order(table: pd.DataFrame, rows: Sequence[int]) -> list[int]:
    """The rows that may be the best, the fastest first: a stopped early one is not among them."""
    stopped_early, ratio, seconds = (
        table[name].to_numpy() for name in ("stopped_early", "ratio", "seconds")
    )
    open_rows = [row for row in rows if not stopped_early[row]] or list(rows)
    # Over the baseline where there is one, for that is paired; else by the time itself.
    return sorted(
        open_rows, key=lambda row: ratio[row] if math.isfinite(ratio[row]) else seconds[row]
    )


def _estimates(
    loaded: RunFrame, races: Iterable[Sequence[int]]
) -> dict[tuple[int, int], estimate.Estimate]:
    """Every pair of every race, estimated at once; keys are the identities of the two Samples."""
    pairs = [
        (loaded.samples[one], loaded.samples[other])
        for rows in races
        for one, other in itertools.combinations(rows, 2)
    ]
    found = estimate.estimate_all(pairs)
    return {(id(one), id(other)): f for (one, other), f in zip(pairs, found, strict=True)}


def _best_rows(
    loaded: RunFrame, order: Sequence[int], estimates: Mapping[tuple[int, int], estimate.Estimate]
) -> list[int]:
    """Rows not shown slower than the best, the fastest first."""
    if len(order) == 1:
        return list(order)
    kept = estimate.best_set(
        {str(row): loaded.samples[row] for row in order},
        estimator=lambda one, other: estimates[id(one), id(other)],
    )
    return [row for row in order if str(row) in set(kept)] or list(order[:1])


def base_values(table: pd.DataFrame, op: str) -> dict[str, object]:
    """The value of each axis that most of the op's cases have: what the others are varied around."""
    cases = table[table["op"] == op].drop_duplicates("race")
    values: dict[str, object] = {}
    for name in axes_in(table):
        codes, found = pd.factorize(cases[name], use_na_sentinel=False)
        counts = np.bincount(codes)
        top = [_plain(found[i]) for i in np.flatnonzero(counts == counts.max())]
        usual = [value for value in top if is_usual(op, name, value)]
        values[name] = usual[0] if usual else top[0]
    return values


def _plain(value: object) -> object:
    """A pandas cell as Python's own type, None for a missing one."""
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.item() if hasattr(value, "item") else value


def at_base(
    table: pd.DataFrame, op: str, free: Iterable[str], fixed: Mapping[str, object] | None = None
) -> pd.DataFrame:
    """The op's rows in which every axis but `free` has its base value, or the one in `fixed`."""
    base = {**base_values(table, op), **(fixed or {})}
    free = set(free)
    keep = table["op"] == op
    for name, value in base.items():
        if name not in free:
            keep &= table[name].isna() if value is None else table[name] == value
    return table[keep]


def headline(loaded: RunFrame, found: Sequence[Choice]) -> list[Choice]:
    """One choice for each op, device, mode and direction: at the base case, else the largest measured."""
    table = loaded.table
    by_race = {choice.race: choice for choice in found}
    picked = []
    for key, rows in table.groupby(list(GROUP), sort=False):
        op = key[0]
        base = base_values(table, str(op))
        cases = rows[rows["race"].isin(by_race)].drop_duplicates("race")
        if cases.empty:
            continue
        distance = sum(
            (cases[name].map(_plain) != base[name]).astype(int)
            for name in axes_in(table)
            if name not in GROUP
        )
        order = cases.assign(distance=distance).sort_values(
            ["distance", "nbytes"], ascending=[True, False]
        )
        picked.append(by_race[int(order.iloc[0]["race"])])
    return picked


def others_label(at: Mapping[str, Any]) -> str:
    """The settings that the chooser does not ask for one by one: 'k3, valid', '1 thread', ..."""
    parts = []
    op = str(at["op"])
    for name in axes_of(op):
        value: Any = None if name in CHOSEN_BY else _plain(at.get(name))
        if value is not None and not is_usual(op, name, value):
            parts.append(label_value(op, name, value))
    return ", ".join(parts) or "as usual"


def sentence(loaded: RunFrame, choice: Choice, registry: Registry = REGISTRY) -> str:
    """'on cpu:0, under xla, forward, use X: 5.2 times as fast as the recipe [4.9, 5.5], 91% of what the memory allows'.

    Says no more than the data: no interval where the race was stopped early, no rank where only one was right.
    """
    at = loaded.row(choice.row)
    op = registry.ops.get(at["op"])
    parts = [
        f"On {at['device']}, {MODE_WORDS.get(at['mode'], at['mode'])}, {at['direction']}, "
        f"use {choice.recommended}: {format_seconds(at['seconds'])} a call" + _clock_words(at)
    ]
    recipe = _speed_up(at, "recipe_ratio", "recipe_low", "recipe_high")
    baseline = _speed_up(at, "ratio", "ratio_low", "ratio_high")
    if recipe and op and choice.recommended != op.textbook:
        parts.append(f"{recipe} the speed of the book's recipe ({op.textbook})")
    elif baseline and choice.recommended != at["baseline"]:
        parts.append(f"{baseline} the speed of {at['baseline']}")
    if math.isfinite(at["efficiency"]):
        parts.append(f"{format_share(at['efficiency'])} of what the memory allows")
    text = ", ".join(parts) + "."
    if choice.alone:
        text += " Nothing else was right here."
    elif len(choice.best) > 1:
        rest = [name for name in choice.best if name != choice.recommended]
        text += f" Not shown slower: {join_names(rest)}."
    return text


def _clock_words(at: Mapping[str, Any]) -> str:
    """By which clock a time on a GPU is; '' on a CPU."""
    if at["clock"] == "device":
        return f" by the device's clock ({format_seconds(at['wall_seconds'])} from Python)"
    return " from Python" if is_gpu(at["device"]) else ""


MODE_WORDS = {"xla": "under XLA", "graph": "in a graph", "eager": "eagerly"}


def _speed_up(at: Mapping[str, Any], middle: str, low: str, high: str) -> str:
    values = inverse(*(float(at[name]) for name in (middle, low, high)))
    value, lower, upper = values
    if not math.isfinite(value):
        return ""
    if math.isfinite(lower) and math.isfinite(upper):
        return f"{significant(value)} times (95% interval {significant(lower)} to {significant(upper)})"
    return f"{significant(value)} times"


def caveats(loaded: RunFrame, op: str, name: str) -> list[str]:
    """What the support matrix says against a candidate, one line a cell that is not 'pass'."""
    return [
        f"{cell.probe}: {cell.state}" + (f" ({cell.evidence})" if cell.evidence else "")
        for cell in loaded.run.capabilities
        if cell.op == op and cell.candidate == name and cell.state not in ("pass", "not_run")
    ]


def speed_up_text(at: Mapping[str, Any], columns: tuple[str, str, str]) -> str:
    """'5.20x [4.90, 5.50]' of a row's three columns of a time ratio, as a speed-up."""
    return with_interval(*inverse(*(float(at[name]) for name in columns)))


__all__ = ["Choice", "choices", "format_times", "headline", "recommend", "sentence"]
