"""Identification of functions by values: look-alikes are not taken for an op."""

import numpy as np
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from poolbench.core.registry import REGISTRY
from poolbench.models.probe import Form, equals, forms, identify, probe_inputs

tf = pytest.importorskip("tensorflow")
DEPTH, GLOBAL = "depth_max_pool", "global_avg_pool"


def random_shape(random, k):
    n, h, w = 2, int(random.integers(3, 8)), int(random.integers(3, 8))
    return (n, h, w + (w == h), k * int(random.integers(3, 6)))


def grouped(x, k):
    return tf.reshape(x, [-1, *x.shape[1:3], x.shape[-1] // k, k])


def windows(x, k, stride, reduce):
    """Reduce windows of k channels that begin every `stride`; those beyond the depth are left out."""
    starts = range(0, x.shape[-1] - k + 1, stride)
    return tf.stack([reduce(x[..., i : i + k], axis=-1) for i in starts], axis=-1)


def shuffle(random, x, k):
    """Return channels in an order in which no window keeps its elements."""
    count = x.shape[-1]
    order = np.arange(count).reshape(-1, k)
    order[:, 0] = np.roll(order[:, 0], 1)
    return tf.gather(x, random.permutation(order).ravel(), axis=-1)


# Each takes (random, x, k) and is no shipped op of x, whatever the window and padding.
LOOK_ALIKES = {
    "maximum of channels j, j+C/k, ...": lambda _, x, k: tf.reduce_max(
        tf.reshape(x, [-1, *x.shape[1:3], k, x.shape[-1] // k]), axis=3
    ),
    "overlapping windows": lambda _, x, k: windows(x, k + 1, k, tf.reduce_max),
    "windows with gaps": lambda _, x, k: windows(x, k, k + 1, tf.reduce_max),
    "spatial maximum": lambda _, x, k: tf.nn.max_pool2d(x, 2, 2, "VALID"),
    "spatial average": lambda _, x, k: tf.nn.avg_pool2d(x, 2, 2, "VALID"),
    "every k-th channel": lambda _, x, k: x[..., ::k],
    "shuffled channels": lambda random, x, k: tf.reduce_max(grouped(shuffle(random, x, k), k), -1),
    "reversed windows": lambda _, x, k: tf.reduce_max(grouped(x[..., ::-1], k), -1),
    "softmax of half": lambda _, x, k: tf.nn.softmax(x[..., : x.shape[-1] // k]),
    "average of neighbours": lambda _, x, k: tf.reduce_mean(grouped(x, k), -1),
    "minimum of neighbours": lambda _, x, k: tf.reduce_min(grouped(x, k), -1),
    "maximum, at least zero": lambda _, x, k: tf.nn.relu(tf.reduce_max(grouped(x, k), -1)),
    "maximum, at most six": lambda _, x, k: tf.minimum(tf.reduce_max(grouped(x, k), -1), 6.0),
    "maximum of magnitudes": lambda _, x, k: tf.reduce_max(tf.abs(grouped(x, k)), -1),
    "smooth maximum": lambda _, x, k: tf.reduce_logsumexp(grouped(x, k), -1),
    "maximum and a little": lambda _, x, k: tf.reduce_max(grouped(x, k), -1) * 1.0001,
    "zeros before the first channel": lambda _, x, k: tf.reduce_max(
        grouped(tf.pad(x, [[0, 0]] * 3 + [[1, k - 1]]), k), -1
    ),
    "sum over the image": lambda _, x, k: tf.reduce_sum(x, (1, 2)),
    "root of the mean square": lambda _, x, k: tf.sqrt(tf.reduce_mean(x * x, (1, 2))),
    "mean of magnitudes": lambda _, x, k: tf.reduce_mean(tf.abs(x), (1, 2)),
    "mean and a little": lambda _, x, k: tf.reduce_mean(x, (1, 2)) * 1.001,
    "mean without the border": lambda _, x, k: tf.reduce_mean(x[:, 1:, :, :], (1, 2)),
    "mean over the batch": lambda _, x, k: tf.reduce_mean(x, (0, 1, 2))[None] + 0 * x[:, 0, 0],
    "maximum over a part of the image": lambda _, x, k: tf.reduce_max(x[:, 1:], (1, 2)),
    "mean, softly limited": lambda _, x, k: 50 * tf.tanh(tf.reduce_mean(x, (1, 2)) / 50),
    "normalised mean": lambda _, x, k: tf.reduce_mean(x / (1e-3 + tf.reduce_max(tf.abs(x))), (1, 2)),
    "random mean": lambda _, x, k: tf.reduce_mean(tf.nn.dropout(x, 0.1), (1, 2)),
    "largest two": lambda _, x, k: tf.reduce_mean(tf.math.top_k(grouped(x, k), 2).values, -1),
}  # fmt: skip
assert len(LOOK_ALIKES) == 28


def look_alike(number):
    random = np.random.default_rng(number)
    names = sorted(LOOK_ALIKES)
    name, k = names[number % len(names)], int(random.integers(2, 5))
    shape, seed = random_shape(random, k), int(random.integers(1 << 30))
    if name == "softmax of half":
        k = 2

    def function(x, training):
        return LOOK_ALIKES[name](np.random.default_rng(seed), x, k)

    return name, function, shape


def assert_not_mistaken(number):
    name, function, shape = look_alike(number)
    found = identify(function, shape, "float32")
    assert found.form is None, f"{name} at {shape} is taken for {found.form}"


@pytest.mark.parametrize("number", range(0, 28, 2))
def test_identify_look_alike_is_no_op(number):
    assert_not_mistaken(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(200))
def test_identify_two_hundred_look_alikes_are_no_op(number):
    assert_not_mistaken(number + 1000 * 28 + 1)


# A gradient of its own at a tie, which is documented, or an error whatever the case.
UNLIKE = {(DEPTH, "max_pool3d"), (DEPTH, "recipe-verbatim")}


def implementations():
    """Return every implementation of the ops placed in models that TensorFlow and Keras run."""
    return [
        key for key, entry in REGISTRY.candidates.items()
        if entry.builtin and "tensorflow" in entry.backends and key not in UNLIKE
        and REGISTRY.ops[key[0]].in_models
    ]  # fmt: skip


def assert_recognised(number):
    random = np.random.default_rng(number)
    names = implementations()
    op, name = names[number % len(names)]
    k = int(random.integers(2, 4))
    shape = random_shape(random, k)
    fields = {"pool_size": k, "padding": "valid"} if op == DEPTH else {}
    candidate = REGISTRY.candidates[op, name]
    case = REGISTRY.ops[op].make_case(
        shape=shape, dtype="float32", data_format="channels_last", **fields
    )
    built = candidate.build(case)
    if hasattr(built, "build") and not getattr(built, "built", True):
        built.build(shape)
    found = identify(lambda x, training: built(x), shape, "float32")
    assert found.form is not None, f"{name} at {shape}: {found.note}"
    assert (found.form.op, found.form.parameters) == (op, fields)
    assert found.gradients == 4, f"{name} at {shape}: {found.note}"


@pytest.mark.parametrize("number", [1, 4, 5, 16, 18, 21])
def test_identify_implementation_of_an_op_is_recognised(number):
    assert_recognised(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100))
def test_identify_a_hundred_implementations_are_recognised(number):
    assert_recognised(number + 100)


def test_identify_stopped_gradient_is_reported():
    found = identify(lambda x, _: tf.stop_gradient(tf.reduce_max(x, -1)), (2, 4, 5, 6), "float32")
    assert found.form is not None
    assert (found.gradients, found.note) == (0, "it has no gradient")


def test_identify_other_gradient_is_reported():
    @tf.custom_gradient
    def mean(x):
        return tf.reduce_mean(x, (1, 2)), lambda dy: tf.ones_like(x)

    found = identify(lambda x, _: mean(x), (2, 4, 5, 6), "float32")
    assert found.gradients == 0
    assert found.note.startswith("its gradient differs")


@pytest.mark.parametrize(
    ("function", "shape", "op"),
    [
        (lambda x, _: tf.reduce_mean(x, 1), (2, 7, 6), GLOBAL),
        (lambda x, _: tf.reduce_mean(x, (2, 3)), (2, 6, 4, 5), GLOBAL),
        (lambda x, _: tf.reduce_mean(x, 3, keepdims=True), (2, 4, 5, 6), GLOBAL),
        (lambda x, _: tf.reduce_mean(x, (2, 3)), (2, 3, 4, 5, 6), GLOBAL),
        (lambda x, _: tf.reduce_max(x, -1), (2, 7, 6), DEPTH),
        (lambda x, _: tf.reduce_max(x, (1, 2)), (2, 4, 5, 6), "global_max_pool"),
        (lambda x, _: tf.reduce_mean(x, (1, 2)), (2, 4, 5, 6), GLOBAL),
        (
            lambda x, _: tf.reduce_max(tf.reshape(x, (2, 2, 2, 2, 3, 5)), (2, 4)),
            (2, 4, 6, 5),
            "adaptive_pool",
        ),
    ],
)
def test_identify_op_on_a_view_is_recognised(function, shape, op):
    found = identify(function, shape, "float32")
    assert found.form is not None
    assert (found.form.op, found.gradients) == (op, 4)


def test_identify_empty_output_is_no_pooling():
    found = identify(lambda x, _: x[..., :0], (2, 4, 5, 6), "float32")
    assert (found.form, found.note) == (None, "no pooling")


def test_explain_names_the_channels_that_compete():
    def maxout(x, _):
        return tf.reduce_max(tf.reshape(x, [-1, 4, 5, 3, 4]), axis=3)

    found = identify(maxout, (2, 4, 5, 12), "float32")
    assert found.note == "none of the shipped ops: channels j, j+4, j+8 compete, not neighbours"


def test_probe_inputs_are_adversarial():
    inputs = probe_inputs((2, 4, 5, 6), "float16")
    assert all(x.dtype == np.float16 for x in inputs)
    assert any((x < 0).all() for x in inputs)
    assert any(len(np.unique(x)) <= 5 for x in inputs)
    assert sum(int(np.isneginf(x).sum()) for x in inputs) == 2


def test_forms_own_axes_come_first_and_none_twice():
    found = list(forms((2, 4, 5, 6), 2 * 4 * 5 * 2))
    assert found[0] == Form(op=DEPTH, parameters={"pool_size": 3, "padding": "valid"})
    assert all(not form.is_view((2, 4, 5, 6)) for form in found[:2])


def test_find_pools_model_that_divides_by_a_scalar_is_read():
    import keras
    from poolbench.models.find import find_pools
    from poolbench.models.zoo import Loaded, input_specs

    x = keras.Input((4, 5, 6))
    scaled = x / keras.ops.max(x)
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(scaled))
    found = find_pools(Loaded(model=model, specs=input_specs(model, {})), ((2, 4, 5, 6),))
    assert [pool.op for pool in found.pools] == [GLOBAL]


def test_equals_infinities_count():
    x = np.ones((1, 2, 2, 4))
    x[0, 0, 0, :2] = -np.inf
    form = Form(op=DEPTH, parameters={"pool_size": 2, "padding": "valid"})
    y = x.reshape(1, 2, 2, 2, 2).max(-1)
    assert equals(form, x, y)
    assert not equals(form, x, np.maximum(y, -1e38))
