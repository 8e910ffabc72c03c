"""Behaviour of TensorFlow and Keras that the project relies on or documents, with its issues.

A test that finds the behaviour gone fails with "mended upstream": take the limitation out of the candidate's
table of failures and of docs/recipes.md, and make the support matrix anew.
"""

import functools
import os
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
import keras  # noqa: E402

X = tf.constant(np.random.default_rng(0).standard_normal((2, 4, 4, 6)), tf.float32)
WINDOW = (1, 1, 1, 3)
REFUSALS = (ValueError, TypeError, NotImplementedError, NameError, LookupError, tf.errors.OpError)


def cpu_flags():
    """Return the features of the processor, as Linux lists them."""
    file = Path("/proc/cpuinfo")
    return file.read_text().split() if file.exists() else []


def refused(call, match, issue=""):
    """The call fails with a text that matches; where it no longer fails, that is the news."""
    try:
        call()
    except REFUSALS as error:
        assert match in str(error), f"it fails with another text now {issue}: {error}"
        return
    pytest.fail(f"mended upstream {issue}: this works now")


def pool(x, padding="VALID", ksize=WINDOW, strides=WINDOW, **options):
    return tf.nn.max_pool(x, ksize, strides, padding, **options)


def compiled(function, *arguments):
    return tf.function(function, jit_compile=True)(*arguments)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "graph"])
class TestOutsideXla:
    def test_lower_case_padding_is_refused(self, wrap):
        refused(lambda: wrap(lambda: pool(X, "valid"))(), "padding")

    @pytest.mark.parametrize("padding", ["VALID", "SAME"])
    def test_a_window_that_does_not_divide_the_depth_is_refused(self, wrap, padding):
        refused(
            lambda: wrap(lambda: pool(X[..., :5], padding))(),
            "evenly divide the input depth",
            "(handson-ml3#83)",
        )

    def test_a_window_that_is_not_the_stride_is_refused(self, wrap):
        refused(lambda: wrap(lambda: pool(X, strides=(1, 1, 1, 2)))(), "equal the depth stride")

    def test_depth_and_space_at_once_are_refused(self, wrap):
        refused(
            lambda: wrap(lambda: pool(X, ksize=(1, 2, 2, 3), strides=(1, 2, 2, 3)))(),
            "exactly one of pooling",
        )

    def test_channels_first_is_refused_on_the_cpu(self, wrap):
        first = tf.transpose(X, (0, 3, 1, 2))
        refused(
            lambda: wrap(
                lambda: pool(first, ksize=(1, 3, 1, 1), strides=(1, 3, 1, 1), data_format="NCHW")
            )(),
            "only supports NHWC on device type CPU",
        )

    def test_the_gradient_is_refused_on_the_cpu(self, wrap):
        def gradient():
            with tf.GradientTape() as tape:
                tape.watch(X)
                y = pool(X)
            return tape.gradient(y, X)

        refused(
            lambda: wrap(gradient)(), "not yet supported on the depth dimension", "(tensorflow#636)"
        )


