"""`poolbench which`: reading of files and options, and the answer from measurements."""

import dataclasses
import json
import math
import struct
import zipfile
from pathlib import Path

import msgspec
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from poolbench.core.errors import UsageError
from poolbench.core.records import Measurement, Samples
from poolbench.models.advise import advise, default_batch
from poolbench.models.answer import (
    conclude,
    conclude_isolated,
    describe_layers,
    describe_pools,
    is_negligible,
    is_wide,
    snippet,
    worth_racing,
)
from poolbench.models.config import (
    MAX_CONFIG_DEPTH,
    InputOption,
    InputSpec,
    Unknown,
    brief,
    clean,
    consumed_shapes,
    fill_shapes,
    find_unknown,
    fixed_batch,
    keras_version,
    parse_input,
    read_file,
)
from poolbench.models.pools import Pool, title_of
from poolbench.models.probe import Form
from poolbench.models.results import Described, Entry, Stepped
from poolbench.models.steps import ISOLATED, ORIGINAL
from poolbench.models.zoo import Source
from poolbench.stats.prior import SHIPPED

DEPTH = "depth_max_pool"


def layer(kind, name=None, module="keras.layers", **keys):
    return {"module": module, "class_name": kind, "config": {"name": name or kind.lower()}, **keys}


def model(*layers, kind="Sequential"):
    return {"module": "keras", "class_name": kind, "config": {"name": "m", "layers": list(layers)}}


def keras_file(folder, config, name="m.keras"):
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
    return path


