"""MaskedGlobalPooling1D against a float64 reference with its gradient, in every mode of TensorFlow and on JAX."""

import os
import re

import numpy as np
import pytest
from alone import draw_many, run_alone, run_on_jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402
from poolbench import masked_pooling  # noqa: E402
from poolbench.masked_pooling import MaskedGlobalPooling1D  # noqa: E402

# The acceptance run sets 500; fewer keep the slow tests within minutes.
MANY = pytest.param(int(os.environ.get("POOLBENCH_EXAMPLES", "25")), marks=pytest.mark.slow)
EXAMPLES = [6, MANY]
JAX_EXAMPLES = [MANY]
RTOL = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "int32": 1e-6}


def reference(x, mask, kind, dy):
    """Return (y, dx) of x (N, T, C), mask (N, T) and dy (N, C) by a loop over the sequences."""
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    for n, valid in enumerate(mask.astype(bool)):
        if not valid.any():
            continue
        steps = x[n, valid]
        if kind == "average":
            y[n] = steps.mean(0)
            dx[n, valid] = dy[n] / valid.sum()
        else:
            y[n] = steps.max(0)
            winners = steps == y[n]
            dx[n, valid] = winners * dy[n] / winners.sum(0)
    return y, dx


@st.composite
def problems(draw, dtypes=("float32", "float16", "bfloat16", "float64", "int32")):
    return {
        "kind": draw(st.sampled_from(["average", "max"])),
        "shape": (draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 3))),
        "dtype": draw(st.sampled_from(dtypes)),
        "mask_dtype": draw(st.sampled_from(["bool", "int32", "float32"])),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "keepdims": draw(st.booleans()),
        "padding": draw(st.sampled_from([0, 1000, np.nan, np.inf])),
        "valid_share": draw(st.sampled_from([0, 0.1, 0.5, 1])),
        "seed": draw(st.integers(0, 1000)),
    }


def arrays_of(problem):
    """Return x with its padding, mask and dy in float64, channels last, and the expected (y, dx)."""
    rng = np.random.default_rng(problem["seed"])
    # Few distinct values, negative ones among them: maxima often tie.
    x = rng.integers(-6, 3, problem["shape"]).astype(np.float64)
    mask = rng.random(problem["shape"][:2]) < problem["valid_share"]
    dy = rng.integers(1, 4, problem["shape"][::2]).astype(np.float64)
    expected = reference(x, mask, problem["kind"], dy)
    whole = not np.isfinite(problem["padding"]) and problem["dtype"] == "int32"
    x[~mask] = 1000 if whole else problem["padding"]
    return x, mask, dy, expected


def moved(problem, x):
    """Return x, channels last, in the layout of the problem."""
    return x if problem["data_format"] == "channels_last" else x.swapaxes(1, 2)


def check(problem, y, dx):
    """Compare y and dx, in the layout of the problem, with the reference."""
    expected = arrays_of(problem)[-1]
    axis = 1 if problem["data_format"] == "channels_last" else 2
    assert y.ndim == 2 + problem["keepdims"]
    rtol = RTOL[problem["dtype"]]
    y = y.squeeze(axis) if problem["keepdims"] else y
    np.testing.assert_allclose(y, expected[0], rtol=rtol, atol=rtol)
    if dx is not None:
        np.testing.assert_allclose(moved(problem, dx), expected[1], rtol=rtol, atol=rtol)


def layer_of(problem):
    layer_dtype = "float32" if problem["dtype"] == "int32" else problem["dtype"]
    return MaskedGlobalPooling1D(
        problem["kind"], problem["keepdims"], problem["data_format"], dtype=layer_dtype
    )


def in_mode(mode, function):
    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "xla")


@pytest.mark.parametrize("examples", EXAMPLES)
def test_masked_pooling_any_inputs_equal_the_reference(examples, monkeypatch):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(problems(), st.sampled_from(["eager", "graph", "xla"]), st.booleans())
    def compare(problem, mode, compiled):
        # Without this, arrays as small as these are not compiled.
        monkeypatch.setattr(masked_pooling, "COMPILED_FROM", 0 if compiled else 2**15)
        masked_pooling._for_tensorflow.cache_clear()
        x, mask, dy, _ = arrays_of(problem)
        layer = layer_of(problem)
        tensor = tf.cast(moved(problem, x), problem["dtype"])
        mask = tf.cast(mask, problem["mask_dtype"])

        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, mask=mask)
            seed = tf.cast(tf.reshape(dy, tf.shape(y)), y.dtype)
            return (
                y,
                tape.gradient(y, x, output_gradients=seed) if x.dtype.is_floating else None,
            )

        y, dx = in_mode(mode, both)(tensor)
        check(
            problem,
            tf.cast(y, "float64").numpy(),
            None if dx is None else tf.cast(dx, "float64").numpy(),
        )

    compare()


