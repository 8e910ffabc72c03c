"""Code to paste for a candidate."""

from __future__ import annotations

import inspect
import re

from poolbench.core.candidate import split_contender
from poolbench.core.case import Case
from poolbench.core.registry import REGISTRY, Registry


def snippet(case: Case, name: str, registry: Registry = REGISTRY) -> str:
    """Return a candidate's snippet for a case, else its builder's source; '' where neither is at hand."""
    entry = registry.candidates.get((case.op, split_contender(name)[0]))
    if entry is None:
        return ""
    if entry.snippet is not None:
        return entry.snippet(case)
    try:
        source = inspect.getsource(entry.build)
    except (OSError, TypeError):
        return ""
    start = re.search(r"^def ", source, flags=re.MULTILINE)
    return source[start.start() :] if start else source
