"""GPU code paths that can be tested without a GPU.

NVML is faked; TensorFlow's logical CPU devices stand for several devices.
"""
# ruff: noqa: N802, N815 (NVML's own names)

import inspect
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakePool, fake_candidate
from poolbench.core.case import Case, make_case
from poolbench.core.errors import UsageError
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import common_clock, samples_by
from poolbench.core.registry import import_file
from poolbench.engine.device import DEVICE_ROUNDS
from poolbench.engine.noise import device_contention
from poolbench.engine.process import Worker
from poolbench.engine.race import race_in_one_worker
from poolbench.engine.run import Run, RunOptions
from poolbench.machine.info import Seen, Usage, read_usage, seen_between, usage_reader
from poolbench.machine.nvml import (
    DeviceUsage,
    driver_versions,
    energy_joules,
    nvml_handle,
    watch_device,
)
from poolbench.options import refuse_kinds
from poolbench.store.journal import read_run
from poolbench.worker import timing, trace, xspace
from poolbench.worker.backends import BACKENDS
from poolbench.worker.contender import open_contender
from poolbench.worker.session import Session, open_case
from poolbench.worker.trace import time_on_device

ROOT = Path(__file__).parent.parent
OURS, OTHER = 100, 200


class NotSupportedError(Exception):
    pass


class FakeNvml:
    """NVML as far as `poolbench.machine.nvml` asks it; what is None raises, as on a device that does not know."""

    NVMLError = NotSupportedError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksEventReasonHwSlowdown = 0x8
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80
    SW_POWER_CAP = 0x4

    def __init__(self, *, clock=1980, celsius=41, reasons=0, samples=(), millijoules=None):
        self.answers = {
            "clock": clock,
            "celsius": celsius,
            "reasons": reasons,
            "samples": samples or None,
            "millijoules": millijoules,
        }
        self.asked_since = []

    def answer(self, name):
        if self.answers[name] is None:
            raise NotSupportedError(name)
        return self.answers[name]

    def nvmlDeviceGetHandleByIndex(self, index):
        if index > 3:
            raise NotSupportedError("no such device")
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return f"uuid {uuid}"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self.answer("clock")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self.answer("celsius")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.answer("reasons")

    def nvmlDeviceGetProcessUtilization(self, handle, since):
        self.asked_since.append(since)
        return [sample for sample in self.answer("samples") if sample.timeStamp > since]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.answer("millijoules")

    def nvmlSystemGetDriverVersion(self):
        return "570.86.10"


def sample(pid, percent, time=1):
    return SimpleNamespace(pid=pid, smUtil=percent, timeStamp=time)


def read(**answers):
    return watch_device("gpu:0", nvml=FakeNvml(**answers), own=lambda: {OURS})()


def test_a_quiet_device_is_read_and_does_not_contend():
    usage = read(samples=(sample(OURS, 90),))
    assert usage == DeviceUsage(clock_mhz=1980, celsius=41, others_share=0.0)
    assert not usage.contended()


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (0x8, ("hardware slowdown",)),
        (0x20, ("thermal slowdown",)),
        (0x40 | 0x80, ("hardware thermal slowdown", "power brake")),
    ],
)
def test_a_slowdown_contends_and_says_which(reasons, words):
    usage = read(reasons=reasons)
    assert usage.slowdowns == words
    assert usage.contended()


def test_the_power_cap_is_a_steady_state_and_does_not_contend():
    assert not read(reasons=FakeNvml.SW_POWER_CAP).contended()


def test_another_process_that_computes_contends_and_an_idle_one_does_not():
    busy = read(samples=(sample(OURS, 50), sample(OTHER, 40)))
    assert busy.others_share == pytest.approx(0.4)
    assert busy.contended()
    assert not read(samples=(sample(OURS, 50), sample(OTHER, 0))).contended()


def test_the_others_share_is_a_mean_over_the_moments_that_were_sampled():
    samples = (sample(OURS, 10, 1), sample(OTHER, 40, 1), sample(OURS, 90, 2))
    assert read(samples=samples).others_share == pytest.approx(0.2)


