"""Checks of saved models: `.keras` in safe mode and SavedModel, loaded by a fresh process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, explain_error
from poolbench.matrix.trial import Trial
from poolbench.matrix.wrap import as_layer

KERAS_FILE = "model.keras"
EXPORT_FOLDER = "exported"
NOTE = "note.json"


def save_keras(trial: Trial) -> Finding:
    """Save a model of the candidate and a note on its layer."""
    import keras

    case = trial.case()
    layer = as_layer(trial, case)
    (spec,) = trial.specs(case)
    inputs = keras.Input(spec.shape[1:])
    model = keras.Model(inputs, layer(inputs))
    model.save(trial.folder / KERAS_FILE)
    note = {"module": type(layer).__module__, "lambda": isinstance(layer, keras.layers.Lambda)}
    (trial.folder / NOTE).write_text(json.dumps(note), encoding="utf-8")
    return Finding(state="pass", evidence="saved")


def load_keras(trial: Trial) -> Finding:
    """Load the model in safe mode and compare its values with the reference."""
    import keras

    note = json.loads((trial.folder / NOTE).read_text(encoding="utf-8"))
    words = "wrapped in a keras.layers.Lambda: " if note["lambda"] else ""
    case = trial.case()
    try:
        model, needs = load_with_imports(trial.folder / KERAS_FILE, note["module"])
    except Exception as error:  # noqa: BLE001 (what loading raises is the result)
        refused = explain_error(trial.candidate, case, error)
        return msgspec.structs.replace(refused, evidence=words + refused.evidence)
    (x,) = trials.distinct_inputs(trial, case)
    y = np.asarray(keras.ops.convert_to_numpy(model(x)))
    found = trials.compare_output(trial, case, (x,), y)
    return msgspec.structs.replace(
        found, evidence=f"{words}loads in safe mode, {needs}; {found.evidence}"
    )


def load_with_imports(path: Path, module: str) -> tuple[Any, str]:
    """Return the model and what had to be imported for it besides Keras."""
    import keras

    try:
        return keras.saving.load_model(path), "needs no code but Keras"
    except (TypeError, ValueError) as error:
        if "locate class" not in str(error) or module.startswith("keras."):
            raise
    importlib.import_module(module)
    return keras.saving.load_model(path), f"needs import {module}"


def save_export(trial: Trial) -> Finding:
    """Export the candidate for serving: a layer by Keras, a function by tf.saved_model."""
    import keras
    import tensorflow as tf

    case = trial.case()
    target = str(trial.folder / EXPORT_FOLDER)
    with trials.on_device(trial):
        build = trial.candidate.build(case)
        specs = trial.specs(case)
        if isinstance(build, keras.layers.Layer) and len(specs) == 1:
            inputs = keras.Input(specs[0].shape[1:])
            model = keras.Model(inputs, build(inputs))
            model.export(target, verbose=False)
        else:
            module = tf.Module()
            module.serve = tf.function(
                lambda *inputs: build(*inputs),  # noqa: PLW0108 (build may be no function)
                input_signature=[tf.TensorSpec(spec.shape, spec.dtype) for spec in specs],
            )
            tf.saved_model.save(module, target)
    return Finding(state="pass", evidence="exported")


def load_export(trial: Trial) -> Finding:
    """Load the export and compare its values with the reference."""
    import tensorflow as tf

    case = trial.case()
    inputs = trials.distinct_inputs(trial, case)
    with trials.on_device(trial):
        serve = tf.saved_model.load(str(trial.folder / EXPORT_FOLDER)).serve
        y = serve(*map(tf.constant, inputs)).numpy()
    return trials.compare_output(trial, case, inputs, y)


PROBES = (
    SupportProbe(
        key="save-keras",
        title=".keras, safe mode",
        group="exports",
        question="Does a model with it, saved as .keras, load in safe mode in a fresh process and "
        "give the right values? (A function is wrapped in a keras.layers.Lambda.)",
        steps=(Step(run=save_keras), Step(run=load_keras, process="fresh")),
        requires=("one-input",),
        accelerators=False,
    ),
    SupportProbe(
        key="save-export",
        title="SavedModel",
        group="exports",
        question="Does it export to a SavedModel that a fresh process loads and that gives the "
        "right values?",
        steps=(Step(run=save_export), Step(run=load_export, process="fresh")),
    ),
)
