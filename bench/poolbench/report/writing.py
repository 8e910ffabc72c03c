"""Write into a report's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poolbench.core.errors import StoreError


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Make the folder; a write that fails without a file's name, as on a full disk, names the folder.

    Raises:
        StoreError: no room is left, or the disk fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(
            f"cannot write into {folder}: {error.strerror or error}; mend that, or name another folder with --out"
        ) from None