def refusal(path, **options):
    with pytest.raises(UsageError) as error:
        advise(path, say=lambda line: None, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


# Files


@pytest.mark.parametrize("content", [b"", b"import keras", b"PK\x03\x04 broken", b"\x89PNG\r\n"])
def test_read_file_other_content_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "x.keras"
    path.write_bytes(content)
    assert "is no Keras model; expected a file that model.save" in refusal(path)


def test_read_file_missing_file_is_refused(tmp_path):
    assert "cannot read none.keras" in refusal(tmp_path / "none.keras")


@pytest.mark.parametrize("config", [[], 3, {}, {"config": 4}, None, "{", "[" * 100_000])
def test_read_file_config_of_no_model_is_refused(config, tmp_path):
    assert "is no Keras model" in refusal(keras_file(tmp_path, config))


def test_read_file_saved_model_folder_is_named(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"")
    assert "is a SavedModel folder" in refusal(folder)


def test_read_file_tflite_is_named(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(struct.pack("<I", 28) + b"TFL3" + bytes(20))
    assert "is a TensorFlow Lite model" in refusal(path)


def test_read_file_hdf5_is_left_to_a_worker(tmp_path):
    path = tmp_path / "m.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    assert read_file(path) is None


def test_read_file_zip_bomb_is_refused_unread(tmp_path):
    path = keras_file(tmp_path, model())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(64 << 20))
    assert "unpacks to 67108864 bytes" in refusal(path)


def test_read_file_huge_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("poolbench.models.config.MAX_CONFIG_NBYTES", 1000)
    path = keras_file(tmp_path, model(*[layer("Dense")] * 100))
    assert "has a config.json of over 1000 bytes" in refusal(path)


def test_read_file_deep_nesting_is_refused(tmp_path):
    config = model(layer("Dense"))
    for _ in range(MAX_CONFIG_DEPTH):
        config = model(config)
    path = keras_file(tmp_path, config)
    assert "levels deep" in refusal(path)


@pytest.mark.parametrize("member", ["../evil.py", "/etc/evil", "assets/../../evil", "C:\\evil"])
def test_read_file_path_out_of_the_archive_is_refused(member, tmp_path):
    path = keras_file(tmp_path, model())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, b"x")
    assert "leads out of the archive" in refusal(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.keras"]


def test_keras_version_of_broken_metadata_is_unknown(tmp_path):
    path = keras_file(tmp_path, model())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.0.0"}')
        start = archive.getinfo("metadata.json").header_offset + 30 + len("metadata.json")
    assert keras_version(path) == "3.0.0"
    data = bytearray(path.read_bytes())
    data[start] = 0xFF  # a kind of block that deflate does not have
    path.write_bytes(data)
    assert keras_version(path) == ""


def test_clean_and_brief_leave_no_dump_and_no_escape_code():
    assert clean("a\x1b[31m\nb" + "x" * 100).isprintable()
    text = brief(
        "\x1b[1mCould not locate class 'Net'. Make sure custom classes are decorated. Full object config: "
        "{'module': None, 'class_name': 'Net'}\x1b[0m"
    )
    assert text == "Could not locate class 'Net'"


# Layers


def test_find_unknown_lambdas_and_classes_once_each_in_nested_models():
    inner = model(layer("Lambda", "pool"), layer("Dense"))
    wrapped = layer("TimeDistributed")
    wrapped["config"]["layer"] = inner
    custom = layer("DepthMax", "d", module=None, registered_name="DepthMax")
    ours = layer(
        "DepthMaxPool2D", module="poolbench.layers", registered_name="poolbench>DepthMaxPool2D"
    )
    found = find_unknown(model(wrapped, inner, custom, ours, layer("Dense")))
    assert found == [Unknown(name="pool", kind="Lambda"), Unknown(name="d", kind="DepthMax")]
    assert not find_unknown(model(custom), classes=frozenset({"DepthMax"}))


def test_find_unknown_model_class_is_the_root():
    (found,) = find_unknown({"module": None, "class_name": "Net", "config": {"name": "n"}})
    assert found.root


def test_consumed_shapes_are_those_that_followers_take():
    tensor = {"shape": [None, 8, 8, 2], "keras_history": ["pool", 0, 0]}
    node = {"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}
    functional = model(
        layer("Lambda", "pool"), layer("Conv2D", inbound_nodes=[node]), kind="Functional"
    )
    assert consumed_shapes(functional) == {"pool": (None, 8, 8, 2)}
    sequential = model(
        layer("Lambda", "pool"), layer("Dense", build_config={"input_shape": [None, 4]})
    )
    assert consumed_shapes(sequential) == {"pool": (None, 4)}
    assert consumed_shapes(model()) == {}


@pytest.mark.parametrize("history", [5, [], None, "pool"])
def test_consumed_shapes_of_a_damaged_config_are_none(history):
    tensor = {"shape": 8, "keras_history": history}
    node = {"args": [{"class_name": "__keras_tensor__", "config": tensor}], "kwargs": {}}
    damaged = layer("Conv2D", inbound_nodes=[node], build_config=[1])
    assert consumed_shapes(model("x", damaged, kind="Functional")) == {}


# Inputs


def test_parse_input_takes_sizes_and_a_name():
    assert parse_input("48x48x3") == InputOption(name="", shape=(48, 48, 3))
    assert parse_input("image=16x32x32x3") == InputOption(name="image", shape=(16, 32, 32, 3))
    for text in ("", "0x2x3", "axbxc", "=3x3", "image=", "48x"):
        with pytest.raises(UsageError, match="224x224x3"):
            parse_input(text)


IMAGE = InputSpec(name="image", shape=(None, None, None, 3))
FIXED = InputSpec(name="mask", shape=(None, 64, 64, 1))
VIDEO = InputSpec(name="video", shape=(None, None, 32, 32, 3))


def filled(specs, *texts, batch=4):
    return fill_shapes(specs, [parse_input(text) for text in texts], batch)


def test_fill_shapes_open_input_is_filled_and_fixed_one_kept():
    expected = ((4, 48, 48, 3), (4, 64, 64, 1))
    assert filled([IMAGE, FIXED], "48x48x3") == expected
    assert filled([IMAGE, FIXED], "image=48x48x3") == expected
    assert filled([IMAGE, FIXED], "48x48x3", "64x64x1") == expected
    assert filled([FIXED]) == ((4, 64, 64, 1),)


@pytest.mark.parametrize(
    ("specs", "options", "said"),
    [
        ([IMAGE], [], "`image` leaves sizes open (?x?x3); give them: --input 224x224x3"),
        ([IMAGE, FIXED], [], "--input image=224x224x3"),
        ([VIDEO], [], "--input 16x32x32x3"),
        ([VIDEO], ["48x48x3"], "takes ?x32x32x3; --input 48x48x3 does not fit it"),
        ([FIXED], ["48x48x1"], "takes 64x64x1; --input 48x48x1 does not fit it"),
        ([IMAGE], ["photo=48x48x3"], "no input is called `photo`; the model takes `image`"),
        ([IMAGE], ["48x48x3", "48x48x3"], "the model has 1 inputs"),
        ([IMAGE], ["image=48x48x3", "64x64x3"], "the model has 1 inputs"),
        ([IMAGE, FIXED], ["image=48x48x3", "64x64x3"], "takes 64x64x1; --input 64x64x3 does not"),
    ],
)
def test_fill_shapes_misfit_names_the_input_and_an_option(specs, options, said):
    with pytest.raises(UsageError) as error:
        filled(specs, *options)
    assert said in str(error.value)


def test_fill_shapes_suggestion_works():
    from poolbench.models.config import suggest

    for spec in (IMAGE, VIDEO, InputSpec(name="t", shape=(None, None, 8))):
        (shape,) = filled([spec], suggest(spec, named=True).removeprefix("--input "))
        assert len(shape) == len(spec.shape) and None not in shape


def test_fixed_batch_is_the_files_own():
    assert fixed_batch([InputSpec(name="x", shape=(16, 4, 4, 3))]) == 16
    assert fixed_batch([IMAGE]) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"processes": 1}, "--processes takes at least 2"),
        ({"batch": 0}, "--batch at least 1"),
        ({"write": Path("model.h5")}, "--write takes a new file called NAME.keras"),
        ({"write": Path("no-folder/m.keras")}, "--write takes a file in a folder that exists"),
    ],
)
def test_advise_options_out_of_range_are_refused(options, said, tmp_path):
    assert said in refusal(keras_file(tmp_path, model()), **options)


