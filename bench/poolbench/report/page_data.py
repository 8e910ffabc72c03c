"""Write the data of the page's script: answers, rows of the table, and raw samples in files beside the page."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from poolbench.core.axes import STANDARD
from poolbench.core.records import Samples
from poolbench.core.text import one_line, significant
from poolbench.report.cases import CHOSEN_BY, others, others_label
from poolbench.report.frame import RunFrame
from poolbench.report.recommend import Answers
from poolbench.report.snippets import snippet
from poolbench.report.support import Support
from poolbench.report.tables import sentences

CHUNK = 100  # measurements in a file of samples


def page_data(loaded: RunFrame, answers: Answers, matrices: Sequence[Support]) -> dict[str, Any]:
    """Return the answers and the rows of the table for the page's script."""
    found = []
    used: set[tuple[str, str, str]] = set()
    codes: dict[str, int] = {}
    axes: dict[tuple[str, str], list[list[str]]] = {}
    for choice in answers.choices:
        at = loaded.row(choice.row)
        label = others_label(at)
        axes[str(at["op"]), label] = [[name, str(value)] for name, value in others(at).items()]
        used.add((str(at["op"]), str(at["device"]), choice.recommended))
        case = loaded.measurement(choice.row).case
        code = snippet(case, choice.recommended, loaded.run.header.sources)
        found.append(
            {
                "key": [*(str(at.get(name) or "") for name in CHOSEN_BY), label],
                "use": choice.recommended,
                "row": choice.row,
                "text": sentences(loaded, choice),
                "code": codes.setdefault(code, len(codes)),
                "disagree": bool(at["disagree"]),
            }
        )
    cells = {(one.op, one.device): one for one in matrices}
    return {
        "answers": found,
        "settings": [[op, label, some] for (op, label), some in axes.items()],
        "codes": list(codes),
        "caveats": [
            [op, device, name, cells[op, device].caveats(name)]
            for op, device, name in sorted(used)
            if (op, device) in cells and cells[op, device].of(name)
        ],
        "choices": {name: STANDARD[name].choices for name in ("mode", "direction", "dtype")},
        "columns": PAGE_COLUMNS,
        **_rows(loaded.table),
        "chunk": CHUNK,
    }


PAGE_COLUMNS = (  # heading, kind
    ("op", "text"),
    ("case", "text"),
    ("candidate", "text"),
    ("status", "text"),
    ("time per call", "seconds"),
    ("speed over baseline", "times"),
    ("95% of next runs", "text"),
    ("verdict", "text"),
    ("speed over textbook", "times"),
    ("of bandwidth limit", "share"),
    ("error / tolerance", "number"),
    ("samples", "samples"),
)


def _rows(table: pd.DataFrame) -> dict[str, Any]:
    """Return the rows, with texts as indices into a list of words, to keep large runs small."""
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
        else ("stopped early" if stopped_early and not v else v)
        for v, n, stopped_early in zip(table["verdict"], table["processes_needed"], table["stopped_early"], strict=True)
    ]  # fmt: skip
    columns = "op label candidate seconds ratio textbook_ratio efficiency worst samples".split()
    rows = [
        [
            index(op), index(label), index(name), index(status), rounded(seconds), _invert(ratio), index(interval),
            index(verdict), _invert(textbook), rounded(efficiency), rounded(worst), int(count),
        ]
        for op, label, name, seconds, ratio, textbook, efficiency, worst, count, status, interval, verdict in zip(
            *(table[name].tolist() for name in columns), statuses, intervals, verdicts, strict=True
        )
    ]  # fmt: skip
    return {"words": list(words), "rows": rows}


def rounded(value: float) -> float | None:
    """Return four significant digits; None for a value that is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _invert(ratio: float) -> float | None:
    return rounded(1 / ratio) if ratio and math.isfinite(ratio) else None


@functools.lru_cache(maxsize=256)
def _lengths(process: tuple[int, ...]) -> list[int]:
    """Return how many blocks each process measured in a row; measurements of one race share them."""
    return [len(list(some)) for _, some in itertools.groupby(process)]


def write_samples(samples: Sequence[Samples], folder: Path) -> None:
    """Write raw samples in files that the page loads on demand: [float32 seconds, processes' lengths]."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.js"):
        old.unlink()
    for start in range(0, len(samples), CHUNK):
        rows = []
        for one in samples[start : start + CHUNK]:
            seconds = np.asarray(one.seconds, dtype="<f4")
            rows.append([base64.b64encode(seconds.tobytes()).decode(), _lengths(one.process)])
        number = start // CHUNK
        text = f"poolbenchSamples({number},{json.dumps(rows, separators=(',', ':'))});\n"
        (folder / f"{number}.js").write_text(text, encoding="ascii")
