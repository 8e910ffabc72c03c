"""poolbench: which implementation of a pooling operation to use, whether it is right, and how sure that is."""

from poolbench.core.candidate import Candidate, KnownFailure, Op, Tolerance, candidate, register
from poolbench.core.case import Case, Sweep, make_case, product, zipped
from poolbench.core.errors import UsageError

__version__ = "0.1.0"
__all__ = [
    "Candidate",
    "Case",
    "KnownFailure",
    "Op",
    "Sweep",
    "Tolerance",
    "UsageError",
    "candidate",
    "make_case",
    "product",
    "register",
    "zipped",
]
