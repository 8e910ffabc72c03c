import dataclasses

import numpy as np
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from poolbench.core.case import make_case
from poolbench.core.op import Op, TensorSpec, ties_within
from poolbench.core.registry import REGISTRY
from poolbench.worker import check as checks
from poolbench.worker.check import BOUNDS, Answers, check
from poolbench.worker.inputs import make_inputs, numpy_dtype, write_repeated

DEPTH = REGISTRY.ops["depth_max_pool"]
MEAN = REGISTRY.ops["global_avg_pool"]


def depth_case(**fields):
    return make_case(
        **(
            {"op": "depth_max_pool", "shape": (2, 3, 4, 12), "pool_size": 3, "padding": "valid"}
            | fields
        )
    )


def mean_case(**fields):
    return make_case(**({"op": "global_avg_pool", "shape": (2, 7, 5, 6)} | fields))


def rows(values, **fields):
    """An input of one pixel with these channels, and its case."""
    x = np.array(values, np.float64).reshape(1, 1, 1, -1)
    return x, depth_case(shape=x.shape, **fields)


def test_valid_drops_the_tail():
    x, case = rows([1, 5, 2, 9, 8, 7, 99])
    assert DEPTH.reference(case, x).ravel().tolist() == [5, 9]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-1, -2, -3, -4, -5], [-1, -4]),  # one channel is missing: it is padded behind
        ([-1, -2, -3, -4], [-1, -3]),  # two are missing: one before, one behind
        ([-1, -2, -3], [-1]),
    ],
)
def test_same_pads_both_ends_with_the_lowest_value(values, expected):
    x, case = rows(values, padding="same")
    assert DEPTH.reference(case, x).ravel().tolist() == expected


def test_a_maximum_s_gradient_goes_to_the_maximum_and_is_split_at_a_tie():
    x, case = rows([1, 5, 2, 7, 7, 0])
    dy = np.array([2.0, 4.0]).reshape(1, 1, 1, 2)
    assert DEPTH.vjp(case, dy, x)[0].ravel().tolist() == [0, 2, 0, 2, 2, 0]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("channels", [5, 7, 9, 10])
def test_a_gradient_given_out_adds_up_to_dy_over_each_window(padding, channels):
    rng = np.random.default_rng(0)
    case = depth_case(shape=(2, 3, 4, channels), padding=padding)
    x = rng.integers(0, 3, (2, 3, 4, channels)).astype(float)
    dy = rng.standard_normal(DEPTH.reference(case, x).shape)
    dx = DEPTH.vjp(case, dy, x)[0]
    assert dx.shape == x.shape
    np.testing.assert_allclose(DEPTH.check_gradient.window_sum(dx, case), dy)


def test_channels_first_is_channels_last_transposed():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 10))
    for padding in ("valid", "same"):
        last = DEPTH.reference(depth_case(shape=x.shape, padding=padding), x)
        first = DEPTH.reference(
            depth_case(shape=x.shape, padding=padding, data_format="channels_first"),
            x.transpose(0, 3, 1, 2),
        )
        np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), last)


def test_the_mean_s_gradient_is_numerically_its_slope():
    rng = np.random.default_rng(0)
    case = mean_case()
    x, dy, step = rng.standard_normal(case.shape), rng.standard_normal((2, 6)), 1e-6
    direction = rng.standard_normal(case.shape)
    slope = (
        (MEAN.reference(case, x + step * direction) - MEAN.reference(case, x)) / step * dy
    ).sum()
    assert (MEAN.vjp(case, dy, x)[0] * direction).sum() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_inputs_have_the_case_s_layout_and_dtype(dtype, data_format):
    case = depth_case(
        dtype=dtype, data_format=data_format, direction="training", padding="same", pool_size=5
    )
    x, dy = make_inputs(case, seed=1)
    assert x.shape == DEPTH.inputs(case)["x"].shape
    assert {x.dtype, dy.dtype} == {numpy_dtype(dtype)}
    assert dy.shape == DEPTH.reference(case, x.astype(float)).shape


