"""Tables of a run as DataFrames of text, and those as Markdown, CSV, HTML and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from poolbench.core.axes import STANDARD
from poolbench.core.case import case_label
from poolbench.core.records import (
    ALL_POOLING,
    HEAD,
    Environment,
    MatrixCell,
    ModelResult,
    Selftest,
    samples_by,
)
from poolbench.core.text import (
    format_bandwidth,
    format_nbytes,
    format_seconds,
    format_share,
    format_times,
    inverse,
    markdown_cell,
    one_line,
    significant,
    with_interval,
)
from poolbench.machine.nvml import is_gpu
from poolbench.report.frame import RunFrame, axes_in, middle_of, process_medians
from poolbench.report.recommend import Choice, speed_up_text

SMALL_SHARE = 0.02  # of a step: what a implementation could win there is lost in its noise
BASELINE = ("ratio", "ratio_low", "ratio_high")
RECIPE = ("recipe_ratio", "recipe_low", "recipe_high")
MISSING = {
    "matrix_cell": "No support matrix in this run: record one with `nox -s matrix`.",
    "trace_summary": "No traces in this run: record them with `nox -s trace`.",
    "selftest": "The harness was not audited in this run: do so with `nox -s selftest`.",
    "model": "No network was raced in this run, so that the share of pooling in a step is unknown here: "
    "`nox -s networks` measures the book's, `nox -s which -- model.keras` your own.",
    "shares": "The run did not end by itself, or is an import: where its wall time went is not recorded.",
}


def headline_table(loaded: RunFrame, picked: Sequence[Choice]) -> pd.DataFrame:
    """One row for each op, device, mode and direction: who to use, how fast, over whom."""
    rows = []
    for choice in picked:
        at, fastest = loaded.row(choice.row), loaded.row(choice.fastest_row)
        rest = [name for name in choice.best if name != choice.recommended]
        rows.append(
            {
                "op": at["op"],
                "device": at["device"],
                "mode": at["mode"],
                "direction": at["direction"],
                "size": at["shape"],
                "use": choice.recommended,
                "time a call": time_text(at),
                "speed over the baseline": "is the baseline"
                if at["candidate"] == at["baseline"]
                else speed_up_text(at, BASELINE),
                "baseline": at["baseline"],
                "speed over the recipe": speed_up_text(at, RECIPE) or at["recipe_reason"],
                "of the memory's bandwidth limit": format_share(at["efficiency"]),
                "fastest": f"{choice.fastest} ({format_seconds(fastest['seconds'])})",
                "not shown slower": ", ".join(rest)
                or ("nothing else was right" if choice.alone else "none"),
            }
        )
    return pd.DataFrame(rows)


def time_text(at: Mapping[str, Any]) -> str:
    """'815 µs'; on a GPU '17.4 µs (called: 216 µs)', or 'called: 164 µs' where its own clock did not time it."""
    own, called = format_seconds(at["seconds"]), format_seconds(at["wall_seconds"])
    if at["clock"] == "device":
        return f"{own} (called: {called})"
    return f"called: {called}" if is_gpu(at["device"]) else own


def measurement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every measurement in at most twelve columns, base units turned into text."""
    speed = [
        with_interval(*inverse(r, low, high))
        for r, low, high in zip(*(table[name].tolist() for name in BASELINE), strict=True)
    ]
    recipe = [
        with_interval(*inverse(r, low, high)) or reason
        for r, low, high, reason in zip(
            *(table[name].tolist() for name in (*RECIPE, "recipe_reason")), strict=True
        )
    ]
    efficiency = [
        with_interval(e, low, high, "%")
        for e, low, high in zip(
            *(table[name].tolist() for name in ("efficiency", "efficiency_low", "efficiency_high")),
            strict=True,
        )
    ]
    return pd.DataFrame(
        {
            "op": table["op"].tolist(),
            "case": table["label"].tolist(),
            "candidate": table["candidate"].tolist(),
            "status": [
                f"{status}: {one_line(reason)}" if reason else status
                for status, reason in zip(table["status"], table["reason"], strict=True)
            ],
            "time a call": [
                format_seconds(v) + (" (stopped early)" if s else "")
                for v, s in zip(table["seconds"], table["stopped_early"], strict=True)
            ],
            "speed over baseline": speed,
            "verdict": [
                f"UNDECIDED (+{int(n)} processes)" if v == "UNDECIDED" and math.isfinite(n) else v
                for v, n in zip(table["verdict"], table["processes_needed"], strict=True)
            ],
            "speed over recipe": recipe,
            "efficiency": efficiency,
            "error / bound": [
                significant(v, 2) if math.isfinite(v) else "" for v in table["worst"]
            ],
            "first call": [format_seconds(v) for v in table["first_seconds"]],
            "samples": table["samples"].tolist(),
        }
    )


