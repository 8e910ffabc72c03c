"""The memory-bandwidth limit of each measurement, from the probes that raced beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import pandas as pd

from poolbench.core.case import Case
from poolbench.core.records import Clock, Measurement, Samples, samples_by
from poolbench.machine.nvml import is_gpu
from poolbench.report.medians import all_process_medians, median, middle_of

EFFICIENCY_FROM_NBYTES = 1 << 20  # below it the cost of the call itself decides, not the memory

RaceKey = tuple[Case, str]


def limits_of(
    found: Sequence[Measurement | None], probes: Iterable[Measurement]
) -> list[Samples | None]:
    """Return the limit's time for each measurement's bytes in each (process, allocation, round).

    None below 1 MiB, without probes, and for wall time on a GPU. Measurements of one race that move
    the same bytes share one Samples object.
    """
    by_race: dict[RaceKey, dict[str, Measurement]] = {}
    for probe in probes:
        if probe.status == "ok" and len(probe.samples):
            by_race.setdefault((probe.case, probe.node), {})[probe.candidate] = probe
    known: dict[tuple[RaceKey, str, int, int], Samples | None] = {}
    limits: list[Samples | None] = []
    for m in found:
        race = (m.case, m.node) if m is not None else None
        # A probe whose launch takes longer than its run does not measure a GPU's memory.
        if (
            m is None
            or race not in by_race
            or m.read_nbytes + m.written_nbytes < EFFICIENCY_FROM_NBYTES
            or (m.clock == "wall" and is_gpu(m.case.device))
        ):
            limits.append(None)
            continue
        key = (race, m.clock, m.read_nbytes, m.written_nbytes)
        if key not in known:
            known[key] = limit_samples(
                by_race[race], m.read_nbytes, m.written_nbytes, clock=m.clock
            )
        limits.append(known[key])
    return limits


def limit_samples(
    probes: Mapping[str, Measurement],
    read_nbytes: int,
    written_nbytes: int,
    *,
    clock: Clock,
) -> Samples | None:
    """Return the time that the memory needs for these bytes, block by block, or None.

    It is bytes read over the read bandwidth plus bytes written over the write bandwidth, or all
    bytes over the copy bandwidth, whichever is less: short probes show less than the memory's
    bandwidth, and which probe is too short depends on the case.

    Args:
        probes: of the race, by name.
        read_nbytes: of a call.
        written_nbytes: of a call.
        clock: by which the probes are read.

    Returns:
        Seconds per call for each (process, allocation, round) that both probes have; None without them.
    """
    read, write = probes.get("bandwidth-read"), probes.get("bandwidth-write")
    if read is None or write is None or not read.read_nbytes or not write.written_nbytes:
        return None
    source, written = samples_by(read, clock), samples_by(write, clock)
    copy = probes.get("bandwidth-copy")
    left, right = _common_places(source, written)
    if not len(left):
        return None
    seconds = (
        np.array(source.seconds)[left] * (read_nbytes / read.read_nbytes)
        + np.array(written.seconds)[right] * (written_nbytes / write.written_nbytes)
    )  # fmt: skip
    if copy is not None and copy.read_nbytes:
        copied, moved = samples_by(copy, clock), copy.read_nbytes + copy.written_nbytes
        whole = np.array(copied.seconds) * ((read_nbytes + written_nbytes) / moved)
        if len(whole) and middle_of(whole) < middle_of(seconds):
            return msgspec.structs.replace(copied, seconds=tuple(whole.tolist()))
    if len(left) == len(source):
        return msgspec.structs.replace(source, seconds=tuple(seconds.tolist()))
    return Samples(
        process=tuple(source.process[i] for i in left),
        allocation=tuple(source.allocation[i] for i in left),
        round=tuple(source.round[i] for i in left),
        calls=tuple(source.calls[i] for i in left),
        seconds=tuple(seconds.tolist()),
        contended=tuple(source.contended[i] for i in left) if source.contended else (),
    )


def _common_places(one: Samples, other: Samples) -> tuple[Sequence[int], Sequence[int]]:
    """Return the indices on either side of the blocks that both have, in the order of the first."""
    left, right = ((some.process, some.allocation, some.round) for some in (one, other))
    if left == right:  # as of two probes that raced together
        everything = range(len(one.process))
        return everything, everything
    places = {place: i for i, place in enumerate(zip(*right, strict=True))}
    found = [
        (i, places[place]) for i, place in enumerate(zip(*left, strict=True)) if place in places
    ]
    return [i for i, _ in found], [i for _, i in found]


def limit_seconds(limits: Sequence[Samples | None]) -> list[float]:
    """Return the median of the processes' medians of each; nan without a limit. Many are the same object."""
    known = {id(one): one for one in limits if one is not None}
    medians = dict(zip(known, map(median, all_process_medians([*known.values()])), strict=True))
    return [medians.get(id(one), math.nan) for one in limits]


def probe_table(probes: Sequence[Measurement]) -> pd.DataFrame:
    """Return one row per bandwidth probe: its case, and bytes per second by its processes' medians."""
    rows = []
    found = all_process_medians([probe.samples for probe in probes])
    for probe, medians in zip(probes, found, strict=True):
        case, moved = probe.case, probe.read_nbytes + probe.written_nbytes
        if probe.status != "ok" or not len(medians) or not moved:
            continue
        rows.append(
            {
                "device": case.device,
                "dtype": case.dtype,
                "threads": case.threads,
                "cache": case.cache,
                "probe": probe.candidate,
                "nbytes": moved,
                "bandwidth": moved / median(medians),
            }
        )
    return pd.DataFrame(rows)
