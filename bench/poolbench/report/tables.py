"""Tables and sentences of a run: headline, measurements, support, models, break-even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from poolbench.core.records import ALL_POOLING, HEAD, ModelResult
from poolbench.core.registry import REGISTRY
from poolbench.core.text import (
    format_seconds,
    format_share,
    inverse,
    join_names,
    one_line,
    significant,
    with_interval,
)
from poolbench.machine.nvml import is_gpu
from poolbench.report.cases import MODE_WORDS
from poolbench.report.formats import rows_of
from poolbench.report.frame import RunFrame, axes_in
from poolbench.report.history import runs_of_machine
from poolbench.report.pairs import NOTHING, Interval
from poolbench.report.programs import same_program
from poolbench.report.recommend import Answers, Choice

MOST_RUNS = 8  # columns of the history: more do not fit a page
SMALL_SHARE = 0.02  # of a step: less is lost in the noise of a step
BASELINE = ("ratio", "ratio_low", "ratio_high")
TEXTBOOK = ("textbook_ratio", "textbook_low", "textbook_high")
MISSING = {
    "matrix_cell": "This run holds no support matrix. To record one, type: poolbench matrix",
    "trace_summary": "This run holds no traces. To record them, type: poolbench trace",
    "selftest": "This run holds no self-test. To make one, type: poolbench selftest",
    "history": "One run of this machine is here. Each further run in the same folder adds a column.",
    "model": "This run measured no model. For your own, type: poolbench which model.keras",
    "shares": "The run did not end by itself, or is an import. Where its wall time went is not recorded.",
}


@dataclass(frozen=True, kw_only=True)
class HeadlineRow:
    """The answer at one op, device, mode and direction.

    Attributes:
        choice: of its race.
        row: the table's row of the op's recommendation, or of the race's where that is not right here.
        loss: the row's time over the fastest one's, with its interval; (1, 1, 1) for the fastest.
    """

    choice: Choice
    row: int
    loss: Interval


def headline_rows(loaded: RunFrame, answers: Answers) -> list[HeadlineRow]:
    """Return one row per op, device, mode and direction, in the order of the run."""
    found = []
    for choice in answers.headline:
        at = loaded.row(choice.row)
        advice = answers.recommendations.get((at["op"], at["device"]))
        row = loaded.row_of.get((choice.race, advice.candidate)) if advice else None
        losses = {loss.row: loss.ratio for loss in advice.losses} if advice else {}
        # On a GPU a candidate that its own clock did not time is not compared with those that it did.
        if row is None or not (row in losses or loaded.row(row)["candidate"] in choice.best):
            row = choice.row
        found.append(HeadlineRow(choice=choice, row=row, loss=losses.get(row, NOTHING)))
    return found


def headline_table(loaded: RunFrame, answers: Answers) -> pd.DataFrame:
    """Return one row per op, device, mode and direction: what to use, how fast, and over what."""
    rows = []
    for one in headline_rows(loaded, answers):
        at = loaded.row(one.row)
        rows.append(
            {
                "op": at["op"],
                "device": at["device"],
                "mode": at["mode"],
                "direction": at["direction"],
                "size": at.get("shape") or at["label"],
                "use": at["candidate"],
                "time per call": time_text(at),
                "speed over the textbook": textbook_text(at),
                "speed over the baseline": "is the baseline"
                if at["candidate"] == at["baseline"]
                else speed_up_text(at, BASELINE),
                "of bandwidth limit": format_share(at["efficiency"]),
                "fastest here": fastest_text(loaded, one),
            }
        )
    return pd.DataFrame(rows)


def fastest_text(loaded: RunFrame, one: HeadlineRow) -> str:
    """Return the fastest of a headline row: 'this one', 'tied with x', 'x (401 us), 1.31x as fast'."""
    choice, own = one.choice, loaded.row(one.row)["candidate"]
    if choice.alone:
        return "no other is right here"
    if own in choice.best:
        same, rest = _same_program(loaded, one.row, choice)
        words = [f"same program as {', '.join(same)}"] if same else []
        words += [f"tied with {', '.join(rest)}"] if rest else []
        return "; ".join(words) or "this one"
    seconds = format_seconds(loaded.row(choice.fastest_row)["seconds"])
    return f"{choice.fastest} ({seconds}), {with_interval(*one.loss)} as fast"


def _same_program(loaded: RunFrame, row: int, choice: Choice) -> tuple[list[str], list[str]]:
    """Return the others of a race's best of which XLA made the row's program, and those left."""
    own, name = loaded.measurement(row), loaded.row(row)["candidate"]
    others = [other for other in choice.best if other != name]
    same = [
        other
        for other in others
        if same_program(own, loaded.measurement(loaded.row_of[choice.race, other]))
    ]
    return same, [other for other in others if other not in same]


def history_table(loaded: RunFrame, answers: Answers) -> pd.DataFrame:
    """Return the headline's speeds over the baseline in the latest runs of this machine, a column per run.

    Each has the interval of the next run by the shipped prior; empty where there is one run only.
    """
    runs = runs_of_machine(loaded.run)[-MOST_RUNS:]
    rows = []
    for one in headline_rows(loaded, answers) if len(runs) > 1 else ():
        at = loaded.row(one.row)
        key = (at["op"], at["label"], at["node"], at["candidate"])
        seen = [estimates[key].next_run if key in estimates else None for _, estimates in runs]
        texts = [
            with_interval(*inverse(e.ratio, e.ratio_low, e.ratio_high)) if e else "" for e in seen
        ]
        if any(texts):
            names = [f"{summary.run}, {summary.created[:10]}" for summary, _ in runs]
            place = {"op": at["op"], "case": at["label"], "candidate": at["candidate"]}
            rows.append(place | dict(zip(names, texts, strict=True)))
    return pd.DataFrame(rows)


def rank_note(loaded: RunFrame, answers: Answers) -> str:
    """Explain in one line a fastest candidate whose median beside it is not the least; '' without one."""
    table = loaded.table
    if not answers.headline:
        return ""
    least = table[table["right"]].groupby(["race", "clock"])["seconds"].min()
    for choice in answers.headline:
        at = loaded.row(choice.fastest_row)
        if least[choice.race, at["clock"]] < at["seconds"]:
            return (
                "Ranks use ratios paired within rounds. Medians of separate candidates can differ from "
                "that order by less than the noise."
            )
    return ""


def textbook_text(at: Mapping[str, Any]) -> str:
    """Return a row's speed over the textbook implementation, or the reason why there is none."""
    if at["textbook_reason"]:
        return str(at["textbook_reason"])
    return "is the textbook" if _is_textbook(at) else speed_up_text(at, TEXTBOOK)


