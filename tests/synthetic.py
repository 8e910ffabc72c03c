"""Seeded synthetic runs for unit tests of code that reads a run. They are never shown as results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from poolbench.core.axes import AxisInfo
from poolbench.core.case import Case, make_case
from poolbench.core.program import Program
from poolbench.core.records import (
    Accuracy,
    Contention,
    Environment,
    Header,
    MatrixCell,
    Measurement,
    ModelResult,
    Node,
    Record,
    Samples,
    Selftest,
    TimeBreakdown,
    TraceSummary,
)
from poolbench.core.registry import input_nbytes, load_builtin
from poolbench.store.journal import Journal

load_builtin()  # declares the axes of the cases below

SHAPES = (
    (1, 7, 7, 96),
    (1, 56, 56, 96),
    (32, 14, 14, 96),
    (32, 28, 28, 96),
    (32, 56, 56, 96),
    (32, 112, 112, 96),
)
MODES = ("eager", "graph", "xla")
DIRECTIONS = ("forward", "training")

# Name to factor over the bandwidth limit time by mode, calls' overhead in seconds, and form.
FACTORS: dict[str, dict[str, dict[str, float]]] = {
    "depth_max_pool": {
        "reshape-reduce_max": {"eager": 3.0, "graph": 3.1, "xla": 1.25},
        "lambda-max_pool": {"eager": 3.2, "graph": 3.3, "xla": 1.3},
        "recipe-verbatim": {"eager": 3.2, "graph": 3.3, "xla": 1.3},
        "max_pool2d-reshape": {"eager": 2.0, "graph": 2.1, "xla": 1.27},
        "transpose-reduce_max": {"eager": 1.9, "graph": 2.0, "xla": 1.6},
        "slices-maximum": {"eager": 14.0, "graph": 13.5, "xla": 1.35},
        "layer-depth_max_pool": {"eager": 2.1, "graph": 2.1, "xla": 1.25},
    },
    "global_avg_pool": {
        "layer-global_avg_pool": {"eager": 1.5, "graph": 1.5, "xla": 1.3},
        "lambda-reduce_mean": {"eager": 1.45, "graph": 1.45, "xla": 1.1},
        "avg_pool2d-full": {"eager": 1.1, "graph": 1.2, "xla": 1.25},
        "mean-of-means": {"eager": 1.4, "graph": 1.6, "xla": 1.5},
        "einsum": {"eager": 2.4, "graph": 2.4, "xla": 1.9},
    },
}
BASELINES = {"depth_max_pool": "reshape-reduce_max", "global_avg_pool": "layer-global_avg_pool"}
OVERHEAD = {"eager": 40e-6, "graph": 170e-6, "xla": 190e-6}
FIRST = {"eager": 0.002, "graph": 0.08, "xla": 0.35}
READ, WRITE = 12e9, 9e9  # bytes a second
ENVIRONMENT = Environment(
    machine={"processor": "Synthetic CPU", "cores": 2, "memory_nbytes": 8 << 30, "system": "Linux"},
    devices={"cpu:0": "Synthetic CPU"},
    versions={"python": "3.11.7", "tensorflow": "2.21.0", "keras": "3.15.1"},
    settings={"TF_CPP_MIN_LOG_LEVEL": "2"},
    source={"commit": "0000000", "dirty": False},
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many blocks a contender has: processes x allocations x rounds."""

    processes: int = 5
    allocations: int = 4
    rounds: int = 3


def header(run: str = "synthetic", **environment: object) -> Header:
    """A header line; environment fields may be replaced."""
    return Header(
        run=run,
        created="2026-01-02T03:04:05",
        environment=msgspec.structs.replace(ENVIRONMENT, **environment),
        options={"sweep": "default", "processes": 5},
        seed=7,
    )


def op_case(op: str, **fields: object) -> Case:
    """A base case of one of the two ops."""
    return make_case(op=op, **{"shape": (32, 56, 56, 96), **fields})


def nbytes_of(case: Case) -> tuple[int, int]:
    """Fewest bytes read and written by a call."""
    size = input_nbytes(case)
    _, h, w, _ = case.shape
    small = size // case.get("pool_size", h * w)
    if case.direction == "training":
        return size + small, size + small
    return size, small