def test_default_batch_of_a_large_model_is_smaller():
    assert default_batch(1e6, "training") == 32
    assert default_batch(4e9, "training") == 1
    assert default_batch(2e8, "forward") == 32


# The answer

FORM = Form(op=DEPTH, parameters={"pool_size": 3, "padding": "valid"})
POOL = Pool(
    names=("dp",), kind="DepthMaxPool2D", title="depthwise max pooling of 3", given=(8, 4, 4, 12),
    made=(8, 4, 4, 4), form=FORM, inputs=8, gradients=4,
)  # fmt: skip
STOCK = "keras.Sequential([\n    keras.layers.MaxPooling2D(pool_size=(1, 3)),\n], name='dp')"


def stepped(status="ok", spread=0.001, code=(), pastable=STOCK, processes=3, **seconds):
    """Return a race whose contenders took this long, the original with a status."""
    entry = Entry(name="m", source=Source(kind="file"), direction="training", batch=8)
    places = [(r, a) for r in range(processes) for a in range(2)]
    measured = {}
    for name, value in seconds.items():
        wide = spread if name == ISOLATED + ORIGINAL else 0.001
        columns = Samples(
            process=tuple(r for r, _ in places),
            allocation=tuple(a for _, a in places),
            round=(0,) * len(places),
            calls=(1,) * len(places),
            seconds=tuple(value * (1 + wide * r) for r, _ in places),
            contended=(0,) * len(places),
        )
        measured[name] = Measurement(
            case=entry.case, candidate=name, baseline=ORIGINAL, samples=columns,
            status=status if name == ORIGINAL else "ok",
            reason="" if status == "ok" else "UnimplementedError: no gradient",
        )  # fmt: skip
    found = Described(
        pools=(POOL,), traced=8, code=code,
        pastable={DEPTH: {"keras-stock": pastable}} if pastable else {DEPTH: {}},
    )  # fmt: skip
    return Stepped(entry=entry, described=found, measurements=measured)


