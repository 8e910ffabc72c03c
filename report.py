"""Render a run, compare two, import a pytest-benchmark file: `python report.py --help`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NEEDED = ("msgspec", "pandas", "seaborn", "jinja2", "itables")
MARK = "POOLBENCH_REEXEC"  # set in the second interpreter, so that it cannot start a third


def missing() -> list[str]:
    """The libraries that this interpreter lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def nox_python(root: Path) -> Path | None:
    """The interpreter of one of nox's environments that has what is needed; None without one."""
    for pattern in ("bin/python", "Scripts/python.exe"):
        for python in sorted((root / ".nox").glob(f"*/{pattern}")):
            home = python.parent.parent
            places = [*home.glob("lib/python*/site-packages"), home / "Lib" / "site-packages"]
            if any(all((place / name).exists() for name in NEEDED) for place in places):
                return python
    return None


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036  # an old interpreter must be told, not shown a SyntaxError
        print("report.py needs Python 3.10 or newer", file=sys.stderr)
        return 2
    lacking = missing()
    if lacking:
        python = None if os.environ.get(MARK) else nox_python(ROOT)
        if python is None:
            print(
                f"{sys.executable} lacks {', '.join(lacking)}: type `pip install nox && nox -s report`",
                file=sys.stderr,
            )
            return 2
        print(
            f"this Python lacks {', '.join(lacking)}; going on with {python.relative_to(ROOT)}",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os.environ[MARK] = "1"
        os.execv(str(python), [str(python), str(ROOT / "report.py"), *arguments])  # noqa: S606
    sys.path.insert(0, str(ROOT / "bench"))
    from poolbench.report.cli import main as run

    return run(arguments, root=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
