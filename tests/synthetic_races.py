"""Races of synthetic samples: no worker, no clock."""

import numpy as np
from poolbench.core.records import Contention, Measurement, Samples
from poolbench.engine import aa

CASE = aa.CASE
CALM = Contention(steal=0.0, others=0.0, blocks_marked=0, blocks_redone=0, involuntary_switches=0)


def samples(ratio, generator, noise=0.002, processes=5):
    places = [(r, a, k) for r in range(processes) for a in range(4) for k in range(2)]
    process, allocation, number = zip(*places, strict=True)
    seconds = tuple(1e-3 * ratio * np.exp(noise * generator.normal(size=len(places))))
    return Samples(
        process=process, allocation=allocation, round=number, seconds=seconds,
        calls=(1,) * len(places), contended=(0,) * len(places),
    )  # fmt: skip


def measured(name, ratio, generator, **fields):
    return Measurement(
        case=fields.pop("case", CASE), candidate=name, status=fields.pop("status", "ok"),
        baseline=fields.pop("baseline", aa.BASELINE), contention=fields.pop("contention", CALM),
        samples=samples(ratio, generator, fields.pop("noise", 0.002)), **fields,
    )  # fmt: skip


def race_of(design, seed=0, noise=0.002, seconds=2.0, contention=CALM):
    generator = np.random.default_rng(seed)
    names = aa.copy_names(design)
    found = {
        name: measured(name, 1 + injected, generator, noise=noise, contention=contention)
        for name, injected in names.items()
    }
    return aa.judge_copies(names, found, seconds)
