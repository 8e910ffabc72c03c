"""Start, call, time out, kill and replace worker processes.

A worker is `INTERPRETER -m poolbench.worker`. An exception, a crash or a timeout of a task becomes a
`WorkerFailure` with a status and the end of the output.

Two libraries were considered. execnet also talks to any interpreter, but it is in maintenance-only mode,
uses the child's standard streams, and reports neither exit signals nor timeouts. multiprocessing and the
libraries on top of it start processes of one interpreter only and send pickled functions.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import poolbench
from poolbench.core.errors import Status, WorkerFailure
from poolbench.core.plan import WorkerSpec
from poolbench.engine import cleanup
from poolbench.engine.watchdog import PERIOD_SECONDS, Watchdog, system_killings
from poolbench.worker import messages
from poolbench.worker.messages import Hello, MessageError, Reply, Start

START_TIMEOUT_SECONDS = 180.0
# After a wait longer than this, this process was stopped or the machine was suspended.
LONGEST_WAIT_SECONDS = 5 * PERIOD_SECONDS
# Of such waits, load explains shorter ones than this.
SLEPT_SECONDS = 2.0
END_SECONDS = 2.0
# Readings of one clock in two processes, of which one was made before the other.
CLOCK_SLACK_SECONDS = 0.001
SOURCE = str(Path(poolbench.__file__).parent.parent)
T = TypeVar("T")


class WorkerLike(Protocol):
    """The interface of a worker, local or remote."""

    node: str
    tail: str  # the end of the last task's output

    @property
    def slept(self) -> bool:
        """Whether this process or the worker was suspended during the last task."""

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """Return the function's result, run in the worker; raises WorkerFailure."""

    def close(self) -> None:
        """End the worker."""


class _Ended(Exception):  # noqa: N818 (an end, which may be regular)
    """The process ended, or sent an invalid message."""


class _TooLong(Exception):  # noqa: N818
    """The process did not answer in time; no TimeoutError, which is an OSError."""


