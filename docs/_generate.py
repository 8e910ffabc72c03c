"""Write the generated parts of README.md and docs/: `python docs/_generate.py [--check]`.

A block stands between `<!-- generated:NAME -->` and `<!-- end:NAME -->`. Its figures come from the
run in results/reference/ and the other committed results. docs/support.md is generated as a whole.
A test checks that all are up to date.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from _backends import BLOCKS as BACKEND_BLOCKS
from _blocks import (
    OP,
    headline_block,
    means_block,
    network_block,
    output_block,
    predicted_block,
    runs_block,
    selftest_block,
    short_answer_block,
    trace_summary_block,
)
from _further import BLOCKS as FURTHER_BLOCKS
from _gpu import gpu_bandwidth_block, gpu_block, gpu_means_block, gpu_runs
from _stored import acceptance_block, scale_block, sides_block, tool_comparison_block
from _tests import faults_block, hacks_block
from poolbench.core.records import MatrixCell
from poolbench.core.registry import load_builtin
from poolbench.matrix import GROUPS, PROBES
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame, load
from poolbench.store.journal import StoredRun

if TYPE_CHECKING:
    from poolbench.report.figures import Plot

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path("results") / "reference"
PICTURE = Path("docs") / "images" / "headline.png"
_BLOCK = re.compile(r"(<!-- generated:([a-z-]+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)


def fill(root: Path, *, check: bool = False, run: Path | None = None) -> list[str]:
    """Write every generated block and file; return the names of the files that were out of date.

    With `check` nothing is written. The picture is not compared: its bytes depend on the installed
    fonts and on Matplotlib's version.
    """
    loaded = load(run or root / REFERENCE)
    block = functools.cache(lambda name: BLOCKS[name](loaded, root))
    pages = [path for path in (root / "README.md", *root.glob("docs/*.md")) if path.exists()]
    texts = {
        path: _BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}\n{m[4]}", path.read_text(encoding="utf-8"))
        for path in pages
    }
    runs = [loaded.run, *(found.run for found in gpu_runs(root))]
    texts[root / "docs" / "support.md"] = support_page(runs)
    stale = [
        path
        for path, text in texts.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if not check:
        for path in stale:
            path.write_text(texts[path], encoding="utf-8")
        draw_picture(loaded, root / PICTURE)
    return [str(path.relative_to(root)) for path in stale]


def figure_block(loaded: RunFrame, root: Path) -> str:
    """Return the Markdown image of the README's figure."""
    del root
    plot = _picture(loaded)
    title = plot.title if plot is not None else "Depthwise max pooling by mode"
    return f"![{title}]({PICTURE.as_posix()})"


def _picture(loaded: RunFrame) -> Plot | None:
    """Plot the README's figure: time by implementation, mode and direction."""
    from poolbench.report import figures

    with figures.styled():
        return figures.plot_mode_direction(loaded, OP, "cpu:0")


def draw_picture(loaded: RunFrame, path: Path) -> None:
    """Write the README's figure to `path`."""
    from poolbench.report import figures

    plot = _picture(loaded)
    if plot is None:
        return
    plot.figure.set_facecolor("white")
    path.parent.mkdir(parents=True, exist_ok=True)
    with figures.styled():
        plot.figure.savefig(path, dpi=110, bbox_inches="tight")


BLOCKS: dict[str, Callable[[RunFrame, Path], str]] = {
    "headline": headline_block,
    "figure": figure_block,
    "selftest": selftest_block,
    "runs": runs_block,
    "network": network_block,
    "means": means_block,
    "traces": trace_summary_block,
    "output": output_block,
    "short-answer": short_answer_block,
    "versus": tool_comparison_block,
    "scale": scale_block,
    "sides": sides_block,
    "predicted": predicted_block,
    "acceptance": acceptance_block,
    "gpu": gpu_block,
    "gpu-bandwidth": gpu_bandwidth_block,
    "gpu-means": gpu_means_block,
    **BACKEND_BLOCKS,
    **FURTHER_BLOCKS,
    "hacks": hacks_block,
    "faults": faults_block,
}

SUPPORT_INTRO = """\
# What works where

The support matrix tries every implementation with every check: modes, gradients, `model.fit`, depths that the window
does not divide, dynamic shapes, number formats, special values, repeatability, saving and export. The table counts the
checks that passed in each group: `yes` is all, `no` is none, `7/9` is seven of nine; an empty cell was not run. What
each failed check observed stands in the report of the run.

`runs`: each mode; `trains`: gradients and `model.fit`; `depth`: depths that the window does not divide; `shapes`: sizes
unknown when traced; `numbers`: dtypes; `values`: NaN, infinities, ties; `repeats`: the same result again, from other
threads too; `exports`: saving, TensorFlow Lite, ONNX; `backends`: JAX and PyTorch.

`nox -s matrix` fills the matrix on your machine and renders the report; `nox -s matrix -- --with-exports` adds
TensorFlow Lite and ONNX. The checks of JAX and PyTorch need `pip install '.[cpu,backends]'` and `poolbench matrix`.
This page is generated from the reference runs by `python docs/_generate.py`.
"""


def support_page(runs: Sequence[StoredRun]) -> str:
    """Return docs/support.md: one table per op and device, implementations by groups of checks."""
    load_builtin()
    lines = [SUPPORT_INTRO.strip()]
    for run in runs:
        versions, devices = run.header.environment.versions, run.header.environment.devices
        for op, device in dict.fromkeys((c.op, c.device) for c in run.capabilities):
            cells = [c for c in run.capabilities if (c.op, c.device) == (op, device)]
            name = device if devices.get(device) in (None, "CPU") else devices[device]
            lines += [
                f"## {op} on {name}",
                f"TensorFlow {versions.get('tensorflow-cpu') or versions.get('tensorflow')}, "
                f"Keras {versions.get('keras')}.",
                support_table(cells),
            ]
    if not any(run.capabilities for run in runs):
        lines.append("The reference run holds no matrix.")
    return "\n\n".join(lines) + "\n"


def support_table(cells: Sequence[MatrixCell]) -> str:
    """Return a Markdown table: one row per implementation, one column per group of checks."""
    states: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.state != "not_run":
            states.setdefault((cell.candidate, PROBES[cell.probe].group), []).append(cell.state)
    groups = [group for group in GROUPS if any(group == found for _, found in states)]
    rows = [
        [name, *(_passed(states.get((name, group), ())) for group in groups)]
        for name in dict.fromkeys(cell.candidate for cell in cells)
    ]
    return as_markdown(pd.DataFrame(rows, columns=["implementation", *groups])).strip()


def _passed(states: Sequence[str]) -> str:
    """Return 'yes', 'no', '7/9', or '' where no check was run."""
    passed = sum(state == "pass" for state in states)
    if 0 < passed < len(states):
        return f"{passed}/{len(states)}"
    return ("yes" if passed else "no") if states else ""


def main(arguments: Sequence[str]) -> int:
    """Run the command: exit code 1 if --check finds a file out of date."""
    parser = argparse.ArgumentParser(prog="docs/_generate.py", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a file is out of date"
    )
    options = parser.parse_args(arguments)
    stale = fill(ROOT, check=options.check)
    for name in stale:
        print(f"{'out of date' if options.check else 'wrote'}: {name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
