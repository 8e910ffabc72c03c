"""Checks that it runs and is correct: forward, gradient, second order and model.fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Figures, Finding
from poolbench.matrix.probe import Step, SupportProbe
from poolbench.matrix.trial import Trial
from poolbench.matrix.wrap import as_layer

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

MODE_NAMES = {"eager": "eager", "graph": "graph", "xla": "XLA"}
JIT_NAMES: dict[str, tuple[str, bool | str]] = {
    "default": ("jit_compile left at its default", "auto"),
    "plain": ("jit_compile=False", False),
    "xla": ("jit_compile=True", True),
}


def forward(mode: str) -> Callable[[Trial], Finding]:
    """Return a check of the values in a mode."""
    return lambda trial: trials.try_forward(trial, trial.case(mode=mode))


def gradient(mode: str) -> Callable[[Trial], Finding]:
    """Return a check of the gradients in a mode, on inputs without ties."""
    return lambda trial: trials.try_gradient(trial, trial.case(mode=mode))


def second_order(mode: str) -> Callable[[Trial], Finding]:
    """Return a check of d|d|y|^2/dx|^2/dx along three directions, against finite differences."""

    def probe(trial: Trial) -> Finding:
        import tensorflow as tf

        reference_gradient = trial.op.vjp
        if reference_gradient is None:
            return Finding(state="not_run", evidence="the op has no reference for its gradient")
        case = trial.case(mode=mode)
        build = trial.candidate.build(case)

        def second(x: Any) -> Any:
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    energy = tf.reduce_sum(build(x) ** 2)
                first = inner.gradient(energy, x)
                size = tf.reduce_sum(first**2)
            return outer.gradient(size, x)

        run = tf.function(second, jit_compile=mode == "xla")
        (x,) = trials.distinct_inputs(trial, case)
        with trials.on_device(trial):
            result = run(tf.constant(x))
        if result is None:
            return Finding(state="wrong", evidence="the second-order gradient is None")

        def size_of(values: Array) -> float:
            first = reference_gradient(case, 2 * trial.op.reference(case, values), values)[0]
            return float((first**2).sum())

        point, step = x.astype(np.float64), 1e-4
        random = np.random.default_rng(2)
        ratios = []
        for direction in random.standard_normal((3, *x.shape)):
            slope = (
                (size_of(point + step * direction) - size_of(point - step * direction)) / 2 / step
            )
            ratios.append(float((result.numpy() * direction).sum()) / slope - 1)
        error = max(map(abs, ratios))
        figures: Figures = {"largest relative error": error}
        if not error < 1e-3:
            words = f"off by {100 * error:.3g}% along a random direction"
            return Finding(state="wrong", evidence=words, figures=figures)
        return Finding(state="pass", evidence=f"off by {error:.1e} at most", figures=figures)

    return probe


def fit(jit: str) -> Callable[[Trial], Finding]:
    """Return a check that one step of model.fit gives the weights of the same step in NumPy."""
    return lambda trial: fit_once(trial, JIT_NAMES[jit][1], "float32", relative=1e-3)


def fit_once(
    trial: Trial, jit: bool | str, dtype: str, *, relative: float, mixed: bool = False
) -> Finding:
    """Fit scale -> candidate -> mean squared error for one step and compare the scale's update.

    `dtype`: the dtype that the candidate computes in; `mixed`: by a mixed policy. The scale has one
    weight per channel, all one: the product is exact, so that values keep their order.
    """
    import keras

    if trial.op.vjp is None:
        return Finding(state="not_run", evidence="the op has no reference for its gradient")
    case = trial.case(mode="graph", dtype=dtype)
    (x,) = trials.distinct_inputs(trial, case)
    y = trials.reference(trial, case, (x,))
    target = np.random.default_rng(3).integers(-64, 64, y.shape) / 64
    rate = 0.5
    with trials.on_device(trial):
        layer = as_layer(trial, case, mixed=mixed)
        scale = keras.layers.DepthwiseConv2D(1, use_bias=False, depthwise_initializer="ones")
        inputs = keras.Input(x.shape[1:])
        model = keras.Model(inputs, layer(scale(inputs)))
        model.compile(optimizer=keras.optimizers.SGD(rate), loss="mse", jit_compile=jit)
        auto = f"; auto chose jit_compile={model.jit_compile}" if jit == "auto" else ""
        model.fit(
            x.astype(np.float32), target.astype(np.float32),
            batch_size=len(x), epochs=1, shuffle=False, verbose=0,
        )  # fmt: skip
        update = 1 - scale.get_weights()[0].astype(np.float64).reshape(-1)
    x64 = x.astype(np.float64)
    dy = 2 * (y - target) / y.size
    expected = rate * (x64 * trial.op.vjp(case, dy, x64)[0]).sum((0, 1, 2))
    error = float(np.abs(update - expected).max() / np.abs(expected).max())
    figures: Figures = {"error of the weights' update": error}
    if not error <= relative:
        words = f"the weights' update is off by {100 * error:.3g}%{auto}"
        return Finding(state="wrong", evidence=words, figures=figures)
    words = f"one step moves the weights correctly, to {100 * error:.1g}%{auto}"
    return Finding(state="pass", evidence=words, figures=figures)


PROBES = (
    *(
        SupportProbe(
            key=f"{key}-{mode}",
            title=f"{key}, {name}",
            group=group,
            question=f"{question} of the reference in {name} mode?",
            steps=(Step(run=run(mode)),),
        )
        for key, group, question, run in (
            ("forward", "runs", "Are its values those", forward),
            ("gradient", "trains", "Is its gradient that", gradient),
        )
        for mode, name in MODE_NAMES.items()
    ),
    *(
        SupportProbe(
            key=f"fit-{jit}",
            title=f"model.fit, {words.replace('jit_compile left at its default', 'default')}",
            group="trains",
            question=f"Does one step of model.fit move the weights correctly, {words}?",
            steps=(Step(run=fit(jit)),),
            requires=("image",),
        )
        for jit, (words, _) in JIT_NAMES.items()
    ),
    *(
        SupportProbe(
            key=f"second-order-{mode}",
            title=f"second order, {MODE_NAMES[mode]}",
            group="trains",
            question=f"Is the gradient of its gradient right in {MODE_NAMES[mode]} mode?",
            steps=(Step(run=second_order(mode)),),
            requires=("one-input",),
        )
        for mode in ("graph", "xla")
    ),
)
