"""TensorBoard on a run's traces, with a deep link for each.

Runs in an environment without TensorFlow too, where TensorBoard starts several seconds sooner.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

from poolbench.core.errors import UsageError
from poolbench.store.runs import PROFILES, RUN_NAME

SUFFIX = ".xplane.pb"
RECORD_FIRST = "record some first: poolbench trace"
LOCAL = "127.0.0.1"
ADDRESS = re.compile(r"http://[^\s/]+:\d+/")


def find_traces(logdir: Path) -> dict[str, list[str]]:
    """By run, its hosts: one of a candidate's own trace, one a candidate of a comparison."""
    found: dict[str, list[str]] = {}
    for path in sorted((logdir / PROFILES).glob(f"*/*{SUFFIX}")):
        found.setdefault(path.parent.name, []).append(path.name.removesuffix(SUFFIX))
    return found


def find_logdir(results: Path, run: str = "") -> Path:
    """The traces of a run, or of the newest run that has any.

    Raises:
        UsageError: there is none; the text is one line that says what to type.
    """
    if run:
        logdir = results / run / "traces"
        if not RUN_NAME.fullmatch(run) or not find_traces(logdir):
            raise UsageError(f"run {run!r} holds no trace; {RECORD_FIRST} --run {run}")
        return logdir
    logdirs = [path for path in results.glob("*/traces") if find_traces(path)]
    if not logdirs:
        raise UsageError(f"no run under {results.name}/ holds a trace; {RECORD_FIRST}")
    return max(logdirs, key=lambda path: (path / PROFILES).stat().st_mtime)


def deep_link(address: str, run: str, hosts: list[str]) -> str:
    """Return a link that opens the trace viewer on a run: its only host, or all hosts one above the other."""
    words = {"run": run, "tag": "trace_viewer@"}
    words |= {"host": hosts[0]} if len(hosts) == 1 else {"hosts": ",".join(hosts)}
    return f"{address}?{urlencode(words, quote_via=quote, safe='')}#profile"


@contextlib.contextmanager
def serve(
    logdir: Path, *, host: str = LOCAL, port: int = 0
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start TensorBoard, and yield its process and its address; port 0 is a free one.

    Raises:
        UsageError: it ended before it said its address; the end of what it printed.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir),
         "--host", host, "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if match := ADDRESS.search(line):
                # Later output must not fill the pipe and block it.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield process, match[0]
                return
        raise UsageError("TensorBoard did not start: " + "".join(said[-3:]).strip())
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def view(
    results: Path, run: str = "", *, host: str = LOCAL, port: int = 0, say: Callable[[str], None]
) -> int:
    """Serve a run's traces and print their links; return TensorBoard's exit code, 0 after Ctrl-C.

    Raises:
        UsageError: there are no traces, or TensorBoard does not start.
    """
    logdir = find_logdir(results, run)
    with serve(logdir, host=host, port=port) as (process, address):
        for name, hosts in find_traces(logdir).items():
            say(f"{name}\n  {deep_link(address, name, hosts)}")
        say("Press Ctrl-C to end.")
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0
