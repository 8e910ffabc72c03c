"""The options of a run: `poolbench run --NAME` and `pytest --poolbench-NAME` read this one table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poolbench.core.errors import UsageError

SWEEPS = ("default", "quick", "full", "gpu", "backends")


if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic in click's newest releases only


class Pattern(ParamType):
    """A value whose text must match a pattern; `convert` returns what `read` makes of the match."""

    def __init__(self, name: str, pattern: str, example: str) -> None:
        self.name = name
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value; a value that is no text has been converted before."""
        if not isinstance(value, str):
            return value
        found = self._pattern.fullmatch(value.strip())
        result = None if found is None else self.read(found)
        if result is None:
            self.fail(f"expected {self._example}; got {value!r}", param, ctx)
        return result

    def read(self, found: re.Match[str]) -> Any:
        """Return the value of a match; None where it is out of range."""
        return found[0]


class _Whole(Pattern):
    def read(self, found: re.Match[str]) -> int:
        return int(found[0])


class _Percent(Pattern):
    def read(self, found: re.Match[str]) -> float | None:
        value = float(found[1]) / (100 if found[2] else 1)
        return value if value < 1 else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


class _Duration(Pattern):
    def read(self, found: re.Match[str]) -> float | None:
        units = {"": 1, "s": 1, "min": 60, "h": 3600}
        return _finite(float(found[1]) * units[found[2].lower()]) or None


class _Bytes(Pattern):
    def read(self, found: re.Match[str]) -> int | None:
        return (
            int(_finite(float(found[1]) * 1024 ** "_kmgt".index(found[2].lower() or "_"))) or None
        )


class _Columns(Pattern):
    def read(self, found: re.Match[str]) -> tuple[str, tuple[str, ...]]:
        return found[1].strip(), tuple(value.strip() for value in found[2].split(","))


AXIS = Pattern("NAME=V1,V2", r"[A-Za-z_]\w*\s*=.+", "an axis and its values, such as pool_size=2,3")
COLUMN = _Columns(
    "COLUMN=V1,V2", r"([^=]+)=(.+)", "a column and its values, such as mode=xla,graph"
)
COUNT = _Whole("N", r"[1-9]\d{0,3}", "a number from 1 to 9999, such as 5")
INTEGER = _Whole("N", r"\d{1,18}", "a whole number from 0, such as 7")
PERCENT = _Percent("PERCENT", r"(\d+(?:\.\d+)?)\s*(%?)", "a share below 100%, such as 5% or 0.05")
DURATION = _Duration(
    "SECONDS", r"(\d+(?:\.\d+)?)\s*(s|min|h|)", "a time above 0, such as 10 or 2min"
)
BYTES = _Bytes("SIZE", r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", "a size above 0, such as 8GiB")
RUN = Pattern(
    "NAME", r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", "a run's name: letters, digits, '.', '_', '-'"
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a run: text or, with `flag`, a switch."""

    name: str
    help: str
    type: ParamType = click.STRING
    metavar: str | None = None
    default: Any = None
    multiple: bool = False
    flag: bool = False

    @property
    def key(self) -> str:
        """The name as a Python identifier."""
        return self.name.replace("-", "_")

    def parse(self, value: Any) -> Any:
        """Convert what pytest read.

        Raises:
            UsageError: the value does not fit; the text names the option.
        """
        try:
            if self.multiple:
                return tuple(self.type.convert(text, None, None) for text in value)
            return value if value is None or self.flag else self.type.convert(value, None, None)
        except click.BadParameter as error:
            raise UsageError(f"--poolbench-{self.name}: {error.message}") from None


OPTIONS = (
    Option(name="sweep", type=click.Choice(SWEEPS), metavar="|".join(SWEEPS),
           help="Which sweep of each op. Default: default; quick with --check-only."),
    Option(name="op", multiple=True, metavar="NAME", help="Run this op alone; may be repeated."),
    Option(name="axis", type=AXIS, multiple=True, help="Replace the values of an axis."),
    Option(name="candidates", multiple=True, metavar="FILE",
           help="A Python file that registers candidates or ops."),
    Option(name="processes", type=COUNT, help="Fresh processes per race. Default: by sweep."),
    Option(name="budget", type=DURATION, help="Seconds of rounds per race. Default: by sweep."),
    Option(name="precision", type=PERCENT, default="3%", help="Half-width of an interval that is enough."),
    Option(name="margin", type=PERCENT, default="5%", help="Equivalence margin of the verdicts."),
    Option(name="memory", type=BYTES,
           help="Memory that a worker may hold. Default: three quarters of the machine's."),
    Option(name="task-timeout", type=DURATION, default="60", help="Seconds that one task of a worker may take."),
    Option(name="seed", type=INTEGER, default="0", help="Seed of the inputs and of the order of rounds."),
    Option(name="run", type=RUN, help="Name of the run. Default: the time and the sweep."),
    Option(name="resume", type=RUN, help="Go on with this run."),
    Option(name="allow-different", multiple=True, metavar="FIELD",
           help="A field in which a resumed run may differ: tensorflow-cpu, commit, ..."),
    Option(name="results", metavar="FOLDER", default="results", help="Folder that holds the runs."),
    Option(name="ray-address", metavar="ADDRESS",
           help="Race on the nodes of a Ray cluster: HOST:PORT, ray://HOST:PORT or auto."),
    Option(name="with-exports", flag=True, help="Check TFLite and ONNX too, in the support matrix."),
    Option(name="dry-run", flag=True, help="Print the cases and the predicted time; run nothing."),
    Option(name="check-only", flag=True, help="Check the candidates; time and store nothing."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks.

    Attributes:
        options: value of each option of OPTIONS by its name in Python.
        files: the user's files that register candidates.
    """

    options: dict[str, Any]
    files: tuple[Path, ...]

    def axes(self, known: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """Return the values of those axes to replace that are known.

        Raises:
            UsageError: a value is not one of the axis.
        """
        from poolbench.core.registry import parse_axis  # NumPy: --help need not wait for it

        names = set(known)
        texts = [t for t in self.options["axis"] if t.partition("=")[0].strip() in names]
        axes = dict(parse_axis(text) for text in texts)
        if self.options["ray_address"] is None:
            refuse_kinds(map(str, axes.get("device", ())))
        return axes


def refuse_kinds(devices: Iterable[str]) -> None:
    """Refuse a kind of accelerator where no cluster could know it.

    Raises:
        UsageError: a device has no number.
    """
    for device in devices:
        if not device.partition(":")[2].isdigit():
            raise UsageError(
                f"{device} names a kind of accelerator in a Ray cluster (--ray-address); on this "
                "machine devices are numbered: --axis device=gpu:0"
            )
