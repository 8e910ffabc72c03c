"""AdaptivePooling2D against a float64 reference with its gradient, in every mode of TensorFlow and on JAX."""

import os
import re

import numpy as np
import pytest
from alone import draw_many, run_alone, run_on_jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402
from poolbench import adaptive_pooling  # noqa: E402
from poolbench.adaptive_pooling import AdaptivePooling2D  # noqa: E402

# The acceptance run sets 500; fewer keep the slow tests within minutes.
MANY = pytest.param(int(os.environ.get("POOLBENCH_EXAMPLES", "25")), marks=pytest.mark.slow)
EXAMPLES = [6, MANY]
JAX_EXAMPLES = [MANY]
RTOL = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int32": 1e-6}
MODES = ["eager", "graph", "xla"]


def windows(size, count):
    """Return the windows of PyTorch along one axis, as slices."""
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def reference(x, output, kind, dy):
    """Return (y, dx) of x (N, H, W, C) and dy (N, *output, C) by a loop over the windows.

    Each window of a maximum must have one largest element.
    """
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    for i, rows in enumerate(windows(x.shape[1], output[0])):
        for j, columns in enumerate(windows(x.shape[2], output[1])):
            window = x[:, rows, columns]
            slope = dy[:, i : i + 1, j : j + 1]
            if kind == "average":
                y[:, i, j] = window.mean((1, 2))
                dx[:, rows, columns] += slope / (window.shape[1] * window.shape[2])
            else:
                y[:, i, j] = window.max((1, 2))
                dx[:, rows, columns] += slope * (window == y[:, i : i + 1, j : j + 1])
    return y, dx


@st.composite
def problems(draw, dtypes=("float32", "float16", "bfloat16", "float64", "int32")):
    sizes = st.integers(1, 9)
    return {
        "kind": draw(st.sampled_from(["average", "max"])),
        "shape": (draw(st.integers(0, 2)), draw(sizes), draw(sizes), draw(st.integers(1, 3))),
        "output": (draw(sizes), draw(sizes)),
        "dtype": draw(st.sampled_from(dtypes)),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "seed": draw(st.integers(0, 1000)),
    }


def arrays_of(problem):
    """Return x and dy in float64, channels last, and the expected (y, dx)."""
    n, height, width, channels = problem["shape"]
    rng = np.random.default_rng(problem["seed"])
    # Distinct in each map, so that no maximum ties; at most 81, so that bfloat16 holds them.
    maps = [rng.permutation(height * width) - 70.0 for _ in range(n * channels)]
    x = np.reshape(maps, (n, channels, height, width)).transpose(0, 2, 3, 1)
    dy = rng.integers(1, 4, (n, *problem["output"], channels)).astype(np.float64)
    return x, dy, reference(x, problem["output"], problem["kind"], dy)


def moved(problem, x, back=False):
    """Return x, channels last, in the layout of the problem, or back from it."""
    if problem["data_format"] == "channels_last":
        return x
    return x.transpose((0, 2, 3, 1) if back else (0, 3, 1, 2))


def check(problem, y, dx):
    """Compare y and dx, in the layout of the problem, with the reference."""
    rtol = RTOL[problem["dtype"]]
    for got, expected in zip((y, dx), arrays_of(problem)[-1]):
        if got is not None:
            last = moved(problem, got, back=True)
            np.testing.assert_allclose(last, expected, rtol=rtol, atol=70 * rtol)


def with_gradient(layer, dy):
    """Return a function of x that returns y and dx; None for dx of integers."""

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        if not x.dtype.is_floating:
            return y, None
        return y, tape.gradient(y, x, output_gradients=tf.cast(dy, y.dtype))

    return both


def in_mode(mode, function, signature=None):
    if mode == "eager":
        return function
    return tf.function(function, input_signature=signature, jit_compile=mode == "xla")


@pytest.mark.parametrize("examples", EXAMPLES)
def test_adaptive_pooling_any_inputs_equal_the_reference(examples, monkeypatch):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(problems(), st.sampled_from(MODES), st.booleans(), st.booleans())
    def compare(problem, mode, compiled, unknown):
        # Without this, maps as small as these are not compiled.
        monkeypatch.setattr(adaptive_pooling, "COMPILED_FROM", 0 if compiled else 2**15)
        adaptive_pooling._for_tensorflow.cache_clear()
        x, dy, _ = arrays_of(problem)
        layer_dtype = "float32" if problem["dtype"] == "int32" else problem["dtype"]
        layer = AdaptivePooling2D(
            problem["output"], problem["kind"], problem["data_format"], dtype=layer_dtype
        )
        tensor = tf.cast(moved(problem, x), problem["dtype"])
        signature = [tf.TensorSpec([None] * 4, tensor.dtype)] if unknown else None
        call = in_mode(mode, with_gradient(layer, moved(problem, dy)), signature)
        found = [None if a is None else tf.cast(a, "float64").numpy() for a in call(tensor)]
        check(problem, *found)

    compare()


