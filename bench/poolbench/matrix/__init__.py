"""The checks of the support matrix, by key.

Importing this loads neither TensorFlow nor Keras. `poolbench.matrix.runner` runs the checks.
"""

from poolbench.matrix.probe import SupportProbe
from poolbench.matrix.probes import (
    backends,
    depth,
    dtypes,
    export,
    repeat,
    run,
    save,
    shapes,
    silent,
    threads,
    values,
)

_BY_THEME = (run, silent, repeat, threads, depth, shapes, dtypes, values, save, export, backends)

# In the order of the matrix: groups stay together.
GROUPS = (
    "runs",
    "trains",
    "depth",
    "shapes",
    "numbers",
    "values",
    "repeats",
    "exports",
    "backends",
)
PROBES: dict[str, SupportProbe] = {
    probe.key: probe
    for probe in sorted(
        (probe for theme in _BY_THEME for probe in theme.PROBES),
        key=lambda probe: GROUPS.index(probe.group),
    )
}

__all__ = ["GROUPS", "PROBES", "SupportProbe"]