def test_process_ids_of_another_namespace_are_not_taken_for_others():
    assert read(samples=(sample(7, 90), sample(8, 5))).others_share is None


def test_each_reading_asks_for_what_came_since_the_last():
    nvml = FakeNvml(samples=(sample(OURS, 10, 5), sample(OTHER, 80, 9)))
    watch = watch_device("gpu:0", nvml=nvml, own=lambda: {OURS})
    watch()
    assert watch().others_share is None
    assert nvml.asked_since == [0, 9]


def test_device_unsupported_query_is_none():
    usage = read(clock=None, celsius=None, reasons=None)
    assert usage == DeviceUsage()
    assert energy_joules("gpu:0", nvml=FakeNvml()) is None


def test_energy_is_in_joules():
    assert energy_joules("gpu:0", nvml=FakeNvml(millijoules=2500)) == 2.5


@pytest.mark.parametrize(
    ("visible", "device", "handle"),
    [
        (None, "gpu:1", "index 1"),
        ("2,3", "gpu:1", "index 3"),
        ("GPU-ab", "gpu:0", "uuid GPU-ab"),
        (None, "gpu:9", None),
        (None, "gpu:H100", None),  # a kind, on another node of a cluster
    ],
)
def test_a_device_is_found_behind_cuda_visible_devices(monkeypatch, visible, device, handle):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvml_handle(FakeNvml(), device) == handle


def test_the_driver_is_among_the_versions():
    assert driver_versions(nvml=FakeNvml()) == {"nvidia-driver": "570.86.10"}


def test_a_cpu_has_no_device_counters():
    assert watch_device("cpu:0", nvml=FakeNvml()) is None
    assert energy_joules("cpu:0", nvml=FakeNvml(millijoules=1)) is None
    assert usage_reader("cpu:0") is read_usage


def test_a_round_on_a_hot_device_is_contended_though_the_host_is_quiet():
    def usage(clock, device=None):
        return Usage(
            clock=clock, busy_seconds=0.0, steal_seconds=0.0, own_seconds=0.0, device=device
        )

    hot = DeviceUsage(slowdowns=("thermal slowdown",))
    assert seen_between(usage(0.0), usage(1.0, hot), 0.0).contended()
    assert not seen_between(usage(0.0), usage(1.0, DeviceUsage()), 0.0).contended()


def test_a_race_keeps_the_extremes_of_its_device():
    usages = [
        DeviceUsage(clock_mhz=1900, celsius=50, others_share=0.0),
        DeviceUsage(clock_mhz=1500, celsius=80, slowdowns=("power brake",)),
    ]
    assert device_contention(usages) == {
        "device_clock_mhz": (1500, 1900),
        "device_celsius": 80,
        "device_slowdowns": ("power brake",),
        "device_others": 0.0,
    }
    assert not Seen(wall_seconds=1, steal_seconds=0, others_seconds=0, device=usages[0]).contended()


def race_on(device, *, cache="warm", device_seconds=1e-4, shape=(1, 8, 8, 3)):
    def time_on_device(names, calls):
        return [
            device_seconds(name) if callable(device_seconds) else device_seconds for name in names
        ]

    answers = {timing.measure_energy: 0.002, trace.time_on_device: time_on_device}
    pool = FakePool(lambda spec, process: answers)
    case = make_case(op="fake", shape=shape, device=device, cache=cache)
    plan = Plan(processes=2, allocations=1, rounds=1)
    race = race_in_one_worker(
        case, [fake_candidate("one"), fake_candidate("two")], baseline="one", plan=plan
    )
    return {m.candidate: m for m in race.run(pool).measurements}, pool.tasks


def test_energy_is_measured_once_for_every_candidate_only_on_a_gpu_and_not_among_cold_calls():
    for device, cache, joules in (
        ("gpu:0", "warm", 0.002),
        ("gpu:0", "cold", None),
        ("cpu:0", "warm", None),
    ):
        found, tasks = race_on(device, cache=cache)
        assert {found["one"].energy_joules, found["two"].energy_joules} == {joules}
        assert found["bandwidth-read"].energy_joules is None
        assert tasks[timing.measure_energy] == (2 if joules else 0)


