"""The page of a run: one folder that works from disk, with no network.

Everything that a journal holds is untrusted: text reaches HTML through jinja2's escaping, data through
JSON with no `<`, `>` or `&` in it, files have names of ours; a content security policy with a nonce
runs no script but the page's own.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from poolbench.core.case import case_label
from poolbench.core.records import Node
from poolbench.core.text import (
    format_nbytes,
    format_seconds,
    format_share,
    join_names,
    one_line,
    significant,
)
from poolbench.report import machine_tables, tables
from poolbench.report.backends import cost_tables, races_of, settings_table
from poolbench.report.cards import cards
from poolbench.report.formats import as_csv, as_markdown
from poolbench.report.frame import RunFrame
from poolbench.report.page_data import page_data, write_samples
from poolbench.report.pairs import estimate_pairs
from poolbench.report.recommend import answer
from poolbench.report.support import STANDS_IN, Support, supports
from poolbench.report.template import embed_json, fill_template
from poolbench.report.terminal import headline_text, interval_line
from poolbench.report.writing import writing_into
from poolbench.stats.estimate import Estimate
from poolbench.stats.verdict import verdict

TOP_PARTS = 12
MOST_MARKDOWN = 2000  # rows of a table that is written as Markdown too: more are read by a program


@dataclass(frozen=True, kw_only=True)
class RenderedReport:
    """The written page, and the headline for the terminal."""

    page: Path
    headline: str


def render(loaded: RunFrame, out: Path) -> RenderedReport:
    """Write the page, figures, tables and samples of a run under `out`.

    Returns:
        The page's path and the headline as text.
    """
    with writing_into(out):
        page = _write(loaded, out)
    return RenderedReport(page=page, headline=headline_text(loaded))


def _write(loaded: RunFrame, out: Path) -> Path:
    """Write the page and its files; return its path."""
    from poolbench.report.figures.files import write_figures

    answers = answer(loaded)
    matrices = supports(loaded)
    summary = tables.headline_table(loaded, answers)
    write_samples(loaded.samples, out / "samples")
    run = loaded.run
    races = races_of(run.measurements)
    written = {
        "headline": summary,
        "all": loaded.table,
        "networks": tables.network_table(run.networks),
        "selftest": machine_tables.selftest_table(run.selftests),
        "environment": machine_tables.environment_table(run.header.environment),
        "bandwidth_limits": machine_tables.bandwidth_limit_table(loaded.probes),
        "devices": machine_tables.device_table(loaded),
        "history": tables.history_table(loaded, answers),
    }
    _write_tables(out / "tables", written)
    groups = write_figures(loaded, answers, matrices, out / "figures")
    context = {
        "run": run,
        "runs": [one.header.run for one in loaded.runs],
        "created": run.header.created,
        "cards": cards(loaded, answers, matrices),
        "interval_line": interval_line(loaded),
        "networks": tables.network_sentence(run.networks),
        "missing": tables.MISSING,
        "headline": _for_page(summary),
        "rank_note": tables.rank_note(loaded, answers),
        "figures": groups,
        "supports": [_matrix(one) for one in matrices],
        "stands_in": STANDS_IN,
        "trace_summaries": _accounts(loaded),
        "network_table": written["networks"],
        "selftest_table": written["selftest"],
        "selftest_sentence": selftest_sentence(loaded),
        "programs_sentence": programs_sentence(loaded),
        "cost_tables": cost_tables(races, loaded.prior),
        "settings_table": settings_table(races),
        "contention_table": machine_tables.contention_table(loaded),
        "bandwidth_limit_table": written["bandwidth_limits"],
        "device_table": written["devices"],
        "history_table": written["history"],
        "shares_table": machine_tables.shares_table(loaded),
        "environment_tables": [("local", written["environment"])]
        + [
            (node.name, machine_tables.environment_table(node.environment)) for node in run.of(Node)
        ],
        "options": one_line(json.dumps(run.header.options, sort_keys=True, default=str), 2000),
        "disagreeing": _disagreeing(loaded),
        "count": len(loaded.table),
        "in_markdown": len(loaded.table) <= MOST_MARKDOWN,
        "statuses": _status_counts(loaded.table),
        "data": embed_json(page_data(loaded, answers, matrices)),
    }
    page = out / "index.html"
    page.write_text(fill_template("page.html", context), encoding="utf-8")
    return page


def _for_page(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a narrower headline: cells cut, and no column with equal values in every row."""
    same = [name for name in ("device", "size") if name in summary and summary[name].nunique() < 2]
    return summary.drop(columns=same).map(lambda cell: one_line(str(cell), 70))


