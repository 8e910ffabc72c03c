"""A Ray cluster of three nodes on this machine; the nodes are real, their processors are not.

The first part needs no cluster: what a node offers, and which nodes may share a device.
"""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from poolbench.core.case import make_case
from poolbench.core.errors import UsageError
from poolbench.core.plan import Plan
from poolbench.core.records import Environment, Node
from poolbench.core.registry import REGISTRY, import_file
from poolbench.engine.ray_cluster import RayScheduler
from poolbench.engine.ray_nodes import Host, Kinds, Offer, local_device, read_offer, ship, unlike
from poolbench.engine.run import Run, RunOptions
from poolbench.store.journal import read_run

FILE = Path(__file__).with_name("doubling.py")
PLAN = Plan(processes=1, allocations=2, rounds=2, budget_seconds=0.2)
MACHINE = Environment(
    machine={"processor": "one", "memory_nbytes": 64_000_000_000},
    devices={"cpu:0": "CPU"},
    versions={"numpy": "2"},
    settings={},
    source={},
)


def host(name, environment=MACHINE, **offer):
    found = Host(name, Offer(processors=4.0, **offer), name=name)
    found.environment = environment
    return found


def changed(environment=MACHINE, **machine):
    return msgspec.structs.replace(environment, machine=environment.machine | machine)


@pytest.mark.parametrize(
    ("device", "served"),
    [("cpu:0", True), ("gpu:0", True), ("gpu:1", False), ("gpu:H100", True), ("gpu:A100", False)],
)
def test_a_node_serves_the_devices_that_ray_says_it_has(device, served):
    resources = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 1.0, "memory": 1e9, "node:a": 1.0}
    assert read_offer(resources).serves(device) is served


def test_a_node_without_accelerator_serves_the_cpu_alone():
    offer = read_offer({"CPU": 4.0, "memory": 1e9})
    assert offer.serves("cpu:0")
    assert not offer.serves("gpu:0")


def test_a_kind_of_accelerator_is_number_zero_on_its_node():
    assert [local_device(name) for name in ("gpu:H100", "gpu:1", "cpu:0")] == [
        "gpu:0",
        "gpu:1",
        "cpu:0",
    ]


def test_nodes_are_alike_but_for_a_few_pages_of_memory():
    assert unlike(MACHINE, changed(memory_nbytes=64_000_100_000)) == []
    assert unlike(MACHINE, changed(memory_nbytes=32_000_000_000)) == ["memory_nbytes"]
    assert unlike(MACHINE, changed(processor="another")) == ["processor"]


def test_a_device_is_measured_by_the_kind_that_most_nodes_are_of():
    kinds = Kinds()
    other = changed(processor="another")
    kinds.choose("cpu:0", [host("node-1", other), host("node-2"), host("node-3")])
    assert kinds.takes("cpu:0", MACHINE)
    assert not kinds.takes("cpu:0", other)


def test_the_cpu_is_measured_where_no_accelerator_is_if_it_can_be():
    kinds = Kinds()
    other = changed(processor="another")
    gpus = [host(f"node-{i}", other, accelerators=1.0, kinds=("h100",)) for i in (1, 2)]
    kinds.choose("cpu:0", [*gpus, host("node-3")])
    kinds.choose("gpu:H100", [*gpus, host("node-3")])
    assert kinds.takes("cpu:0", MACHINE)
    assert kinds.takes("gpu:H100", other)


def test_the_user_s_files_travel_with_those_beside_them(tmp_path):
    home, target = tmp_path / "home", tmp_path / "target"
    home.mkdir()
    target.mkdir()
    (home / "mine.py").write_text("import helper")
    (home / "helper.py").write_text("")
    (home / "secret.txt").write_text("")
    assert ship([home / "mine.py"], target) == ("files0/mine.py",)
    assert sorted(path.name for path in target.rglob("*.*")) == ["helper.py", "mine.py"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "a:99999"])
