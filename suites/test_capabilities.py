"""The support matrix: one cell per candidate and check. `poolbench matrix` runs this."""

from collections.abc import Callable

import poolbench.ops  # noqa: F401 (registers what ships)
import pytest
from poolbench.core.errors import UsageError, WorkerFailure
from poolbench.core.records import MatrixCell
from poolbench.core.registry import REGISTRY
from poolbench.matrix.record import run_matrix
from poolbench.matrix.runner import Key, all_keys
from poolbench.pytest_plugin import Benchmark

Matrix = dict[Key, list[MatrixCell]]

# The reusable layers and a user's own candidate must pass every check on the CPU. A failed check of another
# shipped implementation is a result.
PROMISED = {
    (op, f"layer-{op}")
    for op in ("depth_max_pool", "masked_global_pool", "adaptive_pool", "gem_pool")
}
OUTCOMES: dict[str, Callable[..., object]] = {"unsupported": pytest.skip, "not_run": pytest.skip}


@pytest.fixture(scope="module")
def filled() -> list[Matrix]:
    """Hold the matrix after the first test has filled it."""
    return []


@pytest.fixture
def matrix(request: pytest.FixtureRequest, poolbench: Benchmark, filled: list[Matrix]) -> Matrix:
    """Return the cells of the selected tests, filled once."""
    if poolbench.check_only:
        pytest.skip("the support matrix is no part of a check (--check-only): poolbench matrix")
    if not filled:
        params = [getattr(item, "callspec", None) for item in request.session.items]
        keys = [found.params["key"] for found in params if found and "key" in found.params]
        devices = [str(device) for device in poolbench.axis("device")]
        exports = poolbench.options["with_exports"]
        try:
            filled.append(
                run_matrix(
                    poolbench.run,
                    keys,
                    exports=exports,
                    devices=devices,
                    say=poolbench.say,
                    count=poolbench.count_ahead,
                )
            )
        except (UsageError, WorkerFailure) as error:
            pytest.exit(str(error), returncode=4)
    return filled[0]


@pytest.mark.parametrize("key", all_keys(), ids="-".join)
def test_capability(key: Key, matrix: Matrix) -> None:
    """Run one check of one candidate on every device."""
    op, candidate, _ = key
    promised = (op, candidate) in PROMISED or not REGISTRY.candidates[op, candidate].builtin
    for cell in matrix.get(key, []):
        if cell.state == "pass":
            continue
        outcome = OUTCOMES.get(cell.state, pytest.fail if promised else pytest.xfail)
        outcome(f"{cell.device} {cell.state}: {cell.evidence}")