def race(
    case: Case,
    rng: np.random.Generator,
    *,
    plan: Plan = Plan(),
    slow: float = 1.0,
    slowed: dict[str, float] | None = None,
    names: Sequence[str] = (),
) -> list[Measurement]:
    """Measurements of one race: its probes, then its candidates.

    Args:
        case: the case.
        rng: source of the noise.
        plan: how many blocks.
        slow: the day's slowness, of all contenders alike.
        slowed: candidate to a factor on its time.
        names: candidates; empty means all.
    """
    shape = (plan.processes, plan.allocations, plan.rounds)
    blocks = np.array(list(itertools.product(*map(range, shape))))
    process, allocation, round_ = (tuple(map(int, column)) for column in blocks.T)
    read, written = nbytes_of(case)
    candidates = FACTORS[case.op]
    day = slow * np.exp(rng.normal(0, 0.03, shape))
    contention = Contention(
        steal=0.01, others=0.02, blocks_marked=2, blocks_redone=2, involuntary_switches=5
    )

    def samples(mean: float, spread: float = 0.01) -> Samples:
        between = rng.normal(0, spread, (shape[0], 1, 1)) + rng.normal(0, spread, (*shape[:2], 1))
        seconds = mean * day * np.exp(between + rng.normal(0, 0.01, shape))
        return Samples(
            process=process,
            allocation=allocation,
            round=round_,
            calls=(10,) * len(blocks),
            seconds=tuple(seconds.ravel().tolist()),
            contended=(0,) * len(blocks),
        )

    found = [
        Measurement(
            case=case, candidate=f"bandwidth-{kind}", kind="probe", status="ok",
            samples=samples(r / READ + w / WRITE), read_nbytes=r, written_nbytes=w, contention=contention,
        )
        for kind, r, w in (("read", read + written, 0), ("write", 0, read + written), ("copy", read, read))
    ]  # fmt: skip
    for name in names or candidates:
        common = dict(
            case=case,
            candidate=name,
            form="layer" if "layer" in name or "lambda" in name else "function",
            baseline=BASELINES[case.op],
            read_nbytes=read,
            written_nbytes=written,
            contention=contention,
        )
        if name == "recipe-verbatim":
            found.append(
                Measurement(
                    **common, status="unsupported", reason="attr 'padding' wants SAME or VALID"
                )
            )
            continue
        if name == "lambda-max_pool" and case.direction == "training" and case.mode != "xla":
            found.append(
                Measurement(
                    **common,
                    status="unsupported",
                    issue="tensorflow#636",
                    reason="MaxPoolingGrad is not yet supported on the depth dimension",
                )
            )
            continue
        factor = candidates[name][case.mode] * (1.6 if case.direction == "training" else 1)
        mean = OVERHEAD[case.mode] + factor * (read / READ + written / WRITE)
        wrong = case.dtype == "float16" and name in (
            "lambda-reduce_mean",
            "einsum",
            "avg_pool2d-full",
        )
        h, w = case.shape[1:3]
        worst = h * w / 40 if wrong else 0.2
        found.append(
            Measurement(
                **common,
                status="wrong" if worst > 1 else "ok",
                reason="off by 13% in float16" if worst > 1 else "",
                samples=samples(mean * (slowed or {}).get(name, 1.0)),
                first_call_seconds=tuple(
                    (rng.uniform(0.8, 1.2, plan.processes) * FIRST[case.mode]).tolist()
                ),
                accuracy=Accuracy(
                    worst=worst, max_relative=worst * 1e-3, max_absolute=1e-6, bound="relative 1e-3"
                ),
                peak_nbytes=written,
            )
        )
    return found


def default_cases(shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Case]:
    """Cases like the default sweep's: shape x mode x direction, then one axis at a time."""
    found: dict[Case, None] = {}
    for op in FACTORS:
        for shape, mode, direction in itertools.product(shapes, MODES, DIRECTIONS):
            found[op_case(op, shape=shape, mode=mode, direction=direction)] = None
        for fields in ({"threads": 1}, {"dtype": "float16"}, {"distribution": "relu"}):
            found[op_case(op, **fields)] = None
    for k in (2, 4, 8, 16):
        found[op_case("depth_max_pool", pool_size=k)] = None
    found[op_case("depth_max_pool", padding="same")] = None
    found[op_case("depth_max_pool", padding="same", shape=(32, 56, 56, 95))] = None
    for side in (7, 28, 112):
        found[op_case("global_avg_pool", dtype="float16", shape=(8, side, side, 96))] = None
    return list(found)


