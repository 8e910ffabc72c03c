"""Checks of the support matrix: their declaration, their findings, and one cell from several findings.

Importing this loads no framework: TensorFlow is imported inside the checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from poolbench.core.candidate import Candidate, KnownFailure
from poolbench.core.case import Case
from poolbench.core.errors import printable
from poolbench.core.op import Op
from poolbench.core.plan import WorkerSpec
from poolbench.core.records import CellState
from poolbench.matrix.finding import Finding, features
from poolbench.matrix.trial import Trial

MODES = ("eager", "graph", "xla")
RunStep = Callable[[Trial], Finding]
Judge = Callable[[Sequence[Finding]], Finding]

# The kinds of processes that steps run in. Most steps use 'shared'. The others exist because
# TensorFlow fixes a setting when it starts, or because the check is about another process.
PROCESSES: Mapping[str, WorkerSpec] = {
    "shared": WorkerSpec(),
    "deterministic": WorkerSpec(deterministic=True),
    "fresh": WorkerSpec(backend="numpy"),
    "other": WorkerSpec(),
    "one-thread": WorkerSpec(threads=1),
    "jax": WorkerSpec(backend="jax"),
    "torch": WorkerSpec(backend="torch"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of a check that runs in one process (a key of PROCESSES)."""

    run: RunStep
    process: str = "shared"


def last(findings: Sequence[Finding]) -> Finding:
    """Return the finding of the last step."""
    return findings[-1]


@dataclass(frozen=True, kw_only=True)
class SupportProbe:
    """A check of the support matrix.

    Attributes:
        key: 'gradient-xla'; records of cells refer to it.
        title: for the table's head: 'gradient, XLA'.
        group: checks of a group stand together.
        question: the question that a pass answers with yes.
        steps: run one after the other; the first that does not pass decides the cell.
        judge: makes one finding of the findings of all steps if all passed.
        requires: features that an op must have for the check to apply; see `features`.
        accelerators: run on GPUs too, not only on the CPU.
        exports: run only with --with-exports.
    """

    key: str
    title: str
    group: str
    question: str
    steps: tuple[Step, ...]
    judge: Judge = last
    requires: tuple[str, ...] = ()
    accelerators: bool = True
    exports: bool = False

    def applies(self, op: Op) -> bool:
        """Return whether the op has everything that the check requires."""
        return features(op).issuperset(self.requires)


def attempt(trial: Trial, case: Case, ask: Callable[[], Finding]) -> Finding:
    """Return the finding of `ask`; an exception becomes a finding."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001 (what a candidate raises is a result)
        return explain_error(trial.candidate, case, error)


def _refusal(matches: str, reason: str, issue: str = "") -> KnownFailure:
    return KnownFailure(when=lambda _: True, matches=matches, reason=reason, issue=issue)


# Documented refusals of TensorFlow and Keras. An error that matches none is an `error`.
REFUSALS = (
    _refusal(
        matches="MaxPoolingGrad is not yet supported on the depth dimension",
        reason="TensorFlow has no gradient of depthwise max pooling outside XLA",
    ),
    _refusal(
        matches="Depthwise max pooling is currently only implemented for CPU",
        reason="TensorFlow has no depthwise max pooling on a GPU outside XLA",
        issue="tensorflow#636",
    ),
    _refusal(
        matches="Depthwise max pooling requires the depth window",
        reason="outside XLA the window must divide the depth and equal the stride",
    ),
    _refusal(
        matches="supports exactly one of pooling across depth",
        reason="outside XLA one call pools along the depth or over height and width, not both",
    ),
    _refusal(
        matches="only supports (NHWC|channels_last)|must be NHWC|only supported on GPU|NCHW",
        reason="this layout has no kernel on the CPU outside XLA",
    ),
    _refusal(
        matches="(?i)lambda.*(unsafe|safe_mode|safe mode|arbitrary)|safe_mode",
        reason="Keras does not load a Lambda in safe mode: its code would run",
        issue="keras#20167",
    ),
    _refusal(
        matches="not in (the )?list of allowed values",
        reason="TensorFlow's op does not take this",
    ),
    _refusal(
        matches="Could not locate (class|function)",
        reason="its class is not registered: Keras cannot find it by its name",
    ),
    _refusal(
        matches="(?i)determinis",
        reason="TensorFlow has no deterministic implementation of this",
    ),
    _refusal(
        matches="UnimplementedError|NotImplementedError|not yet supported|is not supported",
        reason="not implemented",
    ),
    _refusal(
        matches="(?i)could not find device|no registered|No OpKernel was registered|"
        "Could not find compiler|not compilable|unsupported operations|uncompilable",
        reason="there is no kernel for this",
    ),
)


def explain_error(candidate: Candidate, case: Case, error: BaseException) -> Finding:
    """Return `unsupported` if the error is documented by the candidate or upstream; else `error`."""
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    text = error_words(error)
    for known in (*candidate.failures, *REFUSALS):
        if known.when(case) and re.search(known.matches, whole):
            return Finding(
                state="unsupported", evidence=f"{known.reason} [{text}]", issue=known.issue
            )
    return Finding(state="error", evidence=text)


# Paragraphs in which TensorFlow and Keras say where an error came from: paths of this machine.
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
    """Return an error's type and message in one line, without stack traces and names of nodes."""
    # Keras prints the whole configuration first and the reason last.
    inner = str(error).rpartition("Exception encountered: ")[2]
    blocks = re.split(r"\n\s*\n", inner.strip())
    said = [block for block in blocks if not _ORIGIN.match(block)] or blocks[-1:]
    text = printable(" ".join(_NOISE.sub(" ", " ".join(said)).split()))
    name = type(error).__name__
    text = text if text.startswith(name) else f"{name}: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


# From best to worst: a wrong answer without an error is worse than any error.
SEVERITY: tuple[CellState, ...] = (
    "pass", "not_run", "unsupported", "error", "timeout", "crashed", "wrong",
)  # fmt: skip


def combine(findings: Mapping[str, Finding]) -> Finding:
    """Combine findings by name: the worst state, and the evidence of all.

    Equal evidence is given once: 'eager, graph: ...; xla: ...'.
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
    """Return one finding over the modes; each is tried, whatever the others found."""
    return combine(
        {mode: attempt(trial, trial.case(mode=mode), partial(ask, mode)) for mode in modes}
    )
