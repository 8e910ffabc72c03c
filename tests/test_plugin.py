"""The pytest plugin beside pytest's own options, other plugins, and other projects."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "tests" / "candidates" / "numpy_faults.py"
BASE = ("-q", "-p", "no:hypothesispytest", "-k", "base or fast", "--poolbench-sweep", "quick")


def run_pytest(folder, *words, python=sys.executable, plugin=True, **environment):
    loaded = ["-p", "poolbench.pytest_plugin"] if plugin else []
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [str(python), "-m", "pytest", *loaded, *map(str, words)],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr
    return done


@pytest.mark.fault(
    "pytest with `-p no:benchmark`, `-p no:cacheprovider` or `-W error`",
    "works",
)
@pytest.mark.parametrize(
    "words",
    [("-p", "no:benchmark"), ("-p", "no:cacheprovider", "-W", "error")],
    ids=" ".join,
)
def test_plugin_works_with_options_of_pytest(words, tmp_path):
    done = run_pytest(tmp_path, SUITE, *BASE, "--poolbench-check-only", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.fault(
    "pytest with `-n 2`",
    "refused in one line, exit code 2",
)
@pytest.mark.slow
def test_plugin_under_xdist_is_one_line_and_exit_2(tmp_path):
    pytest.importorskip("xdist")
    done = run_pytest(tmp_path, SUITE, *BASE, "-n", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "poolbench: benchmarks share no processors with other tests; run without -n" in done.stdout
    )
    assert "no tests ran" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.fault(
    "pytest with `--timeout`",
    "refused in one line",
)
def test_plugin_beside_pytest_timeout_is_one_line(tmp_path):
    (tmp_path / "timeout.py").write_text(
        "def pytest_addoption(parser):\n"
        "    parser.addoption('--timeout', type=float)\n"
        "    parser.addini('timeout', '')\n"
    )
    done = run_pytest(tmp_path, SUITE, *BASE, "-p", "timeout", "--timeout", "5")
    assert done.returncode == 4
    assert "ERROR: pytest-timeout would end a race in its middle" in done.stderr + done.stdout


@pytest.mark.fault(
    "pytest with `-x`",
    "after the first failure the command to resume is printed",
)
def test_plugin_run_stopped_by_x_says_how_to_go_on(tmp_path):
    words = (
        "-q",
        "-x",
        "-k",
        "base or raise",
        "--poolbench-sweep",
        "quick",
        "--poolbench-run",
        "a",
    )
    few = ("--poolbench-processes", "1", "--poolbench-budget", "0.1")
    done = run_pytest(tmp_path, SUITE, "-p", "no:hypothesispytest", *words, *few)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cd ")]
    assert line.startswith(f"cd {tmp_path} && ")
    assert line.endswith("--poolbench-resume a")


OTHER_PROJECT = {
    "conftest.py": (
        "import pytest\n"
        "def pytest_addoption(parser):\n"
        "    for name in ('seed', 'run', 'memory', 'sweep', 'axis', 'resume'):\n"
        "        parser.addoption(f'--{name}', default='theirs')\n"
        "@pytest.fixture\n"
        "def case(request):\n"
        "    return request.config.getoption('--seed')\n"
    ),
    "test_theirs.py": (
        "def test_theirs(case, benchmark):\n    assert case == 'theirs'\n    benchmark(sum, [1])\n"
    ),
}


def write_other_project(folder):
    for name, text in OTHER_PROJECT.items():
        (folder / name).write_text(text)


@pytest.mark.fault(
    "another project's tests, its `--seed` and its benchmark.json",
    "unchanged",
)
def test_plugin_leaves_a_session_without_benchmarks_of_ours_as_it_is(tmp_path):
    write_other_project(tmp_path)
    done = run_pytest(tmp_path, "-q", "--benchmark-json", "out.json", "--benchmark-disable-gc")
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert "poolbench" not in written
    assert "node" in written["machine_info"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment with the wheel, which shares this environment's libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves its build folder in the source
    for name in ("bench", "suites"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(folder), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no network: pip cannot get setuptools to build the wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("poolbench-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    into = [*pip, "install", "--target", str(site)]
    subprocess.run([*into, "--no-deps", str(wheel)], check=True)
    subprocess.run(
        [*into, "--no-deps", "pytest-randomly"], check=False
    )  # without a network: without it
    (site / "bench").mkdir()  # the top-level package of frappe-bench
    (site / "bench" / "__init__.py").write_text("VERSION = '5'\n")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("-p", "no:benchmark"), ("-n", "2")], ids=" ".join)
def test_wheel_leaves_other_projects_alone(installed, tmp_path, words):
    write_other_project(tmp_path)
    if "no:benchmark" in words:
        (tmp_path / "test_theirs.py").write_text("def test_theirs(case):\n    assert case\n")
    if "-n" in words:
        pytest.importorskip("xdist")
    done = run_pytest(
        tmp_path, "-q", "--seed", "theirs", "--run", "x", *words, python=installed, plugin=False, PYTHONPATH=""
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    code = "import bench, sys; assert bench.VERSION == '5'"
    subprocess.run([str(installed), "-c", code], check=True)


@pytest.mark.slow
def test_wheel_alone_runs_the_suites_that_ship(installed, tmp_path):
    words = ["-m", "poolbench", "run", "--sweep", "quick", "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed), *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "races, about" in done.stdout
    assert list(tmp_path.iterdir()) == []
