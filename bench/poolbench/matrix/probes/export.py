"""Checks of exports from TensorFlow: TFLite with builtins only or with Flex, and ONNX."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from poolbench.core.case import Case
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, error_words
from poolbench.matrix.trial import Trial

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

ONNX_OPSET = 17


def concrete(trial: Trial, case: Case) -> Any:
    """Return the candidate as a traced function of its input, for the converters."""
    import tensorflow as tf

    build = trial.candidate.build(case)
    (spec,) = trial.specs(case)
    return tf.function(
        lambda x: build(x),  # noqa: PLW0108 (tf.function wants a function: build may be a layer)
        input_signature=[tf.TensorSpec(spec.shape, spec.dtype, name="x")],
    )


def tflite(trial: Trial, *ops: str) -> Finding:
    """Convert with these sets of ops, run if the interpreter can, and compare."""
    import tensorflow as tf

    case = trial.case(mode="graph")
    function = concrete(trial, case)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [getattr(tf.lite.OpsSet, name) for name in ops]
    try:
        model = converter.convert()
    except Exception as error:  # noqa: BLE001 (a converter may raise anything: it is a result)
        text = error_words(error)
        return Finding(state="unsupported", evidence=f"the converter refuses it [{text}]")
    (x,) = trials.distinct_inputs(trial, case)
    try:
        y = run_tflite(model, x)
    except (RuntimeError, ValueError) as error:
        text = error_words(error)
        if "Flex" not in text and "Select TensorFlow op" not in text:
            raise
        return Finding(
            state="not_run",
            evidence=f"it converts; this interpreter has no Flex ops, so it did not run [{text}]",
        )
    return trials.compare_output(trial, case, (x,), y)


def run_tflite(model: bytes, x: Array) -> Array:
    """Return the model's answer for x from the interpreter."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_content=model)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y: Array = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return y


def onnx(trial: Trial) -> Finding:
    """Convert with tf2onnx, run with onnxruntime and compare: the converter drops unknown attributes."""
    import tensorflow as tf

    try:
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        return Finding(
            state="not_run", evidence=f"install the extra 'export' [{error_words(error)}]"
        )
    case = trial.case(mode="graph")
    (spec,) = trial.specs(case)
    model, _ = tf2onnx.convert.from_function(
        concrete(trial, case),
        input_signature=[tf.TensorSpec(spec.shape, spec.dtype, name="x")],
        opset=ONNX_OPSET,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (x,) = trials.distinct_inputs(trial, case)
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    if y.shape == x.shape and np.array_equal(x, y):
        words = "the ONNX model is the identity: the window along the depth was dropped without an error"
        return Finding(state="wrong", evidence=words)
    found = trials.compare_output(trial, case, (x,), y)
    return msgspec.structs.replace(found, evidence=f"opset {ONNX_OPSET}: {found.evidence}")


_probe = partial(
    SupportProbe, group="exports", accelerators=False, exports=True, requires=("one-input",)
)
PROBES = (
    _probe(
        key="tflite-builtins",
        title="TFLite, builtins",
        question="Does it convert to TFLite's builtin ops alone, and give the right values there?",
        steps=(Step(run=lambda trial: tflite(trial, "TFLITE_BUILTINS")),),
    ),
    _probe(
        key="tflite-flex",
        title="TFLite with Flex",
        question="Does it convert to TFLite with TensorFlow's own ops allowed, and give the right "
        "values where the interpreter can run it?",
        steps=(Step(run=lambda trial: tflite(trial, "TFLITE_BUILTINS", "SELECT_TF_OPS")),),
    ),
    _probe(
        key="onnx",
        title="ONNX",
        question="Does tf2onnx convert it, and does onnxruntime give the right values?",
        steps=(Step(run=onnx),),
    ),
)