JAX_CODE = """
import masked_pooling

def run(case, x, mask, dy):
    names = ("kind", "keepdims", "data_format")
    layer = masked_pooling.MaskedGlobalPooling1D(*(case[n] for n in names), dtype=case["dtype"])
    mask = mask.astype(case["mask_dtype"])

    @jax.jit
    def both(x, dy):
        y, pull = jax.vjp(lambda x: layer(x, mask=mask), x)
        return y, pull(dy.reshape(y.shape))[0]

    return dict(zip(("y", "dx"), both(x, dy)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("examples", JAX_EXAMPLES)
def test_masked_pooling_on_jax_equals_the_reference(examples, tmp_path):
    pytest.importorskip("jax")

    def arrays(case):
        x, mask, dy, _ = arrays_of(case)
        return {"x": moved(case, x), "mask": mask, "dy": dy}

    cases = draw_many(problems(("float32", "float16", "bfloat16")), examples)
    for case, out in run_on_jax("masked_pooling", tmp_path, cases, arrays, JAX_CODE):
        check(case, out["y"], out["dx"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("kind", ["average", "max"])
def test_masked_pooling_of_compiled_size_equals_the_reference(mode, kind):
    problem = {"kind": kind, "shape": (4, 1003, 16), "dtype": "float32", "seed": 0}
    problem |= {
        "padding": np.nan,
        "valid_share": 0.7,
        "data_format": "channels_last",
        "keepdims": False,
    }
    x, mask, dy, _ = arrays_of(problem)
    assert x.size > masked_pooling.COMPILED_FROM
    layer = MaskedGlobalPooling1D(kind)
    tensor, seed = tf.constant(x, tf.float32), tf.constant(dy, tf.float32)

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask)
        return y, tape.gradient(y, x, output_gradients=seed)

    y, dx = in_mode(mode, both)(tensor)
    check(problem, y.numpy(), dx.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_masked_average_long_sequence_in_half_precision_is_exact(mode, dtype):
    x = tf.fill((2, 6000, 3), tf.cast(1000, dtype))
    call = in_mode(mode, MaskedGlobalPooling1D(dtype=dtype))
    np.testing.assert_array_equal(tf.cast(call(x, mask=np.ones((2, 6000))), "float32"), 1000)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_masked_max_many_ties_in_half_precision_share_the_gradient(mode):
    x = tf.zeros((1, 3000, 2), tf.bfloat16)
    layer = MaskedGlobalPooling1D("max", dtype="bfloat16")

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, x)

    dx = tf.cast(in_mode(mode, gradient)(x), "float64")
    np.testing.assert_allclose(tf.reduce_sum(dx, 1), 1, rtol=1e-2)


@pytest.mark.parametrize("steps", [5, 3000])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("kind", ["average", "max"])
def test_masked_pooling_nan_in_a_valid_step_gives_nan(kind, mode, steps):
    x = np.zeros((1, steps, 16), "float32")
    x[0, 1, 0] = x[0, 2, 1] = np.nan
    mask = np.ones((1, steps))
    mask[0, 2] = 0
    y = in_mode(mode, MaskedGlobalPooling1D(kind))(x, mask=mask)
    np.testing.assert_array_equal(y, [[np.nan] + [0] * 15])


@pytest.mark.parametrize("kind", ["average", "max"])
def test_masked_pooling_empty_row_gives_zero_and_zero_gradient(kind):
    x = tf.constant([[[np.nan, 1.0]], [[-2.0, 3.0]]])
    layer = MaskedGlobalPooling1D(kind)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=np.array([[False], [True]]))
    np.testing.assert_array_equal(y, [[0, 0], [-2, 3]])
    np.testing.assert_array_equal(tape.gradient(y, x), [[[0, 0]], [[1, 1]]])


@pytest.mark.parametrize("kind", ["average", "max"])
def test_masked_pooling_attached_mask_is_used_and_not_passed_on(kind):
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    tokens = np.array([[1, 2, 0, 0], [3, 4, 1, 0]])
    inputs = keras.Input((None,), dtype="int32")
    outputs = MaskedGlobalPooling1D(kind)(embedding(inputs))
    assert keras.src.backend.get_keras_mask(outputs) is None
    expected = reference(embedding(tokens).numpy(), tokens > 0, kind, np.zeros((2, 3)))[0]
    np.testing.assert_allclose(keras.Model(inputs, outputs)(tokens), expected, rtol=1e-6)


def test_masked_pooling_without_a_mask_pools_every_step():
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("float32")
    np.testing.assert_allclose(MaskedGlobalPooling1D()(x), x.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(MaskedGlobalPooling1D("max")(x), x.max(1))


@pytest.mark.slow
def test_masked_pooling_length_may_be_unknown_and_change():
    inputs = keras.Input((None, 700))
    outputs = MaskedGlobalPooling1D("max")(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, outputs)
    for steps in (3, 70, 90):
        x = np.random.default_rng(steps).integers(1, 9, (2, steps, 700)).astype("float32") - 10
        x[:, steps // 2 :] = 0
        np.testing.assert_array_equal(model.predict(x, verbose=0), x[:, : steps // 2].max(1))


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_masked_pooling_trains_with_an_empty_row(jit_compile, policy):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Masking(),
        keras.layers.Dense(4, dtype=policy),
        MaskedGlobalPooling1D(dtype=policy),
        keras.layers.Dense(1, dtype="float32"),
    ]
    model = keras.Sequential([keras.Input((6, 2)), *layers])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).standard_normal((16, 6, 2)).astype("float32")
    x[3] = x[4, 2:] = 0
    losses = model.fit(x, x.mean((1, 2)), epochs=10, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2


def test_masked_max_second_order_gradient_is_that_of_the_winners():
    x = tf.constant([[[3.0], [2.0], [9.0]]])
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = MaskedGlobalPooling1D("max")(x, mask=np.array([[1, 1, 0]])) ** 3
        dx = inner.gradient(y, x)
    np.testing.assert_allclose(outer.gradient(dx, x), [[[18], [0], [0]]])


def test_masked_pooling_integer_maximum_keeps_its_dtype():
    y = MaskedGlobalPooling1D("max")(tf.constant([[[-5], [7]]], tf.int8), mask=np.array([[1, 0]]))
    assert y.dtype == tf.int8 and y.numpy().tolist() == [[-5]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "mean"}, "kind must be one of 'average', 'max'; got 'mean'"),
        ({"data_format": "NWC"}, "data_format must be 'channels_last' or"),
    ],
)
def test_masked_pooling_bad_argument_names_what_is_expected(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        MaskedGlobalPooling1D(**arguments)


@pytest.mark.parametrize("shape", [(2, 1), (2, 5, 1), (2,), (1, 5), (3, 5)])
def test_masked_pooling_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask must have the shape \(N, T\)"):
        MaskedGlobalPooling1D()(np.ones((2, 5, 3), "float32"), mask=np.ones(shape))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_masked_pooling_output_shape_is_that_of_the_call(data_format, keepdims):
    layer = MaskedGlobalPooling1D("max", keepdims, data_format)
    assert layer(np.ones((2, 5, 3), "float32")).shape == layer.compute_output_shape((2, 5, 3))


@pytest.mark.slow
def test_masked_pooling_copied_alone_reloads_a_saved_model_in_safe_mode(tmp_path):
    inputs = keras.Input((4, 3))
    model = keras.Model(
        inputs, MaskedGlobalPooling1D("max", keepdims=True)(keras.layers.Masking()(inputs))
    )
    model.save(tmp_path / "model.keras")
    x = -np.random.default_rng(0).random((2, 4, 3)).astype("float32")
    x[1, 2:] = 0
    np.save(tmp_path / "x.npy", x)
    code = (
        "import json, keras, numpy as np, masked_pooling\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "print(json.dumps(np.asarray(model(np.load('x.npy'))).tolist()))\n"
    )
    found = np.array(run_alone("masked_pooling", tmp_path, code), "float32")
    np.testing.assert_array_equal(found, model(x))
    name = keras.saving.get_registered_name(MaskedGlobalPooling1D)
    assert name == "poolbench>MaskedGlobalPooling1D"
