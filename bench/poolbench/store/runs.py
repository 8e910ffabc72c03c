"""Find runs on disk, name new ones, and decide whether a run may be resumed here."""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import Environment, Header
from poolbench.core.text import one_line
from poolbench.store.journal import JOURNAL, MAX_LINE_NBYTES

# The folder of traces within a run, as TensorBoard's profile plugin expects it.
PROFILES = Path("plugins") / "profile"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
PARTS = ("machine", "devices", "versions", "settings", "source")  # of an Environment
# Options that a resumed run may not change, because the rest would be a different measurement.
COMPARED_OPTIONS = ("seed", "processes", "budget_seconds", "precision", "margin")


def check_run_name(name: str) -> str:
    """Return the name of a run after checking it.

    Raises:
        UsageError: the name is invalid.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(
            f"a run's name is letters, digits, '.', '_', '-'; got {name[:80]!r} (--run NAME)"
        )
    return name


def has_journal(folder: Path) -> bool:
    """Whether the folder holds a run: a kill before the header is written leaves an empty journal."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            return file.readline(MAX_LINE_NBYTES + 1).endswith(b"\n")
    except OSError:
        return False


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
    """Return the newest run that fits; None if there is none."""
    runs = filter(has_journal, runs_newest_first(results, reference=reference))
    return next(filter(fits, runs), None)


def find_run(
    results: Path, given: str | None, say: Callable[[str], object] = lambda _: None
) -> Path:
    """Return the folder of the run with the given name or path.

    Args:
        results: folder that holds runs.
        given: a path, a run's name under `results`, or None for the newest, and without a run of one's
            own the reference run.
        say: takes a line about each newer run that is skipped, because it holds nothing.

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
    for folder in runs_newest_first(results):
        if has_journal(folder):
            return folder
        say(f"{folder.name} is skipped: it ended before anything was stored")
    if (results / "reference" / JOURNAL).is_file():
        return results / "reference"
    raise StoreError(f"no run under {results.name}/ yet: measure one with `poolbench run`")


def new_run_folder(results: Path, label: str) -> Path:
    """Return results/<UTC time>-<label>, a folder that does not exist yet."""
    stamp = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d-%H%M%S")
    folder = results / f"{stamp}-{label}"
    number = 1
    while (folder / JOURNAL).exists():
        number += 1
        folder = results / f"{stamp}-{label}-{number}"
    return folder


def source_digests(files: Sequence[Path]) -> dict[str, str]:
    """Return digests of the code: {'code': of this package, 'mine.py': of a user's file, ...}.

    Modules that only read what was measured are not of it: no measurement depends on them.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    readers = {
        *(package / "report").rglob("*.py"),
        package / "cli.py",
        package / "compare_commands.py",
    }
    for path in sorted({*package.rglob("*.py")} - readers):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    digests = {"code": digest.hexdigest()[:16]}
    of_name: dict[str, Any] = {}  # two files may have one name
    for path in files:
        of_name.setdefault(path.name, hashlib.sha256()).update(path.read_bytes())
    digests |= {name: found.hexdigest()[:16] for name, found in of_name.items()}
    return digests


def field_names(*environments: Environment) -> set[str]:
    """Return the names of all fields of these environments: 'tensorflow', 'processor', 'commit', ..."""
    return {name for one in environments for part in PARTS for name in getattr(one, part)}


def check_allowed(names: Collection[str], known: Collection[str]) -> None:
    """Raise UsageError for a name of `--allow-different` that neither run has."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"--allow-different takes the name of a field that one of the runs has; got "
                f"{one_line(name, 40)!r}{f', did you mean {near[0]}?' if near else ''}"
            )


def differing_fields(old: Environment, new: Environment) -> list[str]:
    """Return the names of the fields that differ."""
    names = []
    for part in PARTS:
        before, after = getattr(old, part), getattr(new, part)
        names += [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return names


def differing_options(header: Header, asked: Mapping[str, Any]) -> list[str]:
    """Return the options, and the seed, in which a stored run differs from the present request."""
    before = dict(header.options) | {"seed": header.seed}
    return [key for key in COMPARED_OPTIONS if key in before and before[key] != asked.get(key)]
