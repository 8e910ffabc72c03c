"""Imports load no framework, collection is fast, and files name no machine."""

import ast
import subprocess
from pathlib import Path

import pytest
from alone import compare_with_pandas

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench" / "poolbench"
HEAVY = {"tensorflow", "keras", "ray", "tensorboard"}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=module_name)
def test_no_module_imports_tensorflow_at_its_top(path):
    if path.name in ("layers.py", "masked_pooling.py", "adaptive_pooling.py", "gem_pooling.py"):
        pytest.skip("a reusable layer is a Keras module")
    tops = {name.split(".")[0] for name in imports_of(path, top_level_only=True)}
    assert not tops & HEAVY


@pytest.mark.parametrize("path", sorted((BENCH / "report").rglob("*.py")), ids=module_name)
def test_report_imports_no_framework(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & HEAVY


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=module_name)
def test_package_imports_no_suite(path):
    assert not any(name.split(".")[0] in ("suites", "tests") for name in imports_of(path))


LIST_FRAMEWORKS = """
import atexit, runpy, sys
heavy = "tensorflow.python", "keras.src", "jax", "torch"
atexit.register(lambda: print("LOADED", [name for name in heavy if name in sys.modules], file=sys.stderr))
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


def test_collection_is_quick_and_loads_no_framework():
    # Hypothesis' plugin loads all of it at the end of every session; benches do without it.
    words = "pytest suites --collect-only -q -p no:hypothesispytest".split()
    ratio, done = compare_with_pandas("-c", LIST_FRAMEWORKS, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LOADED []" in done.stderr
    assert ratio < 4  # two seconds where pandas takes half a one


def test_the_report_s_help_is_quick_and_loads_no_framework():
    ratio, done = compare_with_pandas("-c", LIST_FRAMEWORKS, "report.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr
    assert ratio < 2


def test_no_file_carries_a_path_of_a_machine_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("git lists no file here")
    needles = [
        "/ro" + "ot/",
        "/wo" + "rk/",
        "/ho" + "me/",
        "pypi" + ".org",
        "files.python" + "hosted",
    ]
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in (".png", ".pb") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        found += [f"{name}: {needle}" for needle in needles if needle in text]
    assert not found
