"""Checks of number formats: each dtype's error against float64, and Keras' mixed precision."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Finding
from poolbench.matrix.probe import Step, SupportProbe, in_modes
from poolbench.matrix.probes.run import fit_once
from poolbench.matrix.trial import Trial
from poolbench.matrix.wrap import as_layer

# The largest images that models pool: means of this many float16 values lose accuracy.
LARGE = (1, 112, 112, 6)
FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int32", "uint8")
# Allowed error of one training step: the update is a sum of products rounded to half precision.
MIXED_RELATIVE = {"float16": 0.01, "bfloat16": 0.06}


def dtype(name: str) -> Callable[[Trial], Finding]:
    """Return a check of the values in a dtype, uniform in [1, 2); images have 112 by 112 of them."""
    make = trials.uniform_inputs if name in FLOATS else trials.distinct_inputs
    return lambda trial: in_modes(
        trial,
        lambda mode: trials.try_forward(
            trial, trial.case(mode=mode, dtype=name, shape=LARGE), make
        ),
    )


def mixed(name: str) -> Callable[[Trial], Finding]:
    """Return a check of values, dtype and one step of fit under a mixed policy."""

    def probe(trial: Trial) -> Finding:
        import keras
        import tensorflow as tf

        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(f"mixed_{name}")
        try:
            case = trial.case(mode="graph", dtype=name)
            (x,) = trials.distinct_inputs(trial, case)
            with trials.on_device(trial):
                y = as_layer(trial, case, mixed=True)(tf.constant(x.astype("float32"))).numpy()
            found = trials.compare_output(trial, case, (x,), y)
            if found.state != "pass":
                return found
            fitted = fit_once(trial, "auto", name, relative=MIXED_RELATIVE[name], mixed=True)
        finally:
            keras.config.set_dtype_policy(before)
        words = f"float32 comes in, {name} comes out right; {fitted.evidence}"
        return msgspec.structs.replace(fitted, evidence=words)

    return probe


PROBES = (
    *(
        SupportProbe(
            key=f"dtype-{name}",
            title=name,
            group="numbers",
            question=f"Is {name} as near to float64 as it can be, over 112 by 112 values from 1 to "
            "2 where the input is an image, in eager, graph and XLA?",
            steps=(Step(run=dtype(name)),),
        )
        for name in FLOATS
    ),
    *(
        SupportProbe(
            key=f"dtype-{name}",
            title=name,
            group="numbers",
            question=f"Are {name} values exact, in eager, graph and XLA?",
            steps=(Step(run=dtype(name)),),
            requires=("ties", "image"),
        )
        for name in INTEGERS
    ),
    *(
        SupportProbe(
            key=f"mixed_{name}",
            title=f"mixed_{name}",
            group="numbers",
            question=f"Under the policy mixed_{name}, does it compute in {name}, right, and train?",
            steps=(Step(run=mixed(name)),),
            requires=("image",),
        )
        for name in MIXED_RELATIVE
    ),
)
