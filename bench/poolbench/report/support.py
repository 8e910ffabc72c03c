"""Find the support matrix of a run: its own, else that of a reference run of the same kind."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from poolbench.core.errors import StoreError
from poolbench.core.records import MatrixCell
from poolbench.report.frame import RunFrame
from poolbench.store.journal import JOURNAL, StoredRun, read_run

# Reference runs ship with a checkout, not with a wheel.
CHECKOUT = Path(__file__).parents[3] / "results"
STANDS_IN = "Checks of the reference run stand in: same op, device kind and TensorFlow version."


@dataclass(frozen=True, kw_only=True)
class Support:
    """Cells of the support matrix of one op on one device; `borrowed`: they are the reference run's."""

    op: str
    device: str
    cells: tuple[MatrixCell, ...]
    borrowed: bool = False

    def of(self, candidate: str) -> list[MatrixCell]:
        """Return the cells of a candidate that were run."""
        return [c for c in self.cells if c.candidate == candidate and c.state != "not_run"]

    def caveats(self, candidate: str) -> list[str]:
        """Return what the matrix says against a candidate, one line per failed check."""
        return [
            f"{cell.probe}: {cell.state}" + (f" ({cell.evidence})" if cell.evidence else "")
            for cell in self.of(candidate)
            if cell.state != "pass"
        ]


def kind_of(device: str) -> str:
    """Return 'cpu' from 'cpu:0'."""
    return device.partition(":")[0]


def supports(loaded: RunFrame) -> list[Support]:
    """Return one support matrix per op and device of the run; of a reference run if it has none."""
    own = loaded.run.capabilities
    pairs = list(zip(loaded.table["op"], loaded.table["device"], strict=True))
    found = []
    for op, device in dict.fromkeys([*pairs, *((c.op, c.device) for c in own)]):
        cells = tuple(c for c in own if (c.op, c.device) == (op, device))
        other = () if cells else _reference_cells(loaded.run, op, device)
        if cells or other:
            found.append(Support(op=op, device=device, cells=cells or other, borrowed=not cells))
    return found


def _reference_cells(run: StoredRun, op: str, device: str) -> tuple[MatrixCell, ...]:
    version, beside = _tensorflow(run), run.path.absolute().parent
    places = [*sorted(beside.glob("reference*")), *sorted(CHECKOUT.glob("reference*"))]
    for folder in places:
        if version and folder != run.path.absolute() and (folder / JOURNAL).is_file():
            theirs, cells = _cells_in(folder)
            wanted = [c for c in cells if c.op == op and kind_of(c.device) == kind_of(device)]
            if theirs == version and wanted:
                return tuple(c for c in wanted if c.device == wanted[0].device)
    return ()


@functools.lru_cache(maxsize=4)
def _cells_in(folder: Path) -> tuple[str, Sequence[MatrixCell]]:
    try:
        run = read_run(folder)
    except StoreError:
        return "", ()
    return _tensorflow(run), run.capabilities


def _tensorflow(run: StoredRun) -> str:
    versions = run.header.environment.versions
    return next((v for name, v in versions.items() if name.startswith("tensorflow")), "")


def failed_checks(cells: Iterable[MatrixCell]) -> dict[tuple[str, str], int]:
    """Return by (op, candidate) the number of cells of the support matrix that are not 'pass'."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for cell in cells:
        counts[cell.op, cell.candidate] += cell.state not in ("pass", "not_run")
    return counts