def test_on_a_gpu_ratios_are_of_the_device_s_own_clock_and_wall_time_stands_beside_it():
    found, tasks = race_on(
        "gpu:0", cache="cold", device_seconds=lambda name: 2e-5 if name == "one" else 1e-5
    )
    one = found["one"]
    assert one.clock == "device" and set(one.samples.seconds) == {2e-5}
    assert set(one.samples.process) == {0, 1} and len(one.samples) == 2 * DEVICE_ROUNDS
    assert set(one.wall_samples.seconds) == {1e-3}
    assert tasks[trace.time_on_device] == 2
    found, tasks = race_on("cpu:0")
    assert found["one"].clock == "wall" and not len(found["one"].wall_samples)
    assert tasks[trace.time_on_device] == 0


def test_candidate_on_the_host_is_compared_by_wall_time():
    found, _ = race_on("gpu:0", device_seconds={"one": 2e-5, "bandwidth-read": 1e-5}.get)
    one, two = found["one"], found["two"]
    assert (one.clock, two.clock) == ("device", "wall")
    assert one.device_seconds == 2e-5 and two.device_seconds is None
    assert (
        common_clock(one.clock, one.clock) == "device"
        and common_clock(one.clock, two.clock) == "wall"
    )
    assert samples_by(one, "wall").seconds == samples_by(two, "wall").seconds
    assert not len(samples_by(two, "device"))


def test_no_wall_time_on_a_gpu_is_evidence_of_a_folded_op(monkeypatch):
    monkeypatch.setattr("poolbench.engine.recorder.input_nbytes", lambda case: 2 << 20)
    probes = {"one": 1e-3, "bandwidth-read": 1e-3, "bandwidth-write": 1e-3, "bandwidth-copy": 1e-3}
    for two, flagged in ((1e-5, True), (1e-3, False), (None, False)):
        seconds = {**probes, "two": two}
        found, _ = race_on("gpu:0", shape=(8, 64, 64, 64), device_seconds=seconds.get)
        assert ("faster-than-limit" in found["two"].flags) is flagged


def test_a_step_that_brings_data_to_the_host_has_no_device_time():
    stream, python = "/device:GPU:0/Stream #13(Compute)/13", "/host:CPU/python/1"

    def event(kind, name, start, end, line=stream):
        return xspace.Event(kind=kind, name=name, line=line, start=start * 10**9, end=end * 10**9)

    events = [
        event("step", "turn 0", 0, 10, python),
        event("kernel", "max", 1, 4),
        event("kernel", "also max", 2, 6),
        event("step", "turn 1", 20, 30, python),
        event("kernel", "MemcpyD2H", 21, 29),
    ]
    assert xspace.device_seconds(events) == {"turn 0": [pytest.approx(5e-3)], "turn 1": [0.0]}


def test_energy_is_of_the_calls_between_two_steps_of_the_counter(monkeypatch):
    now, called = [0.0], [0]

    def time_block(session, name, warmup, calls):
        called[0] += calls
        now[0] += calls * 0.001

    monkeypatch.setattr(timing, "time_block", time_block)
    monkeypatch.setattr(timing, "clock", lambda: now[0])
    session = SimpleNamespace(open=SimpleNamespace(device="gpu:0"))

    def counter(device):  # 0.002 J a call, shown each 0.1 s
        return 0.002 * (int(now[0] / 0.1) * 100)

    assert timing.measure_energy(session, "one", read=counter) == pytest.approx(0.002, rel=0.1)
    assert now[0] < 0.6
    assert (
        timing.measure_energy(session, "one", read=lambda _: 5.0) is None
    )  # a counter that stands still
    assert timing.measure_energy(session, "one", read=lambda _: None) is None


def test_refuse_kinds_of_accelerator_without_a_cluster():
    refuse_kinds(["cpu:0", "gpu:1"])
    with pytest.raises(UsageError, match="gpu:H100 names a kind of accelerator in a Ray cluster"):
        refuse_kinds(["gpu:H100"])


