"""The compiled program, from the compilers themselves: TensorFlow with XLA, and JAX."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import poolbench.ops  # registers the ops
import pytest
from poolbench.core.registry import REGISTRY
from poolbench.worker.hlo import count_cost
from poolbench.worker.program import _lines, jax_program, tensorflow_operations, tensorflow_program
from poolbench.worker.session import bind

GROUPS = {
    "depth_max_pool": [
        {"lambda-max_pool", "layer-max_pool", "max_pool", "nested-jit-max_pool", "cpu-pinned-max_pool"},
        {"reshape-reduce_max", "layer-reshape-reduce_max", "keras-ops"},
        {"max_pool2d-view", "keras-stock"},
        {"slices-maximum"}, {"max_pool3d"}, {"transpose-reduce_max"}, {"layer-depth_max_pool"},
    ],
    "global_avg_pool": [
        {"layer-global_avg_pool", "lambda-reduce_mean", "reduce_mean", "reduce_mean-float32", "einsum",
         "keras-ops"},
        {"avg_pool2d", "keras-stock"}, {"mean-of-means"}, {"matmul-ones"},
    ],
}  # fmt: skip
RESULTS = {"depth_max_pool": (8, 56, 56, 32), "global_avg_pool": (8, 96)}


@pytest.mark.parametrize(
    ("op", "direction"),
    [
        ("depth_max_pool", "forward"),
        pytest.param("depth_max_pool", "training", marks=pytest.mark.slow),  # 28 compilations
        ("global_avg_pool", "forward"),
        ("global_avg_pool", "training"),
    ],
)
def test_tensorflow_program_of_each_candidate_groups_them(op, direction):
    tf = pytest.importorskip("tensorflow")
    case = REGISTRY.ops[op].make_case(mode="xla", direction=direction)
    x, dy = tf.zeros(case.shape), tf.zeros(RESULTS[op])
    inputs = [x] if direction == "forward" else [x, dy]
    programs = {
        name: tensorflow_program(bind(candidate, case), *inputs)
        for name, candidate in REGISTRY.of(op).items()
        # TensorFlow refuses the recipe; other tests register candidates of their own.
        if name != "recipe-verbatim" and candidate.builtin and "tensorflow" in candidate.backends
    }
    groups = {}
    for name, program in programs.items():
        groups.setdefault(program, set()).add(name)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, GROUPS[op]))
    assert len({program.hash for program in groups}) == len(GROUPS[op])
    if (op, direction) == ("depth_max_pool", "training"):
        # Most traffic and most temporaries: the gradient of the native operation.
        native, slices = programs["max_pool"], programs["slices-maximum"]
        results = 4 * (x.shape.num_elements() + dy.shape.num_elements()) + 16
        assert (slices.kernels, slices.bytes_accessed) == (2, 35_323_920)
        assert (native.kernels, native.bytes_accessed) == (10, 192_675_872)
        assert slices.peak_buffer_nbytes == results
        assert native.peak_buffer_nbytes - results == pytest.approx(57.8e6, rel=1e-2)


HASHES = """
import json
import tensorflow as tf
from poolbench.core.registry import load_builtin
from poolbench.worker.program import tensorflow_operations, tensorflow_program
from poolbench.worker.session import bind

registry, found = load_builtin(), {"xla": {}, "graph": {}}
for op in ("depth_max_pool", "global_avg_pool"):
    case = registry.ops[op].make_case()
    x = tf.zeros(case.shape)
    for name, candidate in registry.of(op).items():
        if name != "recipe-verbatim" and "tensorflow" in candidate.backends:
            program = tensorflow_program(bind(candidate, case.replace(mode="xla")), x)
            found["xla"][name + " of " + op] = [program.hash, program.key]
            function = bind(candidate, case.replace(mode="graph"))
            function(x)
            program = tensorflow_operations(function, x)
            found["graph"][name + " of " + op] = [program.hash, program.key]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_tensorflow_program_hash_is_the_same_in_every_process_and_checkout(tmp_path):
    pytest.importorskip("tensorflow")
    bench = Path(poolbench.__file__).parents[1]
    file = Path("poolbench", "ops", "global_avg_pool", "candidates.py")
    text = (bench / file).read_text()
    inner, outer = (
        "spatial_axes(case)[1]), spatial_axes(case)[0]",
        "spatial_axes(case)[0]), spatial_axes(case)[1]",
    )
    swapped = text.replace(inner, outer)
    renamed = re.sub(r"\bx\b", "values", text)
    assert len({text, swapped, renamed}) == 3
    folders = {"here": bench}
    for name, changed in (("copy", text), ("swapped", swapped), ("renamed", renamed)):
        folders[name] = tmp_path / name
        shutil.copytree(bench / "poolbench", tmp_path / name / "poolbench")
        (tmp_path / name / file).write_text(changed)
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", HASHES], stdout=subprocess.PIPE, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        for name, folder in folders.items()
    }  # fmt: skip
    found = {name: json.loads(one.communicate()[0]) for name, one in started.items()}
    assert found["here"] == found["copy"] == found["renamed"]
    for mode, programs in found["here"].items():
        assert len(programs) > 20
        assert len({key for _, key in programs.values()}) == 1
        swapped = found["swapped"][mode]
        other = {name for name, program in programs.items() if program != swapped[name]}
        assert other == {"mean-of-means of global_avg_pool"}


