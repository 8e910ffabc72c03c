"""Registry: ops and candidates by name; the only importer of built-in ops, suites and user files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from poolbench.core.axes import BACKEND, STANDARD, Axis, AxisInfo, Value, declare
from poolbench.core.candidate import (
    BACKENDS,
    FORMS,
    Builder,
    Candidate,
    KnownFailure,
    Snippet,
    Variant,
    contender_name,
    split_contender,
)
from poolbench.core.case import Case
from poolbench.core.errors import UsageError
from poolbench.core.op import Op
from poolbench.core.plan import PROBE_NAMES
from poolbench.core.text import one_line

MOST_SOURCE = 10_000  # characters of a user's candidate that a journal keeps


@dataclass
class Registry:
    """Ops and candidates by name; one per process, and a fresh one per unit test."""

    ops: dict[str, Op] = field(default_factory=dict)
    candidates: dict[tuple[str, str], Candidate] = field(default_factory=dict)

    def add_op(self, op: Op) -> Op:
        """Add an op; adding it again from the same file replaces it (a file imported twice).

        Raises:
            UsageError: its name is taken, it lacks a default sweep, or it declares an axis twice.
        """
        known = self.ops.get(op.name)
        if known is not None and known.file != op.file:
            raise UsageError(
                f"op {op.name!r} is registered by {known.file} already; {op.file} must pick another name"
            )
        if "default" not in op.sweeps:
            raise UsageError(
                f"op {op.name!r} needs a sweep named 'default'; got {sorted(op.sweeps)}"
            )
        declare(op.name, op.axes)
        self.ops[op.name] = op
        return op

    def add_candidate(self, entry: Candidate) -> Candidate:
        """Add a candidate; adding it again from the same file replaces it.

        Raises:
            UsageError: its name is taken, or that of a probe.
        """
        if entry.name in PROBE_NAMES:
            raise UsageError(f"{entry.name!r} is the name of a probe; pick another (candidate)")
        if "@" in entry.name:
            raise UsageError(
                f"{entry.name!r} has an @, behind which a backend is named; pick another (candidate)"
            )
        key = (entry.op, entry.name)
        known = self.candidates.get(key)
        if known is not None and known.file != entry.file:
            raise UsageError(
                f"candidate {entry.name!r} of {entry.op} is registered by {known.file} already; "
                f"{entry.file} must pick another name"
            )
        if known is not None and _of_one_import(known.build, entry.build):
            raise UsageError(
                f"candidate {entry.name!r} of {entry.op} is registered twice in {entry.file}; pick another name"
            )
        self.candidates[key] = entry
        return entry

    def of(self, op: str) -> dict[str, Candidate]:
        """Return the candidates of an op by name, in the order of registration."""
        return {name: entry for (o, name), entry in self.candidates.items() if o == op}

    def check_ops(self) -> None:
        """Raise UsageError for a candidate of an op that no file has registered, once all files are loaded."""
        for (op, name), entry in self.candidates.items():
            if op not in self.ops:
                raise UsageError(
                    f"candidate {name!r} in {entry.file} is of the op {op!r}, which is not registered; there are "
                    f"{', '.join(self.ops)}"
                )

    def axis_infos(self, ops: Iterable[str]) -> dict[str, tuple[AxisInfo, ...]]:
        """Return the axes of these ops as a journal's header carries them."""
        return {
            name: tuple(axis.info for axis in (*self.ops[name].axes, *STANDARD.values()))
            for name in ops
            if name in self.ops
        }

    def user_sources(self) -> dict[str, dict[str, str]]:
        """Return by op and name the source text of the candidates that do not ship with the package."""
        found: dict[str, dict[str, str]] = {}
        for (op, name), entry in self.candidates.items():
            if not entry.builtin and (code := entry.code):
                found.setdefault(op, {})[name] = code[:MOST_SOURCE]
        return found


REGISTRY = Registry()


def _of_one_import(one: Builder, other: Builder) -> bool:
    """Tell whether one execution of a file made both builders."""
    spaces = [getattr(builder, "__globals__", builder) for builder in (one, other)]
    return one is not other and spaces[0] is spaces[1]