JAX_CODE = """
import adaptive_pooling

def run(case, x, dy):
    names = ("output", "kind", "data_format")
    layer = adaptive_pooling.AdaptivePooling2D(*(case[n] for n in names), dtype=case["dtype"])

    @jax.jit
    def both(x, dy):
        y, pull = jax.vjp(layer, x)
        return y, pull(dy)[0]

    return dict(zip(("y", "dx"), both(x, dy)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("examples", JAX_EXAMPLES)
def test_adaptive_pooling_on_jax_equals_the_reference(examples, tmp_path):
    pytest.importorskip("jax")

    def arrays(case):
        x, dy, _ = arrays_of(case)
        return {"x": moved(case, x), "dy": moved(case, dy)}

    cases = draw_many(problems(("float32", "float16", "bfloat16")), examples)
    for case, out in run_on_jax("adaptive_pooling", tmp_path, cases, arrays, JAX_CODE):
        check(case, out["y"], out["dx"])


@pytest.mark.slow
@pytest.mark.parametrize("output", [(7, 7), (5, 9), (1, 1), (2, 1)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["average", "max"])
def test_adaptive_pooling_of_compiled_size_equals_the_reference(kind, mode, output):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 70, 42, 8)).astype("float32")
    dy = rng.standard_normal((2, *output, 8)).astype("float32")
    assert x.size > adaptive_pooling.COMPILED_FROM
    found = in_mode(mode, with_gradient(AdaptivePooling2D(output, kind), dy))(tf.constant(x))
    expected = reference(x.astype("float64"), output, kind, dy.astype("float64"))
    for got, wanted in zip(found, expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adaptive_average_large_window_in_half_precision_is_exact(dtype, mode, output):
    x = tf.fill((1, 200, 200, 2), tf.cast(1000, dtype))
    y = in_mode(mode, AdaptivePooling2D(output, dtype=dtype))(x)
    np.testing.assert_array_equal(tf.cast(y, "float32"), np.full((1, output, output, 2), 1000))


@pytest.mark.parametrize("size", [6, 300])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["average", "max"])
@pytest.mark.parametrize("output", [3, 4])
def test_adaptive_pooling_nan_in_a_window_gives_nan(kind, mode, size, output):
    x = np.zeros((1, size, size, 2), "float32")
    x[0, 0, 0, 0] = np.nan
    y = in_mode(mode, AdaptivePooling2D(output, kind))(x).numpy()
    assert np.isnan(y[0, 0, 0, 0])
    y[0, 0, 0, 0] = 0
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", [1, 3])
def test_adaptive_max_ties_in_half_precision_share_the_gradient(mode, output):
    x = tf.zeros((1, 48, 48, 2), tf.bfloat16)
    layer = AdaptivePooling2D(output, "max", dtype="bfloat16")
    dy = tf.ones((1, output, output, 2))
    _, dx = in_mode(mode, with_gradient(layer, dy))(x)
    np.testing.assert_allclose(tf.reduce_sum(tf.cast(dx, "float64"), (1, 2)), output**2, rtol=1e-2)


def test_adaptive_max_second_order_gradient_is_that_of_the_winners():
    x = tf.constant(np.arange(20.0).reshape(1, 5, 4, 1))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = AdaptivePooling2D((2, 2), "max", dtype="float64")(x) ** 3
        dx = inner.gradient(y, x)
    curvature = outer.gradient(dx, x)
    winners = reference(x.numpy(), (2, 2), "max", 6 * np.cbrt(y))[1]
    np.testing.assert_allclose(curvature, winners)


def test_adaptive_pooling_sizes_may_be_unknown_and_change():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, AdaptivePooling2D((2, 3), "max")(inputs))
    for height, width in ((4, 9), (5, 7), (1, 2)):
        x = np.random.default_rng(height).standard_normal((2, height, width, 3)).astype("float32")
        expected = reference(x, (2, 3), "max", np.zeros((2, 2, 3, 3)))[0]
        np.testing.assert_array_equal(model(x), expected)
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", ["average", "max"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_adaptive_pooling_to_one_trains_and_exports(kind, jit_compile, policy, tmp_path):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(8, 3, dtype=policy),
        AdaptivePooling2D((1, 2), kind, dtype=policy),
        keras.layers.Flatten(),
        keras.layers.Dense(1, dtype="float32"),
    ]
    model = keras.Sequential([keras.Input((9, 8, 2)), *layers])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).standard_normal((16, 9, 8, 2)).astype("float32")
    losses = model.fit(x, 3 + x[:, 0, 0, 0], epochs=10, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"output": 0}, "output must be one or two whole numbers from 1; got 0"),
        ({"output": (7, 2.5)}, "output must be one or two whole numbers from 1; got (7, 2.5)"),
        ({"output": (7, 7, 7)}, "output must be one or two whole numbers from 1; got (7, 7, 7)"),
        ({"output": 7, "kind": "mean"}, "kind must be one of 'average', 'max'; got 'mean'"),
        ({"output": 7, "data_format": "NHWC"}, "data_format must be 'channels_last' or"),
    ],
)
def test_adaptive_pooling_bad_argument_names_what_is_expected(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        AdaptivePooling2D(**arguments)


@pytest.mark.slow
def test_adaptive_pooling_copied_alone_reloads_a_saved_model_in_safe_mode(tmp_path):
    inputs = keras.Input((3, None, None))
    model = keras.Model(inputs, AdaptivePooling2D((3, 2), "max", "channels_first")(inputs))
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 5)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import json, keras, numpy as np, adaptive_pooling\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "print(json.dumps(np.asarray(model(np.load('x.npy'))).tolist()))\n"
    )
    found = np.array(run_alone("adaptive_pooling", tmp_path, code), "float32")
    np.testing.assert_array_equal(found, model(x))
    name = keras.saving.get_registered_name(AdaptivePooling2D)
    assert name == "poolbench>AdaptivePooling2D"
