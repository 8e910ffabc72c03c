"""Code to paste for a candidate."""

from __future__ import annotations

from collections.abc import Mapping

from poolbench.core.candidate import split_contender
from poolbench.core.case import Case
from poolbench.core.registry import REGISTRY


def snippet(case: Case, name: str, sources: Mapping[str, Mapping[str, str]] = {}) -> str:
    """Return a candidate's snippet for a case, else its builder's source; '' where neither is at hand.

    `sources` are those that the run stored, of a user's candidates by op and name.
    """
    own = split_contender(name)[0]
    entry = REGISTRY.candidates.get((case.op, own))
    if entry is not None and entry.snippet is not None:
        return entry.snippet(case)
    return sources.get(case.op, {}).get(own, "") or (entry.code if entry is not None else "")
