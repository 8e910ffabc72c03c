"""A base-against-head job as text: Markdown for a pull request, JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from poolbench.core.case import case_label
from poolbench.core.text import format_seconds, format_share, markdown_cell, with_interval
from poolbench.stats.estimate import Estimate
from poolbench.stats.side_by_side import Outcome, Report, SideBySide

# Most important first.
WORDS: dict[Outcome, str] = {
    "BROKE": "broke", "SLOWER": "slower", "FASTER": "faster", "WORKS": "works now",
    "UNDECIDED": "undecided", "SAME": "same", "NOT_RUN": "not judged",
}  # fmt: skip
COLLAPSED = ("SAME", "UNDECIDED", "NOT_RUN")
ELSEWHERE = "slower on the wall, same processor time: something else had the machine"


def headline(report: Report) -> str:
    """Return a sentence of each kind: answers that differ first, then what became slower."""
    return " ".join(_sentences(report))


def _sentences(report: Report) -> list[str]:
    parts = []
    for words, some, describe in (
        ("Answers differ", [one for one in report.heads if one.difference], lambda one: one.difference),
        ("Broke", [one for one in report.heads if one.verdict == "BROKE"], lambda one: one.reason),
        ("Slower", [one for one in report.heads if one.verdict == "SLOWER"], _ratio_of),
    ):  # fmt: skip
        if some:
            names = [f"{one.candidate} ({describe(one)})" for one in some[:5]]
            more = f"; and {len(some) - 5} more" if len(some) > 5 else ""
            parts.append(f"{words}: {'; '.join(names)}{more}.")
    return parts or ["Nothing became slower."]


def _ratio_of(one: SideBySide) -> str:
    ratio = (one.wall if one.clock == "wall" else one.processor).ratio
    return f"{ratio:.3g}x, {one.case.mode} {one.case.direction}"


def as_markdown(report: Report) -> str:
    """Return the comparison for a pull request's comment."""
    counts = Counter(one.verdict for one in report.heads)
    lines = [
        f"## {' '.join(map(markdown_cell, _sentences(report)))}",  # each is cut by itself
        "",
        f"Head: {markdown_cell(report.head)}. Base: {markdown_cell(report.base)}. "
        + " ".join(
            f"{word.capitalize()}: {counts[name]}." for name, word in WORDS.items() if counts[name]
        ),
        "",
    ]
    order = list(WORDS)
    ordered = sorted(
        report.heads, key=lambda one: (order.index(one.verdict), -abs(_finite(one.wall.log_ratio)))
    )
    lines += _table([one for one in ordered if one.verdict not in COLLAPSED or one.difference])
    rest = [one for one in ordered if one.verdict in COLLAPSED and not one.difference]
    if rest:
        lines += ["<details><summary>The others</summary>", "", *_table(rest), "</details>", ""]
    lines += [_control_line(report), "", *_undecided_line(report), _method_line(report)]
    return "\n".join(lines)


def _table(rows: Sequence[SideBySide]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| verdict | op | candidate | case | head / base | processor time | base | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = (
            WORDS[one.verdict], one.case.op, one.candidate, case_label(one.case), _ratio(one.wall),
            _ratio(one.processor), format_seconds(one.seconds), note(one),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(markdown_cell, cells))} |")
    return [*lines, ""]


def note(one: SideBySide) -> str:
    """Return what else is to be said of a comparison."""
    notes = [one.difference, one.reason]
    if one.clocks_disagree:
        notes.append(
            ELSEWHERE if one.verdict == "SLOWER" else "faster on the wall, same processor time"
        )
    if one.clock == "processor":
        notes.append("by processor time: the wall clock alone does not decide")
    if one.verdict == "UNDECIDED" and math.isfinite(one.detectable):
        notes.append(f"could have found {format_share(one.detectable)}")
    return "; ".join(filter(None, notes))


def _ratio(found: Estimate) -> str:
    return with_interval(found.ratio, found.ratio_low, found.ratio_high)


def _control_line(report: Report) -> str:
    count, alarms = len(report.controls), report.false_alarms
    if not count:
        return "Base was not raced against itself."
    widest = max(abs(_finite(one.wall.log_ratio)) for one in report.controls)
    said = f"none of {count} differed" if not alarms else (
        f"**{len(alarms)} of {count} differed, falsely: do not trust these verdicts** "
        f"({', '.join(markdown_cell(one.candidate) for one in alarms[:5])})"
    )  # fmt: skip
    return (
        f"Base against itself, in this job: {said}; the largest ratio was {math.exp(widest):.3f}x."
    )


def _undecided_line(report: Report) -> list[str]:
    found = [one.detectable for one in report.heads if one.verdict == "UNDECIDED"]
    found = sorted(value for value in found if math.isfinite(value))
    if not found:
        return []
    middle = found[len(found) // 2]
    return [
        f"Undecided: within the time, a slowdown of {format_share(middle)} (median) would have been found "
        "9 times of 10. More time finds smaller ones (`--budget`).",
        "",
    ]


def _method_line(report: Report) -> str:
    rule = report.rule
    return (
        f"Slower: the {100 * rule.confidence:.4g}% interval excludes 1, and the ratio is above {1 + rule.margin:g}. "
        f"Same: the interval is within {format_share(rule.margin)}. Up to {len(rule.looks) + 1} looks "
        f"of two clocks share an error of {format_share(rule.alpha)} per comparison (Bonferroni). "
        f"{report.seconds:.0f} s."
    )


def as_json(report: Report) -> str:
    """Return every comparison, for programs; msgspec writes numbers that are not finite as null."""
    found = {
        "base": report.base,
        "head": report.head,
        "headline": headline(report),
        "margin": report.rule.margin,
        "alpha": report.rule.alpha,
        "seconds": round(report.seconds, 1),
        "comparisons": [_plain(one) for one in report.heads],
        "base_against_itself": [_plain(one) for one in report.controls],
    }
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode()


def _plain(one: SideBySide) -> dict[str, Any]:
    return {
        "op": one.case.op,
        "candidate": one.candidate,
        "case": case_label(one.case),
        "axes": one.case.axes,
        "verdict": one.verdict,
        "clock": one.clock,
        "wall": _interval(one.wall),
        "processor": _interval(one.processor),
        "base_seconds": one.seconds,
        "could_have_found": one.detectable,
        "visits": one.visits,
        "difference": one.difference,
        "note": note(one),
    }


def _interval(found: Estimate) -> dict[str, float]:
    return {"ratio": found.ratio, "low": found.ratio_low, "high": found.ratio_high}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


FORMATS = {"markdown": as_markdown, "json": as_json}
