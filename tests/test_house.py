"""Imports load no framework, collection is fast, and files name no machine."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run_and_list_frameworks(*words, limit_seconds):
    """Run Python with these words; its CPU seconds, and which frameworks it had loaded at its end.

    CPU time, for wall time depends on what else runs on the machine.
    """
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', [n for n in ('tensorflow.python', 'keras.src', 'jax', 'torch')"
        " if n in sys.modules], file=sys.stderr))\n"
        "import runpy\n"
        f"sys.argv = {list(words)!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__') if sys.argv[0].endswith('.py')"
        " else runpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    seconds = []
    for _ in range(3):  # the least of three: a busy machine makes CPU time longer too
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        after = os.times()
        seconds.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
        if seconds[-1] < limit_seconds:
            break
    return min(seconds), done


def test_collection_is_quick_and_loads_no_framework():
    seconds, done = run_and_list_frameworks(
        # Hypothesis' plugin loads all of it at the end of every session; benches do without it.
        "pytest",
        "suites",
        "--collect-only",
        "-q",
        "-p",
        "no:hypothesispytest",
        limit_seconds=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LOADED []" in done.stderr
    assert seconds < 2


def test_the_report_s_help_is_quick_and_loads_no_framework():
    seconds, done = run_and_list_frameworks("report.py", "--help", limit_seconds=1.5)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr
    assert seconds < 1.5


def test_no_file_carries_a_path_of_a_machine_or_a_registry():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    needles = [
        "/ro" + "ot/",
        "/wo" + "rk/",
        "/ho" + "me/",
        "pypi" + ".org",
        "files.python" + "hosted",
    ]
    found = []
    for name in filter(None, tracked):
        path = ROOT / name
        if path.suffix in (".png", ".pb") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        found += [f"{name}: {needle}" for needle in needles if needle in text]
    assert not found