def test_an_address_where_no_cluster_answers_is_a_usage_error_of_one_line(address):
    pytest.importorskip("ray")
    with pytest.raises(UsageError) as caught:
        RayScheduler(address)
    assert "--ray-address" in str(caught.value)
    assert "\n" not in str(caught.value)


# From here on, a cluster.

NODE = {"object_store_memory": 80 << 20}
ALIKE = NODE | {"num_cpus": 4}
OTHER = NODE | {
    "num_cpus": 2,
    "num_gpus": 1,
    "resources": {"accelerator_type:H100": 1},
    "env_vars": {"TF_ENABLE_ONEDNN_OPTS": "0"},
}


@pytest.fixture(scope="module")
def nodes():
    """The cluster and its three racing nodes: two alike, and one with an accelerator and a setting."""
    pytest.importorskip("ray")
    import_file(FILE)
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args=NODE
        | {
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": {
                "health_check_initial_delay_ms": 500,
                "health_check_period_ms": 500,
                "health_check_failure_threshold": 3,
            },
        },
    )
    racing = [found.add_node(**ALIKE), found.add_node(**ALIKE), found.add_node(**OTHER)]
    yield found, racing
    found.shutdown()


def make_cases(devices=("cpu:0", "gpu:H100"), channels=(3, 4)):
    return [
        make_case(op="doubling", shape=(1, 8, 8, c), device=device)
        for device in devices
        for c in channels
    ]


def race_all(folder, cases, cluster=None, *, plan=PLAN, resume=False):
    # The checkout may change while these tests run: that is not what they are about.
    allowed = ("code", "commit", "dirty") if resume else ()
    options = RunOptions(
        folder=folder, plan=plan, files=(FILE,), resume=resume, allow_different=allowed
    )
    entries = list(REGISTRY.of("doubling"))
    with Run(options, remote=cluster, progress=lambda _: None) as bench:
        for case in cases if cluster else ():
            bench.ahead(case, entries, baseline="add")
        for case in cases:
            bench.race(case, entries, baseline="add")
    return read_run(folder)


def what_was_measured(run):
    return {(m.case, m.candidate, m.status, len(m.samples) > 0) for m in run.measurements}


def pairs(run):
    return Counter((m.case, m.candidate) for m in run.measurements)


@pytest.mark.slow
def test_cluster_measures_the_set_of_one_machine_and_names_its_nodes(nodes, tmp_path):
    found, _ = nodes
    cases = make_cases()
    local = race_all(tmp_path / "local", cases)
    cluster = RayScheduler(found.address, files=[FILE])
    away = race_all(tmp_path / "away", cases, cluster)
    assert what_was_measured(away) == what_was_measured(local)
    assert set(pairs(away).values()) == {1}

    environments = {node.name: node.environment for node in away.of(Node)}
    by_device = {
        device: {m.node for m in away.measurements if m.case.device == device}
        for device in ("cpu:0", "gpu:H100")
    }
    assert by_device["cpu:0"].isdisjoint(by_device["gpu:H100"])
    for names in by_device.values():
        first, *rest = [environments[name] for name in names]
        assert all(unlike(first, other) == [] for other in rest)
    (cpu, *_), (gpu,) = by_device["cpu:0"], by_device["gpu:H100"]
    assert "TF_ENABLE_ONEDNN_OPTS" in unlike(environments[cpu], environments[gpu])
    for case in cases:
        assert len({m.node for m in away.measurements if m.case == case}) == 1


