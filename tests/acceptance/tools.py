"""Invoke one tool in a process of its own: `python -m acceptance.tools TOOL SECONDS`.

The process prints one JSON line: for each statistic of the tool, the log ratio of each callable to
the first one. All tools get the same callables and about the same seconds of timed calls for each.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from poolbench.core.case import Case, make_case
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.registry import REGISTRY
from poolbench.engine.aa import delay_call
from poolbench.engine.pool import WorkerPool
from poolbench.engine.race import race_in_one_worker
from poolbench.engine.recovery import Tasks
from poolbench.engine.rounds import block_calls
from poolbench.stats.estimate import estimate
from poolbench.worker.backends import BACKENDS
from poolbench.worker.contender import OpenedContender, open_call, open_contender
from poolbench.worker.inputs import make_inputs
from poolbench.worker.session import Session, bind, open_case
from poolbench.worker.timing import time_block

CASE = make_case(
    op="depth_max_pool", shape=(8, 28, 28, 96), pool_size=3, padding="valid", mode="graph"
)
# Name: (candidate, injected slowdown as a share of a call). Ratios are taken to the first.
CALLABLES: dict[str, tuple[str, float]] = {
    "native": ("max_pool", 0.0),
    "copy": ("max_pool", 0.0),
    "view": ("max_pool2d-view", 0.0),
    "slower-1": ("max_pool", 0.01),
    "slower-5": ("max_pool", 0.05),
}
BASELINE = "native"
CALIBRATION_CALLS = 10
CALIBRATION_BLOCKS = 7
# pyperf starts processes for every callable; two are the fewest that show differences between processes.
PYPERF_PROCESSES = 2
PYPERF_VALUES = 5
TIMEIT_REPEATS = 5
OPEN_TIMEOUT_SECONDS = 60.0
Times = dict[str, dict[str, float]]  # statistic -> callable -> seconds per call


def make_calls(names: tuple[str, ...] = tuple(CALLABLES)) -> dict[str, Callable[[], Any]]:
    """Return the callables of this process, traced and warmed up by a few calls."""
    import poolbench.ops  # noqa: F401 (registers the ops that ship)

    BACKENDS["tensorflow"].start(WorkerSpec())
    import tensorflow as tf

    x = tf.constant(make_inputs(CASE, 0)[0]) + 0
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        candidate, slowdown = CALLABLES[name]
        call = functools.partial(bind(REGISTRY.candidates[CASE.op, candidate], CASE), x)
        call()
        wait = slowdown * min(
            timeit.repeat(call, number=CALIBRATION_CALLS, repeat=CALIBRATION_BLOCKS)
        ) / CALIBRATION_CALLS  # fmt: skip
        calls[name] = delay_call(call, wait)
    return calls


def open_callable(session: Session, name: str, check: bool, *, case: Case) -> OpenedContender:
    """Open the same callable as a contender of a race, in a worker."""
    candidate, slowdown = CALLABLES[name]
    call = bind(REGISTRY.candidates[case.op, candidate], case)
    contender = open_call(session, name, lambda: delay_call(call, 0.0))
    if not slowdown:
        return contender
    wait = slowdown * min(
        time_block(session, name, 0, CALIBRATION_CALLS).seconds for _ in range(CALIBRATION_BLOCKS)
    )
    return open_call(session, name, lambda: delay_call(call, wait))


def our_plan(seconds: float, processes: int, allocations: int, call: OpenedContender) -> Plan:
    """Return a plan whose rounds time each callable for about `seconds`, if all take as long as `call`."""
    plan = Plan()
    nbytes = call.read_nbytes + call.written_nbytes
    _, calls = block_calls(call.call_seconds, plan.block_seconds, nbytes=nbytes)
    rounds = max(1, round(seconds / (calls * call.call_seconds) / processes / allocations))
    return replace(
        plan, processes=processes, allocations=allocations, rounds=rounds,
        budget_seconds=1e6,
    )  # fmt: skip


def race(seconds: float, *, processes: int, allocations: int) -> dict[str, dict[str, float]]:
    """Time all callables with poolbench, in the same rounds."""
    import poolbench.ops  # noqa: F401 (registers the ops that ship)

    original = REGISTRY.candidates[CASE.op, CALLABLES[BASELINE][0]]
    pool = WorkerPool()
    try:
        pool.prepare((WorkerSpec(),), processes)
        worker = pool.worker(WorkerSpec())
        worker.call(open_case, CASE, 0, timeout=OPEN_TIMEOUT_SECONDS)
        check = functools.partial(open_contender, check=True)
        call = worker.call(check, original.name, timeout=OPEN_TIMEOUT_SECONDS)
        plan = our_plan(seconds, processes, allocations, call)
        result = race_in_one_worker(
            CASE,
            [replace(original, name=name) for name in CALLABLES],
            baseline=BASELINE,
            plan=plan,
            tasks=Tasks(open_contender=functools.partial(open_callable, case=CASE), probes=()),
        ).run(pool)
    finally:
        pool.close()
    samples = {m.candidate: m.samples for m in result.measurements if m.status == "ok"}
    base = samples[BASELINE]
    return {"ratio": {n: estimate(samples[n], base).log_ratio for n in CALLABLES if n != BASELINE}}


def to_log_ratios(times: Times) -> dict[str, dict[str, float]]:
    """Return the log ratios to the baseline, by statistic."""
    return {
        statistic: {
            name: math.log(value / of[BASELINE]) for name, value in of.items() if name != BASELINE
        }
        for statistic, of in times.items()
    }


def time_timeit(seconds: float) -> Times:
    """Time as `python -m timeit` does: the minimum of five repeats."""
    found = {}
    for name, call in make_calls().items():
        timer = timeit.Timer(call)
        loops, taken = timer.autorange()
        number = max(1, round(seconds / TIMEIT_REPEATS / (taken / loops)))
        found[name] = min(timer.repeat(TIMEIT_REPEATS, number)) / number
    return {"min": found}


def time_torch(seconds: float) -> Times:
    """Time with `torch.utils.benchmark.Timer.blocked_autorange`."""
    timer_of = importlib.import_module("torch.utils.benchmark").Timer

    found = {}
    for name, call in make_calls().items():
        timer = timer_of(stmt="call()", globals={"call": call})
        found[name] = timer.blocked_autorange(min_run_time=seconds).median
    return {"median": found}


PYTEST_FILE = """
import pytest
from acceptance.tools import CALLABLES, make_calls

