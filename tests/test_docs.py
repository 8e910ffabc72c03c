"""The commands in README.md and docs/ exist and take the options shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from poolbench.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SWEEPS = {"bench-cpu": "default", "bench-quick": "quick", "bench-full": "full", "bench-gpu": "gpu"}
# What a command begins with, and the command of poolbench behind it.
COMMANDS = {
    "python report.py compare": "compare",
    "python report.py import": "import",
    "python report.py": "report",
    **{f"nox -s {session} --": "run" for session in SWEEPS},
    **{f"nox -s {name} --": name for name in ("which", "selftest", "trace", "matrix")},
    **{f"poolbench {name}": name for name in main.commands},
}


def commands():
    """(page, command) for each line of a fenced block and each piece of code in the text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
        indented = re.findall(r"^    (\S.*)$", prose.replace("\\\n", " "), re.MULTILINE)
        for code in (*lines, *inline, *indented):
            for part in code.replace("\\", "").split("&&"):
                command = part.split(" #")[0].strip().removeprefix("$ ")
                if start_of(command):
                    found.append((page.name, command))
    return sorted(set(found))


def start_of(command):
    return max(
        (start for start in COMMANDS if f"{command} ".startswith(f"{start} ")),
        key=len,
        default=None,
    )


def test_docs_hold_commands_of_every_kind():
    kinds = {COMMANDS[start_of(command)] for _, command in commands()}
    assert {"run", "report", "compare", "which"} <= kinds


@pytest.mark.parametrize(("page", "command"), commands())
def test_docs_command_has_options_that_exist(page, command):
    start = start_of(command)
    words = shlex.split(command.removeprefix(start))
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    known = {name for param in main.commands[COMMANDS[start]].params for name in param.opts}
    assert used <= known, f"{page}: {command}"


@pytest.mark.parametrize(
    "command",
    sorted(
        {
            c
            for _, c in commands()
            if c.startswith("nox -s bench-") and not re.search(r"\b[A-Z]{4,}|my_", c)
        }
    ),
)
def test_docs_benchmark_can_be_planned(command):
    session, _, words = command.removeprefix("nox -s ").partition(" -- ")
    words = ["run", "--dry-run", "--sweep", SWEEPS[session], *shlex.split(words)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "races, about" in done.output


def test_docs_sessions_exist():
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    sessions = set(re.findall(r"^[*-] ([a-z-]+)", listed, re.MULTILINE))
    named = {
        name for page in PAGES for name in re.findall(r"nox -s ([a-z][a-z-]*)", page.read_text())
    }
    assert {"bench-cpu", "tests"} <= named <= sessions
