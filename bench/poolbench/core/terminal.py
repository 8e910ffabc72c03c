"""What is printed: any terminal's encoding takes it, and a reader that has gone changes no exit code."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from poolbench.core.text import escape_controls


def emit(text: str, *, err: bool = False) -> None:
    """Print text as a line on stdout, or on stderr, whatever its encoding and whether or not it is read.

    Raises:
        OSError: stdout cannot be written: the disk is full.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed before Python started: `poolbench compare ... >&-`
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, file=stream, flush=True)
    except OSError as error:
        # What the interpreter flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # A reader that has gone, as in `poolbench compare ... | head`, has what it wants.
        if not (err or isinstance(error, BrokenPipeError)):
            raise


def poolbench_command() -> str:
    """Return how `poolbench` is started from any folder."""
    here = Path(sys.executable).parent
    script = shutil.which("poolbench", path=str(here))
    if script is None:
        return shlex.join([sys.executable, "-m", "poolbench"])
    on_path = shutil.which("poolbench")
    return "poolbench" if on_path and Path(on_path).parent == here else shlex.quote(script)
