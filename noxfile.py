"""The doors of poolbench. `nox -l` lists them; what follows `--` reaches the tool behind the door."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
# One environment serves every session that needs TensorFlow on the CPU: it is the largest by far.
ENV_DIR = Path(os.environ.get("NOXENVDIR", ROOT / ".nox"))
CPU_ENV = ENV_DIR / "cpu"
GPU_ENV = ENV_DIR / "gpu"
NO_GPU = (
    "bench-gpu needs a GPU that TensorFlow can use: {seen}; on a machine with an NVIDIA GPU install its "
    "driver (nvidia-smi must work) and run this again, on any other run bench-cpu"
)


def _python(session: nox.Session, folder: Path, *extras: str) -> str:
    """A Python in an environment that several sessions share, with poolbench and these extras."""
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        session.run(
            sys.executable, "-m", "venv", "--clear", str(folder), external=True, silent=True
        )
    stamp = folder / f"installed-{'-'.join(sorted(extras))}"
    sources = (ROOT / "pyproject.toml", CONSTRAINTS)
    if not stamp.exists() or any(stamp.stat().st_mtime < path.stat().st_mtime for path in sources):
        session.run(
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[{','.join(extras)}]",
            external=True,
        )  # fmt: skip
        stamp.touch()
    return str(python)


def _cpu(session: nox.Session, *extras: str) -> str:
    return _python(session, CPU_ENV, "cpu", *extras)


def _bench(session: nox.Session, python: str, sweep: str, *words: str) -> None:
    """Run the suites' two ops, then render the run and print its headline."""
    run = _run_name(session.posargs, sweep)
    named = (
        []
        if any(word.startswith(("--run", "--resume")) for word in session.posargs)
        else ["--run", run]
    )
    suites = [word for word in session.posargs if word.startswith("suites")] or [
        "suites/test_depth_max_pool.py",
        "suites/test_global_avg_pool.py",
    ]
    rest = [word for word in session.posargs if word not in suites]
    # 1: a candidate failed its test; the report shows which, so it is rendered all the same.
    session.run(
        python, "-m", "pytest", *suites, "-q", "--benchmark-quiet", "--sweep", sweep, *words,
        *named, *rest, external=True, success_codes=[0, 1], env=_environment(),
    )  # fmt: skip
    if "--plan" in rest or "--benchmark-disable" in rest:
        return
    session.run(python, str(ROOT / "report.py"), run, external=True, env=_environment())


def _run_name(posargs: list[str], sweep: str) -> str:
    """The run's name as the user gave it, or a new one from the time and the sweep."""
    for i, word in enumerate(posargs):
        if word in ("--run", "--resume") and i + 1 < len(posargs):
            return posargs[i + 1]
        if word.startswith(("--run=", "--resume=")):
            return word.split("=", 1)[1]
    import datetime as dt

    return dt.datetime.now(dt.timezone.utc).strftime(f"%Y%m%d-%H%M%S-{sweep}")


def _environment() -> dict[str, str]:
    return {"TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2")}


@nox.session(name="bench-cpu", venv_backend="none")
def bench_cpu(session: nox.Session) -> None:
    """The default sweep of both ops on the CPU, then the report: at most 10 minutes on two cores."""
    _bench(session, _cpu(session), "default")


@nox.session(name="bench-quick", venv_backend="none")
def bench_quick(session: nox.Session) -> None:
    """A minute's sweep of both ops on the CPU, then the report."""
    _bench(session, _cpu(session), "quick")


@nox.session(name="bench-full", venv_backend="none")
def bench_full(session: nox.Session) -> None:
    """The whole product of the axes, for a night; goes on by: -- --resume NAME."""
    _bench(session, _cpu(session), "full")