@pytest.mark.parametrize(
    ("channels", "padding", "groups"),
    [
        (5, "SAME", [[0, 1, 2], [3, 4]]),
        (4, "SAME", [[0, 1], [2, 3]]),
        (5, "VALID", [[0, 1, 2]]),
        (6, "VALID", [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_xla_takes_any_depth_and_pads_with_less_than_any_value(channels, padding, groups):
    x = X[..., :channels] - 10
    expected = np.stack([x.numpy()[..., group].max(-1) for group in groups], -1)
    np.testing.assert_array_equal(compiled(lambda x: pool(x, padding), x), expected)


def test_xla_has_the_gradient():
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = pool(x)
        return tape.gradient(y, x)

    assert float(tf.reduce_sum(compiled(gradient, X))) == 2 * 4 * 4 * 2


class TestSilentDifferences:
    """Arguments under which eager and XLA differ without a word."""

    def test_the_spatial_stride_is_ignored_on_the_cpu(self):
        strides = (1, 2, 2, 3)
        shapes = (
            pool(X, strides=strides).shape,
            compiled(lambda x: pool(x, strides=strides), X).shape,
        )
        assert shapes == ((2, 4, 4, 2), (2, 2, 2, 2)), "mended upstream: eager and XLA agree now"

    def test_a_depth_stride_without_a_window_is_ignored_on_the_cpu(self):
        ksize, strides = (1, 1, 1, 1), (1, 1, 1, 3)
        shapes = (
            pool(X, ksize=ksize, strides=strides).shape,
            compiled(lambda x: pool(x, ksize=ksize, strides=strides), X).shape,
        )
        assert shapes == ((2, 4, 4, 6), (2, 4, 4, 2)), "mended upstream: eager and XLA agree now"

    def test_max_pool_with_argmax_returns_its_input(self):
        y, _ = tf.nn.max_pool_with_argmax(X, WINDOW, WINDOW, "VALID")
        assert np.array_equal(y, X), (
            "mended upstream: max_pool_with_argmax pools the depth, or refuses to"
        )


class TestNan:
    """tensorflow#125965, tensorflow#116992: where a NaN goes depends on the implementation and the mode."""

    X = tf.constant(
        [[[[1, np.nan, 3, np.nan, np.nan, np.nan, np.nan, 1, 2, 1, 2, np.nan]]]], tf.float32
    )

    def test_the_native_kernel_loses_it(self):
        np.testing.assert_array_equal(
            pool(self.X).numpy().ravel(),
            [3, np.nan, np.nan, 2],
            err_msg="mended upstream (tensorflow#116992)?",
        )

    def test_xla_s_reduce_max_loses_it(self):
        def reduce(x):
            return tf.reduce_max(tf.reshape(x, (1, 1, 1, 4, 3)), -1)

        eager, xla = reduce(self.X).numpy().ravel(), compiled(reduce, self.X).numpy().ravel()
        assert np.isnan(eager).all()
        assert not np.isnan(xla).all(), (
            "mended upstream (tensorflow#125965): XLA's reduce_max keeps NaN"
        )


class TestSavedLambda:
    """keras#18284, keras#20167: a model with the recipe's Lambda saves, and does not load."""

    @pytest.fixture
    def file(self, tmp_path):
        def save(**options):
            inputs = keras.Input((4, 4, 6))
            layer = keras.layers.Lambda(lambda x: pool(x), name="depth_pool", **options)
            keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
            return tmp_path / "model.keras"

        return save

    def test_safe_mode_refuses_it(self, file):
        path = file()
        refused(lambda: keras.saving.load_model(path), "unsafe", "(keras#20167)")

    def test_without_safe_mode_the_output_shape_is_missing(self, file):
        path = file()
        refused(lambda: keras.saving.load_model(path, safe_mode=False), "output", "(keras#18284)")

    def test_with_an_output_shape_it_loads_and_does_not_know_tf(self, tmp_path):
        inputs = keras.Input((4, 4, 6))
        layer = keras.layers.Lambda(
            lambda x: tf.nn.max_pool(x, WINDOW, WINDOW, "VALID"), output_shape=(4, 4, 2)
        )
        keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
        refused(
            lambda: keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)(X),
            "'tf' is not defined",
            "(keras#18284)",
        )


DETERMINISTIC = """
import tensorflow as tf
tf.config.experimental.enable_op_determinism()
x = tf.ones((1, 2, 2, 6))
@tf.function(jit_compile=True)
def gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nn.max_pool(x, (1, 1, 1, 3), (1, 1, 1, 3), "VALID")
    return tape.gradient(y, x)
try:
    gradient(x)
except tf.errors.OpError as error:
    print("refused:", " ".join(str(error).split()))
"""


@pytest.mark.slow
def test_xla_s_gradient_is_refused_under_op_determinism_even_on_the_cpu():
    # Determinism holds for the whole life of a process.
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "refused:" in done.stdout, (
        "mended upstream: XLA's max-pool gradient is deterministic now"
    )
    assert "determinis" in done.stdout.lower()


@pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="no GPU")
def test_the_gpu_has_no_kernel_over_the_depth():
    with tf.device("gpu:0"):
        refused(lambda: pool(X), "only implemented for CPU devices", "(tensorflow#636)")


def test_a_lambda_does_not_train_on_the_cpu_without_xla():
    inputs = keras.Input((4, 4, 6))
    hidden = keras.layers.Lambda(lambda x: pool(x))(keras.layers.Conv2D(6, 1)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(hidden)))
    model.compile("sgd", "mse", jit_compile=False)
    refused(
        lambda: model.fit(X, np.zeros(2), verbose=0),
        "MaxPoolingGrad is not yet supported",
        "(tensorflow#636)",
    )


def relative_error(mean, size):
    x = np.random.default_rng(0).uniform(1, 2, (2, size, size, 96)).astype(np.float16)
    exact = x.astype(np.float64).mean((1, 2))
    return float(np.abs(np.asarray(mean(tf.constant(x))).astype(np.float64) / exact - 1).max())


class TestHalfPrecisionMeans:
    """float16 on the CPU: the layer accumulates in float32, tf.reduce_mean in half."""

    @pytest.mark.parametrize("size", [7, 28, 56, 112])
    def test_the_layer_is_right_at_any_size(self, size):
        layer = keras.layers.GlobalAveragePooling2D(dtype="float16")
        assert relative_error(layer, size) < 1e-3

    def test_reduce_mean_loses_digits_at_56_and_most_of_the_sum_at_112(self):
        def mean(x):
            return tf.reduce_mean(x, axis=[1, 2])

        errors = [relative_error(mean, size) for size in (56, 112)]
        assert errors[0] > 0.003, "mended upstream: reduce_mean no longer accumulates in half"
        assert errors[1] > 0.02, "mended upstream: reduce_mean no longer accumulates in half"

    def test_avg_pool2d_is_off_by_a_third_at_56(self):
        error = relative_error(lambda x: tf.nn.avg_pool2d(x, x.shape[1:3], 1, "VALID")[:, 0, 0], 56)
        assert error > 0.2, "mended upstream: avg_pool2d no longer accumulates in half"

    @pytest.mark.parametrize("size", [7, 28, 56, 112])
    def test_a_mean_of_means_keeps_its_digits(self, size):
        def mean(x):
            return tf.reduce_mean(tf.reduce_mean(x, axis=1), axis=1)

        assert relative_error(mean, size) < 2e-3

    def test_einsum_accumulates_in_half_too(self):
        def mean(x):
            return tf.einsum("nhwc->nc", x) / tf.cast(x.shape[1] * x.shape[2], x.dtype)

        assert relative_error(mean, 112) > 0.02, (
            "mended upstream: einsum no longer accumulates in half"
        )

    def test_reduce_mean_of_large_values_is_nan_and_the_layer_s_is_right(self):
        x = tf.fill((1, 300, 300, 1), tf.constant(10, tf.float16))
        assert np.isnan(tf.reduce_mean(x, axis=[1, 2])).all(), (
            "mended upstream: no overflow in half"
        )
        assert np.asarray(keras.layers.GlobalAveragePooling2D(dtype="float16")(x)).item() == 10


def test_max_pool3d_gives_every_tied_element_the_whole_gradient():
    x = tf.zeros((1, 1, 1, 3))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nn.max_pool3d(x[..., None], (1, 1, 3), (1, 1, 3), "VALID")
    total = float(tf.reduce_sum(tape.gradient(y, x)))
    assert total == 3, "mended upstream (tensorflow#51682): a tie's gradient adds up to dy"


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "graph"])
def test_max_pool3d_takes_no_float64(wrap):
    x = tf.zeros((1, 1, 1, 3, 1), tf.float64)
    refused(
        lambda: wrap(tf.nn.max_pool3d)(x, (1, 1, 3), (1, 1, 3), "VALID"), "list of allowed values"
    )