def support_table(capabilities: Sequence[MatrixCell], op: str, device: str) -> pd.DataFrame:
    """Candidates down, probes across, states in the cells."""
    cells = [c for c in capabilities if c.op == op and c.device == device]
    probes = list(dict.fromkeys(c.probe for c in cells))
    names = list(dict.fromkeys(c.candidate for c in cells))
    state = {(c.candidate, c.probe): c.state for c in cells}
    frame = pd.DataFrame(
        [[state.get((name, probe), "") for probe in probes] for name in names], columns=probes
    )
    frame.insert(0, "candidate", names)
    return frame


def network_table(networks: Sequence[ModelResult]) -> pd.DataFrame:
    """One row a network, implementation, direction and mode: pooling's share of the step."""
    rows = []
    for record in networks:
        seconds = pd.Series(record.samples.seconds, dtype=float).median()
        figures = ", ".join(
            f"{name} {significant(value) if isinstance(value, (int, float)) else one_line(str(value))}"
            for name, value in record.figures.items()
            if value is not None
        )
        rows.append(
            {
                "model": record.model,
                "direction": record.direction,
                "mode": record.mode,
                "batch": record.batch,
                "op": record.op,
                "candidate": record.candidate,
                "status": record.status
                if record.status == "ok"
                else f"{record.status}: {one_line(record.reason)}",
                "time a step": format_seconds(float(seconds)),
                "pooling's share": share_text(record.share),
                "figures": figures,
            }
        )
    return pd.DataFrame(rows)


def share_text(share: tuple[float, float, float] | None) -> str:
    """'1.3% [1.1, 1.5]' from (low, middle, high)."""
    return with_interval(share[1], share[0], share[2], "%") if share else ""


def network_sentence(networks: Sequence[ModelResult]) -> str:
    """What the page opens with: whether the choice matters in whole networks; '' without records.

    The share of each network is that of all its pooling as it was built, what a user has before choosing, in
    graph mode and in the largest batch where there are several. A head is most of it pooling, and speaks for itself
    only where no whole network was raced.
    """
    shown = [r for r in networks if r.status == "ok" and r.share is not None]
    shown = [r for r in shown if not r.model.endswith(HEAD)] or shown
    chosen: dict[tuple[str, str], ModelResult] = {}
    for record in shown:
        key = (record.model, record.direction)
        chosen[key] = max(chosen.get(key, record), record, key=_stands_for_its_network)
    if not chosen:
        return ""
    shares = {key: record.share for key, record in chosen.items() if record.share is not None}
    small = {key: share for key, share in shares.items() if share[2] < SMALL_SHARE}
    parts = [
        f"{share_text(share)} of {name}'s {direction} step"
        for (name, direction), share in shares.items()
        if (name, direction) not in small
    ]
    if small:
        names = " and ".join(dict.fromkeys(f"{name}'s" for name, _ in small))
        least, most = (pick(share[1] for share in small.values()) for pick in (min, max))
        middle = (
            format_share(least)
            if least == most
            else f"{format_share(least)} to {format_share(most)}"
        )
        steps = " and ".join(dict.fromkeys(direction for _, direction in small))
        parts.append(f"{middle} of {names} {steps} steps")
    advice = f"Below {SMALL_SHARE:.0%} of the step, choose by the support matrix, not by speed"
    if not small:
        advice = "That is enough for the choice to be seen in the step"
    elif len(small) < len(shares):
        advice += "; above, the choice can be seen in the step"
    return f"Pooling takes {'; '.join(parts)}. {advice}."


def _stands_for_its_network(record: ModelResult) -> tuple[bool, bool, bool, int]:
    own = record.candidate == record.baseline
    return record.op == ALL_POOLING, own, record.mode == "graph", record.batch


