"""Documented failures of implementations still happen, and nothing else does.

Where a candidate of a table no longer fails, it is mended upstream: take its failure out of the op's file.
"""

import re

import pytest
from poolbench.core.registry import load_builtin
from poolbench.worker.backends.tensorflow import TensorFlowBackend
from poolbench.worker.check import check
from poolbench.worker.inputs import make_inputs
from poolbench.worker.session import bind

tf = pytest.importorskip("tensorflow")
REGISTRY = load_builtin()
MASKED, ADAPTIVE = "masked_global_pool", "adaptive_pool"
SPATIAL, GLOBAL, GEM = "spatial_max_pool", "global_max_pool", "gem_pool"


def reason_of(entry, case):
    """Return why the candidate is wrong in the case, or its error; '' if it is right."""
    inputs = make_inputs(case, 0)
    try:
        outputs = bind(entry, case)(*(tf.constant(array) for array in inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return check(REGISTRY.ops[case.op], case, inputs, tuple(y.numpy() for y in outputs)).reason


# Small cases of each op, and the candidates that fail there on any machine.
OTHER = {"multiply-mean", "add-lowest"}  # of an average: one divides by all steps, one is a maximum
MEANS = {"multiply-mean", "matmul-weights", "einsum"}
MEAN = {"shape": (4, 24, 6), "distribution": "relu"}
MAX = {"shape": (4, 24, 6), "reduction": "max", "distribution": "negative"}
NOT_MAX = {"matmul-weights", "resize-area", "cumsum"}
UNEQUAL = {"pool2d-strides", "pool2d-same", "reshape-reduce"}
IMAGES, SEQUENCES = {"shape": (2, 6, 8, 5)}, {"shape": (2, 9, 5)}
RELU, TRAINING = {"distribution": "relu"}, {"direction": "training"}
OVERLAPPING, FIRST = {"shape": (2, 7, 8, 5), "window": 3}, {"data_format": "channels_first"}
LEARNED, HALF = {"exponent": "learned"}, {"dtype": "float16"}
NEGATIVE = {"shape": (2, 5, 5, 300), "distribution": "normal"}
ODD, EVEN = {"shape": (2, 24, 17, 3), "output": 7}, {"shape": (2, 12, 12, 3), "output": 4}
CASES = [
    (MASKED, MEAN, OTHER),
    (MASKED, MEAN | {"direction": "training", "mask_dtype": "int32"}, OTHER),
    (
        MASKED,
        MEAN | {"data_format": "channels_first", "mask_dtype": "float32", "padded_end": "pre"},
        OTHER,
    ),
    (
        MASKED,
        MEAN | {"shape": (2, 3000, 6), "dtype": "float16"},
        OTHER | {"layer-stock", "multiply-reduce", "ragged-boolean_mask"},
    ),
    (
        MASKED,
        MEAN | {"empty_row": "yes"},
        OTHER | MEANS | {"layer-stock", "multiply-reduce", "ragged-boolean_mask"},
    ),
    (MASKED, MAX, MEANS | {"layer-stock", "multiply-reduce"}),
    (MASKED, MAX | {"direction": "training"}, MEANS | {"layer-stock", "multiply-reduce"}),
    (MASKED, MAX | {"dtype": "float16"}, MEANS | {"layer-stock", "multiply-reduce", "add-lowest"}),
    (
        MASKED,
        MAX | {"empty_row": "yes"},
        MEANS | {"layer-stock", "multiply-reduce", "add-lowest", "ragged-boolean_mask"},
    ),
    (ADAPTIVE, EVEN, set()),
    (ADAPTIVE, EVEN | {"direction": "training"}, {"resize-area"}),
    (ADAPTIVE, EVEN | {"reduction": "max", "direction": "training"}, NOT_MAX),
    (ADAPTIVE, ODD, UNEQUAL | {"resize-area"}),
    (ADAPTIVE, ODD | {"direction": "training"}, UNEQUAL | {"resize-area"}),
    (ADAPTIVE, ODD | {"reduction": "max"}, UNEQUAL | NOT_MAX),
    (ADAPTIVE, {"shape": (2, 3, 3, 3), "output": 5}, UNEQUAL | {"resize-area"}),
    (ADAPTIVE, ODD | {"output": 1, "mode": "graph"}, {"layer-stock"}),
    (
        ADAPTIVE,
        {"shape": (2, 112, 112, 3), "output": 1, "dtype": "float16", "distribution": "relu"},
        {"pool2d-strides", "pool2d-same", "reshape-reduce", "slices-by_window"},
    ),
    (SPATIAL, IMAGES | TRAINING, set()),
    (SPATIAL, {"shape": (2, 7, 9, 5)} | HALF | TRAINING, set()),
    (SPATIAL, OVERLAPPING | TRAINING, {"reshape-reduce_max"}),
    (SPATIAL, OVERLAPPING | TRAINING | {"padding": "same"}, {"reshape-reduce_max"}),
    (SPATIAL, IMAGES | RELU | TRAINING | FIRST, {"max_pool2d", "patches"}),
    (GLOBAL, IMAGES | TRAINING, set()),
    (GLOBAL, SEQUENCES | {"dtype": "bfloat16"}, set()),
    (GLOBAL, SEQUENCES | RELU | TRAINING | FIRST, {"max_pool2d"}),
    (GEM, IMAGES | RELU | TRAINING, set()),
    (GEM, IMAGES | RELU | TRAINING | LEARNED, {"cube-float32"}),
    (GEM, {"shape": (2, 40, 40, 5)} | RELU | HALF, {"pow", "no-clip", "avg_pool2d", "scaled"}),
    (GEM, NEGATIVE | LEARNED | HALF, {"no-clip", "cube-float32"}),
    (GEM, NEGATIVE, {"no-clip"}),
]
BY_XLA = [
    (SPATIAL, IMAGES | TRAINING, set()),
    (SPATIAL, OVERLAPPING | {"padding": "same"}, {"reshape-reduce_max", "patches"}),
    (GEM, IMAGES | RELU | LEARNED | TRAINING, {"cube-float32"}),
    (MASKED, MEAN, OTHER | {"ragged-boolean_mask"}),
    (ADAPTIVE, EVEN, {"resize-area"}),
]


def assert_failing(op, fields, always):
    """Check which candidates fail in a case, and that each failure is a documented one."""
    case = REGISTRY.ops[op].make_case(**{"mode": "eager", **fields})
    reasons = {
        name: reason_of(entry, case)
        for name, entry in REGISTRY.of(op).items()
        if entry.runs("tensorflow", case.mode)
    }
    failing = {name for name, reason in reasons.items() if reason}
    assert always <= failing, f"mended upstream: {always - failing}"
    for name in failing:
        failures = [f for f in REGISTRY.candidates[op, name].failures if f.when(case)]
        found = [f.reason for f in failures if re.search(f.matches, reasons[name])]
        assert found, f"{name}: {reasons[name]}"


@pytest.mark.parametrize(("op", "fields", "always"), CASES)
def test_implementations_fail_where_documented_and_nowhere_else(op, fields, always):
    assert_failing(op, fields, always)


@pytest.mark.slow
def test_gem_pool_of_channels_first_fails_by_avg_pool2d_where_onednn_is_off():
    onednn = TensorFlowBackend().settings("graph", "cpu:0")["oneDNN"]
    always = {"on": set(), "off": {"avg_pool2d"}}[onednn]
    assert_failing(GEM, IMAGES | RELU | FIRST | {"mode": "graph"}, always)


@pytest.mark.parametrize(("op", "fields", "always"), BY_XLA)
def test_implementations_with_xla_fail_where_documented_and_nowhere_else(op, fields, always):
    assert_failing(op, fields | {"mode": "xla"}, always)
