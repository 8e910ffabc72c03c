"""Render a run with the first Python that can: `python report.py [RUN]`, the same as `poolbench report`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NEEDED = ("click", "msgspec", "pandas", "seaborn", "jinja2", "itables")
MARK = "POOLBENCH_REEXEC"  # set in the second interpreter, so that it cannot start a third


def find_nox_python() -> Path | None:
    """Return the interpreter of one of nox's environments that has what is needed; None without one."""
    for python in sorted(
        (*ROOT.glob(".nox/*/bin/python"), *ROOT.glob(".nox/*/Scripts/python.exe"))
    ):
        home = python.parent.parent
        for place in (*home.glob("lib/python*/site-packages"), home / "Lib" / "site-packages"):
            if all((place / name).exists() for name in NEEDED):
                return python
    return None


missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 10) or missing:
    other = None if os.environ.get(MARK) else find_nox_python()
    lacks = ", ".join(missing) or "Python 3.10 or newer"
    if other is None:
        sys.exit(
            print(
                f"{sys.executable} lacks {lacks}: pip install nox && nox -s report", file=sys.stderr
            )
            or 2
        )
    print(
        f"this Python lacks {lacks}; going on with {other.relative_to(ROOT)}",
        file=sys.stderr,
        flush=True,
    )
    os.environ[MARK] = "1"
    os.execv(str(other), [str(other), *sys.argv])  # noqa: S606
sys.path.insert(0, str(ROOT / "bench"))
os.environ.setdefault("POOLBENCH_RESULTS", str(ROOT / "results"))
from poolbench.cli import main  # noqa: E402

main(
    [*([] if sys.argv[1:2] in (["compare"], ["import"]) else ["report"]), *sys.argv[1:]],
    prog_name="poolbench",
)
