"""Format numbers in base units as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
NBYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def significant(value: float, digits: int = 3) -> str:
    """Return the value with this many significant digits and no exponent: 7.5, 120, 0.0042."""
    if value == 0 or not math.isfinite(value):
        return str(value) if not math.isfinite(value) else "0"
    # The exponent of the rounded value: 9.996 is 10.0.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    places = max(0, digits - 1 - exponent)
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text and places > 3 else text


def format_seconds(value: float) -> str:
    """Return '1.20 ms' from 0.0012; '' from nan."""
    return _scaled(value, SECONDS)


def format_nbytes(value: float) -> str:
    """Return '38.5 MiB' from bytes; '' from nan."""
    return _scaled(value, NBYTES)


def format_bandwidth(value: float) -> str:
    """Return '12.3 GB/s' from bytes per second; '' from nan."""
    return f"{significant(value / 1e9)} GB/s" if math.isfinite(value) else ""


def format_times(value: float) -> str:
    """Return '5.20x' from a ratio; '' from nan."""
    return f"{significant(value)}x" if math.isfinite(value) else ""


def format_share(value: float) -> str:
    """Return '91%' from 0.91, '1.3%' from 0.013; '' from nan."""
    return f"{significant(100 * value, 2)}%" if math.isfinite(value) else ""


def format_count(value: float) -> str:
    """Return '12' from a count; '' from nan."""
    return f"{int(value)}" if math.isfinite(value) else ""


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    if not math.isfinite(value):
        return ""
    shown = float(f"{abs(value):.2e}")  # 999.6 µs are 1.00 ms
    size, unit = next((one for one in units if shown >= one[0]), units[-1])
    return f"{significant(value / size)} {unit}"


FORMATTERS: dict[str, Callable[[float], str]] = {
    "s": format_seconds,
    "B": format_nbytes,
    "B/s": format_bandwidth,
    "x": format_times,
    "%": format_share,
    "": format_count,
}


def format_value(value: float, unit: str) -> str:
    """Return a value with its unit: `format_value(0.0012, "s") == "1.20 ms"`; units are the keys of FORMATTERS."""
    return FORMATTERS[unit](value)


def with_interval(value: float, low: float, high: float, unit: str = "x") -> str:
    """Return '5.20x [4.90, 5.50]', or '5.20x' without an interval; '' from nan."""
    if not math.isfinite(value):
        return ""
    middle = format_value(value, unit)
    if not (math.isfinite(low) and math.isfinite(high)):
        return middle
    scale, digits = (100, 2) if unit == "%" else (1, 3)
    ends = ", ".join(significant(scale * end, digits) for end in (low, high))
    return f"{middle} [{ends}]"


def inverse(value: float, low: float, high: float) -> tuple[float, float, float]:
    """Return a time ratio with its interval as a speed-up: 1/x, the ends exchanged."""
    speed, slowest, fastest = (1 / end if end else math.nan for end in (value, high, low))
    return speed, slowest, fastest


def join_names(names: list[str] | tuple[str, ...]) -> str:
    """Return 'a, b and c'."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


# Of a terminal: colours and cursor (CSI), titles and links (OSC), and the rest.
ESCAPE_CODES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]"
)
_UNUSUAL = re.compile(r"[^\n\t -~]")


def escape_controls(text: str) -> str:
    """Return text without a terminal's codes; other control characters and lone surrogates are spelled out."""
    return _UNUSUAL.sub(_spell_out, ESCAPE_CODES.sub("", text))


def _spell_out(found: re.Match[str]) -> str:
    char = found[0]
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def one_line(text: str, limit: int = 300) -> str:
    """Return the text without line breaks or control characters, cut to a limit."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in ESCAPE_CODES.sub("", text))
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


MARKDOWN = str.maketrans({**{char: "\\" + char for char in "\\`*[]|"}, "<": "&lt;", ">": "&gt;"})


def markdown_cell(text: str) -> str:
    """Escape text so that it neither ends a Markdown cell nor starts markup in it."""
    return one_line(text).translate(MARKDOWN)
