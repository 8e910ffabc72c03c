"""Errors of the user, of the store and of workers, and their conversion to a status and one line of text."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Literal

from poolbench.core.text import escape_controls

Status = Literal[
    "ok",
    "unsupported",
    "wrong",
    "error",
    "crashed",
    "out_of_memory",
    "timeout",
    "not_run",
    "implausible",
]


class UsageError(ValueError):
    """An invalid request; the text is one line and says what to type instead."""


class NotRunError(Exception):
    """A case that cannot be measured here; the text is the reason in one line."""


class StoreError(Exception):
    """A run that cannot be read or written; the text is one line with the reason and what to do."""


class WorkerFailure(Exception):  # noqa: N818 (a result, not a programming error)
    """A task that did not return.

    Attributes:
        status: error, crashed, out_of_memory or timeout.
        reason: one line.
        tail: the end of the worker's output.
        lost: whether the worker's state is lost.
        blameless: whether it was lost before the task began, so that the task is not the cause.
        stopped: whether its process was stopped (SIGSTOP) at the limit, by the task or from outside.
    """

    def __init__(
        self,
        status: Status,
        reason: str,
        *,
        tail: str = "",
        lost: bool = False,
        blameless: bool = False,
        stopped: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason
        self.tail = tail
        self.lost = lost
        self.blameless = blameless
        self.stopped = stopped


_HOST_ALLOCATOR = re.compile(r"device:CPU|allocator.{0,3}cpu|host memory", re.IGNORECASE)
_FULL = re.compile(r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|out of memory", re.IGNORECASE)


def status_of(error: BaseException) -> Status:
    """Return the status of an exception: not_run, out_of_memory or error."""
    if isinstance(error, NotRunError):
        return "not_run"
    return "out_of_memory" if _memory_of(error) else "error"


def reason_of(error: BaseException) -> str:
    """Return the exception in one line; out of memory is preceded by 'host memory' or 'device memory'."""
    if isinstance(error, NotRunError):
        return printable(str(error))
    memory = _memory_of(error)
    return f"{memory} memory: {one_line(error)}" if memory else one_line(error)


def _memory_of(error: BaseException) -> str:
    """Return the memory that is full, 'host' or 'device'; '' for any other error."""
    if isinstance(error, MemoryError):
        return "host"
    name = type(error).__name__
    text = one_line(error, 4000) if name in ("ResourceExhaustedError", "InternalError") else ""
    if name == "ResourceExhaustedError" or _FULL.search(text):
        return "host" if _HOST_ALLOCATOR.search(text) else "device"
    return ""


# A graph's error prints the Python stack before the message, which the length limit would then cut off.
_STACK_LINE = re.compile(
    r"\s*File \"|Graph execution error:|in user code:|Detected at node .* defined at|\s*\[\[\{\{node"
)


def one_line(error: BaseException, limit: int = 400) -> str:
    """Return an exception's type and text in one line of at most `limit` characters."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 (str() of a candidate's own exception may fail)
        said = "(its text cannot be made)"
    said = "\n".join(line for line in said.splitlines() if not _STACK_LINE.match(line))
    text = printable(" ".join(f"{type(error).__name__}: {said[: 10 * limit]}".split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """Return the text in a form that is safe to store and show.

    A terminal's codes are left out, other control characters and lone surrogates spelled out, because the
    text reaches terminals. Paths of the project and of its libraries are shortened, because results are published.
    """
    for folder in own_folders():
        text = text.replace(folder + os.sep, "")
    return escape_controls(text)


def own_folders() -> list[str]:
    """Return the folders of the libraries and of this project, the innermost first."""
    return sorted({sys.prefix, str(Path(__file__).parent.parent.parent)}, key=len, reverse=True)
