"""The page of a run: one folder that works from disk, with no network.

Everything that a journal holds is untrusted: text reaches HTML through jinja2's escaping, data through
JSON with no `<`, `>` or `&` in it, files have names of ours; a content security policy with a nonce
runs no script but the page's own.
"""

from __future__ import annotations

import base64
import json
import math
import multiprocessing
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from poolbench.core.axes import STANDARD
from poolbench.core.records import MatrixCell, Samples
from poolbench.core.text import (
    format_nbytes,
    format_seconds,
    format_share,
    join_names,
    one_line,
    significant,
)
from poolbench.report import tables
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import (
    CHOSEN_BY,
    Choice,
    call,
    caveats,
    choices,
    headline,
    others_label,
    sentence,
    snippet,
)

TEMPLATES = Path(__file__).parent / "templates"
CHUNK = 100  # measurements in a file of samples
FORK_FROM_ROWS = 3000  # below it drawing takes nearly all of the time
TOP_PARTS = 12
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RenderedReport:
    """What was written: the page, and the headline for the terminal."""

    page: Path
    headline: str


def render(loaded: RunFrame, out: Path) -> RenderedReport:
    """Write the page, figures, tables and samples of a run under `out`.

    Returns:
        The page's path and the headline as text.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawing = beside(lambda: write_figures(loaded, out / "figures"), len(loaded.table))
    found = choices(loaded)
    picked = headline(loaded, found)
    summary = tables.headline_table(loaded, picked)
    _write_samples(loaded.samples, out / "samples")
    run = loaded.run
    written = {
        "headline": summary,
        "all": loaded.table,
        "networks": tables.network_table(run.networks),
        "selftest": tables.selftest_table(run.selftests),
        "environment": tables.environment_table(run.header.environment),
        "bandwidth_limits": tables.bandwidth_limit_table(loaded.probes),
        "devices": tables.device_table(loaded),
    }
    _write_tables(out / "tables", written)
    data = embed_json(page_data(loaded, found))
    figures = drawing()
    context = {
        "run": run,
        "created": run.header.created,
        "networks": tables.network_sentence(run.networks),
        "missing": tables.MISSING,
        "sentences": leading_sentences(loaded, picked),
        "headline": _for_page(summary),
        "figures": figures,
        "supports": _supports(run.capabilities),
        "trace_summaries": _accounts(loaded),
        "network_table": written["networks"],
        "selftest_table": written["selftest"],
        "selftest_sentence": selftest_sentence(loaded),
        "contention_table": tables.contention_table(loaded),
        "bandwidth_limit_table": written["bandwidth_limits"],
        "device_table": written["devices"],
        "shares_table": tables.shares_table(loaded),
        "environment_tables": [("local", written["environment"])]
        + [(node.name, tables.environment_table(node.environment)) for node in _nodes(loaded)],
        "options": one_line(json.dumps(run.header.options, sort_keys=True, default=str), 2000),
        "disagreeing": _disagreeing(loaded),
        "count": len(loaded.table),
        "statuses": _status_counts(loaded.table),
        "data": data,
    }
    page = out / "index.html"
    page.write_text(fill_template("page.html", context), encoding="utf-8")
    return RenderedReport(page=page, headline=headline_text(loaded, picked))


def beside(work: Callable[[], Result], rows: int) -> Callable[[], Result]:
    """Begin the work, for a large run in a process of its own; what is returned waits for its result.

    Drawing takes as long as all else that a page of many rows needs. The process is forked: it shares the
    run's memory, and is Linux's alone, for elsewhere a fork is not safe.
    """
    if rows < FORK_FROM_ROWS or sys.platform != "linux":
        return work
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send((work(), None))
        except Exception as error:  # noqa: BLE001 (raised again where the result is asked for)
            sender.send((None, error))

    process = context.Process(target=run)
    process.start()
    sender.close()

    def result() -> Result:
        try:
            value, error = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"drawing ended with code {process.exitcode}") from None
        process.join()
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    return result


def fill_template(name: str, context: Mapping[str, Any]) -> str:
    """A template of ours, filled; undefined names are an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        nonce=secrets.token_urlsafe(16),
        datatables=datatables_bundle,
    )
    return environment.get_template(name).render(**context)


def datatables_bundle() -> tuple[str, str]:
    """(script, style) of itables' offline DataTables; the script leaves the class in window.DataTable."""
    import itables

    folder = Path(itables.__file__).parent / "html"
    script = (folder / "dt_bundle.js").read_text(encoding="utf-8")
    style = (folder / "dt_bundle.css").read_text(encoding="utf-8")
    export = re.search(r"export\{[^}]*?(\w+) as default[^}]*\};?", script)
    if export is None:
        raise RuntimeError(
            f"itables {itables.__version__} exports its bundle in a way unknown here"
        )
    script = (
        script[: export.start()] + f"window.DataTable={export.group(1)};" + script[export.end() :]
    )
    return script.replace("</script", "<\\/script"), style.replace("</style", "<\\/style")


