"""Tables of the documentation that come from the tests: hacks, mutants, faults. The files are read, not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from poolbench.report.formats import as_markdown
from poolbench.report.frame import RunFrame

HACKS = Path("tests") / "test_hacks.py"
MUTANTS = Path("tests") / "test_mutants.py"
CHECKS = {
    "open": "opening",
    "watch": "after each block",
    "clock": "the run's own clock",
    "recheck": "unseen inputs, or inputs against the host's copy",
    "verify": "end of each process",
}


def hacks_block(_: RunFrame, root: Path) -> str:
    """Return the number of timing hacks and of incorrect implementations that are caught, and the hacks."""
    tree = ast.parse((root / HACKS).read_text(encoding="utf-8"))
    caught = {
        name: value
        for table in ("CAUGHT", "TENSORFLOW_CAUGHT")
        for name, value in ast.literal_eval(_assigned(tree, table)).items()
    }
    mutants = _assigned(ast.parse((root / MUTANTS).read_text(encoding="utf-8")), "MUTANTS")
    assert isinstance(mutants, ast.Dict)
    count = len(mutants.keys)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (check, status, _) in caught.items():
        groups.setdefault((check, status), []).append(name)
    rows = [
        {"hack": ", ".join(names), "caught by": CHECKS[check], "status": f"`{status}`"}
        for (check, status), names in groups.items()
    ]
    return (
        f"The checks catch {len(caught)} of {len(caught)} timing hacks (`{HACKS}`), and the reference catches {count} "
        f"of {count} incorrect implementations (`{MUTANTS}`).\n\n"
        f"{as_markdown(pd.DataFrame(rows), markup=['status']).strip()}"
    )


def faults_block(_: RunFrame, root: Path) -> str:
    """Return what happens in unusual environments and with unusual files: a row per mark of a test."""
    rows = [
        dict(zip(("environment or file", "what happens"), map(ast.literal_eval, mark), strict=True))
        for path in sorted((root / "tests").rglob("test_*.py"))
        for mark in _marks(ast.parse(path.read_text(encoding="utf-8")))
    ]
    rows.sort(key=lambda row: row["environment or file"].lower())
    return as_markdown(pd.DataFrame(rows), markup=list(rows[0])).strip()


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    """Return the expression that a module assigns to a name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [
            name
        ]:
            return node.value
    raise LookupError(name)


def _marks(tree: ast.Module) -> Iterator[list[ast.expr]]:
    """Yield the arguments of each `pytest.mark.fault(environment, what_happens)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            yield node.args
