"""What `which` tells of a saved model from its config alone, and (slow) what it answers whole."""

import base64
import json
import re
import subprocess
import sys
import zipfile

import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from click.testing import CliRunner
from poolbench.cli import main
from poolbench.core.errors import UsageError
from poolbench.core.records import Measurement, Samples
from poolbench.models.advise import (
    conclude,
    default_batch,
    inspect,
    parse_input,
    percent,
    read_config,
    times,
)
from poolbench.models.study import ALONE, AS_BUILT, Described, Entry, Source, Stepped
from poolbench.models.zoo import DEPTH, GLOBAL, Mend, Pool


def lambda_layer(code, *, name="pool", **keys):
    function = {"class_name": "__lambda__", "config": {"code": base64.b64encode(code).decode()}}
    config = {"name": name, "function": function}
    return {"module": "keras.layers", "class_name": "Lambda", "config": config, **keys}


def layer(kind, shape=None, **config):
    entry = {
        "module": "keras.layers",
        "class_name": kind,
        "config": {"name": kind.lower(), **config},
    }
    return entry | ({"build_config": {"input_shape": shape}} if shape else {})


def model(*layers):
    return {"module": "keras", "class_name": "Sequential", "config": {"layers": list(layers)}}


def keras_file(folder, config, name="m.keras"):
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    return path


MAX = b"\xe3nn\xda\x08max_pool"
MEAN = b"\xe3\xdareduce_mean"
INPUT = [None, 8, 8, 12]


def mend_of(*layers):
    (refused,) = inspect(model(*layers))
    return refused.mend


def test_a_lambda_that_divides_the_depth_by_three_is_a_depth_pool_of_three():
    found = mend_of(
        lambda_layer(MAX, build_config={"input_shape": INPUT}),
        layer("GlobalAveragePooling2D"),
        layer("Dense", [None, 4]),
    )
    assert found == Mend(layer="pool", op=DEPTH, pool_size=3, candidate="lambda-max_pool")


def test_a_flattened_depth_pool_is_told_from_the_length():
    found = mend_of(
        lambda_layer(MAX, build_config={"input_shape": INPUT}),
        layer("Flatten"),
        layer("Dense", [None, 8 * 8 * 4]),
    )
    assert found is not None
    assert found.pool_size == 3


def test_a_lambda_that_means_over_the_image_is_a_global_pool():
    found = mend_of(
        lambda_layer(MEAN, build_config={"input_shape": INPUT}), layer("Dense", [None, 12])
    )
    assert found == Mend(layer="pool", op=GLOBAL, candidate="lambda-reduce_mean")


