"""The sessions of poolbench, each one command. `nox -l` lists them; words after `--` reach the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
ENVIRONMENTS = Path(os.environ.get("NOXENVDIR", ROOT / ".nox"))
# The oldest and the newest Python that TensorFlow has packages for.
OLDEST, NEWEST = (3, 10), (3, 13)
FURTHER_OPS = (
    "masked_global_pool",
    "adaptive_pool",
    "spatial_max_pool",
    "gem_pool",
    "global_max_pool",
)
NO_GPU = (
    "bench-gpu needs a GPU that TensorFlow can use: {seen}; on a machine with an NVIDIA GPU install its "
    "driver (nvidia-smi must work) and run this again, on any other run bench-cpu"
)


def _find_python(session: nox.Session) -> str:
    """Return a Python that TensorFlow has packages for: this one, else one on the PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return sys.executable
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        if found := shutil.which(f"python3.{minor}"):
            return found
    here, oldest, newest = (".".join(map(str, v)) for v in (sys.version_info[:2], OLDEST, NEWEST))
    return session.error(f"this is Python {here}; poolbench needs Python {oldest} to {newest}")


def _bin(name: str) -> Path:
    return ENVIRONMENTS / name / ("Scripts" if os.name == "nt" else "bin")


def _install(session: nox.Session, name: str, *extras: str) -> Path:
    """Install poolbench with extras into an environment that sessions share; return its commands."""
    python = _bin(name) / "python"
    if not python.with_suffix(".exe" if os.name == "nt" else "").exists():
        home = str(ENVIRONMENTS / name)
        session.run(
            _find_python(session), "-m", "venv", "--clear", home, external=True, silent=True
        )
    stamp = ENVIRONMENTS / name / f"installed-{'-'.join(sorted(extras))}"
    sources = (ROOT / "pyproject.toml", ROOT / "setup.py", CONSTRAINTS)
    if not stamp.exists() or any(stamp.stat().st_mtime < path.stat().st_mtime for path in sources):
        session.run(
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[{','.join(extras)}]", external=True,
        )  # fmt: skip
        stamp.touch()
    return _bin(name)