def test_tensorflow_operations_show_what_a_compiled_part_computes():
    tf = pytest.importorskip("tensorflow")
    x = tf.zeros((2, 4, 4, 96))

    def hash_of(width):
        def pool(x):
            return tf.nn.max_pool(x, (1, 1, 1, width), (1, 1, 1, width), "VALID")

        nested = tf.function(pool, jit_compile=True)
        function = tf.function(lambda x: tf.concat([nested(x)[..., :24]], -1))
        function(x)
        return tensorflow_operations(function, x).hash

    assert hash_of(3) == hash_of(3)
    assert len({hash_of(width) for width in (2, 3, 4)}) == 3


def test_lines_of_a_graph_leave_out_the_settings_of_the_session():
    pytest.importorskip("tensorflow")
    from tensorflow.core.framework import node_def_pb2

    nodes = [node_def_pb2.NodeDef(name="a", op="PartitionedCall") for _ in range(2)]
    for node, settings in zip(nodes, (b"GPU CPU", b"CPU GPU"), strict=True):
        node.attr["config_proto"].s = settings
    assert _lines(nodes[:1], {}) == _lines(nodes[1:], {})
    assert len(_lines(nodes[:1], {})) == 1
    nodes[1].attr["executor_type"].s = b"another"
    assert _lines(nodes[:1], {}) != _lines(nodes[1:], {})


def test_lines_of_a_graph_do_not_depend_on_the_order_of_its_nodes():
    tf = pytest.importorskip("tensorflow")

    def nodes_of(function):
        x = tf.TensorSpec((4,))
        nodes = tf.function(function).get_concrete_function(x, x).graph.as_graph_def().node
        given = [node for node in nodes if node.op == "Placeholder"]
        for number, node in enumerate(given):  # as in an optimised graph
            node.op = "_Arg"
            node.attr["index"].i = number
        return nodes

    def two_parts(a, b):
        return tf.abs(a) - b, tf.abs(b) - a  # alike but for what they read

    nodes = nodes_of(two_parts)
    lines = _lines(nodes, {})
    assert _lines(list(reversed(nodes)), {}) == lines
    assert len(set(lines)) == len(lines) >= 4
    for other in (
        lambda a, b: (b - tf.abs(a), tf.abs(b) - a),
        lambda a, b: (tf.abs(a) - b, tf.abs(a) - b),
        lambda a, b: (tf.abs(a) - b, tf.exp(b) - a),
    ):
        assert _lines(nodes_of(other), {}) != lines


def test_tensorflow_program_renamed_is_equal_and_changed_differs():
    tf = pytest.importorskip("tensorflow")

    def average(values):
        doubled = values * 2.0
        return tf.reduce_max(doubled, axis=1)

    def renamed(x):
        with tf.name_scope("elsewhere"):
            y = x * 2.0
            return tf.reduce_max(y, axis=1, name="largest")

    def changed(values):
        doubled = values * 3.0
        return tf.reduce_max(doubled, axis=1)

    def weighted(weights):
        return lambda x: x * tf.constant(weights, tf.float32)

    x = tf.zeros([4, 20])
    weights = np.arange(20)
    one, again, other, first, second = (
        tensorflow_program(function, x)
        for function in (average, renamed, changed, weighted(weights), weighted(weights[::-1]))
    )
    assert one == again
    assert one.hash != other.hash
    assert (one.flops, one.bytes_accessed) == (other.flops, other.bytes_accessed)
    assert first.hash != second.hash, "XLA elides constants of more than 10 elements"
    assert one.key.startswith(f"tensorflow {tf.__version__}, ")


def jax_functions():
    import jax
    import jax.numpy as jnp
    from jax import lax

    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 1, 3), (1, 1, 1, 3), "VALID")

    return {
        "reshape": lambda x: jnp.max(x.reshape(*x.shape[:-1], -1, 3), -1),
        "slices": lambda x: jnp.maximum(x[..., ::3], x[..., 1::3]),
        "pool": pool,
        "mean": lambda x: x.mean((1, 2)),
        "matmul": lambda x: jnp.einsum("nhwc,hw->nc", x, jnp.ones(x.shape[1:3])),
        "softmax": jax.nn.softmax,
        "sort": jnp.sort,
        "scan": lambda x: lax.scan(lambda carry, row: (carry + row, carry * row), x[0], x),
        "bfloat16": lambda x: x.astype(jnp.bfloat16).sum(-1),
    }


def gradient_of(function):
    import jax

    def gradient(x):
        y, pull_back = jax.vjp(function, x)
        return pull_back(y)

    return gradient


@pytest.mark.parametrize("direction", ["forward", "training"])
def test_count_cost_equals_the_analysis_of_xla(direction):
    jax = pytest.importorskip("jax")
    x = np.zeros((2, 8, 8, 12), np.float32)
    for name, function in jax_functions().items():
        step = function if direction == "forward" else gradient_of(function)
        compiled = jax.jit(step).lower(x).compile()
        cost, theirs = count_cost(compiled.as_text()), compiled.cost_analysis()
        assert cost.flops == theirs.get("flops", 0), name
        # XLA adds up in float32: an odd byte may be lost.
        assert cost.bytes_accessed == pytest.approx(theirs["bytes accessed"], rel=2**-22), name


def test_jax_program_renamed_is_equal_and_changed_differs():
    pytest.importorskip("jax")
    x = np.zeros((2, 8, 8, 12), np.float32)
    weights = np.arange(12, dtype=np.float32)

    def weighted(weights):
        def scale(x):
            return x * weights

        return scale

    def rescaled(values):
        return values * weights

    pool = jax_functions()["pool"]
    one, again, other = (
        jax_program(f, x) for f in (weighted(weights), rescaled, weighted(weights[::-1]))
    )
    assert one.hash == again.hash != other.hash
    assert jax_program(pool, x).peak_buffer_nbytes == x.nbytes // 3
