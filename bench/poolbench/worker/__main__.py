"""A worker process: `INTERPRETER -m poolbench.worker REQUESTS REPLIES`, two pipes by number.

It answers one request after another until its end of the pipe closes, which is how it learns that
the run has ended, however that ended. Its output is the log; no message goes through it.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from poolbench import __version__
from poolbench.core.errors import reason_of, status_of
from poolbench.core.registry import load_suites
from poolbench.worker import isolation, messages, timing
from poolbench.worker.backends import BACKENDS
from poolbench.worker.messages import Hello, MessageError, Reply, Request, Start
from poolbench.worker.session import Session

# State that importing a user's file must not change, because all candidates share it.
SHARED_SETTINGS = ("it replaced", "it changed tf.", "it changed keras.", "it changed numpy.")
NOTHING = msgspec.Raw(messages.encode(None))
T = TypeVar("T")


class Pipes:
    """The worker's ends of its two pipes."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies

    def receive(self, type_: type[T]) -> T:
        """Return the next message; end the process when the pipe is closed."""
        head = self._requests.read(messages.LENGTH.size)
        if len(head) < messages.LENGTH.size:
            os._exit(0)
        (length,) = messages.LENGTH.unpack(head)
        message: T = messages.decode(self._requests.read(length), type_)
        return message

    def send(self, message: msgspec.Struct) -> None:
        """Write a message."""
        self._replies.write(messages.pack(message))
        self._replies.flush()


def main() -> None:
    """Say hello, start, and answer."""
    requests, replies = map(int, sys.argv[1:3])
    for number in (requests, replies):
        os.set_inheritable(number, False)
    _end_with(requests)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    for stream in (sys.stdout, sys.stderr):  # keep the output that precedes a crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    with os.fdopen(requests, "rb") as reading, os.fdopen(replies, "wb") as writing:
        pipes = Pipes(reading, writing)
        pipes.send(Hello(version=__version__))
        start = pipes.receive(Start)
        pipes.send(_start(start))
        modules = os.environ.get(messages.MODULES_VARIABLE, "").split(",")
        process, session = os.getpid(), Session(backend=BACKENDS[start.spec.backend])
        while True:
            reply = answer(session, pipes.receive(Request), modules)
            if os.getpid() != process:  # the child of a candidate's fork must not answer
                os._exit(0)
            pipes.send(reply)


def answer(session: Session, request: Request, modules: list[str]) -> Reply:
    """Call the request's function; convert an exception to plain data.

    A function whose first parameter is named `session` is given this process' own.
    """
    begin = timing.clock()  # the clock of the timing loop
    try:
        function = messages.find_function(request.function, modules)
        own = (session,) if messages.takes_session(function) else ()
        args, keywords = messages.arguments_of(function, request, len(own))
        value = function(*own, *args, **keywords)
        end = timing.clock()
        encoded = msgspec.Raw(messages.encode(value))
    except BaseException as error:  # noqa: BLE001 (a candidate may raise anything: it is a result)
        return _failure(request.number, error)
    return Reply(number=request.number, value=encoded, clock=(begin, end))


def _failure(number: int, error: BaseException) -> Reply:
    reason = reason_of(error)
    if isinstance(error, SystemExit):
        reason = f"it called sys.exit({error.code!r})"
    return Reply(number=number, status=status_of(error), reason=reason, value=NOTHING)


def _start(start: Start) -> Reply:
    """Import what the process needs for its work, the user's files last."""
    try:
        os.environ.pop("PYTHONSAFEPATH", None)
        if start.path:
            sys.path[:] = start.path
        tempfile.tempdir = os.environ["TMPDIR"]
        BACKENDS[start.spec.backend].start(start.spec)
        _load(start.files)
    except BaseException as error:  # noqa: BLE001 (a user's file may raise anything)
        return _failure(0, error)
    return Reply(number=0, value=NOTHING)


def _load(files: Sequence[str]) -> None:
    """Import the user's files.

    Raises:
        ImportError: one of them changes what candidates share.
    """
    before = isolation.read()
    load_suites(files)
    changed = [
        words
        for words in isolation.changes(before, isolation.read())
        if words.startswith(SHARED_SETTINGS)
    ]
    if changed:
        names = ", ".join(Path(file).name for file in files)
        raise ImportError(f"importing {names}: {'; '.join(changed)}")


def _end_with(requests: int) -> None:
    """End this process when the other end of the pipe closes, even while a task runs.

    The thread sleeps until then: it takes no time from what is measured.
    """

    def wait() -> None:
        poll = select.poll()
        poll.register(requests, 0)  # only the hang-up, which is always reported
        with contextlib.suppress(OSError):
            poll.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    try:
        main()
    except MessageError as error:
        sys.exit(f"poolbench.worker: {error}")
