"""GeMPooling2D against a float64 reference with its gradient, in every mode of TensorFlow and on JAX."""

import os
import re

import numpy as np
import pytest
from alone import draw_many, run_alone, run_on_jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402
from poolbench.gem_pooling import LEAST, GeMPooling2D  # noqa: E402

# The acceptance run sets 500; fewer keep the slow tests within minutes.
MANY = pytest.param(int(os.environ.get("POOLBENCH_EXAMPLES", "25")), marks=pytest.mark.slow)
RTOL = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2, "int32": 2e-5}
MODES = ["eager", "graph", "xla"]


def reference(x, p, dy):
    """Return (y, dx, dp) of x (N, H, W, C), p and dy (N, C)."""
    z = np.maximum(x, LEAST)
    mean = (z**p).mean((1, 2))
    y = mean ** (1 / p)
    scale = (dy * y / mean)[:, None, None] / (x.shape[1] * x.shape[2])
    dx = scale * z ** (p - 1) * (x > LEAST)
    logs = (z**p * np.log(z)).mean((1, 2))
    return y, dx, (dy * y * (logs / mean / p - np.log(mean) / p**2)).sum()


@st.composite
def problems(draw, dtypes=("float32", "float16", "bfloat16", "float64", "int32")):
    sizes = st.integers(1, 9)
    return {
        "p": draw(st.sampled_from([1.0, 2.5, 3.0, 6.0])),
        "learned": draw(st.booleans()),
        "shape": (draw(st.integers(1, 3)), draw(sizes), draw(sizes), draw(st.integers(1, 3))),
        "scale": draw(st.sampled_from([1, 0.125, 64])),
        "dtype": draw(st.sampled_from(dtypes)),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "seed": draw(st.integers(0, 1000)),
    }


def arrays_of(problem):
    """Return x and dy in float64, channels last, and the expected (y, dx, dp)."""
    rng = np.random.default_rng(problem["seed"])
    # Whole numbers by powers of two, which every dtype holds; negative ones and zeros among them.
    scale = 1 if problem["dtype"] == "int32" else problem["scale"]
    x = rng.integers(-3, 9, problem["shape"]) * float(scale)
    dy = rng.integers(1, 4, problem["shape"][::3]).astype(np.float64)
    return x, dy, reference(x, problem["p"], dy)


def moved(problem, x):
    """Return x, channels last, in the layout of the problem."""
    return x if problem["data_format"] == "channels_last" else x.transpose(0, 3, 1, 2)


def check(problem, y, dx, dp):
    """Compare y, dx and dp, in the layout of the problem, with the reference."""
    rtol = RTOL[problem["dtype"]]
    wanted_y, wanted_dx, wanted_dp = arrays_of(problem)[-1]
    # 1e-6, the least value, lies between two numbers of float16.
    np.testing.assert_allclose(y, wanted_y, rtol=rtol, atol=6e-8 if rtol > 1e-3 else 0)
    if dx is not None:
        large = max(abs(wanted_dx).max(), 1e-6)
        np.testing.assert_allclose(dx, moved(problem, wanted_dx), rtol=rtol, atol=rtol * large)
    if dp is not None:
        total = abs(wanted_y).sum() * 10
        np.testing.assert_allclose(dp, wanted_dp, rtol=rtol, atol=rtol * total)


def layer_of(problem):
    dtype = "float32" if problem["dtype"] == "int32" else problem["dtype"]
    return GeMPooling2D(problem["p"], problem["learned"], problem["data_format"], dtype=dtype)


def in_mode(mode, function):
    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "xla")


@pytest.mark.parametrize("examples", [6, MANY])
def test_gem_pooling_any_inputs_equal_the_reference(examples):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(problems(), st.sampled_from(MODES))
    def compare(problem, mode):
        x, dy, _ = arrays_of(problem)
        layer = layer_of(problem)
        tensor = tf.cast(moved(problem, x), problem["dtype"])
        layer.build(tensor.shape)

        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            sources = [x] if x.dtype.is_floating else []
            found = tape.gradient(
                y, [*sources, *layer.trainable_variables], output_gradients=tf.cast(dy, y.dtype)
            )
            return [y, *found]

        found = [tf.cast(a, "float64").numpy() for a in in_mode(mode, both)(tensor)]
        dx = found[1] if tensor.dtype.is_floating else None
        check(problem, found[0], dx, found[-1].item() if problem["learned"] else None)

    compare()


