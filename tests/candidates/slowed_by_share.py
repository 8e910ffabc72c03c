"""An average that a variable makes slower by a known share of its own time: POOLBENCH_SLOWED=0.05."""

import os
import time

import tensorflow as tf
from poolbench import candidate

SHARE = float(os.environ.get("POOLBENCH_SLOWED", "0"))


@candidate(op="global_avg_pool", name="slowed-reduce_mean")
def slowed(case):
    """Return the mean after a busy wait, of 0 s where no share is asked, which both sides go through."""
    seconds = []

    def mean(x):
        if not seconds:
            times = []
            for _ in range(200 if SHARE else 1):
                start = time.perf_counter()
                tf.reduce_mean(x, axis=(1, 2))
                times.append(time.perf_counter() - start)
            # Of the quickest call, so that the share is never more than asked: by the lower quartile, 10% were 15%.
            seconds.append(SHARE * min(times))
        end = time.perf_counter() + seconds[0]
        while time.perf_counter() < end:
            pass
        return tf.reduce_mean(x, axis=(1, 2))

    return mean
