"""Write small Keras models of common kinds: `python make_models.py FOLDER`; answers.py says what is in each."""

import json
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import tensorflow as tf
from answers import ANSWERS
from poolbench.layers import DepthMaxPool2D
from poolbench.models.zoo import as_legacy

L, ops = keras.layers, keras.ops


def features(*shape, filters=12, **fields):
    given = keras.Input(shape, **fields)
    return given, L.Conv2D(filters, 3, padding="same", activation="relu")(given)


def classifier(x):
    return L.Dense(4)(L.GlobalAveragePooling2D(name="head")(L.Conv2D(8, 3)(x)))


def around(code):
    """Return a model with a Lambda between its features and its classifier."""
    given, x = features(24, 24, 3)
    return keras.Model(given, classifier(L.Lambda(code, name="code")(x)))


def maxout():
    return around(lambda t: tf.reduce_max(tf.reshape(t, (-1, 24, 24, 3, 4)), axis=3))


def half_softmax():
    return around(lambda t: tf.nn.softmax(t[..., :6]))


def textbook():
    return around(lambda t: tf.nn.max_pool(t, (1, 1, 1, 3), (1, 1, 1, 3), "VALID"))


def half_precision():
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        return textbook()
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


def normalised():
    given, x = features(24, 24, 3)
    return keras.Model(given, L.Lambda(lambda t: t / tf.reduce_mean(t), name="code")(x))


def attention():
    given, x = features(24, 24, 3)
    mean = L.Lambda(lambda t: tf.reduce_mean(t, axis=3, keepdims=True), name="mean")(x)
    peak = L.Lambda(lambda t: tf.reduce_max(t, axis=3, keepdims=True), name="peak")(x)
    gate = L.Conv2D(1, 7, padding="same", activation="sigmoid")(L.Concatenate()([mean, peak]))
    return keras.Model(given, classifier(L.Multiply()([x, gate])))


def operation():
    given, x = features(24, 24, 3)
    return keras.Model(given, L.Dense(4)(ops.mean(x, axis=(1, 2))))


def operations():
    given, x = features(24, 24, 3)
    x = ops.max(ops.reshape(x, (-1, 24, 24, 4, 3)), axis=-1)
    return keras.Model(given, classifier(x))


def kept():
    given, x = features(24, 24, 3)
    pooled = L.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
    return keras.Model(given, L.Conv2D(4, 1)(pooled))


def two_inputs():
    given, x = features(None, None, 3, name="image")
    other = keras.Input((64, 64, 1), name="mask")
    small = L.Dense(2)(L.Flatten()(L.MaxPooling2D(8, name="coarse")(other)))
    return keras.Model([given, other], L.Concatenate()([classifier(x), small]))


def video():
    frame, x = features(32, 32, 3)
    inner = keras.Model(frame, L.GlobalAveragePooling2D(name="frame_pool")(x))
    given = keras.Input((None, 32, 32, 3))
    pooled = L.GlobalAveragePooling1D(name="time_pool")(L.TimeDistributed(inner)(given))
    return keras.Model(given, L.Dense(4)(pooled))


def frozen():
    given, x = features(24, 24, 3)
    model = keras.Model(given, L.GlobalAveragePooling2D(name="pool")(x))
    model.trainable = False
    return model


def pixels():
    given = keras.Input((24, 24, 3), dtype="uint8")
    return keras.Model(given, classifier(L.Conv2D(12, 3)(L.Rescaling(1 / 255)(given))))


def padded():
    given, x = features(24, 24, 8)
    pooled = DepthMaxPool2D(3, padding="same", name="pool")(L.Conv2D(8, 3)(x))
    return keras.Model(given, L.Dense(4)(L.Flatten()(pooled)))


def channels_first():
    given = keras.Input((8, 24, 24))
    pooled = L.GlobalAveragePooling2D(data_format="channels_first", name="pool")(given)
    return keras.Model(given, L.Dense(4)(pooled))


