"""What works where: the probes of the support matrix, by key.

Pure: importing this loads neither TensorFlow nor Keras. `bench.capabilities.matrix` runs them.
"""

from bench.capabilities import (
    depth,
    exports,
    numbers,
    repeat,
    running,
    saving,
    shapes,
    silent,
    threads,
    values,
)
from bench.capabilities.probe import Probe

_BY_THEME = (running, silent, repeat, threads, depth, shapes, numbers, values, saving, exports)

# In the order of the matrix: groups stay together.
GROUPS = ("runs", "trains", "depth", "shapes", "numbers", "values", "repeats", "leaves home")
PROBES: dict[str, Probe] = {
    probe.key: probe
    for probe in sorted(
        (probe for theme in _BY_THEME for probe in theme.PROBES),
        key=lambda probe: GROUPS.index(probe.group),
    )
}

__all__ = ["GROUPS", "PROBES", "Probe"]
