"""Who races: ops, candidates, and the registry that both are entered in.

Pure: a candidate registers a builder; TensorFlow and Keras are imported inside it, in the worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from poolbench.core.case import COMMON_AXES, OPTIONAL_AXES, Case, Sweep
from poolbench.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FRAMEWORKS = ("tensorflow", "keras", "numpy")
FORMS = ("function", "layer")
Builder = Callable[[Case], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class KnownFailure:
    """A documented failure: where it is expected, how its error reads, and why it is so.

    Attributes:
        when: the cases in which it is expected.
        matches: regular expression that the error's text must match.
        reason: one sentence for the reader.
        issue: the upstream issue, 'tensorflow#636', where there is one.
    """

    when: Callable[[Case], bool]
    matches: str
    reason: str
    issue: str = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A named implementation of an op.

    Attributes:
        op: the op that it spells.
        name: 'lambda-max_pool'; unique within the op.
        form: 'function' or 'layer' (the cost of a Keras layer's call is then part of it).
        framework: 'tensorflow', 'keras' or 'numpy'.
        about: one line on what it is.
        build: called in the worker with the case; returns x -> y.
        failures: its documented failures.
        file: the file that registers it; workers import it by this path.
        builtin: whether it ships with the package; a user's own joins every case of its op.
    """

    op: str
    name: str
    form: str
    framework: str
    about: str
    build: Builder
    failures: tuple[KnownFailure, ...] = ()
    file: str
    builtin: bool = False

    @property
    def code(self) -> str:
        """The source text of the builder."""
        return inspect.getsource(self.build)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a right answer may be from the reference: |y - reference| <= absolute + relative |reference|."""

    relative: float
    absolute: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation: what is right, who it is compared with, and where it is swept.

    Attributes:
        name: 'depth_max_pool'.
        title: for headings: 'Depthwise max pooling'.
        reference: (x as float64, case) -> y as float64, in the case's data format.
        gradient: (x, dy as float64, case) -> dx as float64, each tie's gradient split equally among
            the tied elements; None: the op is raced forward only.
        window_sum: (array shaped as x, case) -> array shaped as y, the sum over each window, by which
            the gradient at a tie is judged; None: the op's gradient is unique.
        bounds: case -> Tolerance; None takes the default table of `poolbench.worker.check`.
        baseline: the candidate that ratios are taken to.
        recipe: the book's candidate, for the column of its own; '' if there is none.
        sweeps: 'default', 'quick', 'full'; 'default' is required.
        axes: the optional axes that the op has ('pool_size', 'padding').
        file: the file that registers it.
    """

    name: str
    title: str = ""
    reference: Callable[[Array, Case], Array]
    gradient: Callable[[Array, Array, Case], Array] | None = None
    window_sum: Callable[[Array, Case], Array] | None = None
    bounds: Callable[[Case], Tolerance] | None = None
    baseline: str
    recipe: str = ""
    sweeps: Mapping[str, Sweep]
    file: str = ""
    builtin: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the op has: the common ones, and the optional ones that its base case sets."""
        base = self.sweeps["default"].base
        return COMMON_AXES + tuple(n for n in OPTIONAL_AXES if getattr(base, n) is not None)

    def sweep(self, name: str) -> Sweep:
        """The sweep of this name, or the default one where the op has none of that name."""
        return self.sweeps.get(name) or self.sweeps["default"]


@dataclass
class Registry:
    """Ops and candidates by name; one a process, and a fresh one a unit test."""

    ops: dict[str, Op] = field(default_factory=dict)
    candidates: dict[tuple[str, str], Candidate] = field(default_factory=dict)

    def add_op(self, op: Op) -> Op:
        """Enter an op; entering it again from the same file replaces it (a file imported twice)."""
        known = self.ops.get(op.name)
        if known is not None and known.file != op.file:
            raise UsageError(
                f"op {op.name!r} is registered by {known.file} already; {op.file} must pick another name"
            )
        if "default" not in op.sweeps:
            raise UsageError(
                f"op {op.name!r} needs a sweep named 'default'; got {sorted(op.sweeps)}"
            )
        self.ops[op.name] = op
        return op

    def add_candidate(self, entry: Candidate) -> Candidate:
        """Enter a candidate; the same rule for a second time."""
        key = (entry.op, entry.name)
        known = self.candidates.get(key)
        if known is not None and known.file != entry.file:
            raise UsageError(
                f"candidate {entry.name!r} of {entry.op} is registered by {known.file} already; "
                f"{entry.file} must pick another name"
            )
        self.candidates[key] = entry
        return entry

    def of(self, op: str) -> dict[str, Candidate]:
        """The candidates of an op by name, in the order of registration."""
        return {name: entry for (o, name), entry in self.candidates.items() if o == op}


REGISTRY = Registry()


def register(op: Op) -> Op:
    """Enter an op in the registry, from the file that calls this."""
    from dataclasses import replace

    return REGISTRY.add_op(replace(op, file=op.file or _caller_file()))


def candidate(
    *,
    op: str,
    name: str,
    about: str = "",
    form: str = "function",
    framework: str = "tensorflow",
    failures: tuple[KnownFailure, ...] = (),
) -> Callable[[Builder], Builder]:
    """Register the decorated builder, `build(case) -> callable(x) -> y`, as a candidate.

    Raises:
        UsageError: a form or framework that does not exist, or a name that is taken.
    """
    if form not in FORMS:
        raise UsageError(
            f"form must be one of {', '.join(FORMS)}; got {form!r} (candidate {name!r})"
        )
    if framework not in FRAMEWORKS:
        raise UsageError(
            f"framework must be one of {', '.join(FRAMEWORKS)}; got {framework!r} (candidate {name!r})"
        )

    def enter(build: Builder) -> Builder:
        doc = (inspect.getdoc(build) or "").strip().split("\n")[0]
        REGISTRY.add_candidate(
            Candidate(
                op=op, name=name, form=form, framework=framework, about=about or doc, build=build,
                failures=failures, file=build.__code__.co_filename,
                builtin=(build.__module__ or "").startswith("poolbench."),
            )
        )  # fmt: skip
        return build

    return enter


def _caller_file() -> str:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    assert frame.f_back.f_back is not None
    return frame.f_back.f_back.f_code.co_filename
