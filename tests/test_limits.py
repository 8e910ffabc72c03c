"""Limits of cgroups, read from folders that look like a system's."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import make_batch
from poolbench.core.errors import UsageError
from poolbench.core.records import Environment
from poolbench.engine.noise import NoiseLog
from poolbench.engine.run import RunOptions, refuse_different
from poolbench.machine import limits
from poolbench.machine.info import Seen, Usage, read_usage, seen_between, seen_together
from poolbench.machine.limits import Limits, read_limits, throttled_seconds
from poolbench.report.machine_tables import environment_table

MIB = 1 << 20
UNLIMITED = 9223372036854771712


def system(root, cgroup, **files):
    """Write /proc/self/cgroup and files of /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / (name if name.startswith("proc") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_limits_of_version_2_are_the_tightest_of_all_levels(tmp_path):
    root = system(
        tmp_path, "0::/slice/job",
        **{
            "slice/cpu.max": "150000 100000", "slice/memory.max": str(64 * MIB),
            "slice/memory.current": str(60 * MIB), "slice/memory.stat": f"anon 5\ninactive_file {4 * MIB}",
            "slice/job/cpu.max": "max 100000", "slice/job/memory.max": "max",
        },
    )  # fmt: skip
    cgroup = root / "sys/fs/cgroup"
    assert read_limits(root) == Limits(
        cpu_quota=1.5, memory_nbytes=64 * MIB, free_nbytes=8 * MIB,
        throttled=(cgroup / "slice/cpu.stat",),
    )  # fmt: skip


@pytest.mark.parametrize("path", ["/docker/0123", "/../.."], ids=["path-of-the-host", "above"])
def test_limits_inside_a_container_are_those_of_its_top_folder(tmp_path, path):
    files = {"cpu.max": "50000 100000", "memory.max": "1200000000", "memory.current": "200000000"}
    found = read_limits(system(tmp_path, f"0::{path}", **files))
    assert (found.cpu_quota, found.memory_nbytes, found.free_nbytes) == (0.5, 1_200_000_000, 10**9)


@pytest.mark.fault(
    "a CPU quota or a memory limit of a cgroup, version 1 or 2",
    "it is read, stored with the machine, and shown; the tightest of all levels counts",
)
def test_limits_of_version_1_are_read_by_controller(tmp_path):
    root = system(
        tmp_path, "4:cpu,cpuacct:/job\n3:memory:/job\n2:pids:/other\n0::/",
        **{
            "cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": str(12 * MIB),
            "memory/job/memory.usage_in_bytes": str(9 * MIB),
            "memory/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {5 * MIB}",
            "memory/memory.limit_in_bytes": str(UNLIMITED),
        },
    )  # fmt: skip
    assert read_limits(root) == Limits(
        cpu_quota=0.5, memory_nbytes=12 * MIB, free_nbytes=8 * MIB,
        throttled=(root / "sys/fs/cgroup/cpu/job/cpu.stat",),
    )  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu.max": "max 100000", "memory.max": "max"},
        {"cpu.max": "0 0", "memory.max": ""},
        {"cpu/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": str(UNLIMITED)},
    ],
    ids=["no-cgroup", "max", "damaged", "version-1"],
)
def test_limits_without_any_are_none(tmp_path, files):
    assert read_limits(tmp_path) == Limits()
    assert read_limits(system(tmp_path, "2:cpu:/\n1:memory:/\n0::/", **files)) == Limits()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("nr_periods 530\nnr_throttled 514\nthrottled_usec 2500000", 2.5),
        ("nr_periods 530\nnr_throttled 514\nthrottled_time 2500000000", 2.5),
        ("usage_usec 7", None),
    ],
)
def test_throttled_seconds_of_either_version(tmp_path, text, seconds):
    (tmp_path / "cpu.stat").write_text(text)
    file = os.open(tmp_path / "cpu.stat", os.O_RDONLY)
    try:
        assert throttled_seconds([file]) == seconds
    finally:
        os.close(file)
    assert throttled_seconds([file]) is None  # the cgroup has gone


