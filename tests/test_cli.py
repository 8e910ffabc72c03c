"""The command `poolbench`: its help, its errors and its exit codes."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from poolbench.cli import emit, main
from poolbench.options import BYTES, COUNT, DURATION, OPTIONS, PERCENT, RUN

COMMANDS = ("report", "compare", "import", "which", "trace", "tensorboard", "selftest", "devices")


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_help_lists_every_command():
    done = invoke("--help")
    assert done.exit_code == 0
    assert set(COMMANDS) <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_a_screen(command):
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_help_is_quick_and_imports_no_heavy_library():
    code = (
        "import sys; from poolbench.cli import main; main(['--help'], standalone_mode=False);"
        "sys.exit(str([m for m in ('pandas', 'scipy', 'tensorflow', 'pytest') if m in sys.modules]))"
    )
    seconds = []
    for _ in range(3):  # CPU time, the least of three: other programs use the machine too
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        after = os.times()
        seconds.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
        if seconds[-1] < 0.5:
            break
    assert done.stderr.strip() == "[]"
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["compare", "a"], "Missing argument 'RUN'"),
        (["report", "--margin", "200%"], "--margin: expected a share below 100%"),
        (["report", "--select", "op"], "--select: expected a column and its values"),
        (["report", "--format", "xml"], "--format: 'xml' is not one of"),
        (["which", "x.keras", "--processes", "0"], "--processes: expected a number from 1"),
        (["trace", "--run", "../up"], "--run: expected a run's name"),
        (["trace", "--candidates", "no.py"], "there is no no.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_bad_option_is_one_line_and_exit_2(words, says):
    done = invoke(*words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("disk is full"), 2)]
)
def test_cli_command_that_raises_ends_with_its_exit_code(monkeypatch, error, code):
    @click.command()
    def fails():
        raise error

    monkeypatch.setitem(main.commands, "fails", fails)
    done = invoke("fails")
    assert done.exit_code == code
    assert "Traceback" not in done.output


def test_cli_unknown_failure_is_not_hidden(monkeypatch):
    @click.command()
    def fails():
        raise ZeroDivisionError

    monkeypatch.setitem(main.commands, "fails", fails)
    assert isinstance(invoke("fails").exception, ZeroDivisionError)


def test_emit_reader_has_gone_changes_no_exit_code():
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1);"
        f"from {emit.__module__} import emit; emit('x'); sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (7, b"")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (PERCENT, "2%", 0.02), (PERCENT, "0.05", 0.05), (PERCENT, "0", 0.0),
        (BYTES, "8GiB", 8 * 2**30), (BYTES, "1.5k", 1536), (BYTES, "400 MB", 400 * 2**20),
        (DURATION, "10", 10.0), (DURATION, "90 s", 90.0), (DURATION, "2min", 120.0),
        (COUNT, "5", 5), (RUN, "a.b_c-1", "a.b_c-1"),
    ],
)  # fmt: skip
def test_option_type_reads_a_value(kind, text, value):
    assert kind.convert(text, None, None) == value
    assert kind.convert(value, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (PERCENT, "100%"), (PERCENT, "wide"), (PERCENT, "nan"), (BYTES, "lots"), (BYTES, "0"),
        (DURATION, "0"), (DURATION, "soon"), (COUNT, "0"), (RUN, "../up"), (RUN, ""),
    ],
)  # fmt: skip
def test_option_type_refuses_a_bad_value(kind, text):
    with pytest.raises(click.BadParameter, match="expected"):
        kind.convert(text, None, None)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_option_default_is_valid(option):
    option.parse(() if option.multiple else option.default)
