"""Every snippet of every implementation that ships runs by itself and equals its candidate."""

import numpy as np
import pytest
from poolbench.core.case import make_case
from poolbench.core.registry import load_builtin
from poolbench.report.snippets import snippet

REGISTRY = load_builtin()
SHAPE = (2, 4, 5, 12)
DEPTH = [
    {"pool_size": 3, "padding": "valid"},
    {"pool_size": 5, "padding": "valid"},
    {"pool_size": 5, "padding": "same", "dtype": "float16"},
    {"pool_size": 3, "padding": "valid", "data_format": "channels_first"},
]
MEAN = [{}, {"dtype": "float16"}, {"data_format": "channels_first"}]
CASES = {"depth_max_pool": DEPTH, "global_avg_pool": MEAN}
# The further ops run the code to paste: tests/test_further_ops.py compares it with the reference.
PAIRS = sorted(
    (op, name) for op in CASES for name, entry in REGISTRY.of(op).items() if entry.builtin
)


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def cases_of(op):
    return [make_case(op=op, shape=SHAPE, mode="eager", **fields) for fields in CASES[op]]


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_snippet_is_at_most_ten_lines_and_names_no_harness(op, name):
    for case in cases_of(op):
        code = snippet(case, name)
        assert len(code.splitlines()) <= 10
        assert "case" not in code
        assert max(map(len, code.splitlines())) <= 110
        compile(code, name, "exec")


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_snippet_in_a_fresh_namespace_gives_the_candidate_s_outputs(tf, op, name):
    entry = REGISTRY.candidates[op, name]
    rng = np.random.default_rng(0)
    for case in cases_of(op):
        n, h, w, c = case.shape
        shape = (n, h, w, c) if case.data_format == "channels_last" else (n, c, h, w)
        x = tf.constant(rng.normal(size=shape), case.dtype)
        space = {}
        exec(compile(snippet(case, name), name, "exec"), space)
        # A failure that is documented is the snippet's too: both raise, or the kernel serves both.
        try:
            expected = entry.build(case)(x)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017
                space["pool"](x)
            continue
        found = space["pool"](x)
        assert found.dtype == expected.dtype
        tolerance = 0 if op == "depth_max_pool" else 1e-3 if case.dtype == "float16" else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