def _write_tables(folder: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as CSV and, unless it is large, as Markdown; the measurements in fewer columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        (folder / f"{name}.csv").write_text(as_csv(frame), encoding="utf-8")
        (folder / f"{name}.md").unlink(missing_ok=True)
        if len(frame) <= MOST_MARKDOWN:
            shown = tables.measurement_table(frame) if name == "all" else frame
            (folder / f"{name}.md").write_text(as_markdown(shown), encoding="utf-8")


def _matrix(support: Support) -> dict[str, Any]:
    """Return an op's matrix on a device: checks, and rows of cells with their evidence."""
    cells = support.cells
    probes = list(dict.fromkeys(c.probe for c in cells))
    at = {(c.candidate, c.probe): c for c in cells}
    names = list(dict.fromkeys(c.candidate for c in cells))
    rows = [(name, [at.get((name, probe)) for probe in probes]) for name in names]
    return {
        "op": support.op, "device": support.device, "probes": probes, "rows": rows,
        "borrowed": support.borrowed,
    }  # fmt: skip


def _accounts(loaded: RunFrame) -> list[dict[str, Any]]:
    """Return traced steps as text: time and memory by operation."""
    found = []
    for one in loaded.run.trace_summaries:
        parts = sorted(one.parts, key=lambda part: -_number(part.get("seconds", 0)))
        rows = [
            (
                str(part.get("kind", "")),
                one_line(str(part.get("name", "")), 80),
                format_seconds(_number(part.get("seconds", math.nan))),
                significant(_number(part.get("count", 0))),
                format_nbytes(_number(part.get("nbytes", math.nan))),
                format_share(_number(part.get("seconds", 0)) / (one.step_seconds or math.nan)),
            )
            for part in parts[:TOP_PARTS]
        ]
        facts = {
            "a traced step": format_seconds(one.step_seconds) if one.steps else "",
            "peak memory": _nbytes(one.peak_nbytes),
            "allocated": _nbytes(one.allocated_nbytes),
            "freed": _nbytes(one.freed_nbytes),
            "the compiler's peak": _nbytes(one.compiler_nbytes),
            "threads busy": "" if one.threads_busy is None else significant(one.threads_busy),
        }
        found.append(
            {
                "op": one.case.op,
                "title": f"{one.case.op}: {one.candidate}, {case_label(one.case)}",
                "status": one.status,
                "reason": one.reason,
                "trace": one.trace,
                "facts": {name: value for name, value in facts.items() if value},
                "rows": rows,
                "hidden": max(0, len(parts) - TOP_PARTS),
            }
        )
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _nbytes(value: int | None) -> str:
    return format_nbytes(float(value)) if value is not None else ""


def selftest_sentence(loaded: RunFrame) -> str:
    """Describe the result of the self-test, and the number of withheld verdicts."""
    same = [s for s in loaded.run.selftests if s.injected == 0]
    if not same:
        return ""
    count = sum(s.comparisons for s in same)
    alarms = sum(s.faster + s.slower for s in same)
    floor = max(s.noise_floor for s in same)
    withheld = int((loaded.table["verdict"] == "WITHHELD").sum())
    return (
        f"{alarms} false alarms in {count} comparisons of an op with itself. The noise floor is "
        f"{format_share(floor)}; {withheld} verdicts finer than it are withheld."
    )


def program_pairs(loaded: RunFrame) -> dict[tuple[int, int], Estimate]:
    """Return the estimate of each pair of rows that XLA made one program of, which has an interval."""
    table = loaded.table
    groups: dict[tuple[Any, ...], list[int]] = {}
    chosen = (
        (table["mode"] == "xla")
        & table["right"]
        & ~table["stopped_early"]
        & (table["program"] != "")
    )
    for row in table.index[chosen]:
        if program := loaded.measurement(row).program:
            groups.setdefault((table["race"][row], program.hash, program.key), []).append(row)
    found = estimate_pairs(loaded, groups.values()).mean
    return {
        (row, other): one
        for (row, other), one in found.items()
        if row < other and one.low is not None
    }


def programs_sentence(loaded: RunFrame) -> str:
    """Describe the pairs of candidates that are one program, which are further A/A comparisons; '' without one."""
    pairs = program_pairs(loaded).values()
    if not pairs:
        return ""
    verdicts = Counter(verdict(one, loaded.margin) for one in pairs)
    return (
        f"{len(pairs)} pairs of candidates are one program with XLA, further comparisons of a program with itself: "
        f"{verdicts['FASTER'] + verdicts['SLOWER']} called different, {verdicts['SAME']} SAME at a margin of "
        f"{format_share(loaded.margin)}, {verdicts['UNDECIDED']} undecided. Their ratios differ from 1 by "
        f"{format_share(max(abs(math.expm1(one.log_ratio)) for one in pairs))} at most."
    )


def _disagreeing(loaded: RunFrame) -> list[str]:
    rows = loaded.table[loaded.table["disagree"]]
    names = [f"{r.candidate} ({r.op}-{r.label})" for r in rows.head(20).itertuples(index=False)]
    rest = len(rows) - len(names)
    return [*names, f"and {rest} more"] if rest > 0 else names


def _status_counts(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return join_names([f"{count} {status}" for status, count in counts.items()])
