"""What a probe is, what it finds, and how what several findings say becomes one cell.

Pure: the report imports this for titles and questions; TensorFlow is imported inside the probes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from poolbench.core.candidate import Candidate
from poolbench.core.case import Case, make_case
from poolbench.core.errors import printable
from poolbench.core.op import Op
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import CellState

MODES = ("eager", "graph", "xla")
Figures = dict[str, float | int | str | None]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of a probe saw; plain data, so that it can leave the worker."""

    state: CellState
    evidence: str = ""
    figures: Figures = {}
    issue: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate on a device, as a probe meets it in a worker.

    Attributes:
        op, candidate: who is tried.
        device: 'cpu:0', ...
        folder: scratch for what is saved and loaded; the same for all steps of a probe.
    """

    op: Op
    candidate: Candidate
    device: str = "cpu:0"
    folder: Path = Path()

    @property
    def has_window(self) -> bool:
        """Whether the op pools over windows along the depth, so that the depth may not divide."""
        return "pool_size" in self.op.axis_names

    def case(self, **fields: Any) -> Case:
        """A small case: N, H, W and C all differ; the window, where there is one, is 3."""
        usual: dict[str, Any] = {"op": self.op.name, "shape": SHAPE, "mode": "eager"}
        usual["device"] = self.device
        if self.has_window:
            usual |= {"pool_size": 3, "padding": "valid"}
        # Replaced unchecked: probes ask for integer dtypes and an empty batch too, which no sweep has.
        return make_case(**usual).replace(**fields)


# Every mode compiles for these: small, and no two axes of one length.
SHAPE = (2, 4, 5, 6)

StoredRun = Callable[[Trial], Finding]
Judge = Callable[[Sequence[Finding]], Finding]

# The processes that steps run in. 'shared' serves everything that needs no process of its own; the
# others exist because TensorFlow cannot change these things once it has started, or because the
# claim is about another process.
PROCESSES: Mapping[str, WorkerSpec] = {
    "shared": WorkerSpec(),
    "deterministic": WorkerSpec(deterministic=True),
    "fresh": WorkerSpec(tensorflow=False),
    "other": WorkerSpec(),
    "one-thread": WorkerSpec(threads=1),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of a probe that runs in one process (a key of PROCESSES)."""

    run: StoredRun
    process: str = "shared"


def last(findings: Sequence[Finding]) -> Finding:
    """What the last step found."""
    return findings[-1]


@dataclass(frozen=True, kw_only=True)
class SupportProbe:
    """A row of the matrix.

    Attributes:
        key: 'gradient-xla'; what a support-matrix cell record refers to.
        title: for the table's head: 'gradient, XLA'.
        group: probes of a group stand together.
        question: what a pass says yes to.
        steps: run one after the other; the first that does not pass is the cell.
        judge: makes the cell of what the steps found when all passed.
        window: asked only of ops with a window along the depth.
        accelerators: asked on GPUs too, not only on the CPU.
        exports: asked only with --with-exports.
    """

    key: str
    title: str
    group: str
    question: str
    steps: tuple[Step, ...]
    judge: Judge = last
    window: bool = False
    accelerators: bool = True
    exports: bool = False

    def applies(self, op: Op) -> bool:
        """Whether the question makes sense for the op."""
        return not self.window or "pool_size" in op.axis_names


def attempt(trial: Trial, case: Case, ask: Callable[[], Finding]) -> Finding:
    """What `ask` finds; an error that it raises becomes a finding of its own."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 (what a candidate raises is a result)
        return explain_error(trial.candidate, case, error)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An error by which TensorFlow or Keras says itself that it does not do this."""

    matches: str
    reason: str
    issue: str = ""