def _is_textbook(at: Mapping[str, Any]) -> bool:
    op = REGISTRY.ops.get(str(at["op"]))
    return op is not None and at["candidate"] == op.textbook


def speed_up_text(at: Mapping[str, Any], columns: tuple[str, str, str]) -> str:
    """Return '5.20x [4.90, 5.50]', a row's three columns of a time ratio as a speed-up."""
    return with_interval(*inverse(*(float(at[name]) for name in columns)))


def sentences(loaded: RunFrame, choice: Choice) -> list[str]:
    """Describe the recommended candidate of a race in sentences of at most 25 words."""
    at = loaded.row(choice.row)
    mode = MODE_WORDS.get(at["mode"], at["mode"])
    found = [
        f"{choice.recommended} takes {format_seconds(at['seconds'])} per call "
        f"{mode}, {at['direction']}, on {at['device']}{_clock_words(at)}."
    ]
    textbook = speed_up_text(at, TEXTBOOK)
    baseline = speed_up_text(at, BASELINE)
    if at["textbook_reason"]:
        found.append(f"Textbook implementation: {one_line(str(at['textbook_reason']), 120)}.")
    elif textbook and not _is_textbook(at):
        found.append(f"It is {textbook} as fast as the textbook implementation.")
    if baseline and choice.recommended != at["baseline"]:
        found.append(f"It is {baseline} as fast as the baseline, {at['baseline']}.")
    if math.isfinite(at["efficiency"]):
        found.append(f"It reaches {format_share(at['efficiency'])} of the memory-bandwidth limit.")
    if choice.alone:
        found.append("No other implementation is right here.")
    elif len(choice.best) > 1:
        same, rest = _same_program(loaded, choice.row, choice)
        found += [f"With XLA it is the same program as {join_names(same)}."] if same else []
        found += [f"Statistically tied: {join_names(rest)}."] if rest else []
    return found


def _clock_words(at: Mapping[str, Any]) -> str:
    """Return by which clock a time on a GPU is; '' on a CPU."""
    if at["clock"] == "device":
        return f" by the device's clock ({format_seconds(at['wall_seconds'])} from Python)"
    return " from Python" if is_gpu(at["device"]) else ""


def time_text(at: Mapping[str, Any]) -> str:
    """'815 µs'; on a GPU '17.4 µs (called: 216 µs)', or 'called: 164 µs' where its own clock did not time it."""
    own, called = format_seconds(at["seconds"]), format_seconds(at["wall_seconds"])
    if at["clock"] == "device":
        return f"{own} (called: {called})"
    return f"called: {called}" if is_gpu(at["device"]) else own