def selftest_table(selftests: Sequence[Selftest]) -> pd.DataFrame:
    """One row an injected slowdown: how often it was seen, and what was seen falsely."""
    rows = []
    for record in selftests:
        found = record.faster + record.slower if record.injected == 0 else record.slower
        what = "false alarms" if record.injected == 0 else "power"
        rows.append(
            {
                "injected": "none (A/A)" if record.injected == 0 else format_share(record.injected),
                "margin": format_share(record.margin),
                "comparisons": record.comparisons,
                "FASTER": record.faster,
                "SLOWER": record.slower,
                "SAME": record.same,
                "UNDECIDED": record.undecided,
                "reads as": f"{what} {format_share(found / record.comparisons) if record.comparisons else '?'}",
                "noise floor": format_share(record.noise_floor),
            }
        )
    return pd.DataFrame(rows)


def environment_table(environment: Environment) -> pd.DataFrame:
    """Field and value, one row each."""
    groups: tuple[tuple[str, dict[str, object]], ...] = (
        ("machine", dict(environment.machine)),
        ("device", dict(environment.devices)),
        ("version", dict(environment.versions)),
        ("setting", dict(environment.settings)),
        ("source", dict(environment.source)),
    )
    return pd.DataFrame(
        [
            {"what": group, "field": name, "value": _environment_value(name, value)}
            for group, fields in groups
            for name, value in fields.items()
        ],
        columns=["what", "field", "value"],
    )


def _environment_value(name: str, value: object) -> str:
    if value is None:
        return "cannot be seen here"
    if name.endswith("nbytes") and isinstance(value, (int, float)):
        return format_nbytes(float(value))
    return one_line(str(value), 600)


def contention_table(loaded: RunFrame) -> pd.DataFrame:
    """What else the machine did, by op and mode: the worst race and the blocks marked and redone."""
    races = loaded.table.drop_duplicates("race")
    rows = []
    for (op, mode), group in races.groupby(["op", "mode"], sort=False):
        steal, others, apart, siblings = (
            group[name].max() for name in ("steal", "others", "cores_distant", "smt_sibling_busy")
        )
        rows.append(
            {
                "op": op,
                "mode": mode,
                "races": len(group),
                "blocks marked": int(group["blocks_marked"].sum()),
                "blocks redone": int(group["blocks_redone"].sum()),
                "worst steal": format_share(steal) or "cannot be seen here",
                "worst others' share": format_share(others) or "cannot be seen here",
                "processors far apart, worst share of blocks": format_share(apart)
                or "cannot be seen here",
                "siblings busy for other guests, worst share": format_share(siblings)
                or "cannot be seen here",
            }
        )
    return pd.DataFrame(rows)


def device_table(loaded: RunFrame) -> pd.DataFrame:
    """What GPUs said of each candidate's call, and of themselves during its race; empty without a GPU."""
    rows = []
    for m in loaded.run.measurements:
        if m.kind != "candidate" or m.status != "ok" or not is_gpu(m.case.device):
            continue
        called = process_medians(samples_by(m, "wall"))
        seen = m.contention
        if seen is None:
            continue
        low, high = seen.device_clock_mhz or (math.nan, math.nan)
        rows.append(
            {
                "op": m.case.op,
                "case": case_label(m.case),
                "candidate": m.candidate,
                "on the device": format_seconds(
                    math.nan if m.device_seconds is None else m.device_seconds
                ),
                "called": format_seconds(float(middle_of(called))) if len(called) else "",
                "energy a call": ""
                if m.energy_joules is None
                else f"{significant(1e3 * m.energy_joules)} mJ",
                "peak memory": "" if m.peak_nbytes is None else format_nbytes(m.peak_nbytes),
                "clock": " to ".join(dict.fromkeys((f"{low:.0f}", f"{high:.0f}"))) + " MHz"
                if math.isfinite(low)
                else "",
                "hottest": "" if seen.device_celsius is None else f"{seen.device_celsius:.0f} °C",
                "held down by": ", ".join(seen.device_slowdowns),
            }
        )
    return pd.DataFrame(rows)


def bandwidth_limit_table(probes: pd.DataFrame) -> pd.DataFrame:
    """Memory bandwidths by device, dtype, threads and cache, at the largest array probed."""
    if probes.empty:
        return pd.DataFrame()
    rows = []
    for (device, dtype, threads, cache, probe), group in probes.groupby(
        ["device", "dtype", "threads", "cache", "probe"], sort=True
    ):
        top = group.sort_values("nbytes").iloc[-1]
        rows.append(
            {
                "device": device,
                "dtype": dtype,
                "threads": threads or "all",
                "caches": cache,
                "probe": probe,
                "bytes a call": format_nbytes(top["nbytes"]),
                "bandwidth": format_bandwidth(top["bandwidth"]),
                "races": len(group),
            }
        )
    return pd.DataFrame(rows)


