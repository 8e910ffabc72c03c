"""The only timing loop of the project, and its measurements: blocks of calls, energy.

The clock and the counters are bound here when the process starts, before any candidate's code is
imported: one that replaces `time.perf_counter` changes no figure.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Sequence
from itertools import repeat
from time import perf_counter, process_time
from typing import Any

import msgspec

from poolbench.core.errors import Status, reason_of, status_of
from poolbench.core.plan import PROBE_NAMES
from poolbench.machine.idle import idle_states_disabled
from poolbench.machine.nvml import energy_joules
from poolbench.worker import again, isolation
from poolbench.worker.backends import Call
from poolbench.worker.session import OpenCase, Session
from poolbench.worker.spots import expectations

clock, processor_clock = perf_counter, process_time
# An estimate makes no further call after this time: rounds correct what one call says.
ESTIMATE_SECONDS = 0.05
ENERGY_CALLS = 10  # between two readings of the device's counter
ENERGY_SECONDS, ENERGY_LIMIT_SECONDS = 0.1, 3.0


class BlockRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The request for one block: `warmup` untimed calls, then `calls` timed ones."""

    name: str
    warmup: int
    calls: int


def one_call(name: str) -> BlockRequest:
    """Return the request for one call that is not timed."""
    return BlockRequest(name=name, warmup=1, calls=0)


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a block.

    Attributes:
        seconds: of one call.
        warmup_seconds: the untimed calls before it.
        processor_seconds: of one call, all threads of the process; 0 with a cold cache.
        status, reason: 'ok', or what the call raised; the seconds then say nothing.
    """

    seconds: float = 0.0
    warmup_seconds: float = 0.0
    processor_seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive blocks, and the resources that the process used meanwhile.

    Attributes:
        cpu_seconds: processor time of this process, all threads.
        switches: involuntary context switches.
        dirty: whether a candidate changed what others share: they need a fresh process.
        recheck_seconds: checks after the blocks.
    """

    blocks: tuple[Block, ...]
    cpu_seconds: float
    switches: int
    dirty: bool = False
    recheck_seconds: float = 0.0


def time_batch(session: Session, requests: Sequence[BlockRequest]) -> Batch:
    """Time every block in turn; an exception ends its own block only."""
    start = resource.getrusage(resource.RUSAGE_SELF)
    begin = clock()
    with idle_states_disabled():
        blocks = run_blocks(session, requests)
    failed, recheck_seconds = _check_results(session, requests, clock() - begin)
    # Behind the checks: what they use is this process' own use too.
    end = resource.getrusage(resource.RUSAGE_SELF)
    blocks = [
        failed.get(request.name, block) for request, block in zip(requests, blocks, strict=True)
    ]
    return Batch(
        blocks=tuple(blocks),
        cpu_seconds=end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime,
        switches=end.ru_nivcsw - start.ru_nivcsw,
        dirty=bool(session.suspects),
        recheck_seconds=recheck_seconds,
    )


def run_blocks(
    session: Session, requests: Sequence[BlockRequest], kept: list[object] | None = None
) -> list[Block]:
    """Time every block in turn, and note the candidates that changed process-wide state.

    Args:
        session: whose case is open.
        requests: the blocks.
        kept: is given what the first untimed call of each returns.
    """
    blocks = []
    opened = session.open
    spots = expectations(session) if kept is None else None
    watch = isolation.Watch(session.settings)
    for request in requests:
        keeper = spots if spots and request.warmup and spots.wants(request.name) else None
        results: list[object] | None = [] if keeper else kept
        try:
            blocks.append(time_block(session, request.name, request.warmup, request.calls, results))
            if keeper and results:
                keeper.enter(request.name, results.pop())
        except Exception as error:  # noqa: BLE001 (what a candidate raises is a result)
            blocks.append(Block(status=status_of(error), reason=reason_of(error)))
        if request.name in PROBE_NAMES:
            continue
        if changed := watch.changed(all_shared=opened.is_users(request.name)):
            session.suspects.setdefault(request.name, changed)
            blocks[-1] = Block(status="error", reason=changed)
    return blocks