class _Process:
    """A worker's process and this side's ends of its pipes."""

    def __init__(self, spec: WorkerSpec, folder: Path, memory_nbytes: int | None) -> None:
        requests, self._request_number = os.pipe()
        self._reply_number, replies = os.pipe()
        os.set_blocking(self._request_number, False)
        # Objects, not their numbers: a number that was closed, by another thread too, may belong to another file.
        self._requests = io.FileIO(self._request_number, "w")
        self._replies = io.FileIO(self._reply_number)
        environment = os.environ | {
            cleanup.MARKER: str(folder),
            # When its process is killed, TensorFlow leaves a temporary file per traced function.
            "TMPDIR": str(folder),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "PYTHONSAFEPATH": "1",  # otherwise a folder of the package's name would shadow it
        }
        before = environment.pop("PYTHONPATH", None)
        if has_own_code(spec):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCE, before)))
        with (folder / "log").open("ab") as log:
            try:
                self._popen = subprocess.Popen(  # noqa: S603
                    [spec.interpreter or sys.executable, "-m", "poolbench.worker", str(requests), str(replies)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=(requests, replies), start_new_session=True,
                    env=environment | dict(spec.environment),
                )  # fmt: skip
            except OSError as error:
                self._close_pipes()
                raise WorkerFailure(
                    "error", f"{spec.interpreter or sys.executable} cannot be run: {error.strerror}"
                ) from None
            finally:
                os.close(requests)
                os.close(replies)
        self.pid = self._popen.pid
        cleanup.note_process(folder, self.pid)
        self.watch = Watchdog(self.pid, memory_nbytes, folder / "log")
        self._folder = folder
        self._buffer = bytearray()
        self.slept = False

    def send(self, data: bytes, seconds: float) -> None:
        """Write a message.

        Raises:
            _Ended: the process is gone.
            _TooLong: it does not read.
        """
        left = memoryview(data)
        while left:
            try:
                written = self._requests.write(left)
            except (OSError, ValueError):
                raise _Ended from None
            if written is None:  # the pipe is full
                seconds = self._wait(self._request_number, select.POLLOUT, seconds)[1]
            else:
                left = left[written:]

    def receive(self, seconds: float) -> bytes:
        """Return the next message; time in which this process is stopped does not count.

        Raises:
            _Ended: the process is gone, or what it sent is no message.
            _TooLong: it said nothing within the seconds.
        """
        while True:
            try:
                frame = messages.take_frame(self._buffer)
                if frame is not None:
                    return frame
                ready, seconds = self._wait(self._reply_number, select.POLLIN, seconds)
                more = self._replies.read(1 << 16) if ready else None
            except (OSError, ValueError, MessageError):
                raise _Ended from None
            self._buffer += more or b""
            if ready and not more:
                raise _Ended

    def _wait(self, number: int, event: int, seconds: float) -> tuple[bool, float]:
        """Wait a short while; return whether the event came, and the seconds that are left."""
        if seconds <= 0:
            raise _TooLong
        poll = select.poll()
        poll.register(number, event)
        start = time.monotonic()
        ready = bool(poll.poll(1000 * min(PERIOD_SECONDS, seconds)))
        self.watch.look()
        if not ready and self.watch.has_ended():  # its child may keep the pipe open
            ready = bool(poll.poll(0))
            if not ready:
                raise _Ended
        waited = time.monotonic() - start
        self.slept |= waited > SLEPT_SECONDS or (not ready and self.watch.is_stopped())
        return ready, seconds - min(waited, LONGEST_WAIT_SECONDS)

    def kill(self) -> None:
        """Kill the process and all that it started."""
        cleanup.kill_processes(self._folder)
        if self._popen.returncode is None:
            self._popen.kill()

    def end(self) -> int:
        """End the process and all that it started; return its exit code."""
        limit = time.monotonic() + (END_SECONDS if self._replies_closed() else 0.0)
        while not self.watch.has_ended() and time.monotonic() < limit:
            time.sleep(0.005)
        self.kill()
        code = self._popen.wait()
        self._close_pipes()
        return code

    def _replies_closed(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self._reply_number, 0)
            return bool(poll.poll(0))
        return True

    def _close_pipes(self) -> None:
        with contextlib.suppress(OSError):
            self._replies.close()
            self._requests.close()


class Worker:
    """One fresh process of a kind. State lives in it between calls, until it is lost.

    Args:
        spec: fixed for the life of the process.
        files: the user's files that register ops and candidates, imported by path.
        memory_nbytes: resident memory at which it is killed; None: no limit.
    """

    node = "local"

    def __init__(
        self, spec: WorkerSpec, *, files: Sequence[Path] = (), memory_nbytes: int | None = None
    ) -> None:
        self.spec = spec
        self.tail = ""
        self._files = tuple(map(str, files))
        self._memory_nbytes = memory_nbytes
        self._folder = Path(tempfile.mkdtemp(dir=cleanup.temporary_folder()))
        self._process: _Process | None = None
        self._started = self._killed = False
        self._number = 0

    def start(self) -> None:
        """Begin to start the process without waiting, so that several start concurrently."""
        if self._process is None:
            if self._killed:
                raise _lost_idle("the worker was closed")
            self._process = _Process(self.spec, self._folder, self._memory_nbytes)
            path = tuple(sys.path) if has_own_code(self.spec) else ()
            files = self.spec.files or self._files
            message = Start(spec=self.spec, path=path, files=files)
            with contextlib.suppress(_Ended):  # the missing hello reports it
                self._process.send(messages.pack(message), START_TIMEOUT_SECONDS)

    def wait_started(self) -> None:
        """Wait until the process is up.

        Raises:
            WorkerFailure: it could not start; the reason says why.
        """
        if self._started:
            return
        self.start()
        assert self._process is not None
        interpreter = self.spec.interpreter or sys.executable
        try:
            hello = messages.decode(self._process.receive(START_TIMEOUT_SECONDS), Hello)
        except (_Ended, _TooLong, MessageError) as error:
            failure = self._lose(error, START_TIMEOUT_SECONDS, 0)
            said = failure.tail.splitlines()[-1] if failure.tail else failure.reason
            reason = f"{interpreter} cannot start a worker: {said}"
            raise WorkerFailure("error", reason, tail=failure.tail) from None
        if hello.protocol != messages.PROTOCOL:
            self._discard()
            raise WorkerFailure(
                "error",
                f"{interpreter} has poolbench {hello.version}, which speaks version {hello.protocol} of "
                f"the workers' protocol; this one speaks {messages.PROTOCOL}",
            )
        reply = self._receive(START_TIMEOUT_SECONDS, 0)
        if reply.status != "ok":
            tail = self._process.watch.take_tail(0)
            self._discard()
            raise WorkerFailure(reply.status, reply.reason, tail=tail)
        self._started = True

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """Return the result of a module-level function, run in the process.

        Raises:
            WorkerFailure: it raised, died, took too long or too much memory.
        """
        self.wait_started()
        assert self._process is not None
        watch = self._process.watch
        printed = watch.log_nbytes()
        self._number += 1
        request, function = messages.make_request(self._number, function, args)
        begin = time.perf_counter()
        self._process.slept = False
        try:
            self._process.send(messages.pack(request), timeout)
        except _Ended:  # it did not read the request: the task is not the cause
            self._discard()
            raise _lost_idle("the worker died between two tasks") from None
        except _TooLong as error:
            raise self._lose(error, timeout, printed) from None
        reply = self._receive(timeout, printed)
        self.tail = watch.take_tail(printed)
        if reply.status != "ok":
            raise WorkerFailure(reply.status, reply.reason, tail=self.tail)
        first, last = reply.clock
        begin, end = begin - CLOCK_SLACK_SECONDS, time.perf_counter() + CLOCK_SLACK_SECONDS
        if not begin <= first <= last <= end:
            self._discard()
            raise WorkerFailure(
                "error",
                "the worker's clock was changed: it disagrees with this process' own",
                lost=True,
            )
        try:
            return messages.result_of(function, reply)
        except MessageError as error:
            raise WorkerFailure("error", str(error), tail=self.tail) from None

    @property
    def slept(self) -> bool:
        """Whether this process or the worker was suspended during the last task."""
        return self._process is not None and self._process.slept

    def kill(self) -> None:
        """Kill the process and everything that it started, without waiting; only `close` may follow."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Kill the process and everything that it started."""
        self.kill()
        self._discard()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receive(self, timeout: float, printed: int) -> Reply:
        """Return the reply to the last request; replies to abandoned requests are dropped."""
        assert self._process is not None
        try:
            while True:
                reply: Reply = messages.decode(self._process.receive(timeout), Reply)
                if reply.number == self._number or not self._started:
                    return reply
        except (_Ended, _TooLong, MessageError) as error:
            raise self._lose(error, timeout, printed) from None

    def _lose(self, error: Exception, timeout: float, printed: int) -> WorkerFailure:
        """Remove a process that did not answer; return the failure with its reason."""
        assert self._process is not None
        process = self._process
        timed_out = isinstance(error, _TooLong)
        stopped = timed_out and process.watch.is_stopped()
        if timed_out:
            process.kill()
        code = process.end()
        status, reason = self._why_lost(process.watch, code, timeout if timed_out else None)
        tail = process.watch.take_tail(printed)
        self._discard()
        return WorkerFailure(status, reason, tail=tail, lost=True, stopped=stopped)

    def _discard(self) -> None:
        """Remove the remains of the process; the next call starts a fresh one."""
        process, self._process, self._started = self._process, None, False
        if process is not None:
            process.kill()
            process.end()
            with contextlib.suppress(OSError):
                (self._folder / "log").write_bytes(b"")

    def _why_lost(self, watch: Watchdog, code: int, timeout: float | None) -> tuple[Status, str]:
        if watch.exceeded_nbytes is not None:
            return "out_of_memory", (
                f"host memory: killed at {watch.exceeded_nbytes / 2**20:.0f} MiB, the limit is "
                f"{(self._memory_nbytes or 0) / 2**20:.0f} MiB (--memory)"
            )
        if timeout is not None:
            return "timeout", f"no answer within {timeout:g} s (--task-timeout)"
        if code == -signal.SIGKILL:
            if system_killings() > watch.killings:
                return "out_of_memory", "host memory: killed by the system, which had none left"
            return "crashed", "killed by SIGKILL: from outside, or by the system"
        if code < 0:
            known = -code in signal.Signals.__members__.values()
            name = signal.Signals(-code).name if known else f"signal {-code}"
            return "crashed", f"killed by {name}"
        return "crashed", f"the process exited with code {code}"


def has_own_code(spec: WorkerSpec) -> bool:
    """Tell whether a worker runs this process' interpreter and code."""
    return spec.interpreter in ("", sys.executable) and "PYTHONPATH" not in dict(spec.environment)


def _lost_idle(reason: str) -> WorkerFailure:
    return WorkerFailure("crashed", reason, lost=True, blameless=True)
