"""The commands that README.md and docs/ tell a reader to type: each is one that the doors take."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What a command begins with, and how the door behind it is asked for its options.
SWEEPS = {"bench-cpu": "default", "bench-quick": "quick", "bench-full": "full", "bench-gpu": "gpu"}
SUITES = ["-m", "pytest", "suites"]
DOORS = {
    "python report.py compare": ["-m", "poolbench", "compare", "--help"],
    "python report.py import": ["-m", "poolbench", "import", "--help"],
    "python report.py": ["-m", "poolbench", "report", "--help"],
    "nox -s which --": ["-m", "poolbench", "which", "--help"],
    "python -m poolbench which": ["-m", "poolbench", "which", "--help"],
    "nox -s acceptance --": ["tests/acceptance", "checks", "--help"],
    "nox -s selftest --": ["-m", "poolbench", "selftest", "--help"],
    "pytest suites": [*SUITES, "--help"],
    "python -m pytest suites": [*SUITES, "--help"],
    **{f"nox -s {session} --": [*SUITES, "--help"] for session in SWEEPS},
}


def commands():
    """(page, command) for each line of a fenced block and each piece of code in the text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(
            r"(?<!`)`([^`\n]+)`(?!`)",
            re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE),
        )
        for code in (*lines, *inline):
            for part in code.replace("\\", "").split("&&"):
                command = part.split(" #")[0].strip()
                if door_of(command):
                    found.append((page.name, command))
    return sorted(set(found))


def door_of(command):
    return max(
        (door for door in DOORS if f"{command} ".startswith(f"{door} ")), key=len, default=None
    )


def test_the_docs_hold_commands_of_every_kind():
    assert {
        "python report.py compare",
        "nox -s which --",
        "pytest suites",
        "nox -s bench-cpu --",
    } <= {door_of(command) for _, command in commands()}


@pytest.fixture(scope="module")
def options():
    """Door to the options that it takes, as its own help says them."""
    helps = {}
    for words in {tuple(words) for words in DOORS.values()}:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        helps[words] = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))
    return helps


@pytest.mark.parametrize(("page", "command"), commands())
def test_its_options_are_options_of_the_door(options, page, command):
    door = door_of(command)
    words = shlex.split(command.removeprefix(door))
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert used <= options[tuple(DOORS[door])], f"{page}: {command}"


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
def test_what_it_would_run_can_be_planned(command):
    session, _, words = command.removeprefix("nox -s ").partition(" -- ")
    done = subprocess.run(
        [sys.executable, *SUITES, "-q", "--plan", "--sweep", SWEEPS[session], *shlex.split(words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "races, about" in done.stdout
