"""Format the committed results of `nox -s versus`, `nox -s acceptance` and tests/test_scale.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from poolbench.core.text import format_seconds
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame

VERSUS = Path("results") / "reference-versus" / "versus.json"
VERSUS_PICTURE = "versus.png"
ACCEPTANCE = Path("results") / "reference-acceptance" / "acceptance.json"
SIDES = Path("results") / "reference-sides" / "sides.json"
SCALE = Path("results") / "reference-scale" / "scale.json"
SCALE_ROWS = (
    (
        "a race of one round, over 10,000 races",
        "{race_seconds} (the first 2,000: {first_race_seconds}; the last 2,000: {last_race_seconds})",
    ),
    ("the same in wall time, with the sync to disk", "{race_wall_seconds}"),
    ("a race of the default plan", "{plan_race_seconds}"),
    (
        "pytest and pytest-benchmark around it, two tests per race",
        "{pytest_250_seconds} with 250 races, {pytest_1000_seconds} with 1,000",
    ),
    (
        "size of a race in the journal",
        "{race_nbytes} for one round, {plan_race_nbytes} for the default plan",
    ),
    ("reading a journal of 10,000 races", "{read_seconds}"),
    (
        "rendering a page of 5,000 and 20,000 measurements",
        "{page_5000_seconds}, {page_20000_seconds}",
    ),
    (
        "building only their table",
        "{table_5000_seconds}, {table_20000_seconds}",
    ),
    ("comparing 20,000 measurements with 20,000", "{compare_20000_seconds}"),
    ("peak memory of the report", "{report_peak_nbytes}"),
)


Found = dict[str, Any]


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return a machine's name: 'AMD EPYC, 2 cores, virtual'; processors of one name differ in AVX-512."""
    wide = ", AVX-512" if "avx512f" in str(machine.get("features")).split() else ""
    virtual = ", virtual" if machine.get("virtual") else ""
    return f"{machine.get('processor')}, {machine.get('usable_threads')} cores{wide}{virtual}"


def _from_file(
    stored: Path, otherwise: str
) -> Callable[[Callable[[Found], str]], Callable[[RunFrame, Path], str]]:
    """Make a block function of a function of a stored result; `otherwise` where there is none."""

    def decorate(describe: Callable[[Found], str]) -> Callable[[RunFrame, Path], str]:
        @functools.wraps(describe)
        def block(_: RunFrame, root: Path) -> str:
            path = root / stored
            return describe(json.loads(path.read_bytes())) if path.exists() else otherwise

        return block

    return decorate


@_from_file(VERSUS, "`nox -s versus` has not been run on the reference machine.")
def tool_comparison_block(found: Found) -> str:
    """Return how far each tool's figures spread over repeated invocations, with the figure."""
    rows = [
        {
            "tool": row["tool"],
            "statistic": row["statistic"],
            "invocations": row["invocations"],
            "spread of a real ratio": f"{row['spread']:.1%}",
            "A/A, 95th percentile": f"{row['noise_floor']:.1%}",
            "1% found": f"{row['power'].get('0.01', 0):.0%}",
            "5% found": f"{row['power'].get('0.05', 0):.0%}",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in sorted(found["summaries"], key=lambda row: float(row["spread"]))
    ]
    left_out = f" Not installed there: {', '.join(found['missing'])}." if found["missing"] else ""
    where = machine_text(found["environment"]["machine"])
    return (
        f"![Ratios of each tool over repeated invocations](images/{VERSUS_PICTURE})\n\n"
        f"The same callables ({found['case']}), {found['timed_seconds']:g} s of timed calls per callable and "
        f"invocation, in fresh processes (`nox -s versus`), on {where}.{left_out}\n\n"
        f"{as_markdown(pd.DataFrame(rows)).strip()}"
    )


@_from_file(ACCEPTANCE, "`nox -s acceptance` has not been run on the reference machine.")
def acceptance_block(found: Found) -> str:
    """Return the acceptance checks with their last results."""
    rows = [
        {
            "check": check["requirement"],
            "holds": "yes" if check["passed"] else "**no**",
            "found": check["found"],
            "on": check["created"][:10],
        }
        for check in found["checks"]
    ]
    held = sum(check["passed"] for check in found["checks"])
    table = as_markdown(pd.DataFrame(rows), markup=["holds"]).strip()
    where = machine_text(found["environment"]["machine"])
    return f"{held} of {len(rows)} checks hold on {where} (`nox -s acceptance`):\n\n{table}"


def alarms(root: Path) -> tuple[str, int, int] | None:
    """Return the acceptance's machine, its false A/A alarms and of how many comparisons; None if not measured."""
    path = root / ACCEPTANCE
    found: Found = json.loads(path.read_bytes()) if path.exists() else {}
    for check in found.get("checks", ()):
        if check["name"] == "aa-alarms" and "SAME" in check["figures"]:
            verdicts = {
                name: check["figures"][name] for name in ("FASTER", "SLOWER", "SAME", "UNDECIDED")
            }
            machine = machine_text(found["environment"]["machine"])
            return machine, verdicts["FASTER"] + verdicts["SLOWER"], sum(verdicts.values())
    return None


@_from_file(SCALE, "Not measured on the reference machine.")
def scale_block(found: Found) -> str:
    """Return the cost of the driver and of the report, as measured by tests/test_scale.py."""
    rows = [
        (what, text.format(**{name: _plain(name, value) for name, value in found.items()}))
        for what, text in SCALE_ROWS
    ]
    return as_markdown(pd.DataFrame(rows, columns=["what", "figure"])).strip()


@_from_file(SIDES, "Not measured on the reference machine.")
def sides_block(found: Found) -> str:
    """Return the verdicts on sides whose difference is known, and the time until them."""
    rows = [
        {
            "head": name,
            "comparisons": one["comparisons"],
            **{word.lower(): one["verdicts"].get(word, 0) for word in ("SLOWER", "FASTER", "SAME", "UNDECIDED")},
            "ratio, median": f"{one['median_ratio']:.3f}x" if one.get("median_ratio") else "",
            "seconds, median": f"{one['median_seconds']:.0f}" if "limit" in one else "",
            "at most": f"{one['limit']:.0f}" if "limit" in one else "",
        }
        for name, one in found.items()
        if name != "machine"
    ]  # fmt: skip
    where = machine_text(found["machine"])
    return f"On {where}:\n\n{as_markdown(pd.DataFrame(rows)).strip()}"


def _plain(name: str, value: float) -> str:
    if name.endswith("_seconds"):
        return format_seconds(value)
    return f"{value / 1e9:.2f} GB" if value > 1e8 else f"{value / 1e3:.3g} kB"
