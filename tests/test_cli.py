"""The command `poolbench`: its help, its errors and its exit codes."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from alone import compare_with_pandas
from click.testing import CliRunner
from poolbench.cli import emit, main
from poolbench.core.errors import UsageError
from poolbench.launch import find_suites, option_words, require_tensorflow
from poolbench.options import BYTES, COUNT, DURATION, INTEGER, OPTIONS, PERCENT, RUN

COMMANDS = (
    "run", "report", "compare", "bisect", "import", "which", "trace", "tensorboard", "matrix", "selftest",
    "devices",
)  # fmt: skip


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_help_lists_every_command():
    done = invoke("--help")
    assert done.exit_code == 0
    assert set(COMMANDS) == set(main.commands)
    assert set(COMMANDS) <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_at_most_100_columns_wide(command):
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_help_is_quick_and_imports_no_heavy_library():
    code = (
        "import sys; from poolbench.cli import main; main(['--help'], standalone_mode=False);"
        "sys.exit(str([m for m in ('pandas', 'scipy', 'tensorflow', 'pytest') if m in sys.modules]))"
    )
    ratio, done = compare_with_pandas("-c", code)
    assert done.stderr.strip() == "[]"
    assert ratio < 1  # half a second where pandas takes as long


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["compare", "a"], "Missing argument 'RUN'"),
        (["report", "--margin", "200%"], "--margin: expected a share below 100%"),
        (["report", "--select", "op"], "--select: expected a column and its values"),
        (["report", "--format", "xml"], "--format: 'xml' is not one of"),
        (
            ["report", "--format", "csv", "--out", "x"],
            "--format prints a table: leave out --out and --open",
        ),
        (["which", "x.keras", "--processes", "0"], "--processes: expected a number from 1"),
        (["trace", "--run", "../up"], "--run: expected a run's name"),
        (["trace", "--candidates", "no.py"], "there is no no.py"),
        (["run", "nothing"], "no file or suite 'nothing'; the suites are capabilities"),
        (["run", "--processes", "0"], "--processes: expected a number from 1"),
        (["run", "--axis", "padding"], "--axis: expected an axis and its values"),
        (["run", "--candidates", "nowhere.py"], "takes a Python file; there is no nowhere.py"),
        (["matrix", "--sweep", "quick"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_bad_option_is_one_line_and_exit_2(words, says):
    done = invoke(*words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--axis", "strid=2"], "no op has an axis 'strid'"),
        (["--axis", "stride=2"], "no op of this run has an axis 'stride': --op spatial_max_pool"),
        (["--axis", "padding=full"], "padding must be one of 'valid', 'same'; got 'full'"),
        (["--op", "nothing"], "no op 'nothing' is registered; there are"),
        (["--run", "a", "--resume", "b"], "names a new run"),
        (["depth_max_pool", "--axis", "shape=1x1x1x1"], "no case is left by --axis shape=1x1x1x1"),
        (
            [
                "--sweep",
                "quick",
                "--op",
                "spatial_max_pool",
                "--op",
                "depth_max_pool",
                "--axis",
                "window=100",
                "--axis",
                "pool_size=100",
            ],
            "no case is left by --axis window=100 --axis pool_size=100",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_that_pytest_refuses_is_one_line_and_exit_2(words, says, tmp_path):
    done = invoke("run", *words, "--results", tmp_path / "results")
    assert done.exit_code == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.output


def test_run_dry_run_prints_the_races_and_stores_nothing(tmp_path):
    words = ("run", "--dry-run", "--sweep", "quick", "--op", "global_avg_pool")
    done = invoke(*words, "--results", tmp_path / "results")
    assert done.exit_code == 0, done.output
    assert re.search(r"3 races, about \d+ s; nothing was run", done.output)
    assert "depth_max_pool " not in done.output
    assert not (tmp_path / "results").exists()


def test_run_words_behind_two_dashes_go_to_pytest_as_they_stand(tmp_path, monkeypatch):
    suite, seen = tmp_path / "mine.py", []
    suite.touch()
    monkeypatch.setattr("pytest.main", lambda words, plugins: seen.extend(words) or 0)
    own = ("-k", "network", "--maxfail", "2", "--deselect", "mine.py")
    done = invoke("run", suite, "--results", tmp_path / "results", "--", *own)
    assert done.exit_code == 0, done.output
    assert (seen[0], *seen[-len(own) :]) == (str(suite), *own)
    assert seen.count("network") == 1


def test_option_words_carry_every_option():
    given = {
        option.key: ("a",) if option.multiple else True if option.flag else 1 for option in OPTIONS
    }
    assert len(list(option_words(given))) == len(OPTIONS)
    assert list(option_words({"axis": ("a=1", "b=2"), "dry_run": False})) == [
        "--poolbench-axis=a=1",
        "--poolbench-axis=b=2",
    ]


def test_find_suites_default_is_the_suites_of_ops():
    assert [Path(name).stem for name in find_suites([])] == [
        "test_depth_max_pool",
        "test_global_avg_pool",
    ]


def test_find_suites_all_ops_adds_the_further_ones_alone():
    assert {Path(name).stem for name in {*find_suites([], all_ops=True)} - {*find_suites([])}} == {
        "test_further_ops"
    }


@pytest.mark.parametrize("name", ["network", "suites/test_network.py"])
def test_find_suites_knows_a_suite_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network").mkdir()  # of another purpose
    (found,) = find_suites([name])
    assert Path(found).is_file()
    assert find_suites(["./network"]) == ["./network"]


@pytest.mark.fault(
    "no TensorFlow, or a Python that it has no package for",
    "one line that says what to install",
)
@pytest.mark.parametrize(
    ("version", "says"),
    [((3, 14), "TensorFlow has no package for Python 3.14"), ((3, 12), "pip install")],
)
def test_run_without_tensorflow_is_one_line(monkeypatch, version, says):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("poolbench.launch.sys", SimpleNamespace(version_info=version))
    with pytest.raises(UsageError, match=says):
        require_tensorflow(find_suites([]))
    require_tensorflow(["a_suite_of_the_user.py"])


@pytest.mark.fault(
    "nox under a Python that TensorFlow has no package for",
    "another one on the PATH is used; without one, one line before anything is installed",
)
@pytest.mark.parametrize("version", [(3, 14, 0), (3, 9, 6)])
def test_nox_under_an_unsupported_python_is_one_line(monkeypatch, version):
    decorate = lambda **_: lambda function: function  # noqa: E731
    nox = SimpleNamespace(needs_version="", options=SimpleNamespace(), session=decorate)
    monkeypatch.setitem(sys.modules, "nox", nox)
    noxfile = runpy.run_path(str(Path(__file__).parent.parent / "noxfile.py"))
    find_python = noxfile["_find_python"]
    session = SimpleNamespace(error=lambda line: line)
    monkeypatch.setitem(find_python.__globals__, "sys", SimpleNamespace(version_info=version))
    monkeypatch.setenv("PATH", "")
    here = f"{version[0]}.{version[1]}"
    assert find_python(session) == f"this is Python {here}; poolbench needs Python 3.10 to 3.13"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert find_python(session) == "/usr/bin/python3.13"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError("disk is full"), 2, "poolbench: disk is full"),
        (OSError(28, "No space left", "a.json"), 2, "poolbench: cannot use a.json: No space left"),
        (UsageError("two\nlines"), 2, "poolbench: two lines"),
    ],
    ids=repr,
)
def test_cli_command_that_raises_ends_with_its_exit_code(monkeypatch, error, code, says):
    @click.command()
    def fails():
        raise error

    monkeypatch.setitem(main.commands, "fails", fails)
    done = invoke("fails")
    assert done.exit_code == code
    assert done.stderr.strip() == says


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
        (BYTES, "9" * 400), (DURATION, "9" * 400), (INTEGER, "-5"),
    ],
)  # fmt: skip
def test_option_type_refuses_a_bad_value(kind, text):
    with pytest.raises(click.BadParameter, match="expected"):
        kind.convert(text, None, None)


@pytest.mark.parametrize(("kind", "name"), [(PERCENT, "precision"), (DURATION, "budget")])
@pytest.mark.parametrize("value", [1e-5, 0.3, 1e20, 3.000300030003e-05])
def test_option_words_can_be_read_back(kind, name, value):
    (word,) = option_words({name: value})
    text = word.partition("=")[2]
    assert "e" not in text
    if kind is DURATION or value < 1:
        assert kind.convert(text, None, None) == value


def test_run_of_no_test_says_so(tmp_path):
    words = ["run", "--dry-run", "--sweep", "quick", "-k", "nosuch", "--results", str(tmp_path)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "no test matches -k nosuch" in done.output


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "raise ValueError('a\\nb')"])
def test_candidates_file_that_exits_or_raises_is_one_line_and_exit_2(body, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(body)
    for words in (["trace"], ["compare", "--base-env", "A=1"]):
        done = CliRunner().invoke(main, [*words, "--candidates", str(file)])
        assert done.exit_code == 2, done.output
        assert f"--candidates {file} cannot be loaded: " in done.output
        assert done.output.count("\n") == 1


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_option_default_is_valid(option):
    option.parse(() if option.multiple else option.default)


def test_run_that_ends_at_once_leaves_the_handlers_of_signals(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = ("run", "--dry-run", "--sweep", "quick", "--op", "global_avg_pool")
    assert invoke(*words, "--results", tmp_path / "results").exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
