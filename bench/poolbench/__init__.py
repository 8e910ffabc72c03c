"""poolbench: which spelling of a pooling operation to use, whether it is right, and how sure that is."""

from poolbench.core.candidate import Bound, Candidate, Failure, Op, candidate, register
from poolbench.core.case import Case, Sweep, UsageError, make_case, product, zipped

__version__ = "0.1.0"
__all__ = [
    "Bound",
    "Candidate",
    "Case",
    "Failure",
    "Op",
    "Sweep",
    "UsageError",
    "candidate",
    "make_case",
    "product",
    "register",
    "zipped",
]
