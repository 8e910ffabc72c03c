"""Judge the pairs of candidates that XLA made one program of: comparisons of a program with itself.

`python tests/acceptance programs RUN...` writes results/reference-backends/programs.json of the runs' journals, which
are too large to be kept: docs/backends.md has the command that makes the run. Several runs are pooled.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from poolbench.core.case import case_label
from poolbench.report.frame import load
from poolbench.report.page import program_pairs
from poolbench.stats.verdict import SAME, verdict

STORED = Path(__file__).resolve().parents[2] / "results" / "reference-backends" / "programs.json"
MARGIN = 0.02


def main(arguments: list[str]) -> int:
    """Write the verdicts on the pairs of the runs; return 1 unless all are SAME."""
    if not arguments or not all(Path(name).is_dir() for name in arguments):
        print(
            f"expected folders of runs; got {' '.join(arguments) or 'nothing'}",
            file=sys.stderr,
        )
        return 2
    found = judge([Path(name) for name in arguments])
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    verdicts = Counter(pair["verdict"] for race in found["races"] for pair in race["pairs"])
    print(f"{verdicts.total()} pairs of one program: {dict(verdicts)}")
    return int(set(verdicts) != {SAME})


def judge(runs: list[Path]) -> dict[str, Any]:
    """Return, by race, how many programs there are and each pair of one program with its ratio and verdict."""
    loaded = load(*runs, margin=MARGIN)
    races: dict[str, dict[str, Any]] = {}
    hashes: dict[str, set[str]] = {}
    for row in range(len(loaded.table)):
        m = loaded.measurement(row)
        if m.program is not None:
            label = f"{m.case.op} {case_label(m.case)}"
            hashes.setdefault(label, set()).add(m.program.hash)
            races.setdefault(
                label,
                {"op": m.case.op, "case": case_label(m.case), "direction": m.case.direction,
                 "candidates": 0, "programs": 0, "pairs": []},
            )["candidates"] += 1  # fmt: skip
    for (row, other), one in program_pairs(loaded).items():
        m = loaded.measurement(row)
        races[f"{m.case.op} {case_label(m.case)}"]["pairs"].append(
            {"one": m.candidate, "other": loaded.measurement(other).candidate, "ratio": one.ratio,
             "low": one.ratio_low, "high": one.ratio_high, "half_width": one.half_width,
             "verdict": verdict(one, MARGIN)}
        )  # fmt: skip
    for label, race in races.items():
        race["programs"] = len(hashes[label])
    heads = [run.header for run in loaded.runs]
    return {
        "machine": heads[0].environment.machine, "code": heads[0].environment.source, "margin": MARGIN,
        "runs": [{"created": head.created, "options": head.options} for head in heads],
        "races": list(races.values()),
    }  # fmt: skip
