"""How much more threads help: a process with one beside a process with all. Evidence only."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from poolbench.matrix import judge
from poolbench.matrix.probe import Finding, Step, SupportProbe, Trial

SHAPE = (16, 56, 56, 48)
CALLS = 7
# A ratio beyond this many times the cores was not made by them.
CREDIBLE = 1.25


def seconds_a_call(trial: Trial) -> Finding:
    """The least seconds of a few calls in graph mode, in this process."""
    import tensorflow as tf

    from poolbench.worker.session import bind

    case = trial.case(mode="graph", shape=SHAPE)
    with judge.on_device(trial):
        bound = bind(trial.candidate, case)
        x = tf.random.stateless_normal(SHAPE, seed=(0, 1))
        bound(x)
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            bound(x)
            tf.test.experimental.sync_devices()
            times.append(time.perf_counter() - start)
    return Finding(state="pass", figures={"seconds": min(times)})


def scaling(findings: Sequence[Finding]) -> Finding:
    """The ratio of the two processes' least times, in words; they were visited in turn."""
    times = [float(finding.figures["seconds"] or 0) for finding in findings]
    one, every = min(times[::2]), min(times[1::2])
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    figures: dict[str, float | int | str | None] = {
        "seconds, one thread": one,
        "seconds, all threads": every,
        "cores": cores,
    }
    if cores == 1:
        words = "this machine has one core: nothing to scale over"
        return Finding(state="not_run", evidence=words, figures=figures)
    ratio = one / every
    if ratio > CREDIBLE * cores:
        words = f"read {ratio:.2f} on {cores} cores: something else used the machine; run it again"
        return Finding(state="not_run", evidence=words, figures=figures)
    words = f"{ratio:.2f} times as fast with all {cores} cores as with one thread (one pair only)"
    return Finding(state="pass", evidence=words, figures=figures)


VISITS = 2

PROBES = (
    SupportProbe(
        key="threads",
        title="thread scaling",
        group="repeats",
        question="How much faster is it with all threads than with one? A single reading of two "
        "processes, in graph mode; it passes when it was read.",
        steps=VISITS
        * (
            Step(run=seconds_a_call, process="one-thread"),
            Step(run=seconds_a_call, process="other"),
        ),
        judge=scaling,
        accelerators=False,
    ),
)