def test_inputs_are_the_same_for_a_seed_and_others_for_another():
    case = depth_case()
    assert np.array_equal(make_inputs(case, 1)[0], make_inputs(case, 1)[0])
    assert not np.array_equal(make_inputs(case, 1)[0], make_inputs(case, 2)[0])


@pytest.mark.parametrize(("begin", "end"), [(0, 20), (3, 5), (6, 8), (13, 20), (20, 20)])
def test_write_repeated_fills_the_places_and_no_others(begin, end):
    array, block = np.full((4, 5), -1), np.arange(7)
    write_repeated(array, block, begin, end)
    expected = np.full(20, -1)
    expected[begin:end] = np.tile(block, 3)[begin:end]
    assert array.ravel().tolist() == expected.tolist()


def test_half_of_a_relu_input_ties_at_zero():
    (x,) = make_inputs(depth_case(shape=(8, 28, 28, 96), distribution="relu"), 0)
    assert 0.45 < (x == 0).mean() < 0.55


def test_no_two_images_of_a_large_input_are_the_same():
    (x,) = make_inputs(depth_case(shape=(32, 28, 28, 96)), 0)
    assert len({image.tobytes() for image in x}) == 32


@pytest.mark.parametrize("op", [DEPTH, MEAN], ids=lambda op: op.name)
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_the_reference_s_own_answer_in_the_case_s_dtype_passes(op, direction):
    for dtype in BOUNDS:
        case = (depth_case if op is DEPTH else mean_case)(
            dtype=dtype, direction=direction, distribution="relu"
        )
        inputs = make_inputs(case, 0)
        wide = [array.astype(np.float64) for array in inputs]
        outputs = [op.reference(case, wide[0])]
        if direction == "training":
            outputs.append(op.vjp(case, wide[1], wide[0])[0])
        verdict = check(
            op, case, inputs, tuple(np.asarray(a).astype(numpy_dtype(dtype)) for a in outputs)
        )
        assert (verdict.status, verdict.reason) == ("ok", "")


def judged(outputs, case=None):
    case = case or depth_case()
    return check(DEPTH, case, make_inputs(case, 0), outputs)


def right():
    case = depth_case()
    (x,) = make_inputs(case, 0)
    return DEPTH.reference(case, x)


def test_a_wrong_shape_says_which_was_expected():
    assert "expected (2, 3, 4, 4)" in judged((right()[..., :3],)).reason


def test_a_wrong_dtype_says_which_was_expected():
    assert judged((right().astype(np.float64),)).reason == "y is float64, expected float32"


def test_nan_is_wrong_and_counted():
    y = right()
    y[0, 0, 0, 0] = np.nan
    assert judged((y,)).reason == "y has 1 values that are not finite"


def test_check_error_names_its_size_and_the_tolerance():
    y = right()
    y[0, 0, 0, 0] += 1
    verdict = judged((y,))
    assert verdict.status == "wrong"
    assert "beyond the bound in 1 of 96 values: error up to 1" in verdict.reason
    assert verdict.accuracy.max_absolute == pytest.approx(1)


def test_a_check_whose_answer_is_almost_all_zeros_is_mistrusted():
    op = Op(
        name="zero",
        inputs=DEPTH.inputs,
        reference=lambda case, x: x * 0,
        baseline="",
        sweeps={},
    )
    case = depth_case()
    verdict = check(op, case, make_inputs(case, 0), (np.zeros(case.shape, np.float32),))
    assert verdict.status == "wrong"
    assert "mistrusted" in verdict.reason


def gradient_at_ties(give):
    """The verdict on a gradient at windows [7, 7, 0] given out by a rule over (is maximum, place)."""
    case = depth_case(shape=(1, 2, 2, 12), direction="training", distribution="relu")
    x = np.tile(np.array([7, 7, 0], np.float32), 16).reshape(1, 2, 2, 12)
    dy = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
    dx = (dy[..., None] * np.array(give, np.float32)).reshape(x.shape).astype(np.float32)
    return check(DEPTH, case, (x, dy), (DEPTH.reference(case, x).astype(np.float32), dx))


