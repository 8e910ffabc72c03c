"""The two sides of a comparison: a checkout, an interpreter and an environment each, as a kind of worker.

A side's code comes first on its PYTHONPATH, so one environment serves every commit that has the same dependencies.
Checkouts and environments are kept in a cache folder and used again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from poolbench.core.errors import UsageError
from poolbench.core.plan import WorkerSpec
from poolbench.engine.process import SOURCE

# What a worker imports besides the framework.
WORKER_PACKAGES = ("msgspec", "numpy", "psutil")
# Files that decide what an installer installs.
DEPENDENCY_FILES = (
    "pyproject.toml", "setup.cfg", "setup.py", "requirements.txt", "constraints.txt",
    "uv.lock", "poetry.lock", "pdm.lock", "pylock.toml",
)  # fmt: skip
INSTALL_TIMEOUT_SECONDS = 1800.0
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SideRequest:
    """The request for one side; all defaults together are the working tree in the running environment.

    Attributes:
        ref: a commit, branch or tag of the repository; '' for the working tree.
        python: an interpreter that has the dependencies; '' to choose or make one.
        packages: requirements installed into an environment of its own: 'tensorflow-cpu==2.20.0'.
        environment: variables of its workers.
    """

    ref: str = ""
    python: str = ""
    packages: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side, ready to be started.

    Attributes:
        title: 'main (1a2b3c4)', 'working tree, tensorflow-cpu==2.20.0'.
        worker: the kind of its workers.
    """

    title: str
    worker: WorkerSpec


class Builder:
    """Makes sides of one repository, or of the running code where there is no repository.

    Args:
        folder: inside the repository.
        candidates: the user's files; one inside the repository is read from each side's checkout.
        install: arguments of `pip install` in a new environment, run in the checkout; empty: the project
            itself and its requirements.txt.
        cache: holds checkouts and environments.
        say: prints progress.
    """

    def __init__(
        self,
        folder: Path,
        *,
        candidates: Sequence[Path] = (),
        install: Sequence[str] = (),
        cache: Path | None = None,
        say: Say = print,
    ) -> None:
        self._candidates = [path.resolve() for path in candidates]
        self._install = tuple(install)
        self.cache = cache or default_cache()
        self._say = say
        found = _git(folder, "rev-parse", "--show-toplevel", check=False)
        self.root = Path(found).resolve() if found else None

    def build(self, request: SideRequest) -> Side:
        """Return the side, with its checkout and its environment made where they are not there yet.

        Raises:
            UsageError: there is no such commit, or its environment cannot be installed.
        """
        tree, title = self.root, "working tree" if self.root else "running code"
        if request.ref:
            tree, title = self._checkout(request.ref)
        python = request.python and str(Path(request.python).absolute())
        if python and not os.access(python, os.X_OK):
            raise UsageError(f"{request.python} is no interpreter that can be run")
        if not python and tree and (request.packages or not self._runs_here(tree)):
            python = self._environment(tree, request.packages)
        elif not python and request.packages:
            python = self._environment(self.cache, request.packages)
        titles = [title, request.python, *request.packages, *map("=".join, request.environment)]
        return Side(
            title=", ".join(filter(None, titles)), worker=self._worker(tree, python, request)
        )

    def commit(self, ref: str) -> str:
        """Return the commit that a name stands for.

        Raises:
            UsageError: this is no repository, or it has no such commit.
        """
        if self.root is None:
            raise UsageError(
                "a commit can be compared in a git checkout only; this folder is in none"
            )
        if ref.startswith("-"):
            raise UsageError(f"{ref!r} is no commit of this repository")
        found = _git(
            self.root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", check=False
        )
        if not found:
            raise UsageError(
                f"{ref!r} is no commit of this repository; a shallow clone lacks most (git fetch --unshallow)"
            )
        return found

    def git(self, *words: str) -> str:
        """Return git's output in the repository."""
        assert self.root is not None
        return _git(self.root, *words)

    def _worker(self, tree: Path | None, python: str, request: SideRequest) -> WorkerSpec:
        files = tuple(str(self._in(tree, path)) for path in self._candidates)
        if missing := [file for file in files if not Path(file).is_file()]:
            raise UsageError(f"{request.ref or 'the working tree'} has no {Path(missing[0]).name}")
        path = [str(folder) for folder in self._code(tree)]
        if not any((folder / "poolbench").is_dir() for folder in map(Path, path)):
            path.append(str(self._harness()))
        variables = dict(request.environment) | {"PYTHONPATH": os.pathsep.join(path)}
        return WorkerSpec(interpreter=python, environment=tuple(variables.items()), files=files)

    def _code(self, tree: Path | None) -> list[Path]:
        """Return the folders of a checkout that Python imports from: those of the running process, moved.

        An installed package is imported from elsewhere. This project's own is then read from its checkouts too.
        """
        if self.root is None or tree is None:
            return []
        inside = [Path(entry).resolve() for entry in sys.path if entry]
        inside = [
            path for path in inside
            if path.is_relative_to(self.root) and "site-packages" not in path.parts
        ]  # fmt: skip
        moved = [self._in(tree, path) for path in (*inside, self.root / "src", self.root)]
        if (tree / "bench" / "poolbench").is_dir():
            moved.insert(0, tree / "bench")
        return [path for path in dict.fromkeys(moved) if path.is_dir()]

    def _in(self, tree: Path | None, path: Path) -> Path:
        """Return the path of a file of the repository in a checkout; other paths as they are."""
        if self.root and tree and path.is_relative_to(self.root):
            return tree / path.relative_to(self.root)
        return path

    def _harness(self) -> Path:
        """Return a folder that holds nothing but the running poolbench: its parent may be site-packages."""
        folder = self.cache / "harness" / _digest(SOURCE)
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "poolbench"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path(SOURCE) / "poolbench")
        return folder

    def _checkout(self, ref: str) -> tuple[Path, str]:
        commit = self.commit(ref)
        assert self.root is not None
        tree = self.cache / "checkouts" / f"{_digest(str(self.root))}-{commit[:12]}"
        short = commit[:7]
        title = short if commit.startswith(ref) else f"{ref} ({short})"
        if tree.is_dir():
            head = _git(tree, "rev-parse", "HEAD", check=False)
            if head == commit and not _git(tree, "status", "--porcelain", check=False):
                return tree, title
            shutil.rmtree(tree)  # left half made, or changed since
        tree.parent.mkdir(parents=True, exist_ok=True)
        _git(self.root, "worktree", "prune")
        _git(self.root, "worktree", "add", "--quiet", "--detach", "--force", str(tree), commit)
        return tree, title

    def _runs_here(self, tree: Path) -> bool:
        """Tell whether a checkout has the working tree's dependencies, which the running environment has."""
        assert self.root is not None
        return tree == self.root or dependencies(tree) == dependencies(self.root)

    def _environment(self, tree: Path, packages: Sequence[str]) -> str:
        """Return the interpreter of an environment with a checkout's dependencies and these packages."""
        project = [] if self.root is None else list(self._install or _project(tree))
        key = _digest(sys.version, dependencies(tree) if project else "", *project, "--", *packages)
        folder = self.cache / "environments" / key
        python, ready = folder / "bin" / "python", folder / "ready"
        if ready.exists():
            return str(python)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._say(
            f"installing an environment for {', '.join(packages) or tree.name} (kept for the next time)"
        )
        if uv := shutil.which("uv"):
            make = [uv, "venv", "--quiet", "--python", sys.executable]
            pip = [uv, "pip", "install", "--quiet", "--python", str(python)]
        else:
            make = [sys.executable, "-m", "venv"]
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _install([*make, str(folder)], tree)
        # The packages come last: they may differ from what the project asks for.
        for words in (project, [*WORKER_PACKAGES], list(packages)):
            if words:
                _install([*pip, *words], tree)
        ready.touch()
        return str(python)