@nox.session(name="bench-gpu", venv_backend="none")
def bench_gpu(session: nox.Session) -> None:
    """The GPU sweep on every GPU that TensorFlow sees, with the CPU beside it."""
    if not _has_nvidia_driver():
        # Said before the CUDA wheels are fetched: they are gigabytes, and useless without a driver.
        seen = ", ".join(_devices(CPU_ENV)) or "the CPU alone"
        session.error(NO_GPU.format(seen=f"no NVIDIA driver answers, TensorFlow sees {seen}"))
    python = _python(session, GPU_ENV, "gpu")
    devices = _devices(GPU_ENV)
    gpus = [name for name in devices if name.startswith("gpu")]
    if not gpus:
        session.error(NO_GPU.format(seen=f"TensorFlow sees {', '.join(devices) or 'no device'}"))
    _bench(session, python, "gpu", "--axis", f"device={','.join([*gpus, 'cpu:0'])}")


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """What works where: every probe of every candidate, then the report. `-- --exports` for all."""
    exports = ["export"] if "--exports" in session.posargs else []
    python = _cpu(session, *exports)
    run = _run_name(session.posargs, "matrix")
    named = (
        []
        if any(word.startswith(("--run", "--resume")) for word in session.posargs)
        else ["--run", run]
    )
    session.run(
        python, "-m", "pytest", "suites/test_capabilities.py", "-q", "-r", "fE", *named, *session.posargs,
        external=True, success_codes=[0, 1], env=_environment(),
    )  # fmt: skip
    session.run(python, str(ROOT / "report.py"), run, external=True, env=_environment())


def _devices(folder: Path) -> list[str]:
    """What TensorFlow sees, asked in the environment in this folder; [] where there is none yet."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        return []
    answer = subprocess.run(
        [python, "-m", "poolbench", "devices"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.split()


def _has_nvidia_driver() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    answer = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


@nox.session(venv_backend="none")
def selftest(session: nox.Session) -> None:
    """Audit the harness here: false alarms, power, noise floor; into the newest run, or -- --run NAME."""
    session.run(
        _cpu(session),
        "-m",
        "poolbench",
        "selftest",
        *session.posargs,
        external=True,
        env=_environment(),
    )


@nox.session(venv_backend="none")
def acceptance(session: nox.Session) -> None:
    """Hold the promises of real timings against this machine: about an hour; one by -- --only NAME."""
    session.run(
        _cpu(session),
        str(ROOT / "tests" / "acceptance"),
        "checks",
        *session.posargs,
        external=True,
        env=_environment(),
    )


@nox.session(venv_backend="none")
def versus(session: nox.Session) -> None:
    """The same callables by pytest-benchmark, pyperf, timeit, torch's Timer (if installed) and us."""
    python = _cpu(session, "versus")
    session.run(
        python, str(ROOT / "tests" / "acceptance"), "tools", *session.posargs,
        external=True, env=_environment(),
    )  # fmt: skip


@nox.session(venv_backend="none")
def trace(session: nox.Session) -> None:
    """Record traces of the candidates: `nox -s trace -- [OP] [MODE] [CANDIDATE] [--run NAME]`."""
    gpu = bool(_devices(GPU_ENV)) and _has_nvidia_driver()
    python = _python(session, GPU_ENV, "gpu") if gpu else _cpu(session)
    session.run(
        python, "-m", "poolbench", "trace", *session.posargs, external=True, env=_environment()
    )


@nox.session(venv_backend="none")
def tensorboard(session: nox.Session) -> None:
    """Open a run's traces: `nox -s tensorboard -- [RUN]`; an environment without TensorFlow."""
    folder = ENV_DIR / "viewer"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed"
    if not stamp.exists() or stamp.stat().st_mtime < CONSTRAINTS.stat().st_mtime:
        session.run(
            sys.executable, "-m", "venv", "--clear", str(folder), external=True, silent=True
        )
        session.run(
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--constraint", str(CONSTRAINTS), "tensorboard>=2.21", "tensorboard-plugin-profile>=2.24",
            external=True,
        )  # fmt: skip
        stamp.touch()
    # -I: the folder of the script holds modules that are named as some of the standard library's.
    viewer = str(ROOT / "bench" / "poolbench" / "report" / "tensorboard.py")
    session.run(str(python), "-I", viewer, *session.posargs, external=True)