def embed_json(value: object) -> str:
    """JSON that can stand in a script element: ASCII only, no `<`, `>` or `&`."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _for_page(summary: pd.DataFrame) -> pd.DataFrame:
    """The headline table, narrower: the baseline and the fastest are in its CSV."""
    shown = summary.drop(columns=["baseline", "fastest"], errors="ignore")
    return shown.map(lambda cell: one_line(str(cell), 90))


def leading_sentences(loaded: RunFrame, picked: Sequence[Choice]) -> list[tuple[str, str]]:
    """(op, sentence) of the quickest mode for each op, device and direction; the table has them all."""
    quickest: dict[tuple[str, str, str], Choice] = {}
    seconds = loaded.table["seconds"].tolist()
    for choice in picked:
        at = loaded.row(choice.row)
        key = (str(at["op"]), str(at["device"]), str(at["direction"]))
        best = quickest.get(key)
        if best is None or seconds[choice.row] < seconds[best.row]:
            quickest[key] = choice
    return [(key[0], sentence(loaded, choice)) for key, choice in quickest.items()]


def headline_text(loaded: RunFrame, picked: Sequence[Choice]) -> str:
    """One sentence a line of the headline, for the terminal."""
    lines = [f"{loaded.row(choice.row)['op']}: {sentence(loaded, choice)}" for choice in picked]
    opening = tables.network_sentence(loaded.run.networks)
    if not lines:
        lines = ["No measurement of this run is right and timed: nothing to rank."]
    return "\n".join(one_line(line, 2000) for line in ([opening] if opening else []) + lines)


def page_data(loaded: RunFrame, found: Sequence[Choice]) -> dict[str, Any]:
    """What the page's script reads: the choices and the rows of the table."""
    answers = []
    used: set[tuple[str, str]] = set()
    for choice in found:
        at = loaded.row(choice.row)
        used.add((str(at["op"]), choice.recommended))
        answers.append(
            {
                "key": [str(at[name]) for name in CHOSEN_BY] + [others_label(at)],
                "use": choice.recommended,
                "row": choice.row,
                "text": sentence(loaded, choice),
                "call": call(at, choice.recommended),
                "disagree": bool(at["disagree"]),
            }
        )
    return {
        "answers": answers,
        "snippets": [[op, name, snippet(op, name)] for op, name in sorted(used)],
        "caveats": [[op, name, caveats(loaded, op, name)] for op, name in sorted(used)],
        "choices": {
            "mode": list(STANDARD["mode"].choices),
            "direction": list(STANDARD["direction"].choices),
            "dtype": list(STANDARD["dtype"].choices),
        },
        "matrix": bool(loaded.run.capabilities),
        "columns": [list(column) for column in PAGE_COLUMNS],
        **_rows(loaded.table),
        "chunk": CHUNK,
    }


PAGE_COLUMNS = (  # heading, kind
    ("op", "text"),
    ("case", "text"),
    ("candidate", "text"),
    ("status", "text"),
    ("time a call", "seconds"),
    ("speed over baseline", "times"),
    ("95% interval", "text"),
    ("verdict", "text"),
    ("speed over recipe", "times"),
    ("of the bandwidth limit", "share"),
    ("error / bound", "number"),
    ("samples", "samples"),
)


def _rows(table: pd.DataFrame) -> dict[str, Any]:
    """Rows of the table, texts as indices into a list of words: a run of 20,000 stays small."""
    words: dict[str, int] = {}

    def index(text: str) -> int:
        return words.setdefault(text, len(words))

    statuses = [
        f"{status}: {one_line(reason, 160)}" if reason else status
        for status, reason in zip(table["status"], table["reason"], strict=True)
    ]
    intervals = [
        f"{significant(1 / high)} to {significant(1 / low)}"
        if low > 0 and math.isfinite(high)
        else ""
        for low, high in zip(table["ratio_low"], table["ratio_high"], strict=True)
    ]
    verdicts = [
        f"UNDECIDED, {int(n)} more processes" if v == "UNDECIDED" and math.isfinite(n)
        else ("stopped_early" if stopped_early and not v else v)
        for v, n, stopped_early in zip(table["verdict"], table["processes_needed"], table["stopped_early"], strict=True)
    ]  # fmt: skip
    rows = [
        [
            index(op), index(label), index(name), index(status), rounded(seconds), _invert(ratio), index(interval),
            index(verdict), _invert(recipe), rounded(efficiency), rounded(worst), int(count),
        ]
        for op, label, name, status, seconds, ratio, interval, verdict, recipe, efficiency, worst, count in zip(
            table["op"], table["label"], table["candidate"], statuses, table["seconds"], table["ratio"],
            intervals, verdicts, table["recipe_ratio"], table["efficiency"], table["worst"], table["samples"],
            strict=True,
        )
    ]  # fmt: skip
    return {"words": list(words), "rows": rows}


