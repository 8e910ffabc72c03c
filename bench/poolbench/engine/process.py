"""Processes: fresh worker processes that are started, timed out, lost and replaced.

A worker knows functions by name and takes plain data; what it raises, prints, or dies of comes back
as a `WorkerFailure` with one of the project's statuses. pebble owns the processes and their limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import BrokenExecutor, CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

import pebble
import psutil
from pebble.common.types import CONSTS

from poolbench.core.errors import Status, WorkerFailure, printable, reason_of, status_of
from poolbench.core.plan import WorkerSpec
from poolbench.engine import cleanup

# pebble waits this long after SIGTERM before SIGKILL, for each worker in turn; a hung op never
# answers SIGTERM, and 3 s times five workers is felt at every Ctrl-C.
CONSTS.term_timeout = 0.2
TAIL_NBYTES = 2000
LOG_NBYTES = 1 << 20
# What a call may print before its log is emptied under way: a flood must not fill the disk.
FLOOD_NBYTES = 64 << 20
START_TIMEOUT_SECONDS = 180.0


class WorkerLike(Protocol):
    """What a race needs of a worker, wherever it runs."""

    node: str
    tail: str  # the end of what the last task printed

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The function's result, run in the worker; raises WorkerFailure."""

    def close(self) -> None:
        """End the worker."""


@dataclass(frozen=True)
class Outcome:
    """What a task came to, in plain data: an exception may not survive being sent."""

    value: Any = None
    status: Status = "ok"
    reason: str = ""


