"""poolbench: benchmark implementations of an operation for correctness and speed, with confidence intervals."""

from poolbench.core.axes import Axis, Scope, choice_axis, shape_axis, size_axis
from poolbench.core.candidate import KERAS, Candidate, KnownFailure, Variant
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError
from poolbench.core.op import Op, TensorSpec, Tolerance, Traffic, exact, ties_within
from poolbench.core.registry import candidate, register
from poolbench.core.sweep import Sweep, product, zipped

__version__ = "0.1.0"
__all__ = [
    "KERAS",
    "Axis",
    "Candidate",
    "Case",
    "KnownFailure",
    "Op",
    "Scope",
    "Sweep",
    "TensorSpec",
    "Tolerance",
    "Traffic",
    "UsageError",
    "Variant",
    "candidate",
    "choice_axis",
    "exact",
    "make_case",
    "product",
    "register",
    "shape_axis",
    "size_axis",
    "ties_within",
    "zipped",
]
