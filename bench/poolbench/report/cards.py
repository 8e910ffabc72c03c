"""The card of an op: the recommendation, its gain and cost, its support, and code to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poolbench.core.registry import REGISTRY
from poolbench.core.text import format_times, one_line, with_interval
from poolbench.report.cases import base_values, case_words
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import Answers, Loss, Recommendation
from poolbench.report.snippets import snippet
from poolbench.report.support import STANDS_IN, Support

SHOWN = 3  # exceptions on a card; the table lists all


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure of a card: '2.78x', its interval '[2.60, 2.97]', and what it is."""

    value: str
    interval: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """The contents of a card; texts are plain, and untrusted where they name a candidate."""

    title: str
    device: str
    name: str
    facts: Sequence[Fact]
    lines: Sequence[str]
    exceptions: Sequence[str]
    works: str
    fails: Sequence[str]
    source: str
    code: str


def cards(loaded: RunFrame, answers: Answers, supports: Sequence[Support]) -> list[Card]:
    """Return one card per op and device that has a recommendation."""
    at = {(one.op, one.device): one for one in supports}
    return [
        _card(loaded, advice, at.get(place)) for place, advice in answers.recommendations.items()
    ]


def _card(loaded: RunFrame, advice: Recommendation, support: Support | None) -> Card:
    op = REGISTRY.ops.get(advice.op)
    base = base_values(loaded, advice.op)
    cells = support.of(advice.candidate) if support else []
    bad = [c for c in cells if c.state != "pass"]
    case = loaded.measurement(advice.base_row).case
    return Card(
        title=(op.title if op else "") or advice.op,
        device=advice.device,
        name=advice.candidate,
        facts=_facts(loaded, advice, base),
        lines=_lines(advice),
        exceptions=_exceptions(loaded, advice, base),
        works=f"Passes {len(cells) - len(bad)} of {len(cells)} checks of the support matrix."
        if cells
        else "No support matrix is at hand. To record one, type: poolbench matrix",
        fails=[f"{c.probe}: {c.state.replace('_', ' ')}" for c in bad],
        source=STANDS_IN if support and support.borrowed and cells else "",
        code=snippet(case, advice.candidate, loaded.run.header.sources),
    )


def _fact(value: tuple[float, float, float], text: str, unit: str = "x") -> Fact:
    middle, _, interval = with_interval(*value, unit).partition(" ")
    return Fact(value=middle, interval=interval, text=text)


def _facts(loaded: RunFrame, advice: Recommendation, base: Mapping[str, object]) -> list[Fact]:
    found = []
    if advice.over_cases:
        text = f"as fast as {advice.over}: mean of {advice.over_cases} cases"
        if advice.over_cases > 1:
            text += f", {format_times(advice.least)} to {format_times(advice.most)}"
        found.append(_fact(advice.speed_up, text))
    text = (
        f"the time of the best of each case: mean of {advice.cases} cases, "
        f"at most {format_times(advice.largest[0])}"
    )
    found.append(_fact(advice.mean, text))
    at = loaded.row(advice.base_row)
    share = (at["efficiency"], at["efficiency_low"], at["efficiency_high"])
    if math.isfinite(share[0]):
        found.append(_fact(share, f"of the memory-bandwidth limit, {case_words(at, base)}", "%"))
    return found


def _lines(advice: Recommendation) -> list[str]:
    """Return what a reader must know of the choice, in sentences of at most 25 words."""
    if advice.complete:
        count = "all" if advice.cases == advice.all_cases else f"{advice.cases} of"
        found = [
            f"It is right wherever it was raced, in {count} {advice.all_cases} cases, "
            "with the least regret or level with it."
        ]
    else:
        found = [
            f"No implementation is right in all {advice.all_cases} cases: this one is in {advice.cases}."
        ]
    if advice.over and advice.over_cases < advice.cases:
        left = advice.cases - advice.over_cases
        found.append(f"In {left} of them {advice.over} fails, was not raced, or was stopped early.")
    if advice.tied:
        found.append(
            f"Its largest loss cannot be distinguished from that of {', '.join(advice.tied[:3])}."
        )
    return found


def _exceptions(loaded: RunFrame, advice: Recommendation, base: Mapping[str, object]) -> list[str]:
    found = [exception_text(loaded, loss, base) for loss in advice.exceptions[:SHOWN]]
    rest = len(advice.exceptions) - SHOWN
    return [*found, f"and {rest} more cases"] if rest > 0 else found


def exception_text(loaded: RunFrame, loss: Loss, base: Mapping[str, object]) -> str:
    """Return 'in eager mode, forward, 1x8x8x96: x is 1.60x [1.30, 2.00] as fast'."""
    where = case_words(loaded.row(loss.row), base)
    best = one_line(str(loaded.row(loss.best_row)["candidate"]), 60)
    return f"{where}: {best} is {with_interval(*loss.ratio)} as fast"