def test_bench_gpu_without_a_driver_stops_with_one_line_and_installs_nothing(tmp_path):
    pytest.importorskip("nox")
    for tool in ("git", "uv"):  # a PATH without nvidia-smi, whatever this machine has
        if found := shutil.which(tool):
            (tmp_path / tool).symlink_to(found)
    done = subprocess.run(
        [sys.executable, "-m", "nox", "-s", "bench-gpu"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path), "NOXENVDIR": str(tmp_path / "envs")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "bench-gpu needs a GPU" in line]
    assert "no NVIDIA driver answers, TensorFlow sees the CPU alone" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "envs").exists()


TWO_DEVICES = """
from poolbench import Op, Sweep, TensorSpec, Tolerance, candidate, register, shape_axis

register(Op(
    name="tripling", reference=lambda case, x: 3 * x, baseline="multiply",
    axes=(shape_axis("shape", (1, 8, 8, 3)),), inputs=lambda case: {"x": TensorSpec(case.shape, case.dtype)},
    tolerance=lambda case: Tolerance(relative=1e-6, absolute=1e-6),
    sweeps={"default": Sweep(base={"mode": "eager"})},
))


@candidate(op="tripling", name="multiply")
def multiply(case):
    def call(x):
        y = x * 3
        here = case.device.upper()
        assert x.device.endswith(here) and y.device.endswith(here), (x.device, y.device, here)
        return y

    return call
"""


@pytest.mark.slow
def test_two_devices_are_raced_and_distinct_in_journal_and_report(tmp_path):
    from poolbench.core.registry import REGISTRY
    from poolbench.report.frame import load

    file = tmp_path / "tripling.py"
    file.write_text(TWO_DEVICES)
    import_file(file)
    cases = [make_case(op="tripling", shape=(1, 8, 8, 3), mode="eager", device=d) for d in DEVICES]
    plan = Plan(processes=1, allocations=2, rounds=2, budget_seconds=0.2)
    options = RunOptions(folder=tmp_path / "run", plan=plan, files=(file,))
    names = list(REGISTRY.of("tripling"))
    with Run(options, progress=lambda _: None) as bench:
        bench.expect(cases)
        for case in cases:
            bench.race(case, names, baseline="multiply")
    run = read_run(tmp_path / "run")
    assert set(run.header.environment.devices) == set(DEVICES)
    measured = [m for m in run.measurements if m.kind == "candidate"]
    assert Counter(m.case.device for m in measured) == dict.fromkeys(DEVICES, 1)
    assert [(m.status, m.reason) for m in measured] == [("ok", "")] * 2
    assert all(len(m.samples) for m in run.measurements)
    table = load(tmp_path / "run").table
    assert sorted(table[table["candidate"] == "multiply"]["device"]) == list(DEVICES)


DEVICES = ("cpu:0", "cpu:1")


def read_device_clock(session: Session, case: Case) -> tuple[str, list[float | None]]:
    open_case(session, case, 0)
    reason = open_contender(session, "multiply", check=False).reason
    return reason, time_on_device(session, ["multiply"], 3)


@pytest.mark.slow
def test_without_a_gpu_in_the_trace_there_is_no_device_clock(tmp_path):
    file = tmp_path / "tripling.py"
    file.write_text(TWO_DEVICES)
    case = make_case(op="tripling", shape=(1, 8, 8, 3), mode="eager")
    worker = Worker(WorkerSpec(), files=[file])
    try:
        assert worker.call(read_device_clock, case, timeout=600) == ("", [None])
    finally:
        worker.close()


def evict_there(device):
    evict = BACKENDS["tensorflow"].make_evict(device, 1 << 20)
    evict()
    evict()
    words = inspect.getclosurevars(evict).nonlocals["words"]
    return words.device, float(words[0]), words.shape[0] * 4


@pytest.mark.slow
def test_cold_caches_are_those_of_the_case_s_own_device():
    worker = Worker(WorkerSpec(logical_devices=2))
    try:
        device, times, nbytes = worker.call(evict_there, "cpu:1", timeout=600)
    finally:
        worker.close()
    assert device.endswith("CPU:1")
    assert (times, nbytes) == (2.0, 1 << 20)