class Worker:
    """One fresh process with a setting. State lives in it between calls, until it is lost.

    Args:
        setting: fixed for the life of the process.
        files: the user's files that register ops and candidates, imported by path.
        memory_nbytes: resident memory at which it is killed; None: no limit.
    """

    node = "local"

    def __init__(
        self, setting: WorkerSpec, *, files: Sequence[Path] = (), memory_nbytes: int | None = None
    ) -> None:
        self.setting = setting
        self.tail = ""
        self._files = tuple(map(str, files))
        self._memory_nbytes = memory_nbytes
        self._folder = Path(tempfile.mkdtemp(dir=cleanup.guarded_folder()))
        self._log = self._folder / "log"
        self._log.touch()
        self._watch = _Watch(memory_nbytes, self._log)
        self._pool = self._make_pool()
        self._pid: int | None = None
        self._started: Future[Outcome] | None = None

    def _make_pool(self) -> pebble.ProcessPool:
        return pebble.ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=_initialise,
            initargs=(self.setting, self._files, str(self._folder), os.getpid()),
        )

    def start(self) -> None:
        """Begin to start the process, without waiting: several start side by side."""
        if self._started is None:
            self._started = self._schedule(_start, (self.setting,), START_TIMEOUT_SECONDS)

    def wait_started(self) -> None:
        """Wait until the process is up.

        Raises:
            WorkerFailure: it could not start; the reason says why.
        """
        self.start()
        assert self._started is not None
        if self._pid is None:
            try:
                self._pid = self._collect(self._started, START_TIMEOUT_SECONDS)
                self._watch.begin(self._pid)
            except WorkerFailure:
                self._started = None
                raise

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The function's result, run in the process.

        Raises:
            WorkerFailure: it raised, died, took too long or too much memory.
        """
        self.wait_started()
        printed = self._log_nbytes()
        return self._collect(self._schedule(function, args, timeout), timeout, printed)

    def close(self) -> None:
        """End the process and all that it started, by force."""
        self.kill()
        self._pool.join()
        cleanup.kill_processes(self._folder)  # pebble may have started another meanwhile
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """Kill the process and all that it started, without waiting; only `close` comes after."""
        self._watch.end()
        self._pool.stop()  # type: ignore[no-untyped-call]
        cleanup.kill_processes(self._folder)

    def _schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> Any:
        try:
            with _without_interrupts():
                return self._pool.schedule(_guard, args=(function, args), timeout=timeout)
        except RuntimeError:  # pebble's pool broke: its process died while it had nothing to do
            raise self._lost_idle() from None

    def _collect(self, future: Any, timeout: float, printed: int = 0) -> Any:
        begun = time.monotonic()
        try:
            with self._watch:
                outcome: Outcome = self._wait(future)
        except (pebble.ProcessExpired, FutureTimeoutError, CancelledError) as error:
            slept = time.monotonic() - begun < timeout / 2
            if isinstance(error, FutureTimeoutError) and slept:
                # pebble's clock goes on while the machine is suspended, this one does not.
                raise self._lost_idle() from None
            reason = self._why_lost(error, timeout)
            tail = self._trim_log(printed)
            self._renew()
            raise WorkerFailure(*reason, tail=tail, lost=True) from None
        except BrokenExecutor:
            raise self._lost_idle() from None
        self.tail = self._trim_log(printed)
        if outcome.status != "ok":
            raise WorkerFailure(outcome.status, outcome.reason, tail=self.tail)
        return outcome.value

    def _wait(self, future: Any) -> Outcome:
        """The future's outcome; pebble does not notice a process that exits with code 0."""
        gone = False
        while not futures.wait([future], timeout=1.0).done:
            if gone:
                raise pebble.ProcessExpired("it ended", code=0)  # type: ignore[no-untyped-call]
            gone = self._pid is not None and not psutil.pid_exists(self._pid)
        outcome: Outcome = future.result()
        return outcome

    def _lost_idle(self) -> WorkerFailure:
        self._renew()
        reason = "the worker died between two tasks"
        return WorkerFailure("crashed", reason, lost=True, blameless=True)

    def _renew(self) -> None:
        """Clear away what is left of a lost process; the next call starts a fresh one."""
        self._started = self._pid = None
        self.kill()
        self._pool.join()
        cleanup.kill_processes(self._folder)
        self._log.write_bytes(b"")
        self._watch = _Watch(self._memory_nbytes, self._log)
        self._pool = self._make_pool()

    def _why_lost(self, error: BaseException, timeout: float) -> tuple[Status, str]:
        if self._watch.exceeded_nbytes is not None:
            return "out_of_memory", (
                f"host memory: killed at {self._watch.exceeded_nbytes / 2**20:.0f} MiB, the limit is "
                f"{(self._memory_nbytes or 0) / 2**20:.0f} MiB (--memory)"
            )
        if isinstance(error, FutureTimeoutError):
            return "timeout", f"no answer within {timeout:g} s (--limit)"
        code = getattr(error, "exitcode", None)
        if code == -signal.SIGKILL:
            if system_killings() > self._watch.killings:
                return "out_of_memory", "host memory: killed by the system, which had none left"
            return "crashed", "killed by SIGKILL: by somebody, or by the system"
        if isinstance(code, int) and code < 0:
            return "crashed", f"killed by {signal.Signals(-code).name}"
        return "crashed", f"the process exited with code {code}"

    def _log_nbytes(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def _trim_log(self, start: int = 0) -> str:
        """The end of what was printed from `start` on; the file is emptied when it grows large."""
        try:
            with self._log.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                start = min(start, size)  # emptied under way
                file.seek(max(start, size - TAIL_NBYTES))
                tail = (self._watch.flooded + file.read(TAIL_NBYTES))[-TAIL_NBYTES:]
                if size > LOG_NBYTES:
                    file.truncate(0)
        except OSError:
            return ""
        text = tail.decode("utf-8", "replace")
        return printable(text.replace("\r\n", "\n")).strip()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes and threads that Ctrl-C does not reach: it is this thread's to handle."""
    # It would unblock the signal again when the first worker is started.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def system_killings(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes the system has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in counters.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class _Watch:
    """While calls are waited for: kills a process at its memory limit, empties a flooded log.

    One thread for the life of the process: to start one for every call would cost more than the call.
    Use as a context around each wait.

    Attributes:
        exceeded_nbytes: resident memory at which the process was killed; None: it was not.
        killings: how many processes the system had killed for want of memory at the beginning.
        flooded: the end of what a log held that was emptied under way.
    """

    PERIOD_SECONDS = 0.1

    def __init__(self, limit_nbytes: int | None, log: Path) -> None:
        self.exceeded_nbytes: int | None = None
        self.killings = 0
        self.flooded = b""
        self._limit_nbytes = limit_nbytes or sys.maxsize
        self._log = log
        self._waiting = False
        self._done = threading.Event()

    def begin(self, pid: int | None) -> None:
        """Watch this process from now on."""
        self.killings = system_killings()
        threading.Thread(target=self._watch, args=(pid,), daemon=True).start()

    def end(self) -> None:
        """Watch no more."""
        self._done.set()

    def __enter__(self) -> _Watch:
        self.flooded = b""
        self._waiting = True
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def _watch(self, pid: int | None) -> None:
        # A process that is gone is told by the future, not here.
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            while not self._done.wait(self.PERIOD_SECONDS):
                if not self._waiting:
                    continue
                nbytes = process.memory_info().rss
                if nbytes > self._limit_nbytes:
                    self.exceeded_nbytes = nbytes
                    process.kill()
                    return
                if self._log.stat().st_size > FLOOD_NBYTES:
                    with self._log.open("r+b") as file:
                        file.seek(-TAIL_NBYTES, os.SEEK_END)
                        self.flooded = file.read(TAIL_NBYTES)
                        file.truncate(0)


def _guard(function: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    """Run a task in the worker; whatever it raises becomes plain data."""
    process = os.getpid()
    try:
        outcome = Outcome(value=function(*args))
    except SystemExit as error:
        outcome = Outcome(status="error", reason=f"it called sys.exit({error.code!r})")
    except BaseException as error:  # noqa: BLE001 (a candidate may raise anything: it is a result)
        outcome = Outcome(status=status_of(error), reason=reason_of(error))
    if os.getpid() != process:  # a candidate forked, and its child came back here too
        os._exit(0)
    return outcome


# What an exception's text says where it is the host's memory that is full, not an accelerator's.
def _initialise(setting: WorkerSpec, files: Sequence[str], folder: str, parent: int) -> None:
    """First thing in the process: its own session, its output to the log, its user files."""
    _die_with(parent)
    cleanup.enter_process(Path(folder))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    target = os.open(Path(folder) / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):  # what was printed before a crash must not be lost
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    # TensorFlow leaves a file for each function that it traces when its process is killed.
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.environ.update({"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    os.environ.update(dict(setting.environment))
    _FILES[:] = files


_FILES: list[str] = []


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start(setting: WorkerSpec) -> int:
    """Import what the setting asks for and load the user's files; the process id."""
    if setting.backend == "tensorflow":
        from poolbench.worker.session import start_tensorflow

        start_tensorflow(setting)
    load_registry(_FILES)
    return os.getpid()


def load_registry(files: Sequence[str]) -> None:
    """Import the ops that ship, then the user's files by path."""
    importlib.import_module("poolbench.ops")
    for file in files:
        import_file(Path(file))


def import_file(path: Path) -> None:
    """Import a file by path, once a process, under a name of its own.

    Raises:
        ImportError: there is no such file, or it is no Python.
    """
    path = path.resolve()
    name = f"poolbench_user_{path.stem}_{abs(hash(str(path)))}"
    if name in sys.modules or any(
        getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())
    ):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
