"""The sweeps of global average pooling."""

from __future__ import annotations

from poolbench import Sweep, product, zipped
from poolbench.ops.shared import LARGEST, trainable_size

OP = "global_avg_pool"
# These layers receive post-ReLU inputs, which also show a sum that loses terms; sums of normal inputs stay
# near zero and hide it.
BASE = {"shape": (8, 56, 56, 96), "distribution": "relu"}
BATCH = (32, 56, 56, 96)
HEADS = ((1, 7, 7, 2048), (32, 7, 7, 2048), (32, 14, 14, 672), (1, 56, 56, 96))
SMALL = HEADS[0]

BASELINE = "layer-global_avg_pool"
LAMBDA = "lambda-reduce_mean"
ALSO_COMPARE_TO = (LAMBDA,)  # the textbook's
MAIN = (BASELINE, LAMBDA, "avg_pool2d", "mean-of-means", "matmul-ones")
ALL = (*MAIN, "reduce_mean", "reduce_mean-float32", "einsum", "keras-ops")
IN_MODELS = (BASELINE, LAMBDA, "avg_pool2d", "mean-of-means")
IN_COMPILED_MODELS = (BASELINE, LAMBDA)
XLA_MAIN = (BASELINE, LAMBDA, "avg_pool2d", "matmul-ones")
RULES = (trainable_size,)

DEFAULT = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(candidates=ALL, mode=["graph"]),
        product(candidates=[*MAIN, "reduce_mean"], mode=["eager"]),
        product(candidates=[*XLA_MAIN, "einsum", "mean-of-means"], mode=["xla"]),
        product(candidates=MAIN, direction=["training"], mode=["graph"]),
        product(candidates=XLA_MAIN, direction=["training"], mode=["xla"]),
        product(candidates=MAIN, mode=["graph"], shape=HEADS),
        product(candidates=[*MAIN[:4], "reduce_mean"], mode=["eager"], shape=[SMALL]),
        product(candidates=MAIN[:4], mode=["graph"], shape=[LARGEST]),
        product(
            candidates=[BASELINE, LAMBDA, "reduce_mean-float32", "avg_pool2d", "mean-of-means"],
            dtype=["float16"],
            shape=[(32, 7, 7, 2048), (8, 56, 56, 96), (8, 112, 112, 96)],
        ),
        product(candidates=MAIN, threads=[1]),
    ),
)
QUICK = Sweep(
    base=BASE | {"shape": (8, 28, 28, 96)},
    parts=(
        product(candidates=MAIN, mode=["graph"]),
        product(candidates=XLA_MAIN[:3], mode=["xla"]),
        product(candidates=MAIN[:3], direction=["training"]),
    ),
)
FULL = Sweep(
    base=BASE,
    rules=RULES,
    parts=(
        product(
            shape=[
                *HEADS, (8, 56, 56, 96), BATCH, LARGEST, (8, 8, 8, 1536), (32, 10, 10, 2048),
                (8, 11, 11, 4032), (32, 28, 28, 240), (128, 7, 7, 512),
            ],
            mode=["eager", "graph", "xla"],
            direction=["forward", "training"],
            dtype=["float32", "float16", "bfloat16"],
        ),
        product(mode=["eager", "graph", "xla"], dtype=["float64"]),
        product(mode=["graph", "xla"], data_format=["channels_first"]),
        product(mode=["graph", "xla"], cache=["cold"]),
        product(mode=["graph", "xla"], distribution=["normal"]),
        product(mode=["eager", "graph", "xla"], threads=[1]),
        zipped(shape=[(1, 256, 256, 32), (8, 31, 17, 17), (8, 9, 9, 1)], mode=["graph"] * 3),
    ),
)  # fmt: skip
# Most informative parts first: GPU time is expensive, and a run may be ended early.
GPU = Sweep(
    base=BASE | {"shape": BATCH},
    rules=RULES,
    parts=(
        product(candidates=ALL, mode=["graph", "eager"]),
        product(candidates=XLA_MAIN, mode=["xla"]),
        # The cast of the float16 layer moves 10 bytes per element against reduce_mean's 2; XLA erases it.
        product(candidates=MAIN, mode=["graph", "xla"], dtype=["float16", "bfloat16"]),
        # reduce_mean over NHWC changes its kernel where H*W / (N*C) crosses 16: between these two.
        product(candidates=MAIN, mode=["graph"], shape=[(12, 112, 112, 64), (13, 112, 112, 64)]),
        product(candidates=MAIN, mode=["graph", "xla"], direction=["training"]),
        product(candidates=MAIN, mode=["graph"], shape=[LARGEST, *HEADS]),
        product(candidates=MAIN, mode=["graph"], cache=["cold"]),
        product(candidates=XLA_MAIN, mode=["xla"], cache=["cold"]),
        product(candidates=XLA_MAIN, mode=["xla"], shape=[LARGEST]),
        product(candidates=MAIN, mode=["eager"], dtype=["float16", "bfloat16"]),
    ),
)  # fmt: skip

# Keras beside the bare function, on each framework: --axis backend=tensorflow,jax,torch.
BACKENDS = Sweep(
    base=BASE,
    parts=product(
        candidates=["reduce_mean", "keras-ops", BASELINE, "keras-stock"],
        mode=["eager", "graph", "xla"],
        direction=["forward", "training"],
        shape=[SMALL, (8, 56, 56, 96)],
    ),
)  # fmt: skip

SWEEPS = {"backends": BACKENDS, "default": DEFAULT, "quick": QUICK, "full": FULL, "gpu": GPU}
