"""The check at the end of a process: timed candidates still return correct results and changed no state."""

from __future__ import annotations

import msgspec

from poolbench.core.errors import Status
from poolbench.core.plan import PROBE_NAMES
from poolbench.worker import again, isolation
from poolbench.worker.session import Session
from poolbench.worker.timing import BlockRequest, run_blocks


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """An error of a contender that passed its first check: 'wrong' or 'error', and the reason."""

    status: Status
    reason: str


def verify(session: Session, fresh: bool = True, old: bool = True) -> dict[str, Finding]:
    """Check every candidate of the open case again; return the findings by name; correct candidates have none.

    Inputs are compared with the host's copy, results with the reference, on the inputs that were
    timed and on others; settings and shared functions with what they were before any candidate's
    code was imported. A change that nothing tells the cause of is a finding of every user's candidate.

    Args:
        session: whose case is open.
        fresh: whether to call the candidates on inputs that they have not seen.
        old: whether to call them on the inputs that were timed.
    """
    opened = session.open
    names = [name for name in opened.calls if name not in PROBE_NAMES]
    found = dict(session.suspects)
    left = isolation.left_behind(session.settings, grace_seconds=0)
    if left and not found:
        users = [name for name in names if opened.is_users(name)] or names
        others = f" ({', '.join(users)}: one of these)" if len(users) > 1 else ""
        found = dict.fromkeys(users, f"{left}{others}")
    findings = {name: Finding(status="error", reason=reason) for name, reason in found.items()}
    if changed := again.changed_inputs(opened):
        again.write(opened, opened.host)
    for recheck in again.rechecks(opened, fresh=fresh, old=old or changed):
        for name in names:
            if name in findings:
                continue
            kept: list[object] = []
            (block,) = run_blocks(session, [BlockRequest(name=name, warmup=0, calls=1)], kept)
            if block.status != "ok":
                findings[name] = Finding(status=block.status, reason=block.reason)
            elif reason := recheck.judge(opened, kept[0]):
                findings[name] = Finding(status="wrong", reason=reason)
    if changed and not findings:
        reason = f"inputs were changed in place by one of {', '.join(names)}"
        findings = {name: Finding(status="wrong", reason=reason) for name in names}
    return findings