@pytest.mark.parametrize(
    ("give", "rule"), [([1, 0, 0], "first"), ([0, 1, 0], "last"), ([0.5, 0.5, 0], "split")]
)
def test_a_tie_s_gradient_may_go_to_one_or_be_split_and_the_rule_is_recorded(give, rule):
    verdict = gradient_at_ties(give)
    assert (verdict.status, verdict.accuracy.tie) == ("ok", rule)


@pytest.mark.parametrize("give", [[1, 1, 0], [0, 0, 1], [0.5, 0, 0], [0, 0, 0]])
def test_a_tie_s_gradient_given_to_each_or_to_another_or_lost_is_wrong(give):
    assert gradient_at_ties(give).status == "wrong"


@pytest.mark.parametrize("wrong", [False, True])
def test_gradients_beside_that_of_a_maximum_are_checked_too(wrong):
    """y = the larger of each pair of x, plus b: of two inputs, the first may tie."""

    def vjp(case, dy, x, b):
        hits = x == x.max(1, keepdims=True)
        return hits * (dy / hits.sum(1))[:, None], dy

    op = Op(
        name="pairs", baseline="", sweeps={}, vjp=vjp, reference=lambda case, x, b: x.max(1) + b,
        inputs=lambda case: {"x": TensorSpec((6, 2), "float32"), "b": TensorSpec((6,), "float32")},
        check_gradient=ties_within(lambda a, case: a.sum(1)),
    )  # fmt: skip
    generator = np.random.default_rng(0)
    x, b, dy = (generator.standard_normal(shape).astype(np.float32) for shape in ((6, 2), 6, 6))
    x[0] = 7
    dx, db = (array.astype(np.float32) for array in vjp(None, dy, x, b))
    verdict = check(
        op, depth_case(direction="training"), (x, b, dy), (x.max(1) + b, dx, db + np.float32(wrong))
    )
    assert (verdict.status, verdict.reason[:2]) == (("wrong", "db") if wrong else ("ok", ""))
    assert verdict.accuracy.tie == "split"


def test_a_gradient_without_a_reference_is_wrong_and_says_so():
    op = dataclasses.replace(DEPTH, vjp=None)
    case = depth_case(direction="training")
    x, dy = make_inputs(case, 0)
    verdict = check(op, case, (x, dy), (DEPTH.reference(case, x), x))
    assert verdict.status == "wrong"
    assert verdict.reason.startswith("depth_max_pool has no reference for its gradient")


def test_a_right_gradient_of_a_large_window_is_not_mistrusted():
    case = depth_case(shape=(2, 4, 4, 96), pool_size=48, direction="training")
    x, dy = make_inputs(case, 0)
    wide = x.astype(np.float64)
    dx = DEPTH.vjp(case, dy.astype(np.float64), wide)[0].astype(np.float32)
    verdict = check(DEPTH, case, (x, dy), (DEPTH.reference(case, wide).astype(np.float32), dx))
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize("name", [name for name, op in REGISTRY.ops.items() if op.by_example])
def test_answers_in_parts_are_those_of_the_whole(monkeypatch, name):
    op = REGISTRY.ops[name]
    base = op.sweep("default").base_case
    case = base.replace(
        shape=(5, *(min(size, 12) for size in base.shape[1:])), direction="training"
    )
    inputs = make_inputs(case, 0)
    xs = [x.astype(np.float64) for x in inputs[:-1]]
    monkeypatch.setattr(checks, "PART", 1)  # an example at a time
    answers = Answers(op=op, case=case, inputs=inputs)
    assert np.array_equal(answers.y, op.reference(case, *xs))
    whole = op.vjp(case, inputs[-1].astype(np.float64), *xs)
    assert all(map(np.array_equal, answers.gradients.values(), whole))