def usage(clock, throttled):
    return Usage(
        clock=clock, busy_seconds=0, steal_seconds=0, own_seconds=0, throttled_seconds=throttled
    )


@pytest.mark.fault(
    "a CPU quota withholds time during a race",
    "the blocks are marked as noisy; the time has a column of its own",
)
def test_throttled_time_is_contention_of_its_own():
    seen = seen_between(usage(0, 1.0), usage(1, 1.5), 0)
    assert (seen.throttled_seconds, seen.steal_seconds, seen.others_seconds) == (0.5, 0, 0)
    assert seen.contended()
    assert not seen_between(usage(0, 1.0), usage(1, 1.01), 0).contended()
    assert seen_between(usage(0, None), usage(1, None), 0).throttled_seconds is None
    calm = Seen(wall_seconds=1, steal_seconds=0, others_seconds=0)
    assert seen_together([seen, calm]).throttled_seconds == 0.5


def test_noise_log_sums_throttled_time_by_wall_time():
    log = NoiseLog()
    assert log.contention().throttled is None
    for throttled in (0.5, 0.1):
        log.enter_blocks(1, seen_between(usage(0, 1.0), usage(1, 1.0 + throttled), 0))
    found = log.contention()
    assert (found.throttled, found.steal, found.others) == (0.3, 0, 0)
    assert found.blocks_marked == 1


def test_noise_log_of_a_system_without_counters_is_unknown(tmp_path):
    assert read_usage(tmp_path / "stat").busy_seconds is None
    start, end = (
        Usage(clock=clock, busy_seconds=None, steal_seconds=None, own_seconds=0.0)
        for clock in (0.0, 1.0)
    )
    log = NoiseLog()
    log.enter_task(make_batch([], switches=4))
    assert not log.enter_blocks(3, seen_between(start, end, 0.0))
    found = log.contention()
    assert (found.steal, found.others, found.involuntary_switches) == (None, None, None)
    assert found.blocks_marked == 0


def test_environment_table_shows_limits_and_says_that_there_is_none():
    def shown(**machine):
        table = environment_table(
            Environment(machine=machine, devices={}, versions={}, settings={}, source={})
        )
        return dict(zip(table["field"], table["value"], strict=True))

    shows = shown(cpu_quota=0.5, memory_limit_nbytes=12 * MIB)
    assert shows["cpu_quota"].startswith("0.5 processors; TensorFlow still starts a thread")
    assert shows["memory_limit_nbytes"] == "12.0 MiB"
    assert set(shown(cpu_quota=None, memory_limit_nbytes=None).values()) == {"none"}
    assert shown(cpu_quota="half") == {"cpu_quota": "half"}  # a journal may hold any text


def test_memory_of_the_machine_is_that_of_its_cgroup_where_less(tmp_path, monkeypatch):
    memory = SimpleNamespace(total=64 * MIB, available=32 * MIB)
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    assert (limits.total_memory_nbytes(), limits.free_memory_nbytes()) == (64 * MIB, 32 * MIB)
    used = {"memory.max": str(16 * MIB), "memory.current": str(4 * MIB)}
    system(tmp_path, "0::/", **used)
    assert (limits.total_memory_nbytes(), limits.free_memory_nbytes()) == (16 * MIB, 12 * MIB)


def test_refuse_different_total_memory_may_vary_a_little():
    def environment(nbytes):
        return Environment(
            machine={"memory_nbytes": nbytes}, devices={}, versions={}, settings={}, source={}
        )

    before, options = environment(8192 * MIB), RunOptions(folder=Path("night"))
    refuse_different(before, environment(8180 * MIB), options)
    for other in (4096 * MIB, None):
        with pytest.raises(UsageError, match="memory_nbytes differ"):
            refuse_different(before, environment(other), options)