@nox.session(venv_backend="none")
def networks(session: nox.Session) -> None:
    """Whole networks: pooling's share of a step, each spelling in place; at most 6 minutes on two cores."""
    python = _cpu(session)
    run = _run_name(session.posargs, "networks")
    named = (
        []
        if any(word.startswith(("--run", "--resume")) for word in session.posargs)
        else ["--run", run]
    )
    session.run(
        python, "-m", "pytest", "suites/test_network.py", "-q", *named, *session.posargs,
        external=True, success_codes=[0, 1], env=_environment(),
    )  # fmt: skip
    session.run(python, str(ROOT / "report.py"), run, external=True, env=_environment())


@nox.session(venv_backend="none")
def which(session: nox.Session) -> None:
    """Which spelling your model's pooling should have: `nox -s which -- model.keras [--input 224x224x3]`."""
    session.run(
        _cpu(session),
        "-m",
        "poolbench",
        "which",
        *session.posargs,
        external=True,
        env=_environment(),
    )


@nox.session(venv_backend="none")
def reference(session: nox.Session) -> None:
    """Everything into one run, results/reference, the one that is committed: about 25 minutes."""
    python = _cpu(session, "profile", "export")
    shutil.rmtree(ROOT / "results" / "reference", ignore_errors=True)
    suite = [python, "-m", "pytest", "-q", "--benchmark-quiet"]
    again = ["--resume", "reference", "--allow-different", "commit", "--allow-different", "dirty"]
    steps: list[list[str]] = [
        [
            *suite,
            "suites/test_depth_max_pool.py",
            "suites/test_global_avg_pool.py",
            "--run",
            "reference",
        ],
        [python, "-m", "poolbench", "selftest", "--run", "reference"],
        [*suite, "suites/test_network.py", *again],
        [*suite, "suites/test_capabilities.py", "--exports", *again],
        [python, "-m", "poolbench", "trace", "--run", "reference"],
        [python, str(ROOT / "report.py"), "reference"],
        [python, str(ROOT / "docs" / "_generate.py")],
    ]
    for step in steps:
        session.run(*step, external=True, success_codes=[0, 1], env=_environment())


@nox.session(venv_backend="none")
def pictures(session: nox.Session) -> None:
    """Take the pictures of README and docs of the reference run, in Chromium."""
    python = _cpu(session, "test", "profile", "browser")
    session.run(python, "tests/browser/pictures.py", external=True, env=_environment())


@nox.session(venv_backend="none")
def report(session: nox.Session) -> None:
    """Render a run: `nox -s report -- [RUN]`, or any other words of report.py."""
    python = _cpu(session)
    session.run(python, str(ROOT / "report.py"), *session.posargs, external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The tests that need no browser, no root and few minutes."""
    python = _cpu(session, "test", "profile")
    words = session.posargs or ["tests", "-m", "not slow"]
    session.run(python, "-m", "pytest", "-q", *words, external=True, env=_environment())


@nox.session(venv_backend="none")
def backends(session: nox.Session) -> None:
    """The layer to take away on Keras's JAX and PyTorch backends."""
    python = _cpu(session, "test", "backends")
    files = [f"tests/test_{name}.py" for name in ("layers", "masked_pooling", "adaptive_pooling")]
    words = [*files, "-k", "another_backend or on_jax", *session.posargs]
    session.run(python, "-m", "pytest", "-q", *words, external=True, env=_environment())


@nox.session(name="tests-full", venv_backend="none")
def tests_full(session: nox.Session) -> None:
    """Real faults, the browser, the cluster, fuzzing."""
    python = _cpu(session, "test", "profile", "browser", "cluster", "export")
    words = session.posargs or ["tests", "-m", "slow"]
    session.run(python, "-m", "pytest", "-q", *words, external=True, env=_environment())


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    python = _python(session, ENV_DIR / "lint", "lint")
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict, over bench/."""
    python = _python(session, ENV_DIR / "lint", "lint")
    session.run(python, "-m", "mypy", external=True)