def test_max_pool3d_gives_an_element_just_below_the_maximum_its_gradient_too():
    x = tf.constant([[1.0, 1 - 5e-6, 0]])[:, None, None]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nn.max_pool3d(x[..., None], (1, 1, 3), (1, 1, 3), "VALID")
    dx = tape.gradient(y, x).numpy().ravel().tolist()
    assert dx == [1, 1, 0], "mended upstream (tensorflow#51682): the maximum alone has a gradient"


def test_max_pool3d_has_no_kernel_for_float16_on_the_cpu():
    x = tf.zeros((1, 1, 1, 3, 1), tf.float16)
    refused(
        lambda: tf.nn.max_pool3d(x, (1, 1, 3), (1, 1, 3), "VALID"), "Could not find device for node"
    )


def gradient_of(function, x, mode):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)

    wraps = {"eager": lambda f: f, "graph": tf.function}
    return wraps.get(mode, lambda f: tf.function(f, jit_compile=True))(gradient)(x)


def one_winner(window, dtype):
    """Return images of two windows whose largest element is 3, and the right gradient."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (1, 2 * window[0], window[1], 3))
    winner = np.zeros(x.shape)
    for channel in range(3):
        for first in (0, window[0]):
            winner[0, first + rng.integers(window[0]), rng.integers(window[1]), channel] = 1
    return tf.constant(np.where(winner, 3, x), dtype), winner


class TestMaxPool2d:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_gradient_of_256_elements_is_right_but_in_graph_mode(self, dtype):
        x, winner = one_winner((16, 16), dtype)
        for mode in ("eager", "xla"):
            found = gradient_of(lambda x: tf.nn.max_pool2d(x, 16, 16, "VALID"), x, mode)
            np.testing.assert_array_equal(tf.cast(found, "float64"), winner)

    @pytest.mark.skipif(
        "avx512f" not in cpu_flags(), reason="oneDNN takes no bfloat16 on this processor"
    )
    def test_half_precision_gradient_of_256_elements_is_wrong_in_graph_mode(self):
        x, winner = one_winner((16, 16), "bfloat16")
        found = gradient_of(lambda x: tf.nn.max_pool2d(x, 16, 16, "VALID"), x, "graph")
        assert not np.array_equal(tf.cast(found, "float64"), winner), (
            "mended upstream: oneDNN's gradient of a window of 256 elements is right in bfloat16"
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_gradient_of_255_elements_is_right(self, dtype):
        x, winner = one_winner((15, 17), dtype)
        found = gradient_of(lambda x: tf.nn.max_pool2d(x, (15, 17), (15, 17), "VALID"), x, "graph")
        np.testing.assert_array_equal(tf.cast(found, "float64"), winner)

    @pytest.mark.slow
    def test_gradient_with_xla_takes_twice_the_time_of_that_of_slices(self):
        def slices(x):
            parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
            return functools.reduce(tf.maximum, parts)

        def compiled(function):
            def gradient(x):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = function(x)
                return tape.gradient(y, x)

            run, x = tf.function(gradient, jit_compile=True), tf.random.normal((8, 56, 56, 96))
            run(x)
            return lambda: timeit.timeit(lambda: run(x), number=1)

        turns = [compiled(lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID")), compiled(slices)]
        # In turn, so that what else the machine does meets both alike.
        native, sliced = map(min, zip(*[[turn() for turn in turns] for _ in range(40)]))
        assert native > 2 * sliced, "mended upstream: use MaxPooling2D with XLA too"

    def test_nan_is_lost_and_a_window_of_nan_gives_the_lowest_number(self):
        x = np.ones((1, 2, 4, 1), np.float32)
        x[0, 0, 0], x[:, :, 2:] = np.nan, np.nan

        def pooled(x):
            return tf.nn.max_pool2d(x, 2, 2, "VALID")

        lowest = np.finfo(np.float32).min
        assert pooled(x).numpy().ravel().tolist() == [1, lowest], (
            "mended upstream (tensorflow#125965)?"
        )
        found = compiled(pooled, tf.constant(x)).numpy().ravel().tolist()
        assert found == [1, -np.inf], "mended upstream (tensorflow#125965)?"


@pytest.mark.parametrize(("mode", "count"), [("eager", 16), ("graph", 16), ("xla", 0)])
def test_one_nan_makes_the_whole_gradient_of_the_global_max_nan_but_with_xla(mode, count):
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 1)).astype("float32")
    x[0, 1, 1] = np.nan
    found = gradient_of(keras.layers.GlobalMaxPooling2D(), tf.constant(x), mode)
    assert np.isnan(found).sum() == count, "mended upstream: the gradient of a NaN goes elsewhere"


class TestGeneralisedMean:
    """The mean of powers in half precision overflows and underflows; its root of a negative mean is NaN."""

    @staticmethod
    def pooled(value, dtype):
        x = tf.fill((1, 7, 7, 1), tf.constant(value, dtype))
        return float(tf.reduce_mean(tf.maximum(x, 1e-6) ** 3.0, (1, 2))[0, 0] ** (1 / 3))

    @pytest.mark.parametrize(("value", "found"), [(50, np.inf), (0.003, 0)])
    def test_float16_overflows_at_50_and_underflows_at_0_003(self, value, found):
        assert self.pooled(value, "float16") == found
        assert self.pooled(value, "float32") == pytest.approx(value)

    def test_a_learned_exponent_of_negative_values_is_nan_and_so_is_its_gradient(self):
        exponent = tf.Variable(3.0)
        with tf.GradientTape() as tape:
            y = tf.reduce_mean(tf.fill((1, 3, 3, 1), -2.0) ** exponent, (1, 2)) ** (1 / exponent)
        assert np.isnan(y).all()
        assert np.isnan(tape.gradient(y, exponent))


def test_the_mean_over_channels_overflows_in_float16_but_for_keras_ops():
    x = tf.fill((1, 2, 2, 96), tf.constant(1000, tf.float16))
    assert np.isinf(tf.reduce_mean(x, -1)).all(), "mended upstream: no overflow in half"
    assert (keras.ops.mean(x, -1).numpy() == 1000).all()


class TestMaskedPooling:
    """Sequences with a mask, in Keras's own layers."""

    @pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "graph"])
    def test_float16_mean_of_3000_ones_is_less(self, wrap):
        layer = keras.layers.GlobalAveragePooling1D(dtype="float16")
        y = wrap(lambda x: layer(x, mask=tf.ones((2, 3000), tf.bool)))(
            tf.ones((2, 3000, 3), tf.float16)
        )
        assert (y.numpy() < 0.9).all(), "mended upstream (tensorflow#57057): the sum is right now"

    def test_mean_of_a_row_without_valid_steps_is_nan(self):
        y = keras.layers.GlobalAveragePooling1D()(tf.ones((1, 4, 2)), mask=tf.zeros((1, 4)))
        assert np.isnan(y).all(), "mended upstream (keras#18152): it is finite now"

    def test_maximum_takes_no_mask(self):
        layer = keras.layers.GlobalMaxPooling1D()
        refused(lambda: layer(tf.ones((1, 4, 2)), mask=tf.ones((1, 4))), "mask", "(keras#3777)")

    def test_maximum_ignores_an_attached_mask(self):
        x = keras.layers.Masking()(tf.constant([[[-2.0], [-1.0], [0.0]]]))
        with pytest.warns(UserWarning, match="does not support mask"):
            y = keras.layers.GlobalMaxPooling1D()(x)
        assert float(y[0, 0]) == 0, "mended upstream (tensorflow#33260): the mask counts now"


