"""DepthMaxPool2D, the reusable layer, against the reference and as a single copied file."""

import re

import numpy as np
import pytest
from alone import run_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402
import poolbench.layers  # noqa: E402
from poolbench.layers import DepthMaxPool2D, pool_windows  # noqa: E402


def brute_force(x, pool_size, strides, padding):
    """(y, windows of places) of x, channels last, by the definition: a loop over the windows."""
    channels = x.shape[-1]
    if padding == "valid":
        starts = range(0, channels - pool_size + 1, strides)
    else:
        count = -(-channels // strides)
        missing = max((count - 1) * strides + pool_size - channels, 0)
        starts = [i * strides - missing // 2 for i in range(count)]
    windows = [[c for c in range(s, s + pool_size) if 0 <= c < channels] for s in starts]
    return np.stack([x[..., places].max(-1) for places in windows], -1), windows


def first_winner_gradient(x, dy, windows):
    dx = np.zeros(x.shape)
    for i, places in enumerate(windows):
        winners = np.argmax(x[..., places], -1)
        for j, place in enumerate(places):
            dx[..., place] += np.where(winners == j, dy[..., i], 0)
    return dx


@st.composite
def problems(draw):
    channels = draw(st.integers(1, 12))
    padding = draw(st.sampled_from(["valid", "same"]))
    return {
        "shape": (
            draw(st.integers(0, 2)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            channels,
        ),
        "pool_size": draw(st.integers(1, channels if padding == "valid" else channels + 2)),
        "strides": draw(st.none() | st.integers(1, 4)),
        "padding": padding,
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "dtype": draw(
            st.sampled_from(["float32", "float16", "bfloat16", "float64", "int32", "int8", "uint8"])
        ),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_the_formula_is_the_definition(problem):
    """Values and gradient, without the compiler: five hundred compilations would take minutes."""
    rng = np.random.default_rng(problem["seed"])
    strides = problem["strides"] or problem["pool_size"]
    # Few distinct values: windows tie often. All fit every dtype, uint8 included.
    low = 0 if problem["dtype"] == "uint8" else -3
    x = rng.integers(low, 4, problem["shape"]).astype(np.float64)
    y, windows = brute_force(x, problem["pool_size"], strides, problem["padding"])
    last = problem["data_format"] == "channels_last"
    tensor = tf.cast(tf.constant(x if last else x.transpose(0, 3, 1, 2)), problem["dtype"])
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        got = pool_windows(
            tensor, problem["pool_size"], strides, problem["padding"] == "same", 3 if last else 1
        )
    values = tf.cast(got, "float64").numpy()
    np.testing.assert_array_equal(values if last else values.transpose(0, 2, 3, 1), y)
    if "float" not in problem["dtype"]:
        return
    dy = rng.integers(1, 4, y.shape).astype(np.float64)
    seed = tf.cast(tf.constant(dy if last else dy.transpose(0, 3, 1, 2)), problem["dtype"])
    dx = tf.cast(tape.gradient(got, tensor, output_gradients=seed), "float64").numpy()
    expected = first_winner_gradient(x, dy, windows)
    np.testing.assert_array_equal(dx if last else dx.transpose(0, 2, 3, 1), expected)


COMPILED = [
    (pool_size, strides, padding, data_format, dtype)
    for pool_size, strides, padding in [
        (3, None, "valid"), (3, None, "same"), (2, 1, "valid"), (4, 3, "same"), (1, 2, "same"), (9, None, "same"),
    ]
    for data_format, dtype in [
        ("channels_last", "float32"), ("channels_first", "float16"), ("channels_last", "bfloat16"),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("pool_size", "strides", "padding", "data_format", "dtype"), COMPILED)
def test_the_compiled_layer_is_the_definition(pool_size, strides, padding, data_format, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 3, 2, 10)).astype(np.float64)
    y, windows = brute_force(x, pool_size, strides or pool_size, padding)
    last = data_format == "channels_last"
    layer = DepthMaxPool2D(pool_size, strides, padding, data_format, dtype=dtype)
    tensor = tf.cast(tf.constant(x if last else x.transpose(0, 3, 1, 2)), dtype)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        got = layer(tensor)
    dx = tape.gradient(got, tensor)
    assert got.shape == layer.compute_output_shape(tensor.shape)
    values, slope = (tf.cast(a, "float64").numpy() for a in (got, dx))
    np.testing.assert_array_equal(values if last else values.transpose(0, 2, 3, 1), y)
    expected = first_winner_gradient(x, np.ones_like(y), windows)
    np.testing.assert_array_equal(slope if last else slope.transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize(
    ("pool_size", "strides", "padding"), [(3, None, "valid"), (9, None, "same"), (4, 3, "same")]
)
def test_half_precision_in_float32_is_the_definition(pool_size, strides, padding, monkeypatch):
    monkeypatch.setattr(poolbench.layers, "SMALL", 0)
    test_the_compiled_layer_is_the_definition(
        pool_size, strides, padding, "channels_last", "bfloat16"
    )


def test_few_windows_of_large_half_precision_are_computed_in_float32():
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 24)).astype("float16")
    graph = tf.function(DepthMaxPool2D(8, dtype="float16")).get_concrete_function(x)
    joined = [node for node in graph.graph.get_operations() if node.type == "Maximum"]
    assert {node.outputs[0].dtype for node in joined} == {tf.float32}
    np.testing.assert_array_equal(graph(tf.constant(x)), x.reshape(4, 32, 32, 3, 8).max(-1))


def test_eager_calls_after_the_first_are_the_definition():
    """A built layer takes eager tensors of its own dtype past the checks of Keras."""
    layer = DepthMaxPool2D(3)
    for shape in ((2, 3, 2, 10), (1, 2, 2, 7), (2, 3, 2, 10)):
        x = np.random.default_rng(0).integers(-3, 4, shape).astype("float32")
        y, windows = brute_force(x, 3, 3, "valid")
        tensor = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            got = layer(tensor)
        np.testing.assert_array_equal(got, y)
        expected = first_winner_gradient(x, np.ones_like(y), windows)
        np.testing.assert_array_equal(tape.gradient(got, tensor), expected)


@pytest.mark.parametrize("given", ["float64", "float16", "numpy"])
def test_eager_call_of_a_built_layer_with_another_input_is_cast_by_keras(given):
    layer = DepthMaxPool2D(3)
    x = np.random.default_rng(0).integers(-3, 4, (1, 2, 2, 6)).astype("float32")
    layer(x)
    y = layer(x if given == "numpy" else tf.constant(x, given))
    assert y.dtype == tf.float32
    np.testing.assert_array_equal(y, brute_force(x, 3, 3, "valid")[0])


def test_eager_call_of_a_built_layer_with_a_wrong_rank_raises_value_error():
    layer = DepthMaxPool2D(3)
    layer(tf.zeros((1, 2, 2, 6)))
    with pytest.raises(ValueError, match="ndim"):
        layer(tf.zeros((2, 2, 6)))


def test_nan_in_a_window_gives_nan_in_every_mode():
    nan, inf = np.nan, -np.inf
    x = tf.constant(
        [[[[1, nan, 3, nan, nan, nan, nan, 1, 2, 1, 2, nan, inf, inf, inf]]]], tf.float32
    )
    layer = DepthMaxPool2D(3)
    expected = [nan, nan, nan, nan, inf]
    for call in (layer, layer, tf.function(layer), tf.function(layer, jit_compile=True)):
        np.testing.assert_array_equal(call(x).numpy().ravel(), expected)


def test_same_pads_with_less_than_any_value():
    x = tf.constant([[[[-5, -4, -3, -2]]]], tf.int16)
    assert DepthMaxPool2D(3, padding="same", dtype="int16")(x).numpy().ravel().tolist() == [-4, -2]


def test_the_second_order_gradient_is_that_of_the_winners():
    x = tf.constant(np.random.default_rng(0).standard_normal((1, 2, 2, 6)), tf.float32)
    layer = DepthMaxPool2D(3)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(layer(x) ** 3)
        dx = inner.gradient(y, x)
    curvature = outer.gradient(dx, x).numpy()
    pooled, windows = brute_force(x.numpy(), 3, 3, "valid")
    winners = first_winner_gradient(x.numpy(), 6 * pooled, windows)
    np.testing.assert_allclose(curvature, winners, rtol=1e-5)


def test_sizes_may_be_unknown_the_channels_too():
    inputs = keras.Input((None, None, None))
    model = keras.Model(inputs, DepthMaxPool2D(3, padding="same")(inputs))
    for channels in (4, 5, 6):
        x = np.random.default_rng(channels).standard_normal((2, 3, 4, channels)).astype("float32")
        np.testing.assert_array_equal(model(x), brute_force(x, 3, 3, "same")[0])


@pytest.mark.parametrize("jit_compile", ["auto", False, True])
def test_it_trains(jit_compile):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(6, 3),
        DepthMaxPool2D(3),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit_compile)
    x = np.random.default_rng(0).standard_normal((20, 8, 8, 2)).astype("float32")
    losses = model.fit(x, x.max((1, 2, 3)), epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_computes_in_the_narrow_type(policy):
    layer = DepthMaxPool2D(3, dtype=policy)
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 6)).astype("float32")
    y = layer(x)
    assert (
        keras.backend.standardize_dtype(y.dtype)
        == layer.compute_dtype
        == policy.removeprefix("mixed_")
    )
    np.testing.assert_allclose(tf.cast(y, "float32"), brute_force(x, 3, 3, "valid")[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pool_size": 0}, "pool_size must be a whole number from 1; got 0"),
        ({"pool_size": 2.5}, "pool_size must be a whole number from 1; got 2.5"),
        ({"pool_size": 2, "strides": -1}, "strides must be a whole number from 1; got -1"),
        ({"pool_size": 2, "padding": "full"}, "padding must be one of 'valid', 'same'; got 'full'"),
        ({"pool_size": 2, "data_format": "NHWC"}, "data_format must be 'channels_last' or"),
    ],
)
def test_layer_bad_argument_raises_value_error(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        DepthMaxPool2D(**arguments)


def test_layer_window_wider_than_depth_raises_value_error():
    with pytest.raises(ValueError, match="pool_size must be at most the depth of 2"):
        DepthMaxPool2D(3).compute_output_shape((1, 2, 2, 2))
    with pytest.raises(ValueError, match="pool_size must be at most the depth of 2"):
        DepthMaxPool2D(3)(tf.zeros((1, 2, 2, 2)))


def test_padding_is_accepted_in_any_letter_case():
    assert DepthMaxPool2D(2, padding="SAME").padding == "same"


@pytest.mark.slow
def test_a_copy_of_the_file_alone_reloads_a_saved_model_in_safe_mode(tmp_path):
    inputs = keras.Input((4, 4, 7))
    model = keras.Model(inputs, DepthMaxPool2D(3, padding="same", name="pool")(inputs))
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 7)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import json, keras, numpy as np, layers\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "print(json.dumps(np.asarray(model(np.load('x.npy'))).tolist()))\n"
    )
    np.testing.assert_array_equal(
        np.array(run_alone("layers", tmp_path, code), "float32"), model(x)
    )


