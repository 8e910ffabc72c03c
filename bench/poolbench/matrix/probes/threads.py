"""A check that measures thread scaling: a process with one thread beside a process with all."""

from __future__ import annotations

import time
from collections.abc import Sequence

from poolbench.machine.info import usable_threads
from poolbench.matrix import trial as trials
from poolbench.matrix.finding import Figures, Finding
from poolbench.matrix.probe import Step, SupportProbe
from poolbench.matrix.trial import Trial

SHAPE = (16, 56, 56, 48)
CALLS = 7
# A larger ratio than this many times the cores is background load.
CREDIBLE = 1.25


def time_call(trial: Trial) -> Finding:
    """Return the fewest seconds of a few calls in graph mode, in this process."""
    import tensorflow as tf

    from poolbench.worker.session import bind

    case = trial.case(mode="graph", shape=SHAPE)
    with trials.on_device(trial):
        bound = bind(trial.candidate, case)
        inputs = [trials.tensor(trial, array) for array in trials.uniform_inputs(trial, case)]
        bound(*inputs)
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            bound(*inputs)
            tf.test.experimental.sync_devices()
            times.append(time.perf_counter() - start)
    return Finding(state="pass", figures={"seconds": min(times)})


def scaling(findings: Sequence[Finding]) -> Finding:
    """Describe the ratio of the two processes' shortest times; their steps alternate."""
    times = [float(finding.figures["seconds"] or 0) for finding in findings]
    one, every = min(times[::2]), min(times[1::2])
    cores = usable_threads()
    figures: Figures = {"seconds, one thread": one, "seconds, all threads": every, "cores": cores}
    if cores == 1:
        words = "this machine has one core"
        return Finding(state="not_run", evidence=words, figures=figures)
    ratio = one / every
    if ratio > CREDIBLE * cores:
        words = (
            f"measured {ratio:.2f} on {cores} cores: other programs used the machine; run it again"
        )
        return Finding(state="not_run", evidence=words, figures=figures)
    words = f"{ratio:.2f} times as fast with all {cores} cores as with one thread (one pair only)"
    return Finding(state="pass", evidence=words, figures=figures)


PROBES = (
    SupportProbe(
        key="threads",
        title="thread scaling",
        group="repeats",
        question="How much faster is it with all threads than with one? A single reading of two "
        "processes, in graph mode; it passes when it was read.",
        steps=2 * tuple(Step(run=time_call, process=one) for one in ("one-thread", "other")),
        judge=scaling,
        accelerators=False,
    ),
)