def fixed_batch():
    given = keras.Input(batch_shape=(16, 24, 24, 3))
    return keras.Model(given, classifier(L.Conv2D(12, 3)(given)))


def adaptive():
    given, x = features(24, 24, 3)
    pooled = L.AdaptiveAveragePooling2D(1, name="pool")(x)
    return keras.Model(given, L.Dense(4)(L.Flatten()(pooled)))


def shared():
    pool = L.GlobalAveragePooling2D(name="pool")
    given = keras.Input((24, 24, 3))
    one, other = L.Conv2D(8, 3)(given), L.Conv2D(8, 5)(given)
    return keras.Model(given, L.Dense(4)(L.Concatenate()([pool(one), pool(other)])))


def network():
    return keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3))


def counting():
    """The output is an integer: there is no training step."""
    given, x = features(24, 24, 3)
    scores = L.Dense(4)(L.GlobalAveragePooling2D(name="pool")(x))
    return keras.Model(given, ops.argmax(scores, axis=-1))


def keras_2_layer(kind, name, after, **fields):
    return {
        "module": "keras.layers", "class_name": kind, "registered_name": None, "name": name,
        "config": {"name": name, "dtype": "float32", **fields},
        "inbound_nodes": [[[after, 0, 0, {}]]] if after else [],
    }  # fmt: skip


def keras_2_config():
    """Return the config of `of_keras_2` as Keras 2.15 wrote it."""
    zeros = {"module": "keras.initializers", "class_name": "Zeros", "config": {}}
    layers = [
        keras_2_layer("InputLayer", "image", "", batch_input_shape=[None, 24, 24, 3], ragged=False, sparse=False),
        keras_2_layer("Conv2D", "conv", "image", filters=8, kernel_size=[3, 3], bias_initializer=zeros),
        keras_2_layer("BatchNormalization", "norm", "conv", axis=[3]),
        keras_2_layer("MaxPooling2D", "max", "norm", pool_size=[2, 2], padding="valid", strides=[2, 2]),
        keras_2_layer("GlobalAveragePooling2D", "pool", "max", data_format="channels_last", keepdims=False),
        keras_2_layer("Dense", "classes", "pool", units=4),
    ]  # fmt: skip
    ends = {"input_layers": [["image", 0, 0]], "output_layers": [["classes", 0, 0]]}
    return {
        "module": "keras.src.engine.functional", "class_name": "Functional", "registered_name": "Functional",
        "config": {"name": "model", "layers": layers, **ends},
    }  # fmt: skip


def of_keras_2(folder):
    """Write a .keras and an .h5 file whose config is that of Keras 2; the weights lie as in Keras 3."""
    given = keras.Input((24, 24, 3), name="image")
    x = L.BatchNormalization(name="norm")(L.Conv2D(8, 3, name="conv")(given))
    x = L.GlobalAveragePooling2D(name="pool")(L.MaxPooling2D(name="max")(x))
    model = keras.Model(given, L.Dense(4, name="classes")(x))
    model.save(folder / "of_keras_3.keras")
    config = keras_2_config()
    with (
        zipfile.ZipFile(folder / "of_keras_3.keras") as old,
        zipfile.ZipFile(folder / "of_keras_2.keras", "w") as new,
    ):
        new.writestr("config.json", json.dumps(config))
        new.writestr("metadata.json", '{"keras_version": "2.15.0"}')
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
    model.save(folder / "of_keras_2.h5")
    with h5py.File(folder / "of_keras_2.h5", "r+") as file:
        # HDF5 files of Keras 2 name classes only.
        file.attrs["model_config"] = json.dumps(as_legacy(config))
        file.attrs["keras_version"] = "2.15.0"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ANSWERS:
        keras.utils.set_random_seed(0)
        keras.backend.clear_session()
        globals()[name]().save(folder / f"{name}.keras")
    textbook().save(folder / "textbook.h5")
    kept().save(folder / "kept.h5")
    of_keras_2(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
