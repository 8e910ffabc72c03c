"""The check at the end of a process: timed candidates still return correct results and changed no state."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from poolbench.core.errors import Status
from poolbench.core.plan import PROBE_NAMES
from poolbench.worker import again, isolation
from poolbench.worker.contender import answers_of
from poolbench.worker.outputs import Values
from poolbench.worker.session import Session
from poolbench.worker.spots import Spots, accepted, expectations, sample
from poolbench.worker.timing import one_call, run_blocks


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """An error of a contender that passed its first check: 'wrong' or 'error', and the reason."""

    status: Status
    reason: str


def verify(
    session: Session, fresh: bool = True, old: bool = True, only: Sequence[str] = ()
) -> dict[str, Finding]:
    """Check every candidate of the open case again; return the findings by name; correct candidates have none.

    Inputs are compared with the host's copy, results with the reference, on the inputs that were
    timed and on others; settings and shared functions with what they were before any candidate's
    code was imported. A change that nothing tells the cause of is a finding of every user's candidate.
    A candidate of which `expect` awaits a result is called for it here, if no batch had one.

    Args:
        session: whose case is open.
        fresh: whether to call the candidates on inputs that they have not seen.
        old: whether to call them on the inputs that were timed.
        only: the candidates to check; empty: all.
    """
    opened = session.open
    names = [name for name in opened.calls if name not in PROBE_NAMES]
    names = [name for name in names if not only or name in only]
    findings = {
        name: Finding(status="error", reason=reason)
        for name, reason in _suspects(session, names).items()
    }
    spots = expectations(session)
    if spots:
        findings |= _finish(session, spots, names)
    found_changed = again.changed_inputs(opened)
    if found_changed:
        again.write(opened)
    changed = found_changed or (spots is not None and spots.changed)
    whole = fresh and old and not opened.brings_inputs  # what further processes are compared with
    if whole:
        answers_of(opened)
    for recheck in again.rechecks(opened, fresh=fresh or changed, old=old or changed):
        samples = accepted(session).setdefault(recheck.words, {}) if whole else None
        for name in names:
            if name not in findings and (finding := _judge(session, recheck, name, samples)):
                findings[name] = finding
    if changed and not findings:
        reason = f"inputs were changed in place by one of {', '.join(names)}"
        findings = {name: Finding(status="wrong", reason=reason) for name in names}
    return findings


def _judge(
    session: Session, recheck: again.Recheck, name: str, samples: dict[str, Values] | None
) -> Finding | None:
    """Call a candidate once on these inputs; return the finding, or add a sample of a correct result."""
    kept: list[object] = []
    (block,) = run_blocks(session, [one_call(name)], kept)
    if block.status != "ok":
        return Finding(status=block.status, reason=block.reason)
    if reason := recheck.judge(session.open, kept[0]):
        return Finding(status="wrong", reason=reason)
    if samples is not None:
        samples[name] = sample(kept[0])
    return None


def _suspects(session: Session, names: list[str]) -> dict[str, str]:
    """Return which candidates changed what others share, or may have, and what."""
    found = dict(session.suspects)
    left = isolation.left_behind(session.settings, grace_seconds=0)
    if left and not found:
        users = [name for name in names if session.open.is_users(name)] or names
        others = f" ({', '.join(users)}: one of these)" if len(users) > 1 else ""
        found = dict.fromkeys(users, f"{left}{others}")
    return found


def _finish(session: Session, spots: Spots, names: list[str]) -> dict[str, Finding]:
    """Call each candidate of which a result is still awaited; return the findings."""
    opened = session.open
    findings = {}
    for words in (again.FRESH, again.OLD):
        awaited = [name for name in names if name in spots.pending(words)]
        if awaited and words == again.FRESH:
            spots.start(opened)
        if not awaited and not spots.due:
            continue
        blocks = run_blocks(session, [one_call(name) for name in awaited])
        for name, block in zip(awaited, blocks, strict=True):
            if block.status != "ok":
                findings[name] = Finding(status=block.status, reason=block.reason)
        for name, reason in spots.settle(opened).items():
            findings[name] = Finding(status="wrong", reason=reason)
    return findings
