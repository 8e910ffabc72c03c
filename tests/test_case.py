import itertools
import operator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from poolbench.core.axes import DTYPES, axes_of, choice_axis, size_axis
from poolbench.core.case import Case, case_label, case_slug, make_case
from poolbench.core.errors import UsageError
from poolbench.core.registry import load_builtin, parse_axis
from poolbench.core.sweep import Sweep, product, zipped

load_builtin()
BASE = make_case(op="depth_max_pool", shape=(8, 28, 28, 96), pool_size=3, padding="valid")

cases = st.builds(
    make_case,
    op=st.just("depth_max_pool"),
    shape=st.tuples(*[st.integers(1, 512)] * 4),
    dtype=st.sampled_from(DTYPES),
    pool_size=st.none() | st.integers(1, 64),
    padding=st.none() | st.sampled_from(["valid", "same"]),
    device=st.sampled_from(["cpu", "gpu:1", "GPU:H100"]),
    threads=st.integers(0, 64),
)


@given(cases)
def test_a_case_comes_back_from_json_equal_to_itself(case):
    again = msgspec.json.decode(msgspec.json.encode(case), type=Case)
    assert again == case
    assert hash(again) == hash(case)


@given(cases)
def test_a_slug_is_safe_in_a_file_name(case):
    assert set(case_slug(case)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
    )


@given(cases)
def test_axis_formatted_value_reads_back_equal(case):
    for name, axis in axes_of("depth_max_pool").items():
        value = case.get(name)
        if value is not None:
            assert axis.read(axis.format(value)) == value


def test_padding_is_accepted_in_any_letter_case():
    assert make_case(op="depth_max_pool", padding="VALID").padding == "valid"


def test_a_list_for_a_shape_becomes_a_tuple():
    assert hash(make_case(op="pool", shape=[1, 2, 3, 4])) == hash(
        make_case(op="pool", shape=(1, 2, 3, 4))
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("padding=full", "padding must be one of 'valid', 'same'; got 'full'"),
        ("pool_size=0", "pool_size must be like '3'; got '0'"),
        ("pool_size=-3", "pool_size must be like '3'; got '-3'"),
        ("shape=3xa", "shape must be like "),
        ("shape=0x1x1x1", "shape must be"),
        ("strid=2", "no op has an axis 'strid'"),
        ("pool_size", "--axis takes NAME=VALUE"),
        ("pool_size=", "--axis takes NAME=VALUE"),
        ("device=tpu", "device must be like"),
    ],
)
def test_a_bad_axis_is_one_line_that_says_what_to_type(text, says):
    with pytest.raises(UsageError) as caught:
        parse_axis(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_axis_that_a_case_lacks_is_named():
    for ask in (lambda: make_case(op=BASE.op, strid=2), lambda: BASE.replace(strid=2)):
        with pytest.raises(UsageError, match="depth_max_pool has no axis 'strid'; it has "):
            ask()
    with pytest.raises(AttributeError, match="a case of depth_max_pool has no axis 'strid'"):
        operator.attrgetter("strid")(BASE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Width", "an axis is named by lower-case letters"),
        ("1x", "an axis is named by lower-case letters"),
        ("seconds", "an axis may not be named as a column of a report; got 'seconds'"),
    ],
)
def test_an_axis_is_no_column_of_a_report_and_has_a_plain_name(name, says):
    with pytest.raises(UsageError, match=says):
        size_axis(name)


def test_a_sweep_of_no_op_has_no_cases_yet():
    with pytest.raises(UsageError, match="a sweep has cases once its op is known"):
        Sweep(product(mode=["eager"])).cases()


def test_an_axis_is_parsed_into_its_values():
    assert parse_axis("pool_size=2,3") == ("pool_size", (2, 3))
    assert parse_axis("shape=32x56x56x96,1x7x7x2048") == (
        "shape",
        ((32, 56, 56, 96), (1, 7, 7, 2048)),
    )
    assert parse_axis("threads=all,1") == ("threads", (0, 1))


