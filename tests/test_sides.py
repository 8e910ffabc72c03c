"""Sides of a comparison: checkouts, environments and workers, in a small repository; the installer is a fake."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from poolbench import compare_commands
from poolbench.cli import main
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine import bisect, sides
from poolbench.engine.process import SOURCE, Worker
from poolbench.engine.sides import Builder, SideRequest

ROOT = Path(__file__).parent.parent
MINE = '''from poolbench import candidate
import numpy as np

@candidate(op="global_avg_pool", name="mine", backends=("numpy",))
def mine(case):
    """Mean by NumPy."""
    def call(x):
        for _ in range({calls}):
            pass
        return x.mean(axis=(1, 2), dtype="float32"){change}
    return call
'''


def git(folder, *words):
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit(folder, message, **files):
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, the second of which is slower, with the same dependencies."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    project = "[project]\nname = 'a'\nversion = '1'\ndependencies = ['numpy']\n"
    commit(folder, "fast", mine__py=MINE.format(calls=10000, change=""), pyproject__toml=project)
    commit(folder, "slow", mine__py=MINE.format(calls=15000, change=""))
    return folder


@pytest.fixture
def installs(monkeypatch):
    """The commands of a fake installer, which makes an interpreter and nothing else."""
    commands = []

    def install(words, folder):
        words = [word for word in words if word]
        commands.append((words, folder))
        if "venv" in words:
            python = Path(words[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setattr(sides, "_install", install)
    return commands


def make_builder(repository, tmp_path, **more):
    return Builder(repository, cache=tmp_path / "cache", say=lambda line: None, **more)


def path_of(side):
    return dict(side.worker.environment)["PYTHONPATH"].split(os.pathsep)


def test_side_of_a_commit_with_the_same_dependencies_runs_in_this_environment(
    repository, tmp_path, installs
):
    builder = make_builder(repository, tmp_path, candidates=[repository / "mine.py"])
    side = builder.build(SideRequest(ref="HEAD~1"))
    (file,) = side.worker.files
    assert "range(10000)" in Path(file).read_text()
    assert path_of(side)[0] == str(Path(file).parent)
    assert side.worker.interpreter == ""
    assert installs == []
    assert side.title == f"HEAD~1 ({git(repository, 'rev-parse', '--short=7', 'HEAD~1')})"


def test_side_of_this_project_runs_the_checkouts_own_package(repository, tmp_path, monkeypatch):
    """However the running package was installed: only its checkouts have what a commit changed."""
    package = repository / "bench" / "poolbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "own")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" in entry])
    builder = make_builder(repository, tmp_path)
    head, base = (builder.build(SideRequest(ref=ref)) for ref in ("", "HEAD"))
    assert path_of(head)[0] == str(repository / "bench")
    assert Path(path_of(base)[0]).parts[-1] == "bench" and path_of(base)[0] != path_of(head)[0]
    assert not any("harness" in folder for side in (head, base) for folder in path_of(side))
    old = builder.build(SideRequest(ref="HEAD~1"))
    assert "harness" in path_of(old)[-1]


def test_side_of_the_working_tree_reads_uncommitted_files(repository, tmp_path):
    builder = make_builder(repository, tmp_path, candidates=[repository / "mine.py"])
    (repository / "mine.py").write_text("# changed")
    side = builder.build(SideRequest())
    assert side.worker.files == (str(repository / "mine.py"),)
    assert side.title == "working tree"


def test_checkout_is_kept_and_made_again_where_it_was_changed(repository, tmp_path):
    builder = make_builder(repository, tmp_path)
    tree = Path(path_of(builder.build(SideRequest(ref="HEAD~1")))[0])
    made = (tree / "mine.py").stat().st_mtime_ns
    builder.build(SideRequest(ref="HEAD~1"))
    assert (tree / "mine.py").stat().st_mtime_ns == made
    (tree / "mine.py").write_text("# changed")
    builder.build(SideRequest(ref="HEAD~1"))
    assert "range(10000)" in (tree / "mine.py").read_text()
    shutil.rmtree(tree)
    builder.build(SideRequest(ref="HEAD~1"))
    assert tree.is_dir()


def test_commit_with_other_dependencies_gets_an_environment_once(repository, tmp_path, installs):
    commit(
        repository,
        "other",
        pyproject__toml="[project]\nname = 'a'\ndependencies = ['numpy', 'scipy']\n",
    )
    builder = make_builder(repository, tmp_path)
    side = builder.build(SideRequest(ref="HEAD~1"))
    assert side.worker.interpreter.endswith("bin/python")
    assert ["." in words for words, _ in installs] == [False, True, False]
    again = builder.build(SideRequest(ref="HEAD~2"))
    assert again.worker.interpreter == side.worker.interpreter
    assert len(installs) == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib reads pyproject.toml")
def test_dependencies_do_not_depend_on_a_projects_version(repository, tmp_path):
    before = sides.dependencies(repository)
    text = (repository / "pyproject.toml").read_text()
    (repository / "pyproject.toml").write_text(text.replace("version = '1'", "version = '2'"))
    assert sides.dependencies(repository) == before
    (repository / "pyproject.toml").write_text(text.replace("numpy", "numpy<2"))
    assert sides.dependencies(repository) != before


def test_side_with_a_package_has_an_environment_with_it_installed_last(
    repository, tmp_path, installs
):
    side = make_builder(repository, tmp_path, install=[".[cpu]"]).build(
        SideRequest(packages=("tensorflow-cpu==2.20.0",), environment=(("A", "1"),))
    )
    assert installs[-1][0][-1] == "tensorflow-cpu==2.20.0"
    assert ".[cpu]" in installs[1][0]
    assert ("A", "1") in side.worker.environment
    assert side.title == "working tree, tensorflow-cpu==2.20.0, A=1"


def test_side_outside_a_repository_runs_this_code_alone(tmp_path, installs):
    side = make_builder(tmp_path, tmp_path).build(SideRequest(packages=("numpy==2.0.0",)))
    (folder,) = path_of(side)
    assert [path.name for path in Path(folder).iterdir()] == ["poolbench"]
    assert [words for words, _ in installs if "." in words] == []


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"ref": "nothing"}, "'nothing' is no commit of this repository"),
        ({"ref": "--help"}, "is no commit of this repository"),
        ({"python": "nowhere/python"}, "is no interpreter that can be run"),
    ],
)
def test_side_that_cannot_be_built_is_one_line(repository, tmp_path, request_, says):
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        make_builder(repository, tmp_path).build(SideRequest(**request_))
    assert "\n" not in str(error.value)


def test_commit_without_the_candidates_file_is_one_line(repository, tmp_path):
    (repository / "new.py").write_text("")
    builder = make_builder(repository, tmp_path, candidates=[repository / "new.py"])
    with pytest.raises(UsageError, match=r"HEAD has no new\.py"):
        builder.build(SideRequest(ref="HEAD"))


def test_failed_installation_is_one_line(tmp_path):
    words = [sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution')"]
    with pytest.raises(UsageError, match="cannot be installed: ERROR: No matching distribution"):
        sides._install(words, tmp_path)


def test_worker_of_a_side_imports_the_sides_code(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "poolbench").symlink_to(Path(SOURCE) / "poolbench")
    (code / "only_here.py").write_text("")
    mark = tmp_path / "imported"
    (tmp_path / "uses.py").write_text(f"import only_here\nopen({str(mark)!r}, 'w').close()\n")
    spec = WorkerSpec(
        backend="numpy",
        environment=(("PYTHONPATH", str(code)),),
        files=(str(tmp_path / "uses.py"),),
    )
    worker = Worker(spec)
    try:
        worker.wait_started()
    finally:
        worker.close()
    assert mark.exists()


@pytest.mark.parametrize(
    ("main_py", "says"),
    [
        (None, "cannot start a worker: "),
        ("raise ModuleNotFoundError(\"No module named 'msgspec'\")", "No module named 'msgspec'"),
    ],
)
def test_worker_that_lacks_a_package_is_one_line(tmp_path, main_py, says):
    (tmp_path / "poolbench").mkdir()
    (tmp_path / "poolbench" / "__init__.py").touch()
    if main_py:
        (tmp_path / "poolbench" / "worker").mkdir()
        (tmp_path / "poolbench" / "worker" / "__main__.py").write_text(main_py)
    worker = Worker(WorkerSpec(backend="numpy", environment=(("PYTHONPATH", str(tmp_path)),)))
    try:
        with pytest.raises(WorkerFailure, match=says) as failure:
            worker.wait_started()
    finally:
        worker.close()
    assert "\n" not in failure.value.reason


def test_commits_between_are_the_first_parents_in_order(repository, tmp_path):
    builder = make_builder(repository, tmp_path)
    last = commit(repository, "third", a__txt="")
    first = git(repository, "rev-parse", "HEAD~2")
    assert bisect.commits_between(builder, "HEAD~2", "main") == [
        first, git(repository, "rev-parse", "HEAD~1"), last,
    ]  # fmt: skip
    with pytest.raises(UsageError, match="main is no ancestor of HEAD~1"):
        bisect.commits_between(builder, "main", "HEAD~1")


def test_released_versions_include_patches_of_the_last(monkeypatch):
    listed = "tensorflow (2.21.0)\nAvailable versions: 2.21.0, 2.20.0, 2.18.1, 2.18.0, 2.17.1\n"
    monkeypatch.setattr(
        bisect.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listed, "")
    )
    assert bisect.released_versions("tensorflow", "2.18", "2.20") == ["2.18.0", "2.18.1", "2.20.0"]
    with pytest.raises(UsageError, match="fewer than two versions"):
        bisect.released_versions("tensorflow", "2.19", "2.20")


def test_released_versions_pip_failure_is_told_by_its_last_line(monkeypatch):
    said = "WARNING: Retrying\nERROR: no index\n"
    monkeypatch.setattr(
        bisect.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", said)
    )
    with pytest.raises(UsageError, match="cannot list the versions of tensorflow: ERROR: no index"):
        bisect.released_versions("tensorflow", "2.19", "2.20")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "--base", "no-such-commit"], "no commit of this repository"),
        (
            ["compare", "--base", "no-such-commit", "--budget", "3min"],
            "no commit of this repository",
        ),
        (["compare", "--base-env", "A"], "--base-env: expected a variable"),
        (["compare", "--base", "HEAD", "--op", "nothing"], "no op 'nothing'"),
        (["compare", "--base", "HEAD", "--candidate", "nothing"], "no case has such a candidate"),
        (["compare", "--base", "HEAD", "--format", "csv"], "--format of a race is one of"),
        (["compare", "a", "b", "--base", "HEAD"], "BASE is for two stored runs alone"),
        (["compare", "--base", "HEAD", "--select", "mode=xla"], "--select is for two stored runs"),
        (["compare", "a", "b", "--op", "depth_max_pool"], "--op is for --base and --head alone"),
        (["bisect", "nothing", "a", "graph"], "no op 'nothing'"),
        (["bisect", "global_avg_pool", "a", "graph"], "has no candidate 'a'"),
        (["bisect", "global_avg_pool", "avg_pool2d", "graph"], "needs --good REF and --bad REF"),
        (
            ["bisect", "global_avg_pool", "avg_pool2d", "graph", "--versions", "a", "2"],
            "--versions: ",
        ),
        (
            ["bisect", "global_avg_pool", "avg_pool2d", "graph", "--versions", "a", "1.0..2.0..3"],
            "--versions: ",
        ),
        (
            ["bisect", "global_avg_pool", "avg_pool2d", "graph,xla", "--good", "a", "--bad", "b"],
            "bisect races one case: give one value of mode; got graph,xla",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cli_of_sides_bad_option_is_one_line_and_exit_2(words, says, repository, monkeypatch):
    monkeypatch.chdir(repository)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "ops"),
    [
        ({}, {"depth_max_pool", "global_avg_pool"}),
        ({"ops": ("gem_pool",)}, {"gem_pool"}),
        ({"names": ("layer-gem_pool",)}, {"gem_pool"}),
    ],
)
def test_compare_of_sides_races_the_ops_of_a_bare_run_or_those_named(options, ops):
    usual = {"ops": (), "candidates": (), "axis": (), "sweep": "quick", "names": ()}
    pairs = compare_commands._select(usual | options)
    assert {case.op for case, _ in pairs if REGISTRY.ops[case.op].builtin} == ops


def run_blocks(text):
    """Return the shell code of each `run: |` of a YAML file, in order."""
    found = re.finditer(r"^( *)run: \|\n((?:\1  .*\n|\n)+)", text, re.MULTILINE)
    return [re.sub(rf"^{one[1]}  ", "", one[2], flags=re.MULTILINE) for one in found]


def run_action(clone, tmp_path, python, arguments):
    """Run the steps of action.yml as the service would; return the exit codes and the summary."""
    environment = os.environ | {
        "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "GITHUB_OUTPUT": str(tmp_path / "output"), "BASE": git(clone, "rev-parse", "origin/main~1"),
        "ARGUMENTS": arguments, "NUMBER": "7", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "POOLBENCH_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", python), ("gh", f'echo "$@" > {tmp_path}/gh')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    codes = []
    for block in run_blocks((ROOT / "action.yml").read_text()):
        output = tmp_path / "output"
        code = output.read_text().strip().removeprefix("code=") if output.exists() else ""
        codes.append(
            subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", block], cwd=clone, check=False,
                env=environment | {"CODE": code}, capture_output=True,
            ).returncode
        )  # fmt: skip
    return codes, (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("code", "summary"), [(0, "table\n"), (1, "table\n"), (2, "poolbench: the reason\n")]
)
def test_action_comments_and_exits_as_the_command(repository, tmp_path, code, summary):
    python = f'echo "$@" > {tmp_path}/words; echo table; echo progress >&2; '
    python += f'echo "poolbench: the reason" >&2; exit {code}'
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", repository.as_uri(), str(clone))
    arguments = re.search(r"arguments: (.*)", (ROOT / "docs" / "ci.md").read_text())[1]
    codes, said = run_action(clone, tmp_path, python, arguments)
    assert codes == [0, 0, code]
    assert said == summary
    assert "pr comment 7 --body-file" in (tmp_path / "gh").read_text()
    words = (tmp_path / "words").read_text()
    assert words.startswith("-m poolbench compare --base ")
    assert words.endswith(f" {arguments}\n")


@pytest.mark.slow
def test_workflow_finds_a_slowdown_of_half_in_a_real_race(repository, tmp_path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", repository.as_uri(), str(clone))
    arguments = (
        "--candidates mine.py --op global_avg_pool --candidate mine --axis mode=eager "
        "--axis direction=forward --axis shape=1x8x8x8 --budget 60"
    )
    codes, said = run_action(clone, tmp_path, f'exec {sys.executable} "$@"', arguments)
    assert codes == [0, 0, 1], said
    assert said.startswith("## Slower: mine (1.")
    assert "Base against itself, in this job: none of 1 differed" in said


@pytest.mark.slow
def test_bisect_finds_the_slower_commit_in_real_races(repository, tmp_path, monkeypatch):
    first = git(repository, "rev-parse", "HEAD")
    for number in range(6):
        commit(repository, f"later {number}", a__txt=str(number))
    monkeypatch.chdir(repository)
    monkeypatch.setenv("POOLBENCH_CACHE", str(tmp_path / "cache"))
    words = ["bisect", "--good", "HEAD~7", "--bad", "main", "--candidates", "mine.py"]
    words += ["global_avg_pool", "mine", "mode=eager,shape=1x8x8x8"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"first slower: {first[:7]}")