def default_cache() -> Path:
    """Return the folder of checkouts and environments: POOLBENCH_CACHE, or the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("POOLBENCH_CACHE") or user / "poolbench").absolute()


def dependencies(tree: Path) -> str:
    """Return a digest of what a checkout asks an installer for."""
    texts = []
    for name in DEPENDENCY_FILES:
        path = tree / name
        if path.is_file():
            texts += [name, _dependencies_of(path)]
    return _digest(*texts)


def _dependencies_of(path: Path) -> str:
    """Return the file's text; of a pyproject.toml only what an installer resolves, where Python can read it."""
    text = path.read_text(errors="replace")
    if path.name != "pyproject.toml" or importlib.util.find_spec("tomllib") is None:
        return text
    import tomllib

    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return text
    project = read.get("project", {})
    names = ("dependencies", "optional-dependencies", "requires-python")
    tool = read.get("tool", {}).get("poetry", {})
    return repr([project.get(name) for name in names] + [read.get("dependency-groups"), tool])


def _project(tree: Path) -> list[str]:
    """Return what pip installs of a checkout: the project, its requirements, within its constraints."""
    words = ["."] if (tree / "pyproject.toml").is_file() or (tree / "setup.py").is_file() else []
    for name, option in (("requirements.txt", "-r"), ("constraints.txt", "-c")):
        if (tree / name).is_file():
            words += [option, name]
    return words if words[:1] != ["-c"] else []


def _install(words: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(  # noqa: S603
            words, cwd=folder, capture_output=True, text=True,
            timeout=INSTALL_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"the environment cannot be installed: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.match(r"\s*(ERROR|error)", line)]
        reason = (said or done.stderr.splitlines() or ["the installer failed"])[-1].strip()
        raise UsageError(
            f"the environment cannot be installed: {reason} (--base-python, --install)"
        )


def _git(folder: Path, *words: str, check: bool = True) -> str:
    """Return git's output; '' where it fails and `check` is False."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *words],  # noqa: S607
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"git cannot be run: {error}") from None
    if done.returncode and check:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise UsageError(f"git {words[0]}: {said.splitlines()[-1]}")
    return "" if done.returncode else done.stdout.strip()


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
