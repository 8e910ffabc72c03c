"""Clean up after a run, even after kill -9, from a process of its own.

A worker dies with its parent, but the processes that a candidate started do not, nor do the
temporary files. The run therefore holds a pipe to this process. When the pipe closes, the run has ended: this process
kills everything that its workers left and removes the temporary folder.

`start` runs this file as a script. It uses the standard library only, to start within milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

PREFIX = "poolbench-"
OWNER = "owner"
PROCESSES = "processes"
# Workers carry their folder in this variable, and so does every program that they start.
MARKER = "POOLBENCH_WORKER"
WAIT_SECONDS = 2.0
AGAIN_SECONDS = 0.15
STARTING_SECONDS = 2.0

_FOLDERS: dict[int, Path] = {}  # by process: a forked child has its own


def temporary_folder() -> Path:
    """Return this process' folder for its workers' files; a cleanup process removes it when the process ends."""
    known = _FOLDERS.get(os.getpid())
    if known is not None and known.is_dir():
        return known
    remove_orphans(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    (folder / OWNER).write_text(_known_as(os.getpid()))
    _FOLDERS[os.getpid()] = folder
    cleanup = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-S", __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it must survive Ctrl-C and a kill of the run's group
        cwd="/" if os.name == "posix" else None,
        env={name: value for name, value in os.environ.items() if name != MARKER},
    )
    atexit.register(_dismiss, cleanup, os.getpid())
    return folder


def _dismiss(cleanup: subprocess.Popen[bytes], owner: int) -> None:
    """Start the cleanup and wait for it, so that nothing is left when the run has ended."""
    if os.getpid() != owner:
        return
    assert cleanup.stdin is not None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        cleanup.stdin.close()
        cleanup.wait(WAIT_SECONDS)


def remove_orphans(temporary: Path) -> None:
    """Clean up after runs whose cleanup process died too."""
    for folder in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            pid, *started = (folder / OWNER).read_text().split()
            if not _is_alive(int(pid)) or (started and start_time(int(pid)) != started[0]):
                clean(folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def start_time(pid: int) -> str:
    """Return the start time of a process in the system's ticks; '' if it has ended or is not visible.

    Number and start time identify a process; the system reuses numbers.
    """
    try:
        # The name, in parentheses, may contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _known_as(pid: int) -> str:
    return f"{pid} {start_time(pid)}".strip()


def note_process(folder: Path, pid: int) -> None:
    """Note that a process, the leader of its own session, belongs to a worker's folder."""
    with contextlib.suppress(OSError), (folder / PROCESSES).open("a") as file:
        file.write(f"{_known_as(pid)}\n")


def kill_processes(folder: Path) -> None:
    """Kill the processes of a worker's folder: its process and everything that it started.

    A process is killed if it carries the folder in its environment, or if the leader of its session was
    noted, with the same number and start time.
    """
    leaders = set()
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / PROCESSES).read_text().splitlines():
            pid, _, started = line.partition(" ")
            if started and start_time(int(pid)) == started:
                leaders.add(int(pid))
    for found in descendants(leaders, str(folder)):
        with contextlib.suppress(OSError):
            os.kill(found, signal.SIGKILL)
    with contextlib.suppress(OSError):
        (folder / PROCESSES).write_text("")


def descendants(leaders: Iterable[int], marker: str) -> list[int]:
    """Return the processes in the leaders' sessions, or that carry the marker in their environment."""
    leaders = set(leaders)
    needle = f"{MARKER}={marker}".encode() + b"\0"
    found = []
    for pid in _process_ids(leaders):
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if os.getsid(pid) in leaders:
                found.append(pid)
                continue
        with contextlib.suppress(OSError):
            if needle in b"\0" + _environment(pid) + b"\0":
                found.append(pid)
    return found


def _environment(pid: int) -> bytes:
    """Return the environment of a process, and wait for that of one that is just starting.

    A program that replaces another has an empty environment for a moment. A kernel's thread and an ended process
    have one for ever; they have no executable either.
    """
    file = Path(f"/proc/{pid}/environ")
    while not (text := file.read_bytes()) and _age(pid) < STARTING_SECONDS:
        file.with_name("exe").readlink()
        time.sleep(0.001)
    return text


def _age(pid: int) -> float:
    """Return the seconds since a process started; infinite where the system does not tell."""
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(start_time(pid)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return math.inf


def _process_ids(leaders: set[int]) -> Iterable[int]:
    """Return every process that /proc lists; without /proc, the leaders only."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    except OSError:
        return leaders


def clean(folder: Path) -> None:
    """Kill everything left of the workers under a run's folder, and remove the folder."""
    children = sorted(folder.glob("*/"))
    # Twice: between the list and its end a process may start another.
    for pause in (0.0, AGAIN_SECONDS):
        time.sleep(pause)
        for child in children:
            kill_processes(child)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Wait for the end of the pipe, then clean the folder that is named on the command line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
