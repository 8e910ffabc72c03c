"""Checks of unknown sizes, empty batches and the layout channels_first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, in_modes
from poolbench.matrix.trial import Trial

# Name, the dimensions of (N, H, W, C) that are None, and a second shape for the same function.
DYNAMIC: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "batch": ("batch", (0,), (3, 4, 5, 6)),
    "space": ("height and width", (1, 2), (2, 7, 3, 6)),
    "channels": ("channels", (3,), (2, 4, 5, 12)),
}


def dynamic(which: str) -> Callable[[Trial], Finding]:
    """Return a check that one traced function takes two shapes; a layer is tried as a model too."""
    _, unknown, second = DYNAMIC[which]

    def ask(trial: Trial, mode: str) -> Finding:
        import keras
        import tensorflow as tf

        case = trial.case(mode="graph" if mode == "model" else mode)
        signature = [None if i in unknown else size for i, size in enumerate(case.shape)]
        with trials.on_device(trial):
            build = trial.candidate.build(case)
            if mode == "model":
                inputs = keras.Input(tuple(signature[1:]), batch_size=signature[0])
                run: Any = keras.Model(inputs, build(inputs))
            else:
                run = tf.function(
                    lambda x: build(x),  # noqa: PLW0108 (build may be no function)
                    input_signature=[tf.TensorSpec(signature, case.dtype)],
                    jit_compile=mode == "xla" or None,
                )
            for shape in (case.shape, second):
                of_shape = case.replace(shape=shape)
                (x,) = trials.distinct_inputs(trial, of_shape)
                y = run(tf.constant(x)).numpy()
                finding = trials.compare_output(trial, of_shape, (x,), y)
                if finding.state != "pass":
                    words = f"at {'x'.join(map(str, shape))} {finding.evidence}"
                    return msgspec.structs.replace(finding, evidence=words)
        return msgspec.structs.replace(finding, evidence="one function took both shapes")

    def probe(trial: Trial) -> Finding:
        modes = ("graph", "xla") + (("model",) if trial.candidate.form == "layer" else ())
        return in_modes(trial, lambda mode: ask(trial, mode), modes)

    return probe


def empty_batch(trial: Trial) -> Finding:
    """Check that an empty batch gives an empty output and gradient of the right shape."""
    shape = (0, 4, 5, 6)

    def ask(mode: str) -> Finding:
        case = trial.case(mode=mode, shape=shape)
        found = trials.try_forward(trial, case)
        if found.state != "pass" or trial.op.vjp is None:
            return found
        found = trials.try_gradient(trial, case)
        if found.state == "pass":
            return msgspec.structs.replace(found, evidence="empty values and an empty gradient")
        return msgspec.structs.replace(found, evidence=f"empty values; gradient: {found.evidence}")

    return in_modes(trial, ask)


def channels_first(trial: Trial) -> Finding:
    """Check the values where x is (N, C, H, W)."""
    return in_modes(
        trial,
        lambda mode: trials.try_forward(trial, trial.case(mode=mode, data_format="channels_first")),
    )


PROBES = (
    *(
        SupportProbe(
            key=f"dynamic-{which}",
            title=f"dynamic {words}",
            group="shapes",
            question=f"Does one traced function take any {words}, in graph and XLA (a layer also "
            "as a Keras model)?",
            steps=(Step(run=dynamic(which)),),
            requires=("image",),
        )
        for which, (words, _, _) in DYNAMIC.items()
    ),
    SupportProbe(
        key="empty-batch",
        title="empty batch",
        group="shapes",
        question="Does a batch of no images give empty values and an empty gradient, in eager, "
        "graph and XLA?",
        steps=(Step(run=empty_batch),),
        requires=("image",),
    ),
    SupportProbe(
        key="channels_first",
        title="channels_first",
        group="shapes",
        question="Are the values right where x is (N, C, H, W), in eager, graph and XLA?",
        steps=(Step(run=channels_first),),
        requires=("image", "data_format"),
    ),
)