def shares_table(loaded: RunFrame) -> pd.DataFrame:
    """Where the wall time went, by kind."""
    from poolbench.core.records import TimeBreakdown

    rows = []
    for record in loaded.run.of(TimeBreakdown):
        for kind, seconds in sorted(record.seconds.items(), key=lambda item: -item[1]):
            share = seconds / record.wall_seconds if record.wall_seconds else math.nan
            rows.append(
                {"kind": kind, "time": format_seconds(seconds), "share": format_share(share)}
            )
        rows.append({"kind": "wall", "time": format_seconds(record.wall_seconds), "share": ""})
    return pd.DataFrame(rows)


def break_even_table(loaded: RunFrame) -> pd.DataFrame:
    """After how many calls a compiled function has paid for its first call, against the same candidate eager.

    Calls = (first call - steady call, compiled, minus the same eager) / (eager steady - compiled steady).
    """
    table = loaded.table
    right = table[table["right"] & table["first_seconds"].notna()]
    keys = [name for name in ("op", *axes_in(table), "candidate", "node") if name != "mode"]
    # What a call costs its caller: on a GPU too, first calls are wall time.
    right = right.assign(seconds=right["wall_seconds"])
    eager = right[right["mode"] == "eager"][[*keys, "seconds", "first_seconds"]]
    compiled = right[right["mode"] != "eager"][
        [*keys, "mode", "seconds", "first_seconds", "nbytes"]
    ]
    for frame in (eager, compiled):
        for name in set(axes_in(table)) - set(STANDARD):
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "")
    joined = compiled.merge(eager, on=keys, suffixes=("", "_eager"))
    saved = joined["seconds_eager"] - joined["seconds"]
    paid = (joined["first_seconds"] - joined["seconds"]) - (
        joined["first_seconds_eager"] - joined["seconds_eager"]
    )
    joined["saved"] = saved
    joined["calls"] = (paid / saved).where(saved > 0).clip(lower=1)
    return joined


def as_markdown(frame: pd.DataFrame, *, markup: Collection[str] = ()) -> str:
    """A GitHub table; cells are escaped, for names and errors come from outside.

    Not so those of the columns in `markup`: they are Markdown, and ours.
    """
    if frame.empty:
        return "(nothing)\n"
    out = ["| " + " | ".join(markdown_cell(str(name)) for name in frame.columns) + " |"]
    out.append("|" + "---|" * len(frame.columns))
    writers = [_cell if name in markup else _escaped_cell for name in frame.columns]
    out += [
        "| " + " | ".join(write(value) for write, value in zip(writers, row, strict=True)) + " |"
        for row in frame.itertuples(index=False)
    ]
    return "\n".join(out) + "\n"


def as_csv(frame: pd.DataFrame) -> str:
    """Comma-separated; a cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    safe = frame.copy()
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]) and not pd.api.types.is_bool_dtype(
            safe[name]
        ):
            safe[name] = [_no_formula(value) for value in safe[name]]
    out = io.StringIO()
    safe.to_csv(out, index=False)
    return out.getvalue()


def _no_formula(value: object) -> object:
    return (
        f"'{value}"
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
        else value
    )


def as_html(frame: pd.DataFrame) -> str:
    """A plain HTML table, escaped."""
    return str(frame.to_html(index=False, escape=True, border=0, na_rep=""))


def as_json(frame: pd.DataFrame) -> str:
    """One object a row; what is not finite is null."""
    rows = [
        {str(name): _json_cell(value) for name, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False)
    ]
    return json.dumps(rows, ensure_ascii=True, allow_nan=False, indent=1) + "\n"


def _json_cell(value: object) -> object:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, float):
        return value if value is not None and math.isfinite(value) else None
    return value


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _escaped_cell(value: object) -> str:
    return markdown_cell(_cell(value))


WRITERS: dict[str, Callable[[pd.DataFrame], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "html": as_html,
    "json": as_json,
}


def write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> list[Path]:
    """Each table as CSV and Markdown; the names are ours, never the data's."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in tables.items():
        for suffix, writer in ((".csv", as_csv), (".md", as_markdown)):
            path = folder / f"{name}{suffix}"
            path.write_text(writer(frame), encoding="utf-8")
            written.append(path)
    return written


__all__ = [
    "MISSING",
    "WRITERS",
    "format_times",
    "headline_table",
    "measurement_table",
    "write_tables",
]