def extras() -> list[Record]:
    """One record or more of each kind that is no measurement."""
    states = ("pass", "pass", "wrong", "unsupported", "error")
    cells = [
        MatrixCell(
            op=op, candidate=name, probe=probe, state=states[(i + j) % 5],  # type: ignore[arg-type]
            evidence=f"{name} under {probe}: seen", issue="tensorflow#636" if (i + j) % 5 == 3 else "",
        )
        for op, names in FACTORS.items()
        for i, name in enumerate(names)
        for j, probe in enumerate(("trains", "saves", "non-dividing", "nan", "float16"))
    ]  # fmt: skip
    trace_summary = TraceSummary(
        case=op_case("depth_max_pool"), candidate="reshape-reduce_max", trace="2026_depth", steps=10,
        step_seconds=7.9e-3,
        parts=({"kind": "tf_op", "name": "Max", "seconds": 7.5e-3, "count": 1.0, "nbytes": 100},),
        peak_nbytes=12_000_000, allocated_nbytes=12_000_000, freed_nbytes=12_000_000, threads_busy=1.9,
    )  # fmt: skip
    networks = [
        ModelResult(
            model="textbook", op="depth_max_pool", candidate=name, direction="training", mode="graph", batch=32,
            baseline="reshape-reduce_max", share=(0.008, 0.011, 0.014), figures={"images_per_second": 120.0},
        )
        for name in ("reshape-reduce_max", "layer-depth_max_pool")
    ]  # fmt: skip
    selftest = [
        Selftest(
            injected=x, margin=0.05, comparisons=40, faster=0, slower=int(40 * min(1, x * 10)),
            same=40 - int(40 * min(1, x * 10)), undecided=0, noise_floor=0.006, seconds=20.0,
        )
        for x in (0.0, 0.01, 0.1)
    ]  # fmt: skip
    shares = TimeBreakdown(
        seconds={"samples": 200.0, "start": 30.0, "first_calls": 80.0, "other": 12.0},
        wall_seconds=322.0,
    )
    return [*cells, trace_summary, *networks, *selftest, shares]


def unusual() -> tuple[Header, list[Record]]:
    """A header, a node and two measurements with what few runs have: axes, sources, backends, programs."""
    case = op_case("depth_max_pool", mode="xla")
    case = Case(op=case.op, axes={**case.axes, "backend": "jax"})
    head = msgspec.structs.replace(
        header(),
        axes={"users_op": (AxisInfo(name="radius", kind="ordinal", prefix="r"),)},
        sources={case.op: {"mine": "def mine(x):\n    return x\n"}},
    )
    found = race(case, np.random.default_rng(2), plan=Plan(processes=2, allocations=1, rounds=2))
    program = Program(
        hash="0123456789abcdef", key="jax 0.7", kernels=2, flops=10, bytes_accessed=20,
        peak_buffer_nbytes=30, temporary_nbytes=10, operations=("max",),
    )  # fmt: skip
    contention = Contention(
        steal=0.1, others=0.2, blocks_marked=1, blocks_redone=1, involuntary_switches=3, throttled=0.1,
        device_slowdowns=("heat",),
    )  # fmt: skip
    more = [
        msgspec.structs.replace(
            m, program=program, contention=contention, settings={"threads": "2"}, node="other",
            accuracy=Accuracy(worst=0.1, max_relative=1e-7, max_absolute=1e-7, tie="one", bound="1e-6"),
        )
        for m in found[-2:]
    ]  # fmt: skip
    return head, [Node(name="other", environment=ENVIRONMENT), *more]


def records(
    seed: int = 1, *, cases: Sequence[Case] | None = None, slow: float = 1.0,
    slowed: dict[str, float] | None = None, plan: Plan = Plan(), with_extras: bool = True,
) -> list[Record]:  # fmt: skip
    """A whole run without its header."""
    rng = np.random.default_rng(seed)
    found: list[Record] = []
    for case in default_cases() if cases is None else cases:
        found += race(case, rng, plan=plan, slow=slow, slowed=slowed)
    return found + (extras() if with_extras else [])


def write(folder: Path, found: Sequence[Record], head: Header | None = None) -> Path:
    """The records as a run's journal; returns the folder."""
    with Journal(folder) as journal:
        for record in (head or header(folder.name), *found):
            journal.append(record)
    return folder


def write_large(folder: Path, measurements: int, seed: int = 3) -> Path:
    """A journal of at least `measurements` candidates' measurements with 200 samples each, written quickly."""
    from poolbench.store.journal import JOURNAL, encode_line

    rng = np.random.default_rng(seed)
    plan = Plan(processes=5, allocations=4, rounds=10)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    grid = itertools.product(
        range(1, 10_000),
        (48, 96, 192),
        (7, 14, 28, 56),
        MODES,
        DIRECTIONS,
        ("float32", "bfloat16"),
        FACTORS,
    )
    with (folder / JOURNAL).open("wb") as file:
        file.write(encode_line(header(folder.name)))
        for n, c, side, mode, direction, dtype, op in grid:
            case = op_case(
                op, shape=(n, side, side, c), mode=mode, direction=direction, dtype=dtype
            )
            for found in race(case, rng, plan=plan):
                file.write(encode_line(found))
                count += found.kind == "candidate"
            if count >= measurements:
                break
        for record in extras():
            file.write(encode_line(record))
    return folder