CALLS = make_calls()

@pytest.mark.parametrize("name", CALLABLES)
def test_tool(benchmark, name):
    benchmark(CALLS[name])
"""


def time_pytest_benchmark(seconds: float) -> Times:
    """Time with pytest-benchmark's defaults and this much time per callable."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_tool.py").write_text(PYTEST_FILE)
        subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                "--benchmark-json", "found.json", "--benchmark-max-time", str(seconds),
            ],
            cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found = json.loads((folder / "found.json").read_text())
    times: Times = {"min": {}, "median": {}, "mean": {}}
    for result in found["benchmarks"]:
        for statistic, of in times.items():
            of[result["params"]["name"]] = result["stats"][statistic]
    return times


PYPERF_FILE = """
import time
import pyperf
from acceptance.tools import CALLABLES, make_calls

CALLS = {}

def timed(loops, name):
    if name not in CALLS:
        CALLS.update(make_calls((name,)))
    call = CALLS[name]
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return time.perf_counter() - start

runner = pyperf.Runner()
for name in CALLABLES:
    runner.bench_time_func(name, timed, name)
"""


def time_pyperf(seconds: float) -> Times:
    """Time with pyperf: fresh processes per callable, one warm-up value in each, as by default."""
    pyperf: Any = importlib.import_module("pyperf")
    # One loop count for all callables: pyperf's calibration would start one more process per callable.
    call = make_calls((BASELINE,))[BASELINE]
    call_seconds = min(timeit.repeat(call, number=CALIBRATION_CALLS, repeat=CALIBRATION_BLOCKS))
    loops = seconds / PYPERF_PROCESSES / PYPERF_VALUES / (call_seconds / CALIBRATION_CALLS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tool.py").write_text(PYPERF_FILE)
        subprocess.run(
            [
                sys.executable, "tool.py", "--output", "found.json", "--quiet",
                "--processes", str(PYPERF_PROCESSES), "--values", str(PYPERF_VALUES),
                "--loops", str(max(1, round(loops))), "--warmups", "1",
                "--inherit-environ", "TF_CPP_MIN_LOG_LEVEL",
            ],
            cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        suite = pyperf.BenchmarkSuite.load(str(folder / "found.json"))
        found = {bench.get_name(): bench.get_values() for bench in suite.get_benchmarks()}
    return {
        "mean": {name: statistics.fmean(values) for name, values in found.items()},
        "median": {name: statistics.median(values) for name, values in found.items()},
    }


def _tool(measure: Callable[[float], Times]) -> Callable[[float], dict[str, dict[str, float]]]:
    return lambda seconds: to_log_ratios(measure(seconds))


TOOLS: Mapping[str, Callable[[float], dict[str, dict[str, float]]]] = {
    "ours": functools.partial(race, processes=10, allocations=2),
    "ours, one process": functools.partial(race, processes=1, allocations=1),
    "pytest-benchmark": _tool(time_pytest_benchmark),
    "timeit": _tool(time_timeit),
    "pyperf": _tool(time_pyperf),
    "torch Timer": _tool(time_torch),
}
# The module that a tool needs.
NEEDS = {"pytest-benchmark": "pytest_benchmark", "pyperf": "pyperf", "torch Timer": "torch"}


def main(words: list[str]) -> int:
    """Print the log ratios and the seconds of one invocation as a JSON line."""
    tool, seconds = words
    start = time.perf_counter()
    found = TOOLS[tool](float(seconds))
    print(json.dumps({"log_ratios": found, "seconds": time.perf_counter() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
