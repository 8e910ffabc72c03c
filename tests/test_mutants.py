"""More than twenty incorrect implementations, each of which the reference must catch."""

import numpy as np
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from poolbench.core.case import case_label, make_case
from poolbench.core.registry import REGISTRY
from poolbench.worker.check import check
from poolbench.worker.inputs import make_inputs, numpy_dtype

DEPTH = make_case(op="depth_max_pool", shape=(2, 4, 6, 12), pool_size=3, padding="valid")
TAIL = make_case(op="depth_max_pool", shape=(2, 4, 6, 11), pool_size=3, padding="valid")
SAME = make_case(op="depth_max_pool", shape=(2, 4, 6, 10), pool_size=3, padding="same")
FIRST = make_case(
    op="depth_max_pool",
    shape=(2, 6, 6, 6),
    pool_size=3,
    padding="valid",
    data_format="channels_first",
)
TRAIN = make_case(
    op="depth_max_pool",
    shape=(2, 4, 6, 12),
    pool_size=3,
    padding="valid",
    direction="training",
    distribution="relu",
)
MEAN = make_case(op="global_avg_pool", shape=(2, 4, 6, 6), distribution="relu")
HALF = make_case(op="global_avg_pool", shape=(1, 96, 96, 4), distribution="relu", dtype="float16")
MEAN_TRAIN = make_case(
    op="global_avg_pool", shape=(2, 4, 6, 6), distribution="relu", direction="training"
)


def grouped(x, k=3):
    c = x.shape[-1] // k * k
    return x[..., :c].reshape(*x.shape[:-1], c // k, k)


def padded(x, before, after, value):
    return np.pad(x, [(0, 0)] * 3 + [(before, after)], constant_values=value)


def hits(x):
    windows = grouped(x)
    return windows == windows.max(-1, keepdims=True)


def trained(x, dy, give):
    """(y, dx) where `give` shares each window's dy out over its hits."""
    return grouped(x).max(-1), (give(hits(x)) * dy[..., None]).reshape(x.shape).astype(x.dtype)


def half_sum(x):
    total = np.zeros(x.shape[::3], np.float16)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            total = (total + x[:, i, j]).astype(np.float16)
    return total


def mean(x):
    return x.mean((1, 2), dtype=np.float64).astype(x.dtype)


MUTANTS = {
    "maxout groups (channels j, j+C/k, ...)": (DEPTH, lambda x: x.reshape(2, 4, 6, 3, 4).max(-2)),
    "spatial window instead of depth": (DEPTH, lambda x: np.maximum(x[:, :, :, ::3], np.roll(x, 1, 2)[..., ::3])),
    "minimum": (DEPTH, lambda x: grouped(x).min(-1)),
    "mean": (DEPTH, lambda x: grouped(x).mean(-1)),
    "window one short": (DEPTH, lambda x: grouped(x)[..., :2].max(-1)),
    "window one long": (DEPTH, lambda x: np.maximum(grouped(x).max(-1), np.roll(x, -3, -1)[..., ::3])),
    "window shifted by one": (DEPTH, lambda x: grouped(np.roll(x, 1, -1)).max(-1)),
    "stride ignored": (DEPTH, lambda x: grouped(x).max(-1).repeat(3, -1)[..., :4]),
    "input returned, as max_pool_with_argmax does": (DEPTH, lambda x: x),
    "first of each window": (DEPTH, lambda x: x[..., ::3]),
    "absolute value": (DEPTH, lambda x: np.abs(grouped(x)).max(-1)),
    "negatives cut at zero": (DEPTH, lambda x: np.maximum(grouped(x).max(-1), 0)),
    "rounded to half": (DEPTH, lambda x: grouped(x).max(-1).astype(np.float16).astype(x.dtype)),
    "batch swapped": (DEPTH, lambda x: grouped(x[::-1]).max(-1)),
    "height and width swapped": (DEPTH, lambda x: grouped(x.reshape(2, 6, 4, 12).swapaxes(1, 2)).max(-1)),
    "all zeros": (DEPTH, lambda x: np.zeros((2, 4, 6, 4), x.dtype)),
    "tail kept under valid": (TAIL, lambda x: grouped(padded(x, 0, 1, -np.inf)).max(-1)),
    "head dropped instead of tail": (TAIL, lambda x: grouped(x[..., 2:]).max(-1)),
    "tail dropped under same": (SAME, lambda x: grouped(x).max(-1)),
    "padded with zero": (SAME, lambda x: grouped(padded(x, 1, 1, 0)).max(-1)),
    "padded behind only": (SAME, lambda x: grouped(padded(x, 0, 2, -np.inf)).max(-1)),
    "channels_last on channels_first": (FIRST, lambda x: grouped(x).max(-1).reshape(2, 2, 6, 6)),
    "gradient whole to every tie": (TRAIN, lambda x, dy: trained(x, dy, lambda hit: hit)),
    "gradient to all elements": (TRAIN, lambda x, dy: trained(x, dy, lambda hit: np.ones_like(hit))),
    "gradient to none": (TRAIN, lambda x, dy: trained(x, dy, np.zeros_like)),
    "gradient ignores dy": (TRAIN, lambda x, dy: trained(x, np.ones_like(dy), lambda hit: hit / hit.sum(-1, keepdims=True))),
    "gradient to the last element": (TRAIN, lambda x, dy: trained(x, dy, lambda hit: np.eye(3)[[2]] + 0 * hit)),
    "sum instead of mean": (MEAN, lambda x: x.sum((1, 2))),
    "mean over the channels": (MEAN, lambda x: x.mean((1, 3)).astype(x.dtype)),
    "mean over the height only": (MEAN, lambda x: x.mean(1)[:, 0]),
    "last row left out": (MEAN, lambda x: mean(x[:, :-1])),
    "count off by one": (MEAN, lambda x: x.sum((1, 2)) / 23),
    "largest instead of mean": (MEAN, lambda x: x.max((1, 2))),
    "keepdims": (MEAN, lambda x: x.mean((1, 2), keepdims=True)),
    "accumulated in half": (HALF, lambda x: (half_sum(x) / np.float16(96 * 96)).astype(np.float16)),
    "mean's gradient not divided": (MEAN_TRAIN, lambda x, dy: (mean(x), np.broadcast_to(dy[:, None, None], x.shape).copy())),
    "mean's gradient to the wrong instance": (
        MEAN_TRAIN,
        lambda x, dy: (mean(x), np.broadcast_to(dy[::-1, None, None] / 24, x.shape).astype(x.dtype)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_reference_catches(name):
    case, mutant = MUTANTS[name]
    inputs = make_inputs(case, seed=7)
    outputs = mutant(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(np.asarray(a).astype(numpy_dtype(case.dtype)) for a in outputs)
    assert check(REGISTRY.ops[case.op], case, inputs, outputs).status == "wrong"


CASES = list(dict.fromkeys(case for case, _ in MUTANTS.values()))


@pytest.mark.parametrize("case", CASES, ids=case_label)
def test_the_reference_accepts_the_correct_answer(case):
    op, inputs = REGISTRY.ops[case.op], make_inputs(case, seed=7)
    x, *dy = (array.astype(np.float64) for array in inputs)
    outputs = (op.reference(case, x), *(op.vjp(case, *dy, x) if dy else ()))
    outputs = tuple(np.asarray(a).astype(numpy_dtype(case.dtype)) for a in outputs)
    verdict = check(op, case, inputs, outputs)
    assert (verdict.status, verdict.reason) == ("ok", "")