def measurement_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return every measurement in at most twelve columns of text."""
    speed = [with_interval(*inverse(*three)) for three in rows_of(table[[*BASELINE]])]
    textbook = [
        with_interval(*inverse(*three)) or reason
        for *three, reason in rows_of(table[[*TEXTBOOK, "textbook_reason"]])
    ]
    efficiency = [
        with_interval(share, low, high, "%")
        for share, low, high in rows_of(table[["efficiency", "efficiency_low", "efficiency_high"]])
    ]
    return pd.DataFrame(
        {
            "op": table["op"].tolist(),
            "case": table["label"].tolist(),
            "candidate": table["candidate"].tolist(),
            "status": [
                f"{status}: {one_line(reason)}" if reason else status
                for status, reason in zip(
                    table["status"].tolist(), table["reason"].tolist(), strict=True
                )
            ],
            "time per call": [
                format_seconds(v) + (" (stopped early)" if s else "")
                for v, s in zip(table["seconds"], table["stopped_early"], strict=True)
            ],
            "speed over baseline": speed,
            "verdict": [
                u
                or (
                    f"UNDECIDED (+{int(n)} processes)"
                    if v == "UNDECIDED" and math.isfinite(n)
                    else v
                )
                for v, n, u in zip(
                    table["verdict"], table["processes_needed"], table["unlike"], strict=True
                )
            ],
            "speed over textbook": textbook,
            "efficiency": efficiency,
            "error / tolerance": [
                significant(v, 2) if math.isfinite(v) else "" for v in table["worst"]
            ],
            "first call": [format_seconds(v) for v in table["first_seconds"]],
            "samples": table["samples"].tolist(),
        }
    )


def network_table(networks: Sequence[ModelResult]) -> pd.DataFrame:
    """Return one row per model, implementation, direction and mode: pooling's share of the step."""
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
                "time per step": format_seconds(float(seconds)),
                "pooling's share": share_text(record.share),
                "figures": figures,
            }
        )
    return pd.DataFrame(rows)


def share_text(share: tuple[float, float, float] | None) -> str:
    """'1.3% [1.1, 1.5]' from (low, middle, high)."""
    return with_interval(share[1], share[0], share[2], "%") if share else ""


def network_sentence(networks: Sequence[ModelResult]) -> str:
    """Describe the effect of the choice on whole models; '' without records.

    The share of each model is that of all its pooling as it was built, what a user has before choosing, in
    graph mode and in the largest batch where there are several. A head is most of it pooling, and speaks for
    itself only where no whole model was raced.
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
    found = [
        f"Pooling takes {share_text(share)} of {name}'s {direction} step."
        for (name, direction), share in shares.items()
        if (name, direction) not in small
    ]
    if len(small) < len(shares):
        found.append(f"From {SMALL_SHARE:.0%} on, the choice can be seen in the step.")
    if small:
        names = join_names(list(dict.fromkeys(name for name, _ in small)))
        most = format_share(max(share[1] for share in small.values()))
        found.append(f"Pooling takes at most {most} of a step of {names}.")
        found.append(f"Below {SMALL_SHARE:.0%}, choose by the support matrix, not by speed.")
    return " ".join(found)


def _stands_for_its_network(record: ModelResult) -> tuple[bool, bool, bool, int]:
    own = record.candidate == record.baseline
    return record.op == ALL_POOLING, own, record.mode == "graph", record.batch


def break_even_table(loaded: RunFrame) -> pd.DataFrame:
    """Return after how many calls a compiled function has paid for its first call, against eager mode.

    Calls = (first call - steady call, compiled, minus the same eager) / (eager steady - compiled steady).
    """
    table = loaded.table
    right = table[table["right"] & table["first_seconds"].notna()]
    axes = [name for name in axes_in(table) if name != "mode"]
    keys = ["op", *axes, "candidate", "node"]
    # The cost for the caller: first calls are wall time on a GPU too.
    right = right.assign(seconds=right["wall_seconds"])
    for name in axes:  # pandas joins no missing value
        right[name] = right[name].astype(object).where(right[name].notna(), "")
    eager = right[right["mode"] == "eager"][[*keys, "seconds", "first_seconds"]]
    compiled = right[right["mode"] != "eager"][[*keys, "mode", "seconds", "first_seconds"]]
    joined = compiled.merge(eager, on=keys, suffixes=("", "_eager"))
    saved = joined["seconds_eager"] - joined["seconds"]
    paid = (joined["first_seconds"] - joined["seconds"]) - (
        joined["first_seconds_eager"] - joined["seconds_eager"]
    )
    joined["calls"] = (paid / saved).where(saved > 0).clip(lower=1)
    return joined