JAX_CODE = """
import json, keras, numpy as np, layers, jax
x = np.random.default_rng(0).integers(-2, 3, (2, 3, 3, 7)).astype("float32")
out = {}
for padding in ("valid", "same"):
    layer = layers.DepthMaxPool2D(3, padding=padding)
    dx = jax.jit(jax.grad(lambda v: layer(v).sum()))(x)
    out[padding] = [np.asarray(layer(x)).tolist(), np.asarray(dx).tolist()]
assert keras.backend.backend() == "jax"
print(json.dumps(out))
"""


TORCH_CODE = """
import json, keras, numpy as np, layers, torch
x = np.random.default_rng(0).integers(-2, 3, (2, 3, 3, 7)).astype("float32")
out = {}
for padding in ("valid", "same"):
    layer = layers.DepthMaxPool2D(3, padding=padding)
    v = torch.tensor(x, requires_grad=True)
    y = layer(v)
    y.sum().backward()
    out[padding] = [y.detach().cpu().numpy().tolist(), v.grad.cpu().numpy().tolist()]
assert keras.backend.backend() == "torch"
print(json.dumps(out))
"""
BACKENDS = {"jax": JAX_CODE, "torch": TORCH_CODE}


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_right_on_another_backend(tmp_path, backend):
    pytest.importorskip(backend)
    found = run_alone("layers", tmp_path, BACKENDS[backend], KERAS_BACKEND=backend)
    x = np.random.default_rng(0).integers(-2, 3, (2, 3, 3, 7)).astype("float32")
    for padding, (y, dx) in found.items():
        expected, windows = brute_force(x, 3, 3, padding)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(dx, first_winner_gradient(x, np.ones_like(expected), windows))


