"""Every snippet of every implementation that ships runs by itself and equals its candidate."""

import numpy as np
import pytest
from poolbench.core.case import make_case
from poolbench.core.registry import load_builtin
from poolbench.report.snippets import snippet
from poolbench.worker.inputs import make_inputs

REGISTRY = load_builtin()
SHAPE = (2, 4, 5, 12)
DEPTH = [
    {"pool_size": 3, "padding": "valid"},
    {"pool_size": 5, "padding": "valid"},
    {"pool_size": 5, "padding": "same", "dtype": "float16"},
    {"pool_size": 3, "padding": "valid", "data_format": "channels_first"},
]
MEAN = [{}, {"dtype": "float16"}, {"data_format": "channels_first"}]
CASES = {
    "depth_max_pool": [{"shape": SHAPE, **fields} for fields in DEPTH],
    "global_avg_pool": [{"shape": SHAPE, **fields} for fields in MEAN],
    "adaptive_pool": [
        {"shape": shape, "reduction": reduction, "output": 3}
        for reduction in ("average", "max")
        for shape in ((2, 6, 9, 4), (2, 7, 5, 4))
    ],
    "masked_global_pool": [
        {"shape": (3, 16, 5), "reduction": reduction, **fields}
        for reduction in ("average", "max")
        for fields in (*MEAN, {"mask_dtype": "int32"})
    ],
    "spatial_max_pool": [
        {"shape": (2, 7, 8, 5), "window": window, "padding": padding, **fields}
        for window in (2, 3)
        for padding in ("valid", "same")
        for fields in MEAN
    ],
    "global_max_pool": [{"shape": shape, **f} for shape in (SHAPE, SHAPE[1:]) for f in MEAN],
    "gem_pool": [
        {"shape": SHAPE, "exponent": p, **f} for p in ("constant", "learned") for f in MEAN
    ],
}
# Other test modules register candidates of their own.
PAIRS = sorted(
    pair
    for pair, entry in REGISTRY.candidates.items()
    if entry.builtin and "tensorflow" in entry.backends
)


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


def cases_of(op):
    return [make_case(op=op, mode="eager", **fields) for fields in CASES[op]]


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
    compared = 0
    for case in cases_of(op):
        inputs = [tf.constant(array) for array in make_inputs(case, 0)]
        space = {}
        exec(compile(snippet(case, name), name, "exec"), space)
        # A failure that is documented is the snippet's too: both raise, or the kernel serves both.
        try:
            expected = entry.build(case)(*inputs)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017
                space["pool"](*inputs)
            continue
        found = space["pool"](*inputs)
        assert found.dtype == expected.dtype
        tolerance = 0 if op == "depth_max_pool" else 1e-3 if case.dtype == "float16" else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
        compared += 1
    assert compared or name == "recipe-verbatim", "TensorFlow refuses the recipe in every case"


def test_paste_layer_is_written_without_keras_defaults():
    entry = REGISTRY.candidates["global_avg_pool", "layer-global_avg_pool"]
    case = REGISTRY.ops["global_avg_pool"].sweep("default").base_case
    assert entry.snippet(case).endswith("pool = keras.layers.GlobalAveragePooling2D()\n")
    told = entry.snippet(case.replace(data_format="channels_first", dtype="float16"))
    assert "GlobalAveragePooling2D(data_format='channels_first', dtype='float16')" in told