# Texts of documented refusals, of whichever candidate: an error that matches none is an `error`.
REFUSALS = (
    Refusal(
        matches="MaxPoolingGrad is not yet supported on the depth dimension",
        reason="TensorFlow has no gradient of depthwise max pooling outside XLA",
    ),
    Refusal(
        matches="Depthwise max pooling is currently only implemented for CPU",
        reason="TensorFlow has no depthwise max pooling on a GPU outside XLA",
        issue="tensorflow#636",
    ),
    Refusal(
        matches="Depthwise max pooling requires the depth window",
        reason="outside XLA the window must divide the depth and equal the stride",
    ),
    Refusal(
        matches="supports exactly one of pooling across depth",
        reason="outside XLA one call pools along the depth or over height and width, not both",
    ),
    Refusal(
        matches="only supports (NHWC|channels_last)|must be NHWC|only supported on GPU|NCHW",
        reason="this layout has no kernel on the CPU outside XLA",
    ),
    Refusal(
        matches="(?i)lambda.*(unsafe|safe_mode|safe mode|arbitrary)|safe_mode",
        reason="Keras does not load a Lambda in safe mode: its code would run",
        issue="keras#20167",
    ),
    Refusal(
        matches="not in (the )?list of allowed values",
        reason="TensorFlow's op does not take this",
    ),
    Refusal(
        matches="Could not locate (class|function)",
        reason="its class is not registered: Keras cannot find it by its name",
    ),
    Refusal(
        matches="(?i)determinis",
        reason="TensorFlow has no deterministic implementation of this",
    ),
    Refusal(
        matches="UnimplementedError|NotImplementedError|not yet supported|is not supported",
        reason="not implemented",
    ),
    Refusal(
        matches="(?i)could not find device|no registered|No OpKernel was registered|"
        "Could not find compiler|not compilable|unsupported operations|uncompilable",
        reason="there is no kernel for this",
    ),
)


def explain_error(candidate: Candidate, case: Case, error: BaseException) -> Finding:
    """`unsupported` where the error is documented, by its candidate or upstream; else `error`."""
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    text = error_words(error)
    for failure in candidate.failures:
        if failure.when(case) and re.search(failure.matches, whole):
            return Finding(
                state="unsupported", evidence=f"{failure.reason} [{text}]", issue=failure.issue
            )
    for refusal in REFUSALS:
        if re.search(refusal.matches, whole):
            return Finding(
                state="unsupported", evidence=f"{refusal.reason} [{text}]", issue=refusal.issue
            )
    return Finding(state="error", evidence=text)


# Where an error came from, in TensorFlow's and Keras' words: paths of this machine, no evidence.
_ORIGIN = re.compile(
    r"""\s*(File\ "|Detected\ at\ node|in\ user\ code:|Graph\ execution\ error:|Traceback\ |
    Exception\ encountered\ when\ calling|Arguments\ received\ by|Stack\ trace\ for)""",
    re.VERBOSE,
)
_NOISE = re.compile(
    r"\{\{(function_node|node) [^}]*\}\}|\[\[.*?\]\]|\[Op:[^\]]*\](\s*name:\s?)?|\x1b\[[0-9;]*m"
    r"|\s;? ?NodeDef: .*|tf2xla conversion failed.*",
    re.DOTALL,
)


def error_words(error: BaseException, limit: int = 300) -> str:
    """An error's type and what it says, in one line, without stack traces and names of nodes."""
    # Keras says first what it was doing, with all its configuration, and then why it failed.
    inner = str(error).rpartition("Exception encountered: ")[2]
    blocks = re.split(r"\n\s*\n", inner.strip())
    said = [block for block in blocks if not _ORIGIN.match(block)] or blocks[-1:]
    text = printable(" ".join(_NOISE.sub(" ", " ".join(said)).split()))
    name = type(error).__name__
    text = text if text.startswith(name) else f"{name}: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


# From best to worst: a silent wrong answer is worse than any error.
SEVERITY: tuple[CellState, ...] = (
    "pass", "not_run", "unsupported", "error", "timeout", "crashed", "wrong",
)  # fmt: skip


def combine(findings: Mapping[str, Finding]) -> Finding:
    """One cell of several findings, by name: the worst state, every finding's words.

    Equal words are said once: 'eager, graph: ...; xla: ...'.
    """
    said: dict[str, list[str]] = {}
    for name, finding in findings.items():
        said.setdefault(finding.evidence or finding.state, []).append(name)
    worst = max(findings.values(), key=lambda finding: SEVERITY.index(finding.state))
    figures = {
        key if len(findings) == 1 else f"{key} ({name})": value
        for name, finding in findings.items()
        for key, value in finding.figures.items()
    }
    return Finding(
        state=worst.state,
        evidence="; ".join(f"{', '.join(names)}: {words}" for words, names in said.items()),
        figures=figures,
        issue=worst.issue,
    )


def in_modes(trial: Trial, ask: Callable[[str], Finding], modes: Sequence[str] = MODES) -> Finding:
    """One finding over the modes, each tried whatever the others came to."""
    return combine(
        {mode: attempt(trial, trial.case(mode=mode), lambda mode=mode: ask(mode)) for mode in modes}  # type: ignore[misc]
    )
