"""Compare a race's warm blocks with an uninterrupted loop, and loops with and without CPU idle states."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poolbench.core.case import Case, make_case
from poolbench.engine.aa import ProofError
from poolbench.engine.process import Worker
from poolbench.engine.rounds import PROBE_TURN, block_calls, lost_calls
from poolbench.machine import idle
from poolbench.worker.contender import open_contender
from poolbench.worker.session import Session, close_case, open_case
from poolbench.worker.timing import BlockRequest, time_batch, time_block


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Name the candidate whose warm blocks are compared with a loop, and the other candidates of its race."""

    case: Case
    subject: str
    others: tuple[str, ...]


def _bias(subject: str, others: tuple[str, ...], **fields: Any) -> Bias:
    case = make_case(op="depth_max_pool", pool_size=3, padding="valid", **fields)
    return Bias(case=case, subject=subject, others=others)


BIASES = {
    "cache-resident": _bias("max_pool", ("max_pool2d-view",), shape=(8, 28, 28, 96), mode="graph"),
    "cache-resident, xla": _bias(
        "reshape-reduce_max", ("max_pool",), shape=(8, 28, 28, 96), mode="xla"
    ),
    "base case": _bias(
        "layer-depth_max_pool",
        ("lambda-max_pool", "reshape-reduce_max", "transpose-reduce_max", "max_pool2d-view"),
        shape=(8, 56, 56, 96),
        mode="graph",
    ),
    "large": _bias("max_pool", ("max_pool2d-view",), shape=(32, 112, 112, 96), mode="graph"),
    "two threads": _bias(
        "max_pool2d-view",
        ("max_pool", "lambda-max_pool", "layer-max_pool"),
        shape=(8, 28, 28, 96),
        mode="graph",
    ),
}
# The median of few rounds is dominated by the machine's noise: a turn goes on until its standard error is 0.5%.
LEAST_BIAS_ROUNDS, MOST_BIAS_ROUNDS = 40, 1600
BIAS_ERROR = 0.005
BIAS_TURN_SECONDS = 60.0
ROUNDS_PER_LOOP = 4  # a round's one block varies more than the loop, which takes longer
# Long enough for slow effects too, such as waking a second CPU.
LOOP_WARMUP_SECONDS = 0.05
# Few blocks for a large op: the warm blocks, one per round, need most of the time.
LOOP_SECONDS, MOST_LOOP_BLOCKS = 0.1, 10
SLEEP_LOOPS = 20
PROBE = "bandwidth-copy"
LIMIT_SECONDS = 120.0  # of a task


def time_loop(session: Session, name: str, warmup: int, calls: int, blocks: int) -> list[float]:
    """Return seconds per call of each of `blocks` consecutive blocks, in a worker."""
    return [
        time_block(session, name, warmup if number == 0 else 0, calls).seconds
        for number in range(blocks)
    ]


def measure_bias(bias: Bias, turns: int, worker: Worker, block_seconds: float) -> list[float]:
    """Return per turn the median ratio of a warm block to the uninterrupted loop that follows it and its neighbours.

    Raises:
        ProofError: a contender cannot be opened.
    """
    worker.call(open_case, bias.case, 0, timeout=LIMIT_SECONDS)
    beside = _Beside(bias, worker, block_seconds)
    ratios = [statistics.median(beside.turn()) for _ in range(turns)]
    worker.call(close_case, timeout=LIMIT_SECONDS)
    return ratios