def _run(session: nox.Session, folder: Path, *words: str, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of an environment."""
    session.run(
        str(folder / words[0]), *words[1:], external=True, success_codes=list(codes),
        env={"TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2")},
    )  # fmt: skip


def _poolbench(
    session: nox.Session, *words: str, extras: tuple[str, ...] = (), env: str = "cpu"
) -> None:
    """Run a command of poolbench in the environment with TensorFlow for the CPU, or in another."""
    base = (env,) if env in ("cpu", "gpu") else ()
    folder = _install(session, env, *base, *extras)
    # 1: a candidate failed its test; the report shows which.
    _run(session, folder, "poolbench", *words, *session.posargs, codes=(0, 1))


@nox.session(name="bench-cpu", venv_backend="none")
def bench_cpu(session: nox.Session) -> None:
    """Benchmark both ops on the CPU with the default sweep: about 10 minutes on two cores."""
    _poolbench(session, "run", "--sweep", "default")


@nox.session(name="bench-quick", venv_backend="none")
def bench_quick(session: nox.Session) -> None:
    """Benchmark both ops on the CPU in about a minute."""
    _poolbench(session, "run", "--sweep", "quick")


@nox.session(name="bench-full", venv_backend="none")
def bench_full(session: nox.Session) -> None:
    """Benchmark all ops over the whole product of their axes, a night and more; go on with: -- --resume NAME."""
    _poolbench(session, "run", "--sweep", "full")


@nox.session(name="bench-backends", venv_backend="none")
def bench_backends(session: nox.Session) -> None:
    """Compare Keras with TensorFlow's, JAX's and PyTorch's own functions on the CPU: about 5 minutes."""
    ops = ("depth_max_pool", "global_avg_pool", "masked_global_pool", "adaptive_pool")
    words = [word for op in ops for word in ("--op", op)]
    words += ["--axis", "backend=tensorflow,jax,torch"]
    _poolbench(
        session, "run", "--sweep", "backends", *words, extras=("cpu", "backends"), env="backends"
    )


@nox.session(name="bench-gpu", venv_backend="none")
def bench_gpu(session: nox.Session) -> None:
    """Benchmark on every GPU that TensorFlow sees, with the CPU beside it."""
    if not _has_nvidia_driver():
        # Said before the CUDA wheels are fetched: they are gigabytes, and useless without a driver.
        seen = ", ".join(_devices(_bin("cpu"))) or "the CPU alone"
        session.error(NO_GPU.format(seen=f"no NVIDIA driver answers, TensorFlow sees {seen}"))
    devices = _devices(_install(session, "gpu", "gpu"))
    gpus = [name for name in devices if name.startswith("gpu")]
    if not gpus:
        session.error(NO_GPU.format(seen=f"TensorFlow sees {', '.join(devices) or 'no device'}"))
    axis = f"device={','.join([*gpus, 'cpu:0'])}"
    _poolbench(session, "run", "--sweep", "gpu", "--axis", axis, env="gpu")


def _devices(folder: Path) -> list[str]:
    """Return the devices that TensorFlow sees in an environment; [] where there is none yet."""
    if not (folder / "poolbench").exists():
        return []
    words = [str(folder / "poolbench"), "devices"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


def _has_nvidia_driver() -> bool:
    if (command := shutil.which("nvidia-smi")) is None:
        return False
    answer = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


@nox.session(venv_backend="none")
def networks(session: nox.Session) -> None:
    """Measure whole models: pooling's share of a step, and each implementation in place."""
    _poolbench(session, "run", "network")


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """Check what each candidate supports, and render the report; -- --with-exports for all."""
    _poolbench(session, "matrix", extras=("export",) if "--with-exports" in session.posargs else ())


@nox.session(venv_backend="none")
def report(session: nox.Session) -> None:
    """Render a run: `nox -s report -- [RUN]`."""
    _poolbench(session, "report")


@nox.session(venv_backend="none")
def trace(session: nox.Session) -> None:
    """Record traces of the candidates: `nox -s trace -- [OP] [MODE] [CANDIDATE] [--run NAME]`."""
    gpu = bool(_devices(_bin("gpu"))) and _has_nvidia_driver()
    _poolbench(session, "trace", env="gpu" if gpu else "cpu")


@nox.session(venv_backend="none")
def tensorboard(session: nox.Session) -> None:
    """Open a run's traces, `nox -s tensorboard -- [RUN]`, in an environment without TensorFlow."""
    _poolbench(session, "tensorboard", extras=("profile",), env="viewer")


@nox.session(venv_backend="none")
def which(session: nox.Session) -> None:
    """Say which implementation your model should use: `nox -s which -- model.keras`."""
    _poolbench(session, "which")


@nox.session(venv_backend="none")
def selftest(session: nox.Session) -> None:
    """Measure false alarms, power and noise floor here; into the newest run, or -- --run NAME."""
    _poolbench(session, "selftest")


@nox.session(venv_backend="none")
def reference(session: nox.Session) -> None:
    """Measure everything into results/reference and reference-OP, which are committed: about an hour."""
    folder = _install(session, "cpu", "cpu", "profile", "export")
    for op in FURTHER_OPS:
        run = f"reference-{op}"
        shutil.rmtree(ROOT / "results" / run, ignore_errors=True)
        _run(session, folder, "poolbench", "run", "--op", op, "--run", run, codes=(0, 1))
    shutil.rmtree(ROOT / "results" / "reference", ignore_errors=True)
    again = ["--resume", "reference", "--allow-different", "commit", "--allow-different", "dirty"]
    for words in (
        ["poolbench", "run", "--run", "reference"],
        ["poolbench", "selftest", "--run", "reference"],
        ["poolbench", "run", "network", *again],
        ["poolbench", "matrix", "--with-exports", *again],
        ["poolbench", "trace", "--run", "reference"],
        ["poolbench", "report", "reference"],
        ["python", "docs/_generate.py"],
    ):
        _run(session, folder, *words, codes=(0, 1))


@nox.session(venv_backend="none")
def acceptance(session: nox.Session) -> None:
    """Check the promises of real timings on this machine: about an hour; one by -- --only NAME."""
    folder = _install(session, "cpu", "cpu")
    _run(session, folder, "python", "tests/acceptance", "checks", *session.posargs)


@nox.session(venv_backend="none")
def versus(session: nox.Session) -> None:
    """Time the same callables with pytest-benchmark, pyperf, timeit, torch's Timer and poolbench."""
    folder = _install(session, "cpu", "cpu", "versus")
    _run(session, folder, "python", "tests/acceptance", "tools", *session.posargs)


@nox.session(venv_backend="none")
def screenshots(session: nox.Session) -> None:
    """Take the screenshots of README and docs from the reference run, in Chromium."""
    folder = _install(session, "cpu", "cpu", "test", "profile", "browser")
    _run(session, folder, "python", "tests/browser/pictures.py")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests that need no browser, no root and few minutes."""
    folder = _install(session, "cpu", "cpu", "test", "profile")
    _pytest(session, folder, "not slow")


@nox.session(name="tests-full", venv_backend="none")
def tests_full(session: nox.Session) -> None:
    """Run the slow tests: real faults, the browser, the cluster, fuzzing."""
    folder = _install(session, "cpu", "cpu", "test", "profile", "browser", "cluster", "export")
    _pytest(session, folder, "slow and not long")


def _pytest(session: nox.Session, folder: Path, marked: str) -> None:
    """Run the marked tests two at a time, a file's in one process, or what the command line asks."""
    # In the order of tests/conftest.py, not by a file's number of tests.
    words = ["tests", "-m", marked, "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    _run(session, folder, "pytest", "-q", *(session.posargs or words))


@nox.session(venv_backend="none")
def backends(session: nox.Session) -> None:
    """Test the reusable layer on Keras's JAX and PyTorch backends."""
    folder = _install(session, "cpu", "cpu", "test", "backends")
    files = [
        f"tests/test_{name}.py"
        for name in ("layers", "masked_pooling", "adaptive_pooling", "gem_pooling")
    ]
    words = [*files, "-k", "another_backend or on_jax", *session.posargs]
    _run(session, folder, "pytest", "-q", *words)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check the code's rules, its format and the layers of its imports."""
    folder = _install(session, "lint", "lint")
    _run(session, folder, "ruff", "check", ".")
    _run(session, folder, "ruff", "format", "--check", ".")
    # Not the script lint-imports: it does not find a package below bench/.
    checks = "import sys; sys.path.insert(0, 'bench'); import importlinter.cli as c; sys.exit(c.lint_imports())"
    _run(session, folder, "python", "-c", checks)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the package's types with mypy, strict."""
    _run(session, _install(session, "lint", "lint"), "mypy")