def rounded(value: float) -> float | None:
    """Four significant digits; None for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _invert(ratio: float) -> float | None:
    return rounded(1 / ratio) if ratio and math.isfinite(ratio) else None


def _write_samples(samples: Sequence[Samples], folder: Path) -> None:
    """Raw samples in files that the page loads when a row is opened: [float32 seconds, processes' lengths]."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.js"):
        old.unlink()
    for start in range(0, len(samples), CHUNK):
        rows = []
        for one in samples[start : start + CHUNK]:
            seconds = np.asarray(one.seconds, dtype="<f4")
            cuts = np.flatnonzero(np.diff(np.asarray(one.process))) + 1
            lengths = np.diff([0, *cuts, len(seconds)]).tolist()
            rows.append([base64.b64encode(seconds.tobytes()).decode(), lengths])
        number = start // CHUNK
        text = f"poolbenchSamples({number},{json.dumps(rows, separators=(',', ':'))});\n"
        (folder / f"{number}.js").write_text(text, encoding="ascii")


def write_figures(loaded: RunFrame, folder: Path) -> list[dict[str, Any]]:
    """Every figure that the run has the data for, as SVG and PNG; what the page needs of each."""
    from poolbench.report import figures

    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    groups: list[dict[str, Any]] = []
    pairs = list(dict.fromkeys(zip(loaded.table["op"], loaded.table["device"], strict=True)))
    cells = [(c.op, c.device) for c in loaded.run.capabilities]
    number = 0
    for op, device in dict.fromkeys([*pairs, *cells]):
        drawn: list[figures.Plot] = []
        with figures.styled():
            if (op, device) in pairs:
                drawn += [
                    p for maker in figures.MAKERS if (p := maker(loaded, op, device)) is not None
                ]
            support = figures.plot_support(loaded.run.capabilities, op, device)
        shown = []
        for plot in drawn + ([support] if support else []):
            number += 1
            shown.append(
                _write_figure(plot, f"{number:02d}-{plot.name}-{figures.slug(op)}", folder)
            )
        groups.append(
            {
                "op": op, "device": device, "title": figures.title_of(op), "figures": shown,
                "anchor": f"figures-{len(groups)}",
                "note": f"{_direction_note(loaded, op)} {_clock_note(loaded, op, device)}".strip(),
            }
        )  # fmt: skip
    with figures.styled():
        selftest = figures.plot_selftest(loaded.run.selftests)
    if selftest is not None:
        groups.append(
            {
                "op": "", "device": "", "title": "Selftest", "anchor": "figures-selftest", "note": "",
                "figures": [_write_figure(selftest, f"{number + 1:02d}-selftest", folder)],
            }
        )  # fmt: skip
    return groups


def _direction_note(loaded: RunFrame, op: str) -> str:
    """Says so where an op was raced in one direction: for want of an reference for its gradient, or by choice."""
    directions = set(loaded.table.loc[loaded.table["op"] == op, "direction"])
    return (
        "Raced forward only: no training case of this op is in the run."
        if directions == {"forward"}
        else ""
    )


def _clock_note(loaded: RunFrame, op: str, device: str) -> str:
    """Which clock the times on a GPU are by; '' on a CPU."""
    table = loaded.table
    rows = table[(table["op"] == op) & (table["device"] == device) & table["right"]]
    by_wall = rows[rows["clock"] == "wall"]
    if len(by_wall) == len(rows):
        return ""
    text = "Times are by the device's own clock: a call from Python takes longer."
    if not by_wall.empty:
        names = ", ".join(sorted(set(by_wall["mode"] + " " + by_wall["candidate"])))
        text += f" By the wall's clock: {names}."
    return text


def _write_figure(plot: Any, name: str, folder: Path) -> dict[str, Any]:
    from poolbench.report import figures

    png = figures.png_of(plot.figure)
    svg = figures.svg_of(plot.figure, name)
    standalone = '<?xml version="1.0" encoding="utf-8"?>\n' + svg
    (folder / f"{name}.svg").write_text(standalone, encoding="utf-8")
    (folder / f"{name}.png").write_bytes(png)
    return {
        "name": name,
        "title": plot.title,
        "caption": plot.caption,
        "svg": inline_svg(svg, plot.title),
    }


def inline_svg(svg: str, title: str) -> Markup:
    """Our own SVG with a label for screen readers, scaled by the page instead of by its points."""
    head_end = svg.index(">")
    head = re.sub(r' (width|height)="[^"]*"', "", svg[:head_end])
    match = re.search(r' width="([0-9.]+)pt"', svg[:head_end])
    width = float(match.group(1)) if match else 600.0
    label = f' role="img" aria-label="{escape(title)}" style="width:{width * 1.2:.0f}px"'
    return Markup(head + label + svg[head_end:])  # noqa: S704  # matplotlib escapes its text


def _write_tables(folder: Path, frames: Mapping[str, pd.DataFrame]) -> None:
    """CSV of all; Markdown of those that a reader would paste (the whole run is too long for it)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        (folder / f"{name}.csv").write_text(tables.as_csv(frame), encoding="utf-8")
        shown = tables.measurement_table(frame) if name == "all" else frame
        (folder / f"{name}.md").write_text(tables.as_markdown(shown), encoding="utf-8")


def _supports(capabilities: Sequence[MatrixCell]) -> list[dict[str, Any]]:
    """One matrix an op and device: probes, and rows of cells with their evidence."""
    found = []
    for op, device in dict.fromkeys((c.op, c.device) for c in capabilities):
        cells = [c for c in capabilities if (c.op, c.device) == (op, device)]
        probes = list(dict.fromkeys(c.probe for c in cells))
        at = {(c.candidate, c.probe): c for c in cells}
        names = list(dict.fromkeys(c.candidate for c in cells))
        rows = [(name, [at.get((name, probe)) for probe in probes]) for name in names]
        found.append({"op": op, "device": device, "probes": probes, "rows": rows})
    return found


def _accounts(loaded: RunFrame) -> list[dict[str, Any]]:
    """Traced steps as text: where the time and memory went."""
    from poolbench.core.case import case_label

    found = []
    for trace_summary in loaded.run.trace_summaries:
        parts = sorted(trace_summary.parts, key=lambda part: -_number(part.get("seconds", 0)))
        rows = [
            (
                str(part.get("kind", "")),
                one_line(str(part.get("name", "")), 80),
                format_seconds(_number(part.get("seconds", math.nan))),
                significant(_number(part.get("count", 0))),
                format_nbytes(_number(part.get("nbytes", math.nan))),
                format_share(_number(part.get("seconds", 0)) / trace_summary.step_seconds)
                if trace_summary.step_seconds
                else "",
            )
            for part in parts[:TOP_PARTS]
        ]
        facts = {
            "a traced step": format_seconds(trace_summary.step_seconds)
            if trace_summary.steps
            else "",
            "peak memory": _nbytes(trace_summary.peak_nbytes),
            "allocated": _nbytes(trace_summary.allocated_nbytes),
            "freed": _nbytes(trace_summary.freed_nbytes),
            "the compiler's peak": _nbytes(trace_summary.compiler_nbytes),
            "threads busy": significant(trace_summary.threads_busy)
            if trace_summary.threads_busy is not None
            else "",
        }
        found.append(
            {
                "op": trace_summary.case.op,
                "title": f"{trace_summary.case.op}: {trace_summary.candidate}, {case_label(trace_summary.case)}",
                "status": trace_summary.status,
                "reason": trace_summary.reason,
                "trace": trace_summary.trace,
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


def _nodes(loaded: RunFrame) -> list[Any]:
    from poolbench.core.records import Node

    return loaded.run.of(Node)


def selftest_sentence(loaded: RunFrame) -> str:
    """What the audit says, and which verdicts it withholds."""
    same = [s for s in loaded.run.selftests if s.injected == 0]
    if not same:
        return ""
    count = sum(s.comparisons for s in same)
    alarms = sum(s.faster + s.slower for s in same)
    floor = max(s.noise_floor for s in same)
    withheld = int((loaded.table["verdict"] == "WITHHELD").sum())
    return (
        f"{alarms} false alarms in {count} comparisons of an op with itself; the noise floor is "
        f"{format_share(floor)}; {withheld} verdicts finer than it are withheld."
    )


def _disagreeing(loaded: RunFrame) -> list[str]:
    rows = loaded.table[loaded.table["disagree"]]
    names = [f"{r.candidate} ({r.op}-{r.label})" for r in rows.head(20).itertuples(index=False)]
    rest = len(rows) - len(names)
    return [*names, f"and {rest} more"] if rest > 0 else names


def _status_counts(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return join_names([f"{count} {status}" for status, count in counts.items()])