class _Beside:
    """Rounds of a race, and uninterrupted loops of its subject between them."""

    def __init__(self, bias: Bias, worker: Worker, block_seconds: float) -> None:
        self._bias, self._worker = bias, worker
        self._names = (bias.subject, *bias.others)
        self._blocks: dict[str, Callable[..., tuple[int, int]]] = {}
        self._lost: dict[str, list[float]] = {name: [0.0] for name in (*self._names, PROBE)}
        self._random = random.Random(0)
        for name in (*self._names, PROBE):
            contender = self._call(functools.partial(open_contender, check=True), name)
            if contender.status != "ok":
                raise ProofError(f"{name}: {contender.status}: {contender.reason}")
            # As in a race, where the quickest block so far decides on the calls.
            single = [BlockRequest(name=name, warmup=1, calls=1)] * 10
            seen = self._call(time_batch, single).blocks
            seconds = min(contender.call_seconds, *(block.seconds for block in seen))
            nbytes = contender.read_nbytes + contender.written_nbytes
            self._blocks[name] = functools.partial(
                block_calls, seconds, block_seconds, nbytes=nbytes
            )
            if name == bias.subject:
                self._before_loop = math.ceil(LOOP_WARMUP_SECONDS / seconds)
                self._loop_calls = math.ceil(LOOP_SECONDS / seconds)

    def turn(self) -> list[float]:
        """Return the ratios of a turn's rounds."""
        ratios: list[float] = []
        end = time.perf_counter() + BIAS_TURN_SECONDS
        for first in range(0, MOST_BIAS_ROUNDS, ROUNDS_PER_LOOP):
            if ratios and (time.perf_counter() > end or is_known(ratios)):
                break
            lost = {name: statistics.median(some) for name, some in self._lost.items()}
            warm = [self._round(first + number, lost) for number in range(ROUNDS_PER_LOOP)]
            # With the loop beside them: the machine's speed drifts within seconds and affects both alike.
            loop = self._loop()
            ratios += [seconds / loop for seconds in warm]
        return ratios

    def _round(self, number: int, lost: Mapping[str, float]) -> float:
        """Return the subject's seconds per call in a round.

        As in a race: probes run last, in every fifth round, followed by a longer warm-up. Another candidate goes
        first, so that the subject does not profit from the loop before.
        """
        shuffled = self._random.sample(self._names, len(self._names))
        order = [self._bias.others[0], *shuffled, *[PROBE] * (number % PROBE_TURN == 0)]
        requests = []
        for place, name in enumerate(order):
            cold = place == 0 and number % PROBE_TURN == 1
            warmup, calls = self._blocks[name](
                lost=lost[name], cold=cold, dither=self._random.random()
            )
            requests.append(BlockRequest(name=name, warmup=warmup, calls=calls))
        blocks = self._call(time_batch, requests).blocks
        for request, block in zip(requests, blocks, strict=True):
            if request.warmup:
                self._lost[request.name].append(lost_calls(request, block))
        return float(blocks[1 + shuffled.index(self._bias.subject)].seconds)

    def _loop(self) -> float:
        """Return the subject's seconds per call in an uninterrupted loop."""
        subject = self._bias.subject
        _, calls = self._blocks[subject]()
        some = min(MOST_LOOP_BLOCKS, math.ceil(self._loop_calls / calls))
        loop: list[float] = self._call(
            time_loop_without_idle, subject, self._before_loop, calls, some
        )
        return statistics.median(loop)

    def _call(self, task: Callable[..., Any], *words: Any) -> Any:
        return self._worker.call(task, *words, timeout=LIMIT_SECONDS)


def is_known(ratios: Sequence[float]) -> bool:
    """Return whether the standard error of their median, of a normal distribution by its quartiles, is at most 0.5%."""
    if len(ratios) < LEAST_BIAS_ROUNDS:
        return False
    low, _, high = statistics.quantiles(ratios, n=4)
    deviation = (high - low) / 1.349
    return 1.2533 * deviation / math.sqrt(len(ratios)) <= BIAS_ERROR


def time_loop_without_idle(
    session: Session, name: str, warmup: int, calls: int, blocks: int
) -> list[float]:
    """Time as `time_loop` does, with CPU idle states disabled as in a race."""
    with idle.idle_states_disabled():
        return time_loop(session, name, warmup, calls, blocks)


def measure_sleep(bias: Bias, turns: int, worker: Worker) -> list[float]:
    """Return per turn the median of loops with CPU idle states over that of loops without.

    Raises:
        ProofError: idle states cannot be disabled, or the candidate cannot be opened.
    """
    if not idle.can_disable_idle_states():
        raise ProofError("the system does not let this user disable CPU idle states")
    worker.call(open_case, bias.case, 0, timeout=LIMIT_SECONDS)
    contender = worker.call(
        functools.partial(open_contender, check=True), bias.subject, timeout=LIMIT_SECONDS
    )
    if contender.status != "ok":
        raise ProofError(f"{bias.subject}: {contender.status}: {contender.reason}")
    warmup = math.ceil(LOOP_WARMUP_SECONDS / contender.call_seconds)
    ratios = []
    for _ in range(turns):
        seconds: dict[Callable[..., list[float]], list[float]] = {}
        for loop in (time_loop_without_idle, time_loop) * SLEEP_LOOPS:
            seconds.setdefault(loop, []).extend(
                worker.call(loop, bias.subject, warmup, 2, MOST_LOOP_BLOCKS, timeout=LIMIT_SECONDS)
            )
        ratios.append(
            statistics.median(seconds[time_loop])
            / statistics.median(seconds[time_loop_without_idle])
        )
    worker.call(close_case, timeout=LIMIT_SECONDS)
    return ratios
