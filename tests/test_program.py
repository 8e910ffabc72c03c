"""The compiled program: a hash that ignores names, and counts that equal XLA's own."""

import re

import pytest
from poolbench.worker.hlo import count_cost, normalise_hlo
from poolbench.worker.program import hash_program

# As TensorFlow prints it: names, source locations and a configuration whose keys come in any order.
TENSORFLOW = """\
HloModule a_inference_forward_45__.3, is_scheduled=true, alias_passthrough_params=true, entry_computation_layout={(f32[8,56,56,96]{3,2,1,0})->f32[8,56,56,32]{3,2,1,0}}

%max_F32.2 (lhs.2: f32[], rhs.2: f32[]) -> f32[] {
  %lhs.2 = f32[] parameter(0)
  %rhs.2 = f32[] parameter(1)
  ROOT %maximum.2 = f32[] maximum(%lhs.2, %rhs.2)
}

%fused (param_0: f32[8,56,56,96], param_1: f32[]) -> f32[8,56,56,32] {
  %param_0 = f32[8,56,56,96]{3,2,1,0} parameter(0)
  %param_1 = f32[] parameter(1)
  ROOT %MaxPool2d.0 = f32[8,56,56,32]{3,2,1,0} reduce-window(%param_0, %param_1), window={size=1x1x1x3 stride=1x1x1x3}, to_apply=%max_F32.2, metadata={op_type="MaxPool" op_name="a {tricky}, \\"name\\"" source_file="/somewhere/ops.py" source_line=1221}
}

ENTRY %a_inference_forward_45__.3 (arg0.1: f32[8,56,56,96]) -> f32[8,56,56,32] {
  %arg0.1 = f32[8,56,56,96]{3,2,1,0} parameter(0), parameter_replication={false}, metadata={op_name="XLA_Args"}
  %MaxPool2d.2 = f32[] constant(-inf)
  ROOT %wrapped = f32[8,56,56,32]{3,2,1,0} fusion(%arg0.1, /*index=1*/%MaxPool2d.2), kind=kLoop, calls=%fused, frontend_attributes={grad_x="false"}, sharding={replicated}, backend_config={"outer_dimension_partitions":["2"],"fusion_config":{"kind":"loop"}}
}
"""
# The same program as JAX prints it.
JAX = """\
HloModule jit_pool, is_scheduled=true, entry_computation_layout={(f32[8,56,56,96]{3,2,1,0})->f32[8,56,56,32]{3,2,1,0}}, allow_spmd_sharding_propagation_to_output={true}

FileNames
1 "/elsewhere/pool.py"

FunctionNames
1 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=29 end_line=29 column=2 end_column=11}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="reduce_max"}
  %b = f32[] parameter(1)
  ROOT %c = f32[] maximum(%a, %b)
}

%wrapped_computation.7 (p: f32[8,56,56,96], q: f32[]) -> f32[8,56,56,32] {
  %p = f32[8,56,56,96]{3,2,1,0} parameter(0)
  %q = f32[] parameter(1)
  ROOT %r = f32[8,56,56,32]{3,2,1,0} reduce-window(%p, %q), window={size=1x1x1x3 stride=1x1x1x3}, to_apply=%region_0.1
}

ENTRY %main.3 (x.1: f32[8,56,56,96]) -> f32[8,56,56,32] {
  %x.1 = f32[8,56,56,96]{3,2,1,0} parameter(0), metadata={op_name="x"}
  %constant.2 = f32[] constant(-inf)
  ROOT %s = f32[8,56,56,32]{3,2,1,0} fusion(%x.1, %constant.2), kind=kLoop, calls=%wrapped_computation.7, backend_config={"fusion_config":{"kind":"loop"},"outer_dimension_partitions":["2"]}
}
"""
ELIDED = TENSORFLOW.replace("f32[] constant(-inf)", "f32[40] constant({...})")
SOURCE = """\
#loc1 = loc("XLA_Args")
module @a_inference_{name}_9__.1 attributes {{mhlo.is_dynamic = false}} {{
  func.func @main(%arg0: tensor<4x40xf32> loc("{name}"("ops.py":3:4))) -> tensor<4x40xf32> {{
    %cst = stablehlo.constant dense<"{constant}"> : tensor<4x40xf32> loc(#loc2)
#loc2 = loc("{name}"(#loc1))
"""


