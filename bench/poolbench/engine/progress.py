"""Signs of life of a run: a live line on a terminal, a line every 30 s in a log."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

INTERVAL_SECONDS = 30.0  # between two lines of a log
REFRESH_SECONDS = 0.5
# Below this share of the work the time left is predicted; above it, it is measured.
LEARNT_SHARE = 0.05


def format_minutes(seconds: float) -> str:
    """Return '8 min' or '40 s'."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def describe_shares(seconds: Mapping[str, float], wall_seconds: float) -> str:
    """Describe where the time went: 'wall 512 s: samples 41%, warmup 22%, ...'."""
    parts = ", ".join(
        f"{kind} {100 * value / max(wall_seconds, 1e-9):.0f}%"
        for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return f"wall {wall_seconds:.0f} s: {parts}"


class Progress:
    """Progress of the work: done, elapsed, left, and the present task. Use as a context.

    Args:
        total: units of work, such as races.
        predicted_seconds: what the work will take, as predicted.
        most_seconds: after which it ends, however much is done.
        write: prints a line of a log.
        terminal: a terminal that shows a live line instead; None in a log.
        partial: units of work done on what is not finished yet.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        *,
        write: Callable[[str], None],
        predicted_seconds: float = 0.0,
        most_seconds: float = math.inf,
        terminal: IO[str] | None = None,
        partial: Callable[[], float] = float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = 0
        self.now = "starting"
        self._write = write
        self._predicted = predicted_seconds
        self._most = most_seconds
        self._partial = partial
        self._share = 0.0
        self._clock = clock
        self._start = self._said = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._live = _Live(terminal) if terminal is not None else None

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Show the live line, and keep it or the log moving from a thread."""
        self.tick()
        self._thread = threading.Thread(target=self._keep_moving, daemon=True, name="progress")
        self._thread.start()

    def stop(self) -> None:
        """Remove the live line; may be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._live is not None:
            self._live.close()
            self._live = None

    def advance(self, units: int = 1) -> None:
        """Count units of work as done."""
        self.done += units

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._said = self._clock()
        if self._live is not None:
            self._live.print(line)
        else:
            self._write(line)

    def tick(self) -> None:
        """Update the live line, or print a line if a log has been silent for 30 s."""
        if self._live is not None:
            self._live.show(self.share(), self.describe())
        elif self._clock() - self._said >= INTERVAL_SECONDS:
            self.say(self.describe())

    def share(self) -> float:
        """Return the share of the work that is done, from 0 to 1; it never falls."""
        # The work continues in another thread while it is counted here.
        with contextlib.suppress(RuntimeError):
            self._share = max(self._share, (self.done + self._partial()) / max(self.total, 1))
        return min(1.0, self._share)

    def left_seconds(self) -> float | None:
        """Return the expected time left; None if unknown."""
        elapsed, share = self._clock() - self._start, self.share()
        left = elapsed * (1 - share) / share if share >= LEARNT_SHARE else self._predicted - elapsed
        return max(0.0, min(left, self._most - elapsed)) or None

    def describe(self) -> str:
        """Return '4 of 12 done, 2 min elapsed, about 4 min left; now ...'."""
        elapsed, left = self._clock() - self._start, self.left_seconds()
        text = f"{self.done} of {self.total} done, {format_minutes(elapsed)} elapsed"
        if left is not None and self.done < self.total:
            text += f", about {format_minutes(left)} left"
        return text + (f"; {self.now}" if self.now else "")

    def _keep_moving(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            self.tick()


class _Live:
    """A bar and a text at the foot of a terminal."""

    def __init__(self, terminal: IO[str]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self._bar, self._text, self._table = ProgressBar, Text, Table
        self._console = Console(file=terminal, force_terminal=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True,
                          redirect_stdout=False, redirect_stderr=False)  # fmt: skip
        self._live.start()

    def show(self, share: float, text: str) -> None:
        row = self._table.grid(padding=(0, 1))
        row.add_row(
            self._bar(total=1.0, completed=share, width=24),
            self._text(f"{share:.0%} {text}", overflow="ellipsis", no_wrap=True),
        )
        self._live.update(row, refresh=True)

    def print(self, line: str) -> None:
        self._console.print(self._text(line), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def own_terminal() -> IO[str] | None:
    """Return the terminal behind standard output, which pytest redirects while a test runs."""
    try:
        if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            return None
        return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="replace")
    except (OSError, ValueError, AttributeError):
        return None


def describe_fastest(measurements: Mapping[str, Any], baseline: str) -> str:
    """Return 'fastest sort, 0.71 of reduce_max', over the correct candidates."""
    from poolbench.engine.recorder import middle

    times = {
        name: middle(m.samples.seconds)
        for name, m in measurements.items()
        if m.status == "ok" and len(m.samples) and "faster-than-limit" not in m.flags
    }
    if not times:
        return "no correct candidate"
    best = min(times, key=lambda name: times[name])
    if baseline not in times or best == baseline:
        return f"fastest {best}"
    return f"fastest {best}, {times[best] / times[baseline]:.2f} of {baseline}"
