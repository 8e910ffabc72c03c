"""Replicas: fresh worker processes that are started, timed out, lost and replaced.

A worker knows functions by name and takes plain data; what it raises, prints, or dies of comes back
as a `WorkerFailure` with one of the project's statuses. pebble owns the processes and their limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pebble
import psutil
from pebble.common import CONSTS

from bench.measurement import Status

# pebble waits this long after SIGTERM before SIGKILL, for each worker in turn; a hung op never
# answers SIGTERM, and 3 s times five workers is felt at every Ctrl-C.
CONSTS.term_timeout = 0.2
TAIL_NBYTES = 2000
LOG_NBYTES = 1 << 20
START_TIMEOUT_SECONDS = 180.0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a process fixes for its whole life, because TensorFlow cannot change it once started.

    Attributes:
        threads: intra-op threads; 0 leaves TensorFlow's own choice, every core.
        logical_cpus: logical CPU devices that the machine's CPU is split into.
        deterministic: op determinism.
        tensorflow: import TensorFlow at the start; False for NumPy candidates alone.
        environment: environment variables set before anything is imported.
    """

    threads: int = 0
    logical_cpus: int = 1
    deterministic: bool = False
    tensorflow: bool = True
    environment: tuple[tuple[str, str], ...] = ()


class WorkerFailure(Exception):  # noqa: N818 (a result, not a programming error)
    """A task that did not return.

    Attributes:
        status: error, crashed, out_of_memory or timeout.
        reason: one line.
        tail: the end of what the worker printed.
        lost: whether the worker's state is gone with it.
    """

    def __init__(self, status: Status, reason: str, *, tail: str = "", lost: bool = False) -> None:
        super().__init__(reason)
        self.status: Status = status
        self.reason = reason
        self.tail = tail
        self.lost = lost


class WorkerLike(Protocol):
    """What a race needs of a worker, wherever it runs."""

    node: str

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
        self, setting: Setting, *, files: Sequence[Path] = (), memory_nbytes: int | None = None
    ) -> None:
        self.setting = setting
        self._files = tuple(map(str, files))
        self._memory_nbytes = memory_nbytes
        descriptor, name = tempfile.mkstemp(prefix="poolbench-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        self._pool = pebble.ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=_initialise,
            initargs=(setting, self._files, name, os.getpid()),
        )
        self._pid: int | None = None
        self._started: Future[Outcome] | None = None

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
            self._pid = self._collect(self._started, START_TIMEOUT_SECONDS)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The function's result, run in the process.

        Raises:
            WorkerFailure: it raised, died, took too long or too much memory.
        """
        self.wait_started()
        return self._collect(self._schedule(function, args, timeout), timeout)

    def close(self) -> None:
        """End the process, by force if it does not answer."""
        self._pool.stop()
        self._pool.join()
        self._log.unlink(missing_ok=True)

    def _schedule(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> Any:
        try:
            return self._pool.schedule(_guard, args=(function, args), timeout=timeout)
        except RuntimeError as error:  # pebble's pool broke, its processes with it
            raise WorkerFailure("crashed", f"the worker cannot be reached: {error}", lost=True) from None

    def _collect(self, future: Any, timeout: float) -> Any:
        with _MemoryWatch(self._pid, self._memory_nbytes) as watch:
            try:
                outcome: Outcome = future.result()
            except (pebble.ProcessExpired, FutureTimeoutError, CancelledError) as error:
                raise self._lost(error, timeout, watch.exceeded_nbytes) from None
            except MemoryError:
                raise self._lost(None, timeout, None) from None
        tail = self._trim_log()
        if outcome.status != "ok":
            raise WorkerFailure(outcome.status, outcome.reason, tail=tail)
        return outcome.value

    def _lost(
        self, error: BaseException | None, timeout: float, exceeded_nbytes: int | None
    ) -> WorkerFailure:
        self._started = self._pid = None
        tail = self._trim_log()
        self._log.write_bytes(b"")
        if exceeded_nbytes is not None:
            reason = (
                f"killed at {exceeded_nbytes / 2**20:.0f} MiB of host memory, the limit is "
                f"{(self._memory_nbytes or 0) / 2**20:.0f} MiB (--memory)"
            )
            return WorkerFailure("out_of_memory", reason, tail=tail, lost=True)
        if isinstance(error, FutureTimeoutError):
            return WorkerFailure(
                "timeout", f"no answer within {timeout:g} s (--timeout)", tail=tail, lost=True
            )
        code = getattr(error, "exitcode", None)
        if code == -signal.SIGKILL:
            reason = "killed by SIGKILL: by somebody, or by the system for want of memory"
        elif isinstance(code, int) and code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
        else:
            reason = f"the process exited with code {code}"
        return WorkerFailure("crashed", reason, tail=tail, lost=True)

    def _trim_log(self) -> str:
        """The log's tail; the file is emptied when something floods it."""
        try:
            with self._log.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - TAIL_NBYTES))
                tail = file.read().decode("utf-8", "replace").strip()
                if size > LOG_NBYTES:
                    file.truncate(0)
        except FileNotFoundError:
            return ""
        return tail


class _MemoryWatch:
    """Kills a process whose resident memory passes a limit, while a call is waited for."""

    PERIOD_SECONDS = 0.1

    def __init__(self, pid: int | None, limit_nbytes: int | None) -> None:
        self.exceeded_nbytes: int | None = None
        self._pid = pid
        self._limit_nbytes = limit_nbytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryWatch:
        if self._pid is not None and self._limit_nbytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._limit_nbytes is not None
        # A process that is gone is told by the future, not here.
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._pid)
            while not self._done.wait(self.PERIOD_SECONDS):
                nbytes = process.memory_info().rss
                if nbytes > self._limit_nbytes:
                    self.exceeded_nbytes = nbytes
                    process.kill()
                    return


def _guard(function: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    """Run a task in the worker; whatever it raises becomes plain data."""
    try:
        return Outcome(value=function(*args))
    except MemoryError as error:
        return Outcome(status="out_of_memory", reason=f"host memory: {one_line(error)}")
    except SystemExit as error:
        return Outcome(status="error", reason=f"it called sys.exit({error.code!r})")
    except BaseException as error:  # noqa: BLE001 (a candidate may raise anything: it is a result)
        return Outcome(status=status_of(error), reason=one_line(error))


def status_of(error: BaseException) -> Status:
    """out_of_memory for what TensorFlow raises when a device is full, else error."""
    return "out_of_memory" if type(error).__name__ == "ResourceExhaustedError" else "error"


def one_line(error: BaseException, limit: int = 400) -> str:
    """An exception's type and text in one line of at most `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _initialise(setting: Setting, files: Sequence[str], log: str, parent: int) -> None:
    """First thing in the process: its own session, its output to the log, its user files."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
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


def _start(setting: Setting) -> int:
    """Import what the setting asks for and load the user's files; the process id."""
    if setting.tensorflow:
        from bench.workload import start_tensorflow

        start_tensorflow(setting)
    load_registry(_FILES)
    return os.getpid()


def load_registry(files: Sequence[str]) -> None:
    """Import the ops that ship, then the user's files by path."""
    importlib.import_module("bench.ops")
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