def test_a_product_has_every_combination_and_each_case_once():
    sweep = Sweep(
        base=BASE,
        parts=(
            product(mode=["eager", "graph"], dtype=["float32", "float16"]),
            product(mode=["graph"]),
        ),
    )
    found = [(case.mode, case.dtype) for case in sweep.cases()]
    assert found == list(itertools.product(["eager", "graph"], ["float32", "float16"]))


def test_zipped_axes_step_together():
    sweep = Sweep(base=BASE, parts=(zipped(shape=[(1, 7, 7, 8), (1, 9, 9, 6)], pool_size=[2, 3]),))
    assert [(case.shape[-1], case.pool_size) for case in sweep.cases()] == [(8, 2), (6, 3)]


def test_zipped_axes_of_unequal_length_are_refused():
    with pytest.raises(UsageError, match="equal length"):
        zipped(shape=[(1, 7, 7, 8)], pool_size=[2, 3])


def test_a_rule_leaves_combinations_out():
    sweep = Sweep(
        base=BASE,
        parts=(product(pool_size=[2, 3, 5]),),
        rules=(lambda case: case.shape[-1] % case.pool_size == 0,),
    )
    assert [case.pool_size for case in sweep.cases()] == [2, 3]


def test_replacing_an_axis_replaces_it_where_it_varies_and_in_the_base():
    sweep = Sweep(base=BASE, parts=(product(pool_size=[2, 3]), product(mode=["eager"])))
    replaced = sweep.replace("pool_size", (4, 8))
    assert [(case.pool_size, case.mode) for case in replaced.cases()] == [
        (4, "graph"),
        (8, "graph"),
        (4, "eager"),
    ]


def test_replacing_an_axis_of_zipped_ones_keeps_them_together():
    sweep = Sweep(base=BASE, parts=(zipped(pool_size=[2, 3], mode=["eager", "graph"]),))
    for axis, values, expected in (
        ("pool_size", (4,), [(4, "eager", "cpu:0"), (4, "graph", "cpu:0")]),
        ("device", ("cpu:1", "cpu:2"), [
            (size, mode, device) for device in ("cpu:1", "cpu:2") for size, mode in ((2, "eager"), (3, "graph"))
        ]),
    ):  # fmt: skip
        found = sweep.replace(axis, values).cases()
        assert [(case.pool_size, case.mode, case.device) for case in found] == expected


def test_choice_in_upper_case_is_taken_in_any_letter_case():
    axis = choice_axis("layout", "NHWC", "NCHW")
    assert [axis.read(text) for text in ("NHWC", "nchw")] == ["NHWC", "NCHW"]


def test_replacing_an_axis_that_varies_nowhere_multiplies_every_part():
    sweep = Sweep(base=BASE, parts=(product(mode=["eager", "graph"]),))
    replaced = sweep.replace("device", ("cpu:0", "cpu:1"))
    assert {(case.mode, case.device) for case in replaced.cases()} == set(
        itertools.product(["eager", "graph"], ["cpu:0", "cpu:1"])
    )


def test_an_op_that_lacks_the_axis_ignores_it():
    sweep = Sweep(base=make_case(op="mean"))
    assert sweep.replace("pool_size", (2,)) is sweep


def test_parts_that_give_one_case_pool_their_candidates():
    sweep = Sweep(
        base=BASE,
        parts=(product(candidates=["a"], mode=["graph"]), product(candidates=["b"], pool_size=[3])),
    )
    assert [planned.candidates for planned in sweep.planned()] == [("a", "b")]


def test_a_label_leaves_out_what_is_as_usual():
    assert case_label(BASE) == "8x28x28x96-k3-valid-float32-forward-graph-cpu:0"
    assert case_label(make_case(op="pool", threads=1)).endswith("cpu:0-threads1")