def register(op: Op) -> Op:
    """Register an op from the calling file."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return REGISTRY.add_op(replace(op, file=op.file or frame.f_back.f_code.co_filename))


def candidate(
    *,
    op: str,
    name: str,
    about: str = "",
    form: str = "function",
    backends: tuple[str, ...] = ("tensorflow",),
    failures: tuple[KnownFailure, ...] = (),
    variants: tuple[Variant, ...] = (),
    snippet: Snippet | None = None,
) -> Callable[[Builder], Builder]:
    """Register the decorated builder, `build(case) -> callable(*inputs)`, as a candidate.

    Raises:
        UsageError: a form or backend that does not exist, or a name that is taken.
    """
    if form not in FORMS:
        raise UsageError(
            f"form must be one of {', '.join(FORMS)}; got {form!r} (candidate {name!r})"
        )
    if (unknown := [one for one in backends if one not in BACKENDS]) or not backends:
        raise UsageError(
            f"backends must be of {', '.join(BACKENDS)}; got {unknown or backends} (candidate {name!r})"
        )

    def enter(build: Builder) -> Builder:
        doc = (inspect.getdoc(build) or "").strip().split("\n")[0]
        REGISTRY.add_candidate(
            Candidate(
                op=op, name=name, form=form, backends=backends, about=about or doc, build=build,
                failures=failures, variants=variants, file=build.__code__.co_filename, snippet=snippet,
                builtin=(build.__module__ or "").startswith("poolbench."),
            )
        )  # fmt: skip
        return build

    return enter


def baseline_of(case: Case, names: Iterable[str]) -> str:
    """Return the contender that ratios are taken to: the op's baseline, or the first of a backend's own functions."""
    parts = {name: split_contender(name) for name in names}
    if not all(backend for _, backend in parts.values()):
        return REGISTRY.ops[case.op].baseline
    own = (n for n, (one, _) in parts.items() if len(REGISTRY.of(case.op)[one].backends) == 1)
    return next(own, next(iter(parts)))


def contender_names(case: Case, candidate: str, backends: Iterable[str]) -> list[str]:
    """Return a candidate's names in a race on these backends: where they run it, and have the case's mode."""
    entry = REGISTRY.candidates[case.op, candidate]
    return [
        contender_name(candidate, backend)
        for backend in ("numpy", *backends)
        if entry.runs(backend, case.mode)
    ]


def input_nbytes(case: Case) -> int:
    """Return the bytes of the case's inputs; 0 where its op is not registered."""
    op = REGISTRY.ops.get(case.op)
    return sum(spec.nbytes for spec in op.inputs(case).values()) if op else 0


def parse_axis(text: str) -> tuple[str, tuple[Value, ...]]:
    """Return ('pool_size', (2, 3)) from 'pool_size=2,3'; built-in ops are loaded first.

    Raises:
        UsageError: no op has the axis, none takes the values, or there is no value.
    """
    name, _, values = text.partition("=")
    name = name.strip()
    texts = [value.strip() for value in values.split(",") if value.strip()]
    if not texts:
        raise UsageError(f"--axis takes NAME=VALUE[,VALUE...]; got {text!r} (--axis pool_size=2,3)")
    own = [axis for op in load_builtin().ops.values() for axis in op.axes]
    shared: dict[str, Axis[Any]] = {**STANDARD, BACKEND.name: BACKEND}
    axes = [shared[name]] if name in shared else [axis for axis in own if axis.name == name]
    if not axes:
        known = ", ".join(dict.fromkeys([*(axis.name for axis in own), *shared]))
        raise UsageError(f"no op has an axis {name!r}; there are {known} (--axis NAME=...)")
    # Ops may share an axis name and take different values: the last one raises the error.
    for axis in axes[:-1]:
        with contextlib.suppress(UsageError):
            return name, tuple(dict.fromkeys(axis.read(value) for value in texts))
    return name, tuple(dict.fromkeys(axes[-1].read(value) for value in texts))


def load_builtin() -> Registry:
    """Import the ops that ship, which registers them; no framework is loaded."""
    importlib.import_module("poolbench.ops")
    return REGISTRY


def load_suites(files: Iterable[str | Path]) -> Registry:
    """Import the ops that ship, then suites and user files by path."""
    load_builtin()
    for file in files:
        import_file(Path(file))
    return REGISTRY


def load_candidates(name: str) -> Path:
    """Import the ops that ship and a user's file that the command line names; return its path.

    Raises:
        UsageError: there is no such file, or it cannot be imported.
    """
    path = Path(name).resolve()
    if not path.is_file():
        raise UsageError(f"--candidates takes a Python file; there is no {name}")
    load_builtin()
    try:
        import_file(path)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a file may raise anything)
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(f"--candidates {name} cannot be loaded: {reason}") from None
    return path


def user_files(named: Iterable[Path] = ()) -> tuple[Path, ...]:
    """Return the files beyond the package that registered an op or a candidate, the named ones first."""
    package = Path(__file__).resolve().parent.parent
    registered = [op.file for op in REGISTRY.ops.values()]
    registered += [entry.file for entry in REGISTRY.candidates.values()]
    files = [*named, *(Path(file).resolve() for file in registered)]
    return tuple(dict.fromkeys(file for file in files if package not in file.parents))


def import_file(path: Path) -> None:
    """Import a file by path, once per process, under a name of its own.

    Raises:
        ImportError: there is no such file, or it is no Python.
    """
    path = path.resolve()
    name = f"poolbench_user_{path.stem}_{abs(hash(str(path)))}"
    if name in sys.modules or any(
        getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())
    ):
        return
    load_module(path, name)


def load_module(path: Path, name: str) -> types.ModuleType:
    """Run a file as the module of a name, beside which its own folder can be imported from; return the module.

    Raises:
        ImportError: there is no such file, or it is no Python.
        BaseException: whatever the file raises.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