class TestAdaptivePooling:
    """Keras's adaptive pooling on TensorFlow and on JAX."""

    @pytest.mark.parametrize("output", [1, (1, 7), (7, 1)])
    def test_average_to_one_is_refused_in_a_graph(self, output):
        layer = keras.layers.AdaptiveAveragePooling2D(output)
        refused(lambda: tf.function(layer)(tf.ones((1, 24, 24, 3))), "Negative dimension size")

    @pytest.mark.parametrize("name", ["AdaptiveAveragePooling2D", "AdaptiveMaxPooling2D"])
    def test_unknown_sizes_are_refused(self, name):
        layer = getattr(keras.layers, name)(7)
        refused(lambda: tf.function(layer, input_signature=[tf.TensorSpec((1, None, None, 3))])
                .get_concrete_function(), "statically known")  # fmt: skip

    @pytest.mark.slow
    def test_maximum_to_one_with_onednn_ends_the_process(self):
        code = "import tensorflow, keras\nkeras.layers.AdaptiveMaxPooling2D(1)(tensorflow.ones((1, 24, 24, 3)))"
        onednn = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "1"}  # the default on some processors only
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=False, env=onednn
        )
        assert done.returncode == -signal.SIGFPE, "mended upstream (tensorflow#125509)"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["AdaptiveAveragePooling2D", "AdaptiveMaxPooling2D"])
    def test_on_jax_14_to_7_gives_nan(self, name):
        pytest.importorskip("jax")
        code = (
            "import os; os.environ['KERAS_BACKEND'] = 'jax'; import keras, numpy as np\n"
            f"y = np.asarray(keras.layers.{name}(7)(np.ones((1, 14, 14, 1), 'float32')))\n"
            "print(np.isnan(y).sum(), y.size)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["13", "49"], (
            "mended upstream: Keras's windows on JAX are right"
        )
