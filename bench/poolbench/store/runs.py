"""Runs on disk: find one, name a new one, and tell whether a run may be continued here."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import Environment, Header
from poolbench.store.journal import JOURNAL

# The folder of the traces, under a run's traces/, as TensorBoard's profile plugin wants it.
PROFILES = Path("plugins") / "profile"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
# Options of which a change would make the rest of a resumed run another measurement.
COMPARED_OPTIONS = ("seed", "processes", "budget_seconds", "precision", "margin")


def check_run_name(name: str) -> str:
    """Return the name of a run.

    Raises:
        UsageError: it is none.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(
            f"a run's name is letters, digits, '.', '_', '-'; got {name[:80]!r} (--run NAME)"
        )
    return name


def has_journal(folder: Path) -> bool:
    """Whether the folder holds a run."""
    path = folder / JOURNAL
    return path.is_file() and path.stat().st_size > 0


def runs_newest_first(results: Path, *, reference: bool = False) -> list[Path]:
    """Return the folders of runs, the one written last first; `reference`: those that ship too."""
    journals = [
        path for path in results.glob(f"*/{JOURNAL}")
        if reference or not path.parent.name.startswith("reference")
    ]  # fmt: skip
    return [path.parent for path in sorted(journals, key=lambda path: -path.stat().st_mtime)]


def newest_run(
    results: Path, fits: Callable[[Path], bool] = lambda _: True, *, reference: bool = False
) -> Path | None:
    """Return the run written last of those that fit; None without any."""
    return next(filter(fits, runs_newest_first(results, reference=reference)), None)


def find_run(results: Path, given: str | None) -> Path:
    """Return the folder of the run that the user means.

    Args:
        results: folder that holds runs.
        given: a path, a run's name under `results`, or None for the newest, and without a run of one's
            own the reference run.

    Raises:
        StoreError: there is none.
    """
    if given is not None:
        for folder in (Path(given), results / given):
            if (folder / JOURNAL).is_file():
                return folder
        if Path(given).name == JOURNAL and Path(given).is_file():
            return Path(given).parent
        raise StoreError(
            f"no {JOURNAL} in {given!r}, nor in {results.name}/{given}; name a run's folder"
        )
    if (newest := newest_run(results)) is not None:
        return newest
    if (results / "reference" / JOURNAL).is_file():
        return results / "reference"
    raise StoreError(f"no run under {results.name}/ yet: measure one with `poolbench run`")


def new_run_folder(results: Path, label: str) -> Path:
    """Return results/<UTC time>-<label>, one that does not exist yet."""
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = results / f"{stamp}-{label}"
    number = 1
    while (folder / JOURNAL).exists():
        number += 1
        folder = results / f"{stamp}-{label}-{number}"
    return folder


def source_digests(files: Sequence[Path]) -> dict[str, str]:
    """Return what the code is: {'code': digest of this package, 'mine.py': digest of a user's file, ...}."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    digests = {"code": digest.hexdigest()[:16]}
    for path in files:
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return digests


def differing_fields(old: Environment, new: Environment) -> list[str]:
    """Return the names of what differs between two environments: 'tensorflow', 'processor', 'commit', ..."""
    names = []
    for part in ("machine", "devices", "versions", "settings", "source"):
        before, after = getattr(old, part), getattr(new, part)
        names += [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return names


def differing_options(header: Header, asked: Mapping[str, Any]) -> list[str]:
    """Return the options, and the seed, in which a run differs from what is asked now."""
    before = dict(header.options) | {"seed": header.seed}
    return [key for key in COMPARED_OPTIONS if key in before and before[key] != asked.get(key)]
