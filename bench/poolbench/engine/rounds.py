"""What a round is made of: in which order contenders come, and how many calls a block has, untimed and timed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

# Untimed calls before a block, by their time and at most so many. Behind a other candidate a call of 1 ms over 12 MB
# needs four until it is within 5% of an uninterrupted loop, one of 3 ms needs one; where 32 MB of cache are
# shared with other guests, one of 0.5 ms over 12 MB is a tenth above it behind eight and a sixteenth behind
# twelve, which leave half of the rounds. Of arrays that a core's own cache holds, a call of 0.5 ms needs two,
# one of 0.3 ms four.
MOST_WARMUPS, MOST_WARMUPS_WITHIN, LEAST_WARMUPS_WITHIN = 8, 4, 2
WARMUP_SECONDS, WARMUP_SECONDS_WITHIN = 0.003, 0.00075
OWN_CACHE_NBYTES = 4 << 20
COLD_WARMUP_SECONDS, MOST_COLD_WARMUPS = 0.012, 16


def affordable(seconds: float, round_seconds: float, most: int) -> int:
    """Rounds that fit into the seconds: one at least, and no more than `most`."""
    return min(most, max(1, int(seconds / max(round_seconds, 1e-9))))


def block_calls(
    call_seconds: float,
    block_seconds: float,
    *,
    nbytes: int,
    cold: bool = False,
    dither: float = 0.5,
) -> tuple[int, int]:
    """(untimed, timed) calls of a block of an op that reads and writes so many bytes.

    The other candidate before has emptied the caches, and they take several calls to hold the op's data as they do
    in a long loop: the untimed calls bring back the steady state that `cache=warm` promises. They are no
    more than the timed ones, but `cold`, behind a probe or an allocation. A number of them that is not whole is
    rounded up where its remainder is above 1 - `dither`: by chance, so that of two contenders nearly
    alike not one always has a call more.
    """
    call_seconds = max(call_seconds, 1e-9)
    within = nbytes <= OWN_CACHE_NBYTES
    seconds = WARMUP_SECONDS_WITHIN if within else WARMUP_SECONDS
    least = min(LEAST_WARMUPS_WITHIN if within else 1, round(WARMUP_SECONDS / call_seconds))
    most = MOST_WARMUPS_WITHIN if within else MOST_WARMUPS
    warmup = max(1, least, min(most, math.floor(seconds / call_seconds + dither)))
    calls = max(warmup, math.ceil(block_seconds / call_seconds))
    if cold:
        warmup = max(warmup, min(MOST_COLD_WARMUPS, round(COLD_WARMUP_SECONDS / call_seconds)))
    return max(warmup, math.ceil(calls / 8)), calls


def balanced_orders(names: Sequence[str], generator: random.Random) -> Iterator[list[str]]:
    """Orders of the names without end: over each len(names) of them, each name has each place once.

    A new random Latin square (the rotations of a random order, in random turn) for every such batch.
    """
    while True:
        order = generator.sample(names, len(names))
        for turn in generator.sample(range(len(order)), len(order)):
            yield order[turn:] + order[:turn]
