"""Documented failures of implementations still happen, and nothing else does.

Where a candidate of a table no longer fails, it is mended upstream: take its failure out of the op's file.
"""

import re
import subprocess
import sys

import pytest
from poolbench.core.registry import load_builtin
from poolbench.worker.check import check
from poolbench.worker.inputs import make_inputs
from poolbench.worker.session import bind

tf = pytest.importorskip("tensorflow")
REGISTRY = load_builtin()
MASKED, ADAPTIVE = "masked_global_pool", "adaptive_pool"


def reason_of(entry, case):
    """Return why the candidate is wrong in the case, or its error; '' if it is right."""
    inputs = make_inputs(case, 0)
    try:
        outputs = bind(entry, case)(*(tf.constant(array) for array in inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return check(REGISTRY.ops[case.op], case, inputs, tuple(y.numpy() for y in outputs)).reason


def failing(op, fields, names):
    """Return {name: (reason, documented reason or '')} of the candidates that fail in the case."""
    case = REGISTRY.ops[op].make_case(**fields)
    found = {}
    for name in names:
        entry = REGISTRY.candidates[op, name]
        if reason := reason_of(entry, case):
            known = [
                f.reason for f in entry.failures if f.when(case) and re.search(f.matches, reason)
            ]
            found[name] = (reason, *known)
    return found
