"""Plan rounds: the order of the contenders, and the untimed and timed calls of each block."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from poolbench.core.case import Case
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.engine.recorder import ContenderRecord, middle
from poolbench.machine.nvml import is_gpu
from poolbench.worker.timing import Block, BlockRequest

# Untimed calls before a block, by their time and at most so many. Behind another candidate a call of 1 ms over
# 12 MB needs four until it is within 5% of an uninterrupted loop, one of 3 ms needs one. The first call takes 4% longer
# than the second at 3 to 4 ms (median of 9 candidates, 36 races), 1% at 4 to 6 ms (27), nothing above (26): there
# are fewer than one, by chance, and every second or third block has none. Of arrays that a core's own cache holds,
# a call of 0.5 ms needs two, one of 0.3 ms four.
MOST_WARMUPS, MOST_WARMUPS_WITHIN, LEAST_WARMUPS_WITHIN = 8, 4, 2
WARMUP_SECONDS, WARMUP_SECONDS_WITHIN = 0.003, 0.00075
OWN_CACHE_NBYTES = 4 << 20
COLD_WARMUP_SECONDS, MOST_COLD_WARMUPS = 0.012, 24
# A call that others slow down for longer has more: so many for each call's time that is lost before it is steady.
# Where 32 MB of cache are shared with other guests (417 rounds), a call of 0.35 ms over 12 MB loses 2 to 3 behind
# calls of 2 ms; it is 10% above an uninterrupted loop behind eight, 4% behind fourteen, 2.5% behind twenty.
WARMUPS_PER_LOST, MOST_WARMUPS_LOST = 8, 24
# Bandwidth probes evict the candidates' data from the cache: the next candidate then runs up to 25% slower for
# several calls. Probes therefore run last, only in every fifth round, and are followed by a longer warm-up.
PROBE_TURN = 5
# Probe blocks are longer than one call, because waking the threads is not memory time.
PROBE_BLOCK_SECONDS = 0.0015
# A contender whose blocks take n times as long as the median one's is in every n-th round, so that one slow
# candidate does not take the time of all others; n is at most this. Rounds are counted over the allocations of a
# process: of a few long rounds, the second allocation's leave out what the first one's had.
MOST_ROUNDS_OUT = 8
# A block on a GPU ends by waiting for it, some tens of microseconds: blocks are long enough to hide that.
GPU_BLOCK_SECONDS = 0.002

Name = TypeVar("Name")


class PlannedBlock(NamedTuple):
    """A planned block: its round, its contender, and the request to the worker."""

    round: int
    record: ContenderRecord
    request: BlockRequest


class Task(NamedTuple):
    """Consecutive blocks of one worker."""

    worker: WorkerSpec
    blocks: Sequence[PlannedBlock]


class Rounds:
    """Plans the rounds of one race: contenders in balanced random order, with the calls of each block.

    Args:
        records: the contenders, probes included.
        baseline: the contender that is in every round, because all others are paired with it.
        plan: its seed decides the orders.
        case: the case; it is part of the seed.

    Attributes:
        seconds: of one round, on average, as `plan` predicts.
    """

    def __init__(
        self, records: Sequence[ContenderRecord], *, baseline: str, plan: Plan, case: Case
    ) -> None:
        self.seconds = 0.0
        # Rounds of this process: of its earlier allocations, and of this one so far.
        self._earlier = self._planned = 0
        self._costs: dict[str, float] = {}  # seconds of a block, by contender, as planned
        self._records = {record.name: record for record in records}
        self._baseline = baseline
        self._block_seconds = max(plan.block_seconds, GPU_BLOCK_SECONDS * is_gpu(case.device))
        seed = f"{plan.seed} {case!r}"
        self._random = random.Random(seed)
        candidates, probes = (_by_worker(records, probes=kind) for kind in (False, True))
        self._orders, self._probe_orders = (
            {worker: balanced_orders(names, self._random) for worker, names in some.items()}
            for some in (candidates, probes)
        )
        # Contenders that have a worker to themselves: they warm up once per task.
        self._alone = {
            names[0]
            for worker, names in candidates.items()
            if len(names) == 1 and worker not in probes
        }
        # A generator of its own: with one worker the orders do not depend on it.
        self._workers = balanced_orders(list(self._orders), random.Random(f"workers {seed}"))
        self._last = ""  # the contender that ran last
        # The previous work was a probe, another worker, or none on these inputs.
        self._after_eviction = True

    @property
    def workers(self) -> int:
        """Return the number of kinds of worker."""
        return len(self._orders)

    def plan(self, contenders: Sequence[ContenderRecord], allocation: int = 0) -> None:
        """Decide how often each contender runs on the inputs of an allocation, and predict a round's mean duration.

        Warm-up is sized from the fastest block so far. The three calibration calls are noisy: a candidate
        that looks slow there would get too short a warm-up and measure slower for the whole race.
        """
        self._earlier = self._earlier + self._planned if allocation else 0
        self._planned = 0
        for record in contenders:
            seen = [row[4] for row in record.columns]
            record.call_seconds = min([record.call_seconds, *seen])
            record.usual_seconds = middle(seen or [record.call_seconds])
            record.lost_calls = middle(record.lost_columns or [0.0])
        self._costs = costs = {record.name: self._block_cost(record) for record in contenders}
        usual = middle(costs[record.name] for record in contenders if record.candidate)
        for record in contenders:
            turn = 1 if record.name == self._baseline else math.floor(costs[record.name] / usual)
            least = 1 if record.candidate else PROBE_TURN
            record.every = max(least, min(MOST_ROUNDS_OUT, turn))
        self.seconds = sum(costs[record.name] / record.every for record in contenders)
        self.evict()

    def evict(self) -> None:
        """Let the next block warm up for longer: other work has used the caches."""
        # Legs of several workers are too short for the long warm-up, which both sides of a ratio do without.
        self._after_eviction = self.workers == 1

    def within(self, seconds: float) -> int:
        """Return the number of rounds that take about this long, at least one."""
        return max(1, int(seconds / max(self.seconds, 1e-9)))

    def tasks(self, numbers: Iterable[int], *, others_between: bool) -> list[Task]:
        """Plan these rounds, a task per worker in balanced random order.

        Args:
            numbers: of the rounds.
            others_between: whether other work may have used the caches before.
        """
        tasks = []
        numbers = tuple(numbers)
        self._planned = numbers[-1] + 1
        for worker in next(self._workers):
            self._last = ""
            self._after_eviction |= others_between and self.workers == 1
            blocks = [block for number in numbers for block in self._round(number, worker)]
            tasks.append(Task(worker, blocks))
        return tasks

    def expected_seconds(self, blocks: Iterable[PlannedBlock]) -> float:
        """Predict the duration of these blocks."""
        return sum(self._costs[block.record.name] for block in blocks)

    def shuffled(self, records: Sequence[ContenderRecord]) -> list[ContenderRecord]:
        """Return the contenders in a new random order."""
        return self._random.sample(records, len(records))

    def _round(self, number: int, worker: WorkerSpec) -> Iterator[PlannedBlock]:
        """Plan one round in one worker: its candidates in a new order, then the probes."""
        names = next(self._orders[worker])
        if worker in self._probe_orders:
            names = names + next(self._probe_orders[worker])
        for name in names:
            record = self._records[name]
            if not record.runs or (self._earlier + number) % record.every:
                continue
            cold = self._after_eviction and record.candidate is not None
            warmup, calls = self._block_calls(record, cold=cold, dither=self._random.random())
            # The last contender of a round may be the first of the next one, and is still warm.
            if name == self._last:
                warmup = 0
            self._after_eviction, self._last = record.candidate is None, name
            request = BlockRequest(name=record.task_name, warmup=warmup, calls=calls)
            yield PlannedBlock(number, record, request)

    def _block_calls(
        self, record: ContenderRecord, *, cold: bool = False, dither: float = 0.5
    ) -> tuple[int, int]:
        least = 0.0 if record.candidate else PROBE_BLOCK_SECONDS
        seconds = max(self._block_seconds, least)
        return block_calls(
            record.call_seconds, seconds, nbytes=record.nbytes, lost=record.lost_calls, cold=cold,
            dither=dither,
        )  # fmt: skip

    def _block_cost(self, record: ContenderRecord) -> float:
        _, calls = self._block_calls(record)
        warmup = usual_warmup(
            record.call_seconds, calls, nbytes=record.nbytes, lost=record.lost_calls
        )
        warmup *= record.name not in self._alone
        return max((warmup + calls) * record.usual_seconds, 1e-9)


def _by_worker(records: Iterable[ContenderRecord], *, probes: bool) -> dict[WorkerSpec, list[str]]:
    names: dict[WorkerSpec, list[str]] = {}
    for record in records:
        if (record.candidate is None) == probes:
            names.setdefault(record.worker, []).append(record.name)
    return names


def one_by_one(tasks: Iterable[Task]) -> list[Task]:
    """Make each block a task of its own, to identify the block that kills the worker."""
    return [Task(task.worker, [block]) for task in tasks for block in task.blocks]


def affordable(seconds: float, round_seconds: float, most: int) -> int:
    """Return the number of rounds that fit into the seconds, from one to `most`."""
    return min(most, max(1, int(seconds / max(round_seconds, 1e-9))))


def block_calls(
    call_seconds: float,
    block_seconds: float,
    *,
    nbytes: int,
    lost: float = 0.0,
    cold: bool = False,
    dither: float = 0.5,
) -> tuple[int, int]:
    """Return (untimed, timed) calls of a block of an op that reads and writes so many bytes.

    The candidate before has evicted the op's data from the caches. The untimed calls bring back the steady
    state that `cache=warm` promises; they are more where `cold`: behind a probe, another worker or an
    allocation. A fractional number of them is rounded up where its remainder is above 1 - `dither`: by chance,
    so that of two near-equal contenders not one always has a call more. The timed calls are as few as fill the
    block: those of one block share the state of the machine, so that eight of 1 ms vary as much as one.
    """
    call_seconds = max(call_seconds, 1e-9)
    calls = math.ceil(block_seconds / call_seconds)
    warmup = math.floor(usual_warmup(call_seconds, calls, nbytes=nbytes, lost=lost) + dither)
    if cold:
        warmup = max(warmup, min(MOST_COLD_WARMUPS, round(COLD_WARMUP_SECONDS / call_seconds)))
    return warmup, calls


def lost_calls(request: BlockRequest, block: Block) -> float:
    """Return how much longer the untimed calls of a block took than as many timed ones, in timed calls."""
    return block.warmup_seconds / max(block.seconds, 1e-9) - request.warmup


def usual_warmup(call_seconds: float, calls: int, *, nbytes: int, lost: float = 0.0) -> float:
    """Return the mean number of untimed calls before so many timed ones; `lost` is the median of `lost_calls`."""
    call_seconds = max(call_seconds, 1e-9)
    if nbytes <= OWN_CACHE_NBYTES:
        least = min(LEAST_WARMUPS_WITHIN, round(WARMUP_SECONDS / call_seconds))
        usual = max(least, min(MOST_WARMUPS_WITHIN, WARMUP_SECONDS_WITHIN / call_seconds))
    else:
        usual = min(MOST_WARMUPS, WARMUP_SECONDS / call_seconds)
        if usual >= 1:  # of longer calls few are seen, and noise would decide
            usual = max(usual, min(MOST_WARMUPS_LOST, WARMUPS_PER_LOST * lost))
    return max(usual, calls // 8)


def balanced_orders(names: Sequence[Name], generator: random.Random) -> Iterator[list[Name]]:
    """Yield orders of the names without end: over each len(names) of them, each name has each place once.

    Each such group is a new random Latin square: the rotations of a random order, themselves shuffled.
    """
    while True:
        order = generator.sample(names, len(names))
        for turn in generator.sample(range(len(order)), len(order)):
            yield order[turn:] + order[:turn]