def look(pastable=STOCK, code=(), **seconds):
    """Return a race of one process: no interval."""
    return stepped(pastable=pastable, code=code, processes=1, **seconds)


def test_conclude_small_share_says_that_nothing_is_to_be_won():
    lines, chosen = conclude(stepped(**{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.016 * 10}))
    assert lines == [
        "Pooling is 1.0% [0.94, 1.1] of your training step at batch 8: no implementation of it can win more than "
        "1.1%, so nothing is to be won."
    ]
    assert not chosen


def test_conclude_negligible_share_of_one_process_is_under_two_percent():
    first = look(**{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.016})
    assert is_negligible(first)
    assert conclude(first)[0] == [
        "Pooling is under 2% of your training step at batch 8: no implementation of it can win more, so nothing is "
        "to be won."
    ]
    assert not is_negligible(look(**{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.16}))


STEP, POOLING = f"{DEPTH}=keras-stock", f"{ISOLATED}{DEPTH}=keras-stock"


def test_conclude_faster_step_says_replace_and_what_to_write():
    raced = stepped(**{ORIGINAL: 1.4, ISOLATED + ORIGINAL: 8.0, STEP: 1.0})
    (head, line, text), chosen = conclude(raced)
    assert head.startswith("Pooling is 36%")
    assert line == "Replace `dp` by keras.Sequential: 1.40x [1.33, 1.47] the step."
    assert "MaxPooling2D(pool_size=(1, 3))" in text
    assert chosen == {DEPTH: "keras-stock"}


def test_promise_is_wider_than_what_one_run_shows():
    raced = stepped(**{ORIGINAL: 1.4, ISOLATED + ORIGINAL: 8.0, STEP: 1.0})
    low, middle, high = raced.ratio(ORIGINAL, STEP)
    assert middle == pytest.approx(1.4)
    tau = SHIPPED.tau(math.log(1.4))
    assert math.log(high / low) > 2 * 1.96 * tau


@pytest.mark.parametrize(
    ("pastable", "why"),
    [
        (STOCK, "no other implementation is faster here"),
        ("", "no other implementation of it ships"),
    ],
)
def test_conclude_large_share_without_a_gain_says_why(pastable, why):
    raced = stepped(**{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 8.0, STEP: 1.01}, pastable=pastable)
    assert conclude(raced)[0][-1].endswith(f": {why}, so nothing is to be won.")


def test_conclude_code_is_replaced_whatever_its_share():
    raced = stepped(**{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.16, STEP: 1.0}, code=("dp",))
    assert "and safe mode loads it" in conclude(raced)[0][1]


def test_conclude_step_that_fails_is_made_to_run():
    raced = stepped(status="error", **{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 1.0, STEP: 1.0})
    head, line, _ = conclude(raced)[0]
    assert head == (
        "Your training step does not run as it is here (UnimplementedError: no gradient)."
    )
    assert line == "Replace `dp` by keras.Sequential: the training step runs here."


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({}, "no implementation of it ran here."),
        ({"keras-stock": 0.995, "layer": 1.0}, "in isolation no other implementation is faster"),
        ({"keras-stock": 0.5, "layer": 1.0}, "in isolation this is fastest, 2.00x ["),
    ],
)
def test_conclude_isolated_step_that_cannot_run_compares_the_pools_alone(seconds, said):
    isolated = {f"{ISOLATED}{DEPTH}={name}": value for name, value in seconds.items()}
    raced = stepped(**{ISOLATED + ORIGINAL: 1.0}, **isolated)
    found = {DEPTH: {"layer": "DepthMaxPool2D(pool_size=3, name='dp')", "keras-stock": STOCK}}
    described = msgspec.structs.replace(raced.described, pastable=found)
    head, line, *_ = conclude_isolated(dataclasses.replace(raced, described=described))
    assert head == "Which share of the step pooling is, is unknown: not every layer runs."
    assert line.startswith(f"`dp`: {said}")


