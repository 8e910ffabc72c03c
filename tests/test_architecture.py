"""The package matches docs/architecture.md; import-linter checks the layers in `nox -s lint`."""

import ast
import re
from pathlib import Path

import poolbench
import pytest
from poolbench.core.registry import load_builtin

SOURCE = Path(__file__).parent.parent / "bench"
PACKAGE = SOURCE / "poolbench"
MODULE_LINES, CLASS_LINES, OP_LINES = 400, 250, 200

# Each is one file to copy, and needs Keras alone.
REUSABLE = tuple(
    f"poolbench.{name}" for name in ("layers", "adaptive_pooling", "gem_pooling", "masked_pooling")
)
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports_of(tree):
    """Every import in a module, those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges_of(name):
    found = set()
    for imported in imports_of(TREES[name]):
        target = imported
        while target and target not in FILES:
            target = target.rpartition(".")[0]
        if target not in ("", "poolbench", name):
            found.add(target)
    return found


def circles(edges):
    """Groups of nodes that reach each other."""
    reach = {name: set(targets) for name, targets in edges.items()}
    while True:
        wider = {n: ts.union(*(reach[t] for t in ts)) if ts else ts for n, ts in reach.items()}
        if wider == reach:
            break
        reach = wider
    inside = {n for n in reach if n in reach[n]}
    return sorted({frozenset(m for m in reach[n] if n in reach[m]) for n in inside}, key=sorted)


def test_circles_finds_a_circle_of_two():
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [{"a", "b"}]


def test_imports_have_no_circle():
    found = circles({name: edges_of(name) for name in FILES if name != "poolbench"})
    assert found == []


def test_modules_are_within_the_limit():
    counts = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for path in FILES.values()
    }
    assert {n for n, lines in counts.items() if lines > MODULE_LINES} == set()


def test_ops_of_one_file_are_within_the_limit():
    files = [path for path in FILES.values() if path.parent == PACKAGE / "ops"]
    counts = {path.name: len(path.read_text().splitlines()) for path in files}
    ops = {name: lines for name, lines in counts.items() if name not in {"shared.py", "natives.py"}}
    assert len(ops) >= 6  # five ops and the package
    assert {name for name, lines in ops.items() if lines > OP_LINES} == set()


def test_classes_are_within_the_limit():
    lines = {
        (name, node.name): node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {place for place, count in lines.items() if count > CLASS_LINES} == set()


def test_ops_import_only_the_public_names_of_the_package():
    for name, tree in TREES.items():
        if not name.startswith("poolbench.ops"):
            continue
        for imported in imports_of(tree):
            module, _, word = imported.rpartition(".")
            if imported.partition(".")[0] == "poolbench":
                public = module in REUSABLE or (module == "poolbench" and word in poolbench.__all__)
                assert public or imported.startswith("poolbench.ops."), (name, imported)


@pytest.mark.parametrize(
    "name", [n for n in FILES if not n.startswith(("poolbench.ops", *REUSABLE))]
)
def test_modules_outside_ops_name_no_op_and_no_candidate(name):
    registry = load_builtin()
    ops = {name for name, op in registry.ops.items() if op.builtin}  # other tests register theirs
    words = ops | {c for op, c in registry.candidates if op in ops and "-" in c}
    pattern = re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, sorted(words))) + r")(?![\w-])")
    assert not pattern.findall(FILES[name].read_text())