def _check_results(
    session: Session, requests: Sequence[BlockRequest], timed_seconds: float
) -> tuple[dict[str, Block], float]:
    """Check what calls of this batch returned, or at a random moment one candidate.

    Returns:
        Failed blocks by name, and the seconds that it took; 0 if nothing was checked.
    """
    opened = session.open
    spots = expectations(session)
    if spots and spots.due:
        begin = clock()
        wrong = spots.settle(opened)
        failed = {name: Block(status="wrong", reason=reason) for name, reason in wrong.items()}
        return failed, clock() - begin
    before = opened.recheck_seconds
    return _recheck(session, requests, timed_seconds), opened.recheck_seconds - before


def _recheck(
    session: Session, requests: Sequence[BlockRequest], timed_seconds: float
) -> dict[str, Block]:
    """Check one candidate at a random moment between blocks; return its failed block by its name.

    The calls come from where timed calls come from, so that a candidate cannot tell them apart.
    """
    opened = session.open
    names = sorted({request.name for request in requests} - set(PROBE_NAMES))
    if not names or not again.is_due(opened, timed_seconds):
        return {}
    begin = clock()
    name = names[int(begin * 1e6) % len(names)]
    found: dict[str, Block] = {}
    opened.rechecked += 1
    for recheck in again.rechecks(opened, number=opened.rechecked):
        kept: list[object] = []
        (block,) = run_blocks(session, [one_call(name)], kept)
        if block.status == "ok" and (reason := recheck.judge(opened, kept[0])):
            block = Block(status="wrong", reason=reason)
        if block.status != "ok":
            found[name] = block
            break
    opened.recheck_seconds += clock() - begin
    return found


def time_block(
    session: Session, name: str, warmup: int, calls: int, kept: list[object] | None = None
) -> Block:
    """Return seconds per call over `calls` consecutive calls, after `warmup` untimed ones.

    This is the one timing loop of the project. With `kept`, the result of the first untimed call is kept.
    """
    opened = session.open
    call, arguments = opened.bound(name)
    synchronize, device = opened.backend.synchronize, opened.device
    with opened.backend.on(device):
        start = clock()
        if kept is not None:
            kept.append(call(*arguments))
            warmup -= 1
        if not calls:
            synchronize(device)
            return Block()
        if opened.evict is not None:
            return _time_cold_block(opened, opened.evict, call, arguments, calls)
        for _ in repeat(None, warmup):
            call(*arguments)
        synchronize(device)
        gc.disable()
        try:
            used = processor_clock()
            begin = clock()
            for _ in repeat(None, calls):
                call(*arguments)
            synchronize(device)
            end = clock()
            used = processor_clock() - used
        finally:
            gc.enable()
    return Block(
        seconds=(end - begin) / calls, warmup_seconds=begin - start, processor_seconds=used / calls
    )


def _time_cold_block(
    opened: OpenCase, evict: Callable[[], None], call: Call, arguments: list[Any], calls: int
) -> Block:
    """Time a block like time_block, with an untimed cache eviction before every call."""
    total = evicting = 0.0
    for _ in repeat(None, calls):
        start = clock()
        evict()
        begin = clock()
        call(*arguments)
        opened.backend.synchronize(opened.device)
        total += clock() - begin
        evicting += begin - start
    return Block(seconds=total / calls, warmup_seconds=evicting)


def estimate_seconds(opened: OpenCase, name: str) -> float:
    """Estimate the seconds per call: the minimum of three calls after one warm-up call; of one if they are long."""
    step = opened.make_step(name)
    seconds: list[float] = []
    while len(seconds) < 4 and (len(seconds) < 2 or sum(seconds) < ESTIMATE_SECONDS):
        start = clock()
        step()
        seconds.append(clock() - start)
    return min(seconds[1:])


def measure_energy(
    session: Session,
    name: str,
    seconds: float = ENERGY_SECONDS,
    *,
    read: Callable[[str], float | None] = energy_joules,
) -> float | None:
    """Return joules per call, including the device's idle power; None if the device does not count energy.

    The counter steps several times a second: what is counted is the calls between the step that comes first
    and the first one after `seconds` more.
    """
    device = session.open.device
    joules = read(device)
    if joules is None:
        return None
    calls = 0
    first: tuple[float, float, int] | None = None  # when, joules, calls
    limit = clock() + ENERGY_LIMIT_SECONDS
    while (now := clock()) < limit:
        time_block(session, name, 0, ENERGY_CALLS)
        calls += ENERGY_CALLS
        before, joules = joules, read(device)
        if joules is None:
            return None
        if joules == before:
            continue
        if first is None:
            first = now, joules, calls
        elif now - first[0] >= seconds:
            return (joules - first[1]) / (calls - first[2])
    return None
