"""The sweeps of depthwise max pooling."""

from __future__ import annotations

from poolbench import Case, Sweep, product, zipped
from poolbench.ops.shared import LARGEST, trainable_size

OP = "depth_max_pool"
# Small enough for many rounds in a few seconds on two cores, too large for a core's own cache.
BASE = {"shape": (8, 56, 56, 96), "pool_size": 3, "padding": "valid"}
BATCH = (32, 56, 56, 96)
SMALL = (1, 8, 8, 96)
SHAPES = (SMALL, (1, 56, 56, 96), (32, 14, 14, 512), (32, 28, 28, 256))

BASELINE = "reshape-reduce_max"
LAYER = "layer-depth_max_pool"
LAMBDA = "lambda-max_pool"
ALSO_COMPARE_TO = (LAMBDA,)  # the textbook's
# Without XLA each has its own kernel; with XLA most become the same fused loop.
MAIN = (BASELINE, LAMBDA, LAYER, "transpose-reduce_max", "max_pool2d-view", "keras-stock")
ALL = (
    *MAIN, "max_pool", "layer-max_pool", "layer-reshape-reduce_max", "slices-maximum",
    "max_pool3d", "keras-ops", "nested-jit-max_pool", "recipe-verbatim",
)  # fmt: skip
IN_MODELS = (BASELINE, LAMBDA, "max_pool2d-view", "transpose-reduce_max", "keras-stock", LAYER)
IN_COMPILED_MODELS = (BASELINE, LAMBDA, LAYER)
XLA_MAIN = (BASELINE, LAMBDA, LAYER, "max_pool2d-view")


def fits(case: Case) -> bool:
    """Tell whether the window is within the depth."""
    return bool(case.pool_size <= case.shape[-1])


RULES = (fits, trainable_size)

DEFAULT = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(candidates=ALL, mode=["graph"]),
        product(candidates=[*MAIN, "max_pool"], mode=["eager"]),
        product(candidates=[*XLA_MAIN, "slices-maximum", "transpose-reduce_max"], mode=["xla"]),
        product(candidates=MAIN, direction=["training"], mode=["graph"]),
        product(candidates=XLA_MAIN, direction=["training"], mode=["xla"]),
        product(candidates=MAIN[:4], mode=["graph"], shape=SHAPES),
        product(candidates=MAIN[:4], mode=["eager"], shape=[SMALL]),
        product(candidates=MAIN[:3], mode=["graph", "xla"], shape=[LARGEST]),
        product(candidates=MAIN[:4], pool_size=[2, 4, 8, 16]),
        product(candidates=[*MAIN[:4], "keras-stock"], pool_size=[5], padding=["valid", "same"]),
        product(candidates=MAIN[:3], padding=["same"]),
        product(candidates=MAIN[:4], dtype=["float16"]),
        product(candidates=MAIN[:4], direction=["training"], distribution=["relu"]),
        product(candidates=MAIN[:5], threads=[1]),
    ),
)  # fmt: skip
QUICK = Sweep(
    base=BASE | {"shape": (8, 28, 28, 96)},
    rules=RULES,
    parts=(
        product(candidates=MAIN[:5], mode=["graph"]),
        product(candidates=XLA_MAIN[:3], mode=["xla"]),
        product(candidates=MAIN[:3], direction=["training"]),
    ),
)
FULL = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(
            shape=[*SHAPES, (8, 56, 56, 96), BATCH, LARGEST, (8, 28, 28, 96), (128, 7, 7, 2048)],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
            pool_size=[2, 3, 4, 8, 16],
            padding=["valid", "same"],
        ),
        product(mode=["eager", "graph", "xla"], dtype=["float64"]),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
        product(mode=["graph", "xla"], cache=["cold"]),
        product(mode=["eager", "graph", "xla"], threads=[1]),
        zipped(
            shape=[(1, 427, 640, 3), (1, 8, 8, 1), (8, 31, 17, 17), (1, 256, 256, 32)],
            pool_size=[3, 1, 17, 4],
        ),
    ),
)
# Most informative parts first: GPU time is expensive, and a run may be ended early.
GPU = Sweep(
    base=BASE | {"shape": BATCH},
    rules=RULES,
    parts=(
        product(
            candidates=[*MAIN, "max_pool", "cpu-pinned-max_pool", "nested-jit-max_pool"],
            mode=["graph", "eager"],
        ),
        product(candidates=XLA_MAIN, mode=["xla"]),
        product(candidates=MAIN, mode=["graph", "xla"], direction=["training"]),
        product(candidates=MAIN, mode=["graph", "xla"], dtype=["float16", "bfloat16"]),
        product(candidates=MAIN, mode=["graph"], shape=[LARGEST, *SHAPES]),
        product(candidates=MAIN, mode=["graph"], pool_size=[2, 8, 16]),
        product(candidates=MAIN, mode=["graph"], cache=["cold"]),
        product(candidates=XLA_MAIN, mode=["xla"], cache=["cold"]),
        product(candidates=XLA_MAIN, mode=["xla"], shape=[LARGEST]),
        product(candidates=MAIN, mode=["eager"], dtype=["float16", "bfloat16"]),
        product(candidates=MAIN, mode=["graph", "xla"], direction=["training"], dtype=["float16"]),
    ),
)  # fmt: skip
# Some hundred microseconds per call: long enough that 1% of it is some microseconds, which a clock can hold;
# short enough for a hundred comparisons in a minute or two.
SELFTEST = Sweep(base=BASE | {"shape": (2, 28, 28, 96)})

# Keras beside the bare function, on each framework: --axis backend=tensorflow,jax,torch.
BACKENDS = Sweep(
    base=BASE,
    rules=RULES,
    parts=product(
        candidates=[BASELINE, "keras-ops", LAYER, "keras-stock"],
        mode=["eager", "graph", "xla"],
        direction=["forward", "training"],
        shape=[SMALL, (8, 56, 56, 96)],
    ),
)  # fmt: skip

SWEEPS = {
    "backends": BACKENDS,
    "default": DEFAULT,
    "quick": QUICK,
    "full": FULL,
    "gpu": GPU,
    "selftest": SELFTEST,
}