def test_conclude_wide_share_is_not_given_as_known():
    first = stepped(spread=0.9, **{ORIGINAL: 1.0, ISOLATED + ORIGINAL: 5.0})
    assert is_wide(first.share())
    head = conclude(first)[0][0]
    assert head.startswith("Pooling is between ")
    assert "it is not known better on this machine" in head


@pytest.mark.parametrize(
    ("share", "own", "best", "code", "races"),
    [
        (0.5, 1.0, 0.9, (), True),
        (0.05, 1.0, 0.95, (), False),
        (0.001, 1.0, 0.1, (), False),
        (0.001, 1.0, 0.1, ("dp",), True),
        (0.5, 1.0, 1.1, (), False),
    ],
)
def test_worth_racing_only_what_may_win(share, own, best, code, races):
    layer = "DepthMaxPool2D(pool_size=3, name='dp')"
    seconds = {ORIGINAL: 1.0, ISOLATED + ORIGINAL: share * 16, POOLING: best}
    first = look(code=code, **seconds, **{f"{ISOLATED}{DEPTH}=layer": own})
    found = {DEPTH: {"layer": layer, "keras-stock": STOCK}}
    described = msgspec.structs.replace(first.described, pastable=found)
    first = dataclasses.replace(first, described=described)
    assert worth_racing(first, DEPTH) == ("keras-stock" if races else "")


@pytest.mark.parametrize(("best", "races"), [(0.8, True), (0.95, False), (1.1, False)])
def test_worth_racing_step_that_does_not_run_asks_for_a_clear_gain_in_isolation(best, races):
    layer = "DepthMaxPool2D(pool_size=3, name='dp')"
    first = look(**{ISOLATED + ORIGINAL: 1.0, POOLING: best, f"{ISOLATED}{DEPTH}=layer": 1.0})
    described = msgspec.structs.replace(
        first.described,
        pastable={DEPTH: {"layer": layer, "keras-stock": STOCK}},
        unknown=(Unknown(name="code", kind="Lambda"),),
    )
    first = dataclasses.replace(first, described=described)
    assert worth_racing(first, DEPTH) == ("keras-stock" if races else "")


def test_describe_layers_names_the_option_that_runs_the_code():
    found = Described(
        pools=(), traced=8, notes={"gate": "no pooling"},
        unknown=(Unknown(name="l\x1b", kind="Lambda"), Unknown(name="d", kind="DepthMax")),
    )  # fmt: skip
    one, other, third = describe_layers(found)
    assert "`l?` is a Lambda" in one
    assert "--trust" in one
    assert "--custom FILE" in other
    assert third == "`gate` is no pooling."


def test_snippet_imports_all_that_its_code_names():
    text = "keras.Sequential([keras.layers.Reshape((1, 8, 12)), DepthMaxPool2D(3)])"
    own = "from poolbench.layers import DepthMaxPool2D  # or copy that one file"
    assert snippet(text).splitlines() == ["import keras", own, text]
    assert snippet("DepthMaxPool2D(3)").splitlines() == [own, "DepthMaxPool2D(3)"]


def test_describe_pools_counts_calls_and_comparisons():
    found = Described(pools=(POOL, POOL), traced=8)
    (line,) = describe_pools(found, 32)
    assert line == (
        "  `dp` (DepthMaxPool2D): depthwise max pooling of 3 at 32x4x4x12, equal on 8 inputs and 4 gradients, "
        "called 2 times"
    )


def test_title_of_says_what_is_kept_and_pooled():
    mean = Form(op="global_avg_pool")
    assert title_of(mean, (2, 8, 8, 4), (2, 1, 1, 4)) == "global average pooling, dimensions kept"
    assert title_of(mean, (2, 16, 4), (2, 4)) == "global average pooling over time"
    same = Form(op=DEPTH, parameters={"pool_size": 3, "padding": "same"})
    assert title_of(same, (2, 8, 8, 8), (2, 8, 8, 3)) == "depthwise max pooling of 3, same"