def hash_text(text, source=""):
    return hash_program(text, lambda: source)


def test_hash_other_names_metadata_and_tables_is_equal():
    assert hash_text(TENSORFLOW) == hash_text(JAX)
    assert re.fullmatch("[0-9a-f]{16}", hash_text(JAX))


def test_normalise_hlo_drops_paths_and_names():
    assert not re.search("where|tricky|inference|fused|max_F32|index", normalise_hlo(TENSORFLOW))


def test_hash_other_order_of_computations_is_equal():
    head, region, rest = JAX.partition("%region_0.1")
    other = "%sum (c: f32[]) -> f32[] {\n  ROOT %c = f32[] parameter(0)\n}\n\n"
    rest = rest.replace("calls=", "called_computations={%sum}, calls=")
    middle = rest.index("%wrapped_computation.7 (")
    one = head + other + region + rest
    two = head + region + rest[:middle] + other + rest[middle:]
    assert hash_text(one) == hash_text(two) != hash_text(JAX)


def test_hash_custom_call_without_json_is_read():
    text = TENSORFLOW.replace(
        '{"outer_dimension_partitions":["2"],"fusion_config":{"kind":"loop"}}', "{a = 1 : i64}"
    )
    assert hash_text(text) != hash_text(text.replace("a = 1", "a = 2"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constant(-inf)", "constant(0)"),
        ("maximum(", "minimum("),
        ("size=1x1x1x3 stride=1x1x1x3", "size=1x1x1x3 stride=1x1x1x2"),
        ("{3,2,1,0} parameter(0)", "{0,3,2,1} parameter(0)"),
        ('["2"]', '["4"]'),
        ("%arg0.1, /*index=1*/%MaxPool2d.2", "%MaxPool2d.2, %arg0.1"),
        ("is_scheduled=true", "input_output_alias={ {}: (0, {}, may-alias) }, is_scheduled=true"),
    ],
)  # fmt: skip
def test_hash_other_constant_operation_or_layout_differs(old, new):
    assert old in TENSORFLOW
    assert hash_text(TENSORFLOW) != hash_text(TENSORFLOW.replace(old, new))


def test_hash_elided_constant_reads_the_source():
    one = SOURCE.format(name="one", constant="0x6C")
    assert hash_text(ELIDED, one) == hash_text(ELIDED, SOURCE.format(name="two", constant="0x6C"))
    assert hash_text(ELIDED, one) != hash_text(ELIDED, SOURCE.format(name="one", constant="0x6D"))


def test_count_cost_fusion_counts_its_inputs_and_results():
    results = 8 * 56 * 56 * 32
    cost = count_cost(TENSORFLOW)
    assert cost == count_cost(JAX)
    assert cost.flops == 2 * results  # two comparisons per window of three
    assert cost.bytes_accessed == 4 * (3 * results + results) + 4
    assert cost.kernels == 1


@pytest.mark.parametrize(
    ("instruction", "flops", "nbytes"),
    [
        ("f32[4,6]{1,0} add(%x, %x)", 24, 4 * 72),
        ("f32[4,6]{1,0} exponential(%x)", 0, 4 * 48),
        ("bf16[4,6]{1,0} convert(%x)", 24, 4 * 24 + 2 * 24),
        ("pred[4,6]{1,0} compare(%x, %x), direction=NE", 24, 4 * 48 + 24),
        ("f32[4,2]{1,0} slice(%x), slice={[0:4:1], [0:6:3]}", 0, 2 * 4 * 8),
        ("f32[6,6]{1,0} dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}", 2 * 36 * 4, 4 * 84),
        ("f32[4,6]{0,1} transpose(%x), dimensions={0,1}", 0, 4 * 48),
        ("(f32[4,6]{1,0}, f32[4,6]{1,0}) tuple(%x, %x)", 0, 16),
        ("f32[24]{0} bitcast(%x)", 0, 0),
    ],
)  # fmt: skip
def test_count_cost_one_instruction_follows_its_formula(instruction, flops, nbytes):
    text = f"""HloModule m
ENTRY %main (x: f32[4,6]) -> f32[4,6] {{
  %x = f32[4,6]{{1,0}} parameter(0)
  ROOT %y = {instruction}
}}
"""
    cost = count_cost(text)
    assert (cost.flops, cost.bytes_accessed) == (flops, nbytes)