JAX_CODE = """
import gem_pooling

def run(case, x, dy):
    layer = gem_pooling.GeMPooling2D(case["p"], case["learned"], case["data_format"], dtype=case["dtype"])
    layer.build(x.shape)
    weights = [jax.numpy.asarray(v.value) for v in layer.trainable_variables]

    @jax.jit
    def both(weights, x, dy):
        y, pull = jax.vjp(lambda w, x: layer.stateless_call(w, [], x)[0], weights, x)
        return y, *pull(dy)

    y, dw, dx = both(weights, x, dy)
    return {"y": y, "dx": dx} | ({"dp": dw[0]} if dw else {})
"""


@pytest.mark.slow
@pytest.mark.parametrize("examples", [MANY])
def test_gem_pooling_on_jax_equals_the_reference(examples, tmp_path):
    pytest.importorskip("jax")

    def arrays(case):
        x, dy, _ = arrays_of(case)
        return {"x": moved(case, x), "dy": dy}

    cases = draw_many(problems(("float32", "float16", "bfloat16")), examples)
    for case, out in run_on_jax("gem_pooling", tmp_path, cases, arrays, JAX_CODE):
        check(case, out["y"], out["dx"], out["dp"].item() if case["learned"] else None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 1000), ("float16", 0.003), ("bfloat16", 1e6)]
)
def test_gem_pooling_in_half_precision_neither_overflows_nor_underflows(mode, dtype, value):
    x = tf.fill((1, 30, 30, 2), tf.constant(value, dtype))
    y = tf.cast(in_mode(mode, GeMPooling2D(dtype=dtype))(x), "float32")
    np.testing.assert_allclose(y, tf.cast(x, "float32")[:, 0, 0], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_gem_pooling_learned_exponent_trains_and_reloads_alone_in_safe_mode(
    jit_compile, policy, tmp_path
):
    keras.utils.set_random_seed(0)
    layer = GeMPooling2D(2.0, learned=True, dtype=policy)
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).random((32, 6, 6, 3)).astype("float32")
    target = reference(x.astype("float64"), 5.0, np.ones((32, 3)))[0]
    model.fit(x, target, epochs=40, batch_size=16, verbose=0)
    assert layer.exponent.dtype == "float32"
    assert float(layer.exponent.value[0]) == pytest.approx(5, abs=0.5)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import json, keras, numpy as np, gem_pooling\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "print(json.dumps(np.asarray(model(np.load('x.npy')), 'float32').tolist()))\n"
    )
    found = run_alone("gem_pooling", tmp_path, code)
    np.testing.assert_array_equal(found, tf.cast(model(x), "float32"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"p": 0}, "p must be above 0; got 0"),
        ({"data_format": "NHWC"}, "data_format must be 'channels_last' or"),
    ],
)
def test_gem_pooling_bad_argument_names_what_is_expected(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        GeMPooling2D(**arguments)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("value", [0.001, 1.0, 100.0, 1e6])
def test_gem_pooling_large_exponent_equals_the_reference(value, learned):
    layer = GeMPooling2D(20.0, learned=learned)
    x = tf.constant(value * np.array([1.0, 0.5, 0.25, 0.5]).reshape(1, 2, 2, 1), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    wanted, slope, _ = reference(x.numpy().astype(np.float64), 20.0, np.ones((1, 1)))
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(y, x), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gem_pooling_learned_exponent_survives_a_map_of_zeros(jit_compile):
    layer = GeMPooling2D(9.0, learned=True)
    x = tf.zeros((1, 3, 3, 2))
    layer.build(x.shape)

    @tf.function(jit_compile=jit_compile)
    def slope():
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(layer(x))
        return y, tape.gradient(y, layer.exponent)

    y, found = slope()
    assert y.numpy() == pytest.approx(2 * LEAST)
    assert np.isfinite(found).all()


def test_gem_pooling_of_infinity_is_infinity():
    x = np.ones((1, 2, 2, 1), "float32")
    x[0, 0, 0, 0] = np.inf
    assert np.isposinf(GeMPooling2D(9.0)(x)).all()


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_gem_pooling_output_shape_is_that_of_the_call(data_format):
    layer = GeMPooling2D(data_format=data_format)
    assert layer(np.ones((2, 5, 4, 3), "float32")).shape == layer.compute_output_shape((2, 5, 4, 3))
