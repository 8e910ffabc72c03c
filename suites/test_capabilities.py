"""What works where: every probe of every candidate, as a cell of the support matrix."""

from collections.abc import Callable

import poolbench.ops  # noqa: F401 (registers what ships)
import pytest
from poolbench.core.errors import StoreError, UsageError
from poolbench.core.records import MatrixCell
from poolbench.core.registry import REGISTRY, parse_axis
from poolbench.engine.run import Run
from poolbench.matrix.record import run_matrix
from poolbench.matrix.runner import Key, all_keys

Matrix = dict[Key, list[MatrixCell]]

# The layer to take away promises every row on the CPU; of the other implementations that ship, what does
# not work is the result. A user's own candidate is held to every row too.
PROMISED = ("depth_max_pool", "layer-depth_max_pool")
OUTCOMES: dict[str, Callable[..., object]] = {"unsupported": pytest.skip, "not_run": pytest.skip}


@pytest.fixture(scope="session")
def matrix(
    request: pytest.FixtureRequest,
    checks_only: bool,
    say: Callable[[str], None],
) -> Matrix:
    """The cells of the selected tests, filled once."""
    if checks_only:
        pytest.skip("the matrix is no part of a check (--benchmark-disable): nox -s matrix")
    run_in_progress: Run = request.getfixturevalue("run_in_progress")
    keys = [
        item.callspec.params["key"] for item in request.session.items if hasattr(item, "callspec")
        and "key" in item.callspec.params
    ]  # fmt: skip
    axes = dict(parse_axis(text) for text in request.config.getoption("--axis"))
    devices = [str(device) for device in axes.get("device", ())]
    exports = request.config.getoption("--exports")
    try:
        return run_matrix(run_in_progress, keys, exports=exports, devices=devices, say=say)
    except (UsageError, StoreError) as error:
        pytest.exit(str(error), returncode=4)


@pytest.mark.parametrize("key", all_keys(), ids="-".join)
def test_capability(key: Key, matrix: Matrix) -> None:
    """One probe of one candidate, on every device."""
    op, candidate, _ = key
    promised = (op, candidate) == PROMISED or not REGISTRY.candidates[op, candidate].builtin
    for cell in matrix.get(key, []):
        if cell.state == "pass":
            continue
        outcome = OUTCOMES.get(cell.state, pytest.fail if promised else pytest.xfail)
        outcome(f"{cell.device} {cell.state}: {cell.evidence}")