def test_it_exports_to_a_saved_model_and_to_tflite_with_builtins_only(tmp_path):
    inputs = keras.Input((4, 4, 7), batch_size=1)
    model = keras.Model(inputs, DepthMaxPool2D(3, padding="same")(inputs))
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 7)).astype("float32")
    expected = brute_force(x, 3, 3, "same")[0]
    model.export(tmp_path / "saved", verbose=False)
    np.testing.assert_array_equal(tf.saved_model.load(str(tmp_path / "saved")).serve(x), expected)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_its_onnx_export_is_equal_with_infinities_and_nan(padding):
    tf2onnx = pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = keras.Input((4, 4, 7))
    model = keras.Model(inputs, DepthMaxPool2D(3, padding=padding)(inputs))
    signature = [tf.TensorSpec((2, 4, 4, 7), tf.float32, name="x")]
    exported, _ = tf2onnx.convert.from_function(tf.function(lambda x: model(x)), signature)
    session = onnxruntime.InferenceSession(
        exported.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 7)).astype("float32")
    for case in (
        x,
        -np.abs(x),
        np.where(x > 1, -np.inf, x),
        np.full_like(x, -np.inf),
        np.where(x > 1.5, np.nan, x),
    ):
        got = session.run(None, {"x": case.astype("float32")})[0]
        np.testing.assert_array_equal(got, model(case.astype("float32")))


@pytest.mark.slow
def test_it_works_under_op_determinism(tmp_path):
    code = (
        "import json, tensorflow as tf, numpy as np, layers\n"
        "tf.config.experimental.enable_op_determinism()\n"
        "x = tf.constant(np.arange(24.0).reshape(1, 2, 2, 6))\n"
        "layer = layers.DepthMaxPool2D(3, dtype='float64')\n"
        "with tf.GradientTape() as tape:\n"
        "    tape.watch(x)\n"
        "    y = layer(x)\n"
        "print(json.dumps(tape.gradient(y, x).numpy().ravel().tolist()))\n"
    )
    assert run_alone("layers", tmp_path, code) == [0, 0, 1] * 8
