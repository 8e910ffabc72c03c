"""The references of the further ops by their definitions; tests/test_op_failures.py compares implementations."""

import numpy as np
import pytest
from poolbench.core.case import make_case
from poolbench.core.registry import load_builtin
from poolbench.worker.inputs import make_inputs

REGISTRY = load_builtin()
IMAGES, SEQUENCES = (2, 6, 8, 5), (2, 9, 5)
CASES = {
    "spatial_max_pool": [
        {"shape": IMAGES},
        {"shape": (2, 7, 9, 5), "dtype": "float16"},
        {"shape": (2, 7, 9, 5), "window": 3},
        {"shape": (2, 7, 8, 5), "window": 3, "padding": "same"},
        {"shape": IMAGES, "data_format": "channels_first", "distribution": "relu"},
    ],
    "global_max_pool": [
        {"shape": IMAGES},
        {"shape": SEQUENCES, "dtype": "bfloat16"},
        {"shape": SEQUENCES, "data_format": "channels_first"},
        {"shape": IMAGES, "data_format": "channels_first", "distribution": "relu"},
    ],
    "gem_pool": [
        {"shape": IMAGES, "distribution": "relu"},
        {"shape": IMAGES, "distribution": "relu", "exponent": "learned"},
        {"shape": (2, 40, 40, 5), "distribution": "relu", "dtype": "float16"},
        {"shape": IMAGES, "exponent": "learned", "dtype": "float16"},
        {"shape": IMAGES, "data_format": "channels_first"},
    ],
}


def cases(op, **more):
    return [make_case(op=op, **fields, **more) for fields in CASES[op]]


@pytest.mark.parametrize("op", CASES)
def test_reference_gradient_is_the_slope_of_the_reference(op):
    rng = np.random.default_rng(0)
    for case in cases(op):
        inputs = [x.astype(np.float64) for x in make_inputs(case.replace(dtype="float64"), 0)]
        if case.get("distribution") == "relu":  # no slope at zero
            inputs[0] += np.where(inputs[0] == 0, rng.uniform(0.01, 0.02, inputs[0].shape), 0)
        reference = REGISTRY.ops[op].reference
        y = reference(case, *inputs)
        dy = rng.standard_normal(y.shape)
        ways = [rng.standard_normal(x.shape) for x in inputs]
        step = 1e-7
        ends = [reference(case, *(x + s * step * w for x, w in zip(inputs, ways))) for s in (1, -1)]
        slope = ((ends[0] - ends[1]) / (2 * step) * dy).sum()
        gradients = REGISTRY.ops[op].vjp(case, dy, *inputs)
        found = sum((gradient * way).sum() for gradient, way in zip(gradients, ways))
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-5), case


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (2, 3), (1, 2), (5, 1)])
def test_spatial_reference_is_the_maximum_of_each_window(window, stride, padding):
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 3))
    case = make_case(
        op="spatial_max_pool", shape=x.shape, window=window, stride=stride, padding=padding
    )
    starts = []
    for size in x.shape[1:3]:
        count = -(-size // stride) if padding == "same" else (size - window) // stride + 1
        missing = max((count - 1) * stride + window - size, 0) if padding == "same" else 0
        starts.append([i * stride - missing // 2 for i in range(count)])
    expected = [
        [x[:, max(i, 0) : i + window, max(j, 0) : j + window].max((1, 2)) for j in starts[1]]
        for i in starts[0]
    ]
    found = REGISTRY.ops["spatial_max_pool"].reference(case, x)
    np.testing.assert_array_equal(found, np.moveaxis(np.array(expected), 2, 0))


def test_gem_reference_with_p_of_one_is_the_mean_and_with_a_large_p_the_maximum():
    x = np.random.default_rng(0).uniform(0.5, 1, (2, 3, 4, 5))
    case = make_case(op="gem_pool", shape=x.shape)
    reference = REGISTRY.ops["gem_pool"].reference
    np.testing.assert_allclose(reference(case, x, 1.0), x.mean((1, 2)))
    np.testing.assert_allclose(reference(case, x, 400.0), x.max((1, 2)), rtol=1e-2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"dtype": "float16"}, True),
        ({"pool_size": 255}, False),
        ({"dtype": "float32"}, False),
        ({"mode": "xla"}, False),
        ({"mode": "eager"}, False),
        ({"direction": "forward"}, False),
    ],
)
def test_view_of_wide_windows_in_half_precision_has_a_known_failure(fields, expected):
    """tests/test_upstream.py shows the failure, where the processor has it."""
    asked = {
        "shape": (1, 2, 2, 512),
        "pool_size": 256,
        "dtype": "bfloat16",
        "mode": "graph",
        "direction": "training",
    }
    case = make_case(op="depth_max_pool", **asked | fields)
    failures = REGISTRY.candidates["depth_max_pool", "max_pool2d-view"].failures
    assert any(known.when(case) for known in failures) == expected
