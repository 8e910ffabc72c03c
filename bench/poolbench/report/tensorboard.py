"""TensorBoard on a run's traces, with a deep link for each. Standard library only.

The viewer's environment has neither TensorFlow nor what poolbench depends on.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

PROFILES = Path("plugins") / "profile"
SUFFIX = ".xplane.pb"
RECORD_FIRST = "record some first: nox -s trace"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")


def find_traces(logdir: Path) -> dict[str, list[str]]:
    """By run, its hosts: one of a candidate's own trace, one a candidate of a comparison."""
    found: dict[str, list[str]] = {}
    for path in sorted((logdir / PROFILES).glob(f"*/*{SUFFIX}")):
        found.setdefault(path.parent.name, []).append(path.name.removesuffix(SUFFIX))
    return found


def find_logdir(results: Path, run: str = "") -> Path:
    """The traces of a run, or of the newest run that has any.

    Raises:
        FileNotFoundError: there is none; the text is one line that says what to type.
    """
    if run:
        logdir = results / run / "traces"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", run) or not find_traces(logdir):
            raise FileNotFoundError(f"run {run!r} holds no trace; {RECORD_FIRST} -- --run {run}")
        return logdir
    logdirs = [path for path in results.glob("*/traces") if find_traces(path)]
    if not logdirs:
        raise FileNotFoundError(f"no run under {results.name}/ holds a trace; {RECORD_FIRST}")
    return max(logdirs, key=lambda path: (path / PROFILES).stat().st_mtime)


def deep_link(address: str, run: str, hosts: list[str]) -> str:
    """Opens the trace viewer on a run: its one host, or all of them above one another."""
    words = {"run": run, "tag": "trace_viewer@"}
    words |= {"host": hosts[0]} if len(hosts) == 1 else {"hosts": ",".join(hosts)}
    return f"{address}?{urlencode(words, quote_via=quote, safe='')}#profile"


@contextlib.contextmanager
def serve(logdir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """TensorBoard on 127.0.0.1 and a free port: its process and its address.

    Raises:
        RuntimeError: it ended before it said its address; the end of what it printed.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir),
         "--host", "127.0.0.1", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if match := ADDRESS.search(line):
                # What it prints later must not fill the pipe, or it would stand still.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield process, match[0]
                return
        raise RuntimeError("TensorBoard did not start: " + "".join(said[-3:]).strip())
    finally:
        process.terminate()
        process.wait(timeout=30)


def main(words: list[str]) -> int:
    """Serve a run's traces and print their links; ends by Ctrl-C."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print("usage: nox -s tensorboard [-- RUN]", file=sys.stderr)  # noqa: T201
        return 2
    try:
        logdir = find_logdir(Path("results"), *words)
        with serve(logdir) as (process, address):
            for run, hosts in find_traces(logdir).items():
                print(f"{run}\n  {deep_link(address, run, hosts)}")  # noqa: T201
            print("Press Ctrl-C to end.", flush=True)  # noqa: T201
            return process.wait()
    except (FileNotFoundError, RuntimeError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