@pytest.mark.slow
def test_a_node_that_dies_costs_its_race_alone_and_may_come_back(nodes, tmp_path):
    found, racing = nodes
    cases = make_cases(devices=("cpu:0",), channels=range(1, 7))
    cluster = RayScheduler(found.address, files=[FILE])
    journal = tmp_path / "run" / "journal.jsonl"
    next_done = cluster.next_done
    seen = {}

    def kill_and_bring_back():
        if len(seen) == 2:  # one race is kept: end the node that has begun the next
            seen["before"] = journal.read_bytes()
            cluster._assign()
            victim = next(node for node in racing[:2] if node.node_id == seen["node"])
            assert cluster._hosts[victim.node_id].job is not None
            found.remove_node(victim, allow_graceful=False)
            racing.remove(victim)
        elif len(seen) == 5:  # two races later it is back
            racing.insert(0, found.add_node(**ALIKE))
        done = next_done()
        if "node" not in seen:
            seen["node"] = next(h.id for h in cluster._hosts.values() if h.name == done.node.name)
        seen[done.spec.case] = done
        return done

    cluster.next_done = kill_and_bring_back
    # Long races: the node must die in the middle of one, not just after its end.
    plan = replace(PLAN, rounds=4, budget_seconds=4.0, block_seconds=0.1)
    run = race_all(tmp_path / "run", cases, cluster, plan=plan)
    assert journal.read_bytes().startswith(seen["before"])
    assert sum(cluster._attempts.values()) == 1
    assert set(pairs(run).values()) == {1}
    assert {m.case for m in run.measurements} == set(cases)
    assert {m.status for m in run.measurements if m.candidate == "add"} == {"ok"}


@pytest.mark.slow
def test_a_run_goes_on_only_on_the_kind_of_node_that_it_began_on(nodes, tmp_path):
    found, _ = nodes
    first, second = make_cases(devices=("cpu:0",))
    run = race_all(tmp_path / "run", [first], RayScheduler(found.address, files=[FILE]))
    cluster = RayScheduler(found.address, files=[FILE], patience_seconds=3.0)
    elsewhere = [
        msgspec.structs.replace(r, environment=changed(r.environment, processor="another"))
        if isinstance(r, Node)
        else r
        for r in run.records
    ]
    adopt = cluster.adopt
    cluster.adopt = lambda run: adopt(replace(run, records=tuple(elsewhere)))
    gone_on = race_all(tmp_path / "run", [first, second], cluster, resume=True)
    assert set(pairs(gone_on).values()) == {1}
    refused = [m for m in gone_on.measurements if m.case == second]
    assert {m.status for m in refused} == {"not_run"}
    assert "of another kind than those before: processor differ" in refused[0].reason


@pytest.mark.slow
def test_a_device_that_no_node_has_is_not_run_and_says_what_there_is(nodes, tmp_path):
    found, _ = nodes
    cluster = RayScheduler(found.address, files=[FILE], patience_seconds=2.0)
    run = race_all(tmp_path / "run", make_cases(devices=("gpu:A100",), channels=(3,)), cluster)
    assert {m.status for m in run.measurements} == {"not_run"}
    assert run.measurements[0].reason == (
        "no node of the cluster has gpu:A100; 3 nodes offer cpu, gpu:h100"
    )


@pytest.mark.slow
def test_plugin_ray_address_runs_on_the_cluster(nodes, tmp_path):
    found, _ = nodes
    suite = tmp_path / "test_doubling.py"
    suite.write_text(
        FILE.read_text()
        + "\nimport pytest\n\n@pytest.mark.poolbench(op='doubling')\ndef test_doubling(poolbench):\n    poolbench.replay()\n"
    )
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "poolbench.pytest_plugin",
                str(suite),
                "-q",
                "--poolbench-ray-address",
                found.address,
            ),
            *("--poolbench-axis", "device=gpu:H100,cpu", "--poolbench-sweep", "quick"),
            *("--poolbench-budget", "0.2", "--poolbench-run", "r"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    # `add` on the processor; the accelerator has a name only, so that its three are not run.
    assert "2 failed, 1 passed, 3 skipped" in done.stdout, done.stdout + done.stderr
    run = read_run(tmp_path / "results" / "r")
    assert {m.case.device for m in run.measurements} == {"gpu:H100", "cpu:0"}
    assert {m.node for m in run.measurements} <= {node.name for node in run.of(Node)}
