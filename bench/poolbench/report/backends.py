"""Runs on several backends: what Keras costs over each framework's own function, and its settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import pandas as pd

from poolbench.core.axes import axes_of, format_value
from poolbench.core.candidate import split_contender
from poolbench.core.case import Case
from poolbench.core.records import Measurement, is_right
from poolbench.core.registry import REGISTRY
from poolbench.core.text import format_seconds, with_interval
from poolbench.report.programs import same_program, unlike
from poolbench.report.ratios import class_of, paired, pool
from poolbench.stats.prior import SHIPPED, Prior

BACKENDS = {"": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
MODES = {("jax", "xla"): "jit"}
Races = dict[Case, dict[str, Measurement]]


def races_of(measurements: Iterable[Measurement]) -> Races:
    """Return the candidates' measurements by case and name."""
    races: Races = {}
    for m in measurements:
        if m.kind == "candidate":
            races.setdefault(m.case, {})[m.candidate] = m
    return races


def backend_and_mode(case: Case, label: str) -> str:
    """Return 'JAX, jit'."""
    return f"{BACKENDS.get(label, label)}, {MODES.get((label, case.mode), case.mode)}"


def ratio_text(one: Measurement | None, other: Measurement | None, prior: Prior = SHIPPED) -> str:
    """Return the time over another's with the interval of the next run, or why there is none."""
    if one is None or other is None:
        return ""
    for m in (one, other):
        if not is_right(m):
            return m.status
    if words := unlike(one, other):
        return words
    (over,), (own,) = pool([[paired(one, other)]], [class_of(one)], prior=prior)
    if one.stopped_early or over.next_run.low is None:
        return f"{own.ratio:.3g}x, stopped early"
    text = with_interval(over.mean.ratio, over.next_run.ratio_low, over.next_run.ratio_high)
    return f"same program, {text}" if same_program(one, other) else text


def cost_tables(races: Races, prior: Prior = SHIPPED) -> dict[str, pd.DataFrame]:
    """Return per op a row per case and backend: the time of what calls Keras over the backend's own function.

    The own function is the op's baseline, or the first in the race, that runs on no other backend. There is
    no table without a second backend, nor without a candidate that runs on several.
    """
    tables: dict[str, list[dict[str, str]]] = {}
    several = any(split_contender(name)[1] for found in races.values() for name in found)
    for case, found in races.items() if several else ():
        entries = REGISTRY.of(case.op)  # a run may hold candidates of a file that is not loaded
        cases = [one for one in races if one.op == case.op]
        varied = [
            name
            for name in axes_of(case.op)
            if name != "mode" and len({one.get(name) for one in cases}) > 1
        ]
        for label in BACKENDS:
            here = {}
            for one, m in found.items():
                name, of = split_contender(one)
                if of == label and name in entries:
                    here[name] = m
            alone = (label or "tensorflow",)
            own = [n for n in here if (entries[n].backends, entries[n].form) == (alone, "function")]
            keras = [n for n in here if len(entries[n].backends) > 1]
            if own and keras:
                base = own[0] if (usual := REGISTRY.ops[case.op].baseline) not in own else usual
                tables.setdefault(case.op, []).append(
                    {name: format_value(case.get(name)) for name in varied}
                    | {"backend": backend_and_mode(case, label)}
                    | {"own function": f"{base}, {_time_text(here[base])}"}
                    | {name: ratio_text(here[name], here[base], prior) for name in keras}
                )
    return {
        op: pd.DataFrame(sorted(rows, key=lambda row: list(row.values())[:-1])).fillna("")
        for op, rows in tables.items()
    }


def settings_table(races: Races) -> pd.DataFrame:
    """Return the settings that each backend's framework reported in its worker, one row per backend and mode."""
    rows: dict[str, dict[str, str]] = {}
    for case, found in races.items():
        for name, m in found.items():
            if m.settings:
                key = backend_and_mode(case, split_contender(name)[1])
                rows.setdefault(key, {"backend": key} | dict(sorted(m.settings.items())))
    return pd.DataFrame([rows[key] for key in sorted(rows)]).fillna("")


def _time_text(m: Measurement) -> str:
    return format_seconds(statistics.median(m.samples.seconds)) if is_right(m) else m.status