def test_a_functional_model_tells_the_shapes_by_its_edges():
    def edge(shape, source):
        tensor = {"shape": shape, "keras_history": [source, 0, 0]}
        return [{"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}]

    found = mend_of(
        lambda_layer(MAX, inbound_nodes=edge(INPUT, "conv")),
        layer("Conv2D") | {"inbound_nodes": edge([None, 8, 8, 2], "pool")},
    )
    assert found is not None
    assert found.pool_size == 6


def test_a_custom_class_is_mended_without_a_guess_at_its_spelling():
    custom = {"module": None, "class_name": "DepthMax", "registered_name": "DepthMax"}
    entry = custom | {"config": {"name": "d"}, "build_config": {"input_shape": INPUT}}
    assert mend_of(entry, layer("Conv2D", [None, 8, 8, 6])) == Mend(
        layer="d", op=DEPTH, pool_size=2, candidate=""
    )


@pytest.mark.parametrize(
    ("code", "following"),
    [
        (b"relu", [None, 8, 8, 4]),  # nothing says what it does
        (b"max_pool reduce_mean", [None, 8, 8, 4]),  # both
        (MAX, [None, 8, 8, 5]),  # 5 does not divide 12
        (MAX, [None, 8, 8, 12]),  # a pool over the image
        (MEAN, [None, 8, 8, 4]),
    ],
)
def test_what_cannot_be_told_is_not_guessed(code, following):
    pool = lambda_layer(code, build_config={"input_shape": INPUT})
    assert mend_of(pool, layer("Conv2D", following)) is None


def test_a_nested_model_is_searched_too():
    inner = model(lambda_layer(MAX, build_config={"input_shape": INPUT}))
    assert [found.layer for found in inspect(model(inner, layer("Dense", [None, 4])))] == ["pool"]


def test_layers_of_keras_and_ours_load():
    ours = {"module": "poolbench.layers", "registered_name": "poolbench>DepthMaxPool2D"}
    assert not inspect(model(layer("Dense"), ours | {"class_name": "D", "config": {"name": "d"}}))


@pytest.mark.parametrize("content", [b"", b"import keras", b"PK\x03\x04 broken", b"\x89HDF\r\n"])
def test_a_file_that_is_no_model_gets_one_line_and_2(content, tmp_path):
    path = tmp_path / "x.keras"
    path.write_bytes(content)
    done = CliRunner().invoke(main, ["which", str(path)])
    assert done.exit_code == 2
    said = done.stderr
    assert said.count("\n") == 1
    assert "is no Keras model; expected a file that model.save" in said


def test_a_missing_file_gets_one_line_and_2(tmp_path):
    done = CliRunner().invoke(main, ["which", str(tmp_path / "none.keras")])
    assert done.exit_code == 2
    assert "cannot read none.keras" in done.stderr


@pytest.mark.parametrize("config", [[], 3, {}, {"config": 4}, None])
def test_a_config_that_is_none_is_refused(config, tmp_path):
    with pytest.raises(UsageError, match="no Keras model"):
        read_config(keras_file(tmp_path, config))


def test_sizes_are_read_and_bad_ones_refused():
    assert parse_input("224x224x3") == (224, 224, 3)
    assert parse_input(None) is None
    for text in ("224", "0x2x3", "axbxc", "1x2x3x4"):
        with pytest.raises(UsageError, match="224x224x3"):
            parse_input(text)


def test_a_large_model_gets_a_smaller_batch():
    assert default_batch(1e6, "training") == 32
    assert default_batch(4e9, "training") == 1
    assert default_batch(2e8, "forward") == 32


def test_figures_are_written_with_their_intervals():
    assert percent((0.011, 0.013, 0.015)) == "1.3% [1.1, 1.5]"
    assert times((1.3, 1.4, 1.5)) == "1.40x [1.30, 1.50]"


POOL = Pool(
    layer="dp", kind="DepthMaxPool2D", op=DEPTH, shape=(8, 4, 4, 12), pool_size=3, padding="valid"
)


def stepped(**seconds):
    """A race of 3 processes whose contenders always took this long."""
    entry = Entry(name="m", source=Source(kind="file"), direction="training", batch=8)
    places = [(r, a) for r in range(3) for a in range(2)]
    measured = {}
    for name, value in seconds.items():
        columns = Samples(
            process=tuple(r for r, _ in places),
            allocation=tuple(a for _, a in places),
            round=(0,) * len(places),
            calls=(1,) * len(places),
            seconds=tuple(value * (1 + 0.001 * r) for r, _ in places),
            contended=(0,) * len(places),
        )
        measured[name] = Measurement(
            case=POOL.case(), candidate=name, status="ok", baseline=AS_BUILT, samples=columns
        )
    described = Described(pools=(POOL,), shapes=((8, 4, 4, 12),), layers=3, macs=1.0)
    return Stepped(entry=entry, case=POOL.case(), described=described, measurements=measured)


def test_a_small_share_says_keep_what_you_have():
    first = stepped(**{AS_BUILT: 1.0, ALONE + AS_BUILT: 0.016 * 10})
    (line,) = conclude(first, None, [])
    assert re.fullmatch(r"Pooling is 1% \[1, 1\] of your training step at batch 8: keep .*", line)


def test_a_quicker_step_says_replace_and_how():
    placed = stepped(**{AS_BUILT: 1.4, f"{DEPTH}=keras-stock": 1.0})
    first = stepped(**{AS_BUILT: 1.4, ALONE + AS_BUILT: 8.0})
    line, snippet = conclude(first, placed, [])
    assert "replace `dp` by Reshape, MaxPooling2D, Reshape: 1.40x [1.40, 1.40] the step" in line
    assert "MaxPooling2D((1, 3))" in snippet


def test_a_step_that_is_no_quicker_keeps_what_it_has():
    placed = stepped(**{AS_BUILT: 1.0, f"{DEPTH}=keras-stock": 1.01})
    first = stepped(**{AS_BUILT: 1.0, ALONE + AS_BUILT: 8.0})
    assert conclude(first, placed, [])[-1].endswith("keep what you have.")


def test_a_lambda_is_replaced_whatever_its_share():
    lambda_ = lambda_layer(MAX, build_config={"input_shape": INPUT})
    refused = inspect(model(lambda_, layer("Conv2D", [None, 8, 8, 4])))
    both = stepped(**{AS_BUILT: 1.4, ALONE + AS_BUILT: 0.1, f"{DEPTH}=layer-depth_max_pool": 1.0})
    lines = conclude(both, both, refused)
    assert "Replace the Lambda `pool` by DepthMaxPool2D: 1.40x [1.40, 1.40] the step" in lines[1]
    assert "it will load again" in lines[1]


SAVE = """
import sys, keras, tensorflow as tf
from poolbench.layers import DepthMaxPool2D
L = keras.layers
def stem(*image): return [keras.Input(image), L.Conv2D(48, 3, activation="relu")]
tail = lambda: [L.GlobalAveragePooling2D(name="global_pool"), L.Dense(4)]
pool = lambda x: tf.nn.max_pool(x, (1, 1, 1, 3), (1, 1, 1, 3), "VALID")
folder = sys.argv[1] + "/"
keras.Sequential([*stem(24, 24, 3), L.Lambda(pool, name="depth_pool"), *tail()]).save(folder + "lambda.keras")
i = keras.Input((None, None, 3))
x = L.GlobalAveragePooling2D(name="global_pool")(L.Conv2D(8, 3)(i))
keras.Model(i, L.Dense(4)(x)).save(folder + "functional.keras")
keras.Sequential([*stem(24, 24, 3), DepthMaxPool2D(3, name="depth_pool"), L.Flatten(), L.Dense(4)]).save(folder + "depth.keras")
keras.Sequential([*stem(24, 24, 3), L.Flatten(), L.Dense(4)]).save(folder + "none.keras")
keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3)).save(folder + "mobilenet.keras")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True, capture_output=True)
    return folder


def ask(*words):
    """What the door prints, its exit code 0."""
    done = subprocess.run(
        [sys.executable, "-m", "poolbench", "which", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_lambda_stack_is_told_why_and_what_to_write(saved):
    said = ask(saved / "lambda.keras", "--batch", "8", "--budget", "4")
    assert "the Lambda `depth_pool` holds Python code" in said
    assert "Replace the Lambda `depth_pool` by DepthMaxPool2D: " in said
    assert "it will load again" in said
    assert "DepthMaxPool2D(pool_size=3, name='depth_pool')" in said


@pytest.mark.slow
def test_a_functional_model_is_raced_at_the_sizes_given(saved):
    said = ask(saved / "functional.keras", "--input", "48x48x3", "--batch", "8", "--budget", "4")
    assert "`global_pool` (GlobalAveragePooling2D): global average pooling at 8x46x46x8" in said
    assert re.search(r"Pooling is [\d.]+% \[[\d.]+, [\d.]+\] of your training step", said)


@pytest.mark.slow
def test_open_sizes_are_asked_for_in_one_line(saved):
    done = subprocess.run(
        [sys.executable, "-m", "poolbench", "which", str(saved / "functional.keras")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "leaves sizes open; give them: --input 224x224x3" in done.stderr


@pytest.mark.slow
def test_our_own_layer_is_found_and_its_share_told(saved):
    said = ask(saved / "depth.keras", "--batch", "8", "--budget", "4")
    assert "`depth_pool` (DepthMaxPool2D): depthwise max pooling of 3 at 8x22x22x48" in said
    assert re.search(r"Pooling is [\d.]+% \[[\d.]+, [\d.]+\] of your training step", said)


@pytest.mark.slow
def test_a_model_without_pooling_has_nothing_to_choose(saved):
    assert "there is nothing to choose" in ask(saved / "none.keras")


@pytest.mark.slow
def test_a_model_not_made_here_is_answered(saved):
    said = ask(saved / "mobilenet.keras", "--batch", "2", "--processes", "2", "--budget", "6")
    assert "at 2x3x3x1280" in said
    assert re.search(r"Pooling is .* of your training step|too unsteady here", said)


@pytest.mark.slow
def test_the_promised_gain_is_kept(saved):
    """The step with the replacement, raced anew against the original, is where the promise said."""
    from poolbench.core.plan import Plan
    from poolbench.engine.pool import WorkerPool
    from poolbench.models.advise import ADVISED
    from poolbench.models.study import race_network
    from poolbench.stats.estimate import estimate

    (refused,) = inspect(read_config(saved / "lambda.keras"))
    entry = Entry(
        name="lambda",
        source=Source(kind="file", name=str(saved / "lambda.keras"), mends=(refused.mend,)),
        direction="forward",
        batch=8,
        candidates={op: (name,) for op, name in ADVISED.items()},
    )
    found = []
    for seed in (0, 1):
        fleet = WorkerPool()
        try:
            raced = race_network(entry, fleet, Plan(seed=seed, timeout_seconds=180.0))
        finally:
            fleet.close()
        placed = raced.measurements[f"{DEPTH}={ADVISED[DEPTH]}"]
        found.append(estimate(raced.measurements[AS_BUILT].samples, placed.samples))
    promise, kept = found
    assert promise.ratio_low <= kept.ratio_high
    assert kept.ratio_low <= promise.ratio_high
