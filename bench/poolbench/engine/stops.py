"""Ctrl-C and SIGTERM, raised as a KeyboardInterrupt that cannot get lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
# An import half done cannot be trusted, and an extension module may drop the exception: it is
# waited for. Python also ends with the signal's status where code in a string was interrupted.
IMPORT_SECONDS = 0.05
# Longer than the exception's way to who waits for it; one raised in a destructor or in a callback is dropped.
LOST_SECONDS = 2.0


class Stops:
    """The handler of the signals that end a run; later signals change nothing."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._first = self._due = 0.0  # the clock at the first signal, and when the next one counts

    def handle(self) -> None:
        """Raise KeyboardInterrupt at the first signal, and again until `ignore`."""
        self._before = self._before or _set(self._stop)

    def ignore(self) -> None:
        """Ignore the signals, since the first was noticed, or since there is nothing to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        before = _set(signal.SIG_IGN)
        self._before = self._before or before

    def restore(self) -> None:
        """Handle the signals as before."""
        self.ignore()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._first = self._first or now
        # A script that is itself imported imports for as long as it runs.
        importing = now < self._first + LOST_SECONDS and _is_importing(frame)
        wait_seconds = IMPORT_SECONDS if importing else LOST_SECONDS
        self._due = now + wait_seconds
        main = threading.main_thread().ident
        # To this thread: another one's would not wake it from a wait.
        self._timer = threading.Timer(wait_seconds, signal.pthread_kill, (main, number))
        self._timer.daemon = True
        self._timer.start()
        if not importing:
            raise KeyboardInterrupt


def _is_importing(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _set(handler: Any) -> dict[int, Any]:
    """Handle the signals in another way; return the previous handlers."""
    with contextlib.suppress(ValueError):  # pytest runs in a thread: signals go elsewhere
        return {number: signal.signal(number, handler) for number in NUMBERS}
    return {}
