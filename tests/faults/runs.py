"""Run complete runs in processes of their own, and inspect what they leave."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from poolbench.core.errors import StoreError
from poolbench.options import OPTIONS
from poolbench.store.journal import read_run

ROOT = Path(__file__).parent.parent.parent
CANDIDATES = ROOT / "tests" / "candidates"
NUMPY = CANDIDATES / "numpy_faults.py"
MARK = "POOLBENCH_TEST"
QUICK = ("--sweep", "quick", "--processes", "2", "--budget", "0.4")
NAMES = {f"--{option.name}" for option in OPTIONS}


class Started:
    """A `pytest SUITE` in a session of its own, all of whose processes can be found by a mark."""

    def __init__(self, results, *words, suite=NUMPY, limit_nbytes=None):
        self.mark = uuid.uuid4().hex
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:hypothesispytest",
            "-p",
            "poolbench.pytest_plugin",  # a suite elsewhere finds no pyproject.toml that names it
            str(suite),
        ]
        command += ["--benchmark-quiet", *prefixed("--results", results, *words)]
        if limit_nbytes is not None:
            limited = (
                "import os, resource, sys;"
                f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_nbytes}, {limit_nbytes}));"
                "os.execv(sys.argv[1], sys.argv[1:])"
            )
            command = [sys.executable, "-c", limited, *command]
        self.output = results / f"output-{self.mark}"
        results.mkdir(exist_ok=True)
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {MARK: self.mark}, start_new_session=True,
                # A shell's background job ignores Ctrl-C, and so would its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )  # fmt: skip

    def wait(self, timeout=1200):
        """(exit status, what it printed)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return status, self.output.read_text(errors="replace")

    def signal(self, number):
        """Send a signal to the run's process group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def left(self):
        """Processes that carry the run's mark."""
        needle = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def nothing_left(self, timeout=120):
        """Whether no process of the run is there any more, at once or soon."""
        deadline = time.monotonic() + timeout
        while self.left():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def prefixed(*words):
    """The words as pytest takes them: an option of a run has a prefix there."""
    return [str(w).replace("--", "--poolbench-", 1) if w in NAMES else str(w) for w in words]


def run(results, *words, **options):
    started = Started(results, *words, **options)
    status, output = started.wait()
    assert started.nothing_left()
    return status, output


def wait_for(condition, timeout=600):
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def wait_for_more(started, folder, count):
    """Wait until a run's journal has more than so many lines, or the run has ended."""
    wait_for(lambda: started.process.poll() is not None or len(lines(folder)) > count)


def lines(folder):
    """A journal's whole lines; none where there is no journal yet."""
    try:
        return (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return []


def measured(folder):
    """(case, candidate, status) of each line of a run, duplicates included."""
    try:
        records = read_run(folder).records
    except StoreError:
        return []
    return [(r.case, r.candidate, r.status) for r in records if hasattr(r, "samples")]


def verdicts(folder):
    """Candidate to verdict, as the report judges it."""
    from poolbench.report.frame import load

    table = load(folder).table
    return dict(zip(table["candidate"], table["verdict"], strict=True))
