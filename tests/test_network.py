"""Races of whole networks: what they plan, what they record, and (slow) one that is run."""

import math

import numpy as np
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from fakes import FakeFleet
from poolbench.core.errors import UsageError
from poolbench.core.records import Measurement, Samples
from poolbench.core.registry import REGISTRY
from poolbench.engine.run import Run, RunOptions
from poolbench.models import study
from poolbench.models.study import (
    ALL_POOLING,
    ALONE,
    AS_BUILT,
    ENTRIES,
    Described,
    Entry,
    Stepped,
    alone_copies,
    contenders,
    entries_of,
    network_records,
    normwise_error,
    output_shape,
    parse_runner,
    percentiles,
    scaled,
)
from poolbench.models.zoo import DEPTH, GLOBAL, Pool, Source, fix_shape, keep_shape
from poolbench.store.journal import read_run

DEPTH_POOL = Pool(
    layer="d", kind="DepthMaxPool2D", op=DEPTH, shape=(8, 4, 4, 12), pool_size=3, padding="valid"
)
GLOBAL_POOL = Pool(layer="g", kind="GlobalAveragePooling2D", op=GLOBAL, shape=(8, 4, 4, 4))
ENTRY = Entry(name="n", source=Source(kind="textbook"), direction="training", batch=8)


def samples(seconds):
    """One block in each of 3 processes, a little slower each."""
    return Samples(
        process=(0, 1, 2), allocation=(0,) * 3, round=(0,) * 3, calls=(1,) * 3,
        seconds=tuple(seconds * (1 + 0.01 * r) for r in range(3)), contended=(0,) * 3,
    )  # fmt: skip


def stepped(seconds, *, pools=(DEPTH_POOL, GLOBAL_POOL), status="ok", **fields):
    case = ENTRY.case((8, 32, 32, 3))
    measured = {
        name: Measurement(
            case=case, candidate=name, status=status, baseline=AS_BUILT, samples=samples(value)
        )
        for name, value in seconds.items()
    }
    described = Described(pools=pools, shapes=((8, 32, 32, 3),), layers=4, macs=1.0)
    return Stepped(entry=ENTRY, case=case, described=described, measurements=measured, **fields)


def test_every_entry_names_a_registered_spelling():
    for sweep in ENTRIES:
        for entry in entries_of(sweep):
            for op, names in entry.candidates.items():
                assert set(names) <= set(REGISTRY.of(op)), entry.label


def test_the_three_applications_and_their_heads_are_in_the_default():
    names = {entry.name for entry in entries_of("default")}
    networks = {"resnet50", "mobilenetv2", "efficientnetb0"}
    assert names == {"textbook", *networks, *(f"{name}-head" for name in networks)}
    assert {e.direction for e in entries_of("default")} == {"forward", "training"}


def test_labels_tell_the_entries_apart():
    labels = [entry.label for entry in entries_of("default")]
    assert len(set(labels)) == len(labels)


def test_each_spelling_races_in_place_and_alone():
    names = [r.name for r in contenders(ENTRY, (GLOBAL_POOL,), ENTRY.case((8, 32, 32, 3)))]
    assert names[:2] == [AS_BUILT, ALONE + AS_BUILT]
    steps = {name for name in names if not name.startswith(ALONE)}
    assert {ALONE + name for name in steps} == set(names) - steps
    assert f"{GLOBAL}={REGISTRY.ops[GLOBAL].baseline}" in steps


def test_a_network_without_pools_races_itself():
    assert [r.name for r in contenders(ENTRY, (), ENTRY.case((8, 32, 32, 3)))] == [AS_BUILT]


def test_a_large_network_places_nothing():
    entry = Entry(
        name="n", source=Source(kind="textbook"), direction="forward", batch=1, in_place=False
    )
    names = [r.name for r in contenders(entry, (GLOBAL_POOL,), entry.case((1, 8, 8, 3)))]
    assert [name for name in names if not name.startswith(ALONE)] == [AS_BUILT]


def test_a_documented_failure_is_asked_of_the_pool_not_of_the_network():
    case = ENTRY.case((8, 32, 32, 3))  # of three channels, which says nothing of the pool
    entry = Entry(
        name="n", source=Source(kind="textbook"), direction="training", batch=8,
        candidates={DEPTH: ("lambda-max_pool",)},
    )  # fmt: skip
    (step,) = [
        r for r in contenders(entry, (DEPTH_POOL,), case) if r.name == f"{DEPTH}=lambda-max_pool"
    ]
    known = [failure for failure in step.failures if failure.when(case)]
    assert any("no gradient over the depth" in failure.reason for failure in known)
    assert not any("evenly" in failure.matches for failure in known)


def test_runner_names_say_what_is_in_place():
    assert parse_runner(f"{ALONE}{DEPTH}=a-b") == {DEPTH: "a-b"}
    assert parse_runner(AS_BUILT) == parse_runner(ALONE + AS_BUILT) == {}


def test_a_share_is_the_pools_time_over_the_steps():
    copies = alone_copies((DEPTH_POOL, GLOBAL_POOL))
    share = stepped({AS_BUILT: 1.0, ALONE + AS_BUILT: 0.05 * copies}).share(
        ALONE + AS_BUILT, AS_BUILT
    )
    assert share == pytest.approx((0.05, 0.05, 0.05))


def test_no_share_without_a_step_that_runs():
    raced = stepped({AS_BUILT: 1.0, ALONE + AS_BUILT: 0.1}, status="unsupported")
    assert raced.share(ALONE + AS_BUILT, AS_BUILT) is None
    assert raced.share("none", AS_BUILT) is None


def test_the_network_as_built_is_recorded_last_as_its_own_baseline():
    step = f"{DEPTH}=keras-stock"
    found = network_records(
        stepped({AS_BUILT: 2.0, ALONE + AS_BUILT: 1.0, step: 1.0, ALONE + step: 1.0})
    )
    assert [(r.op, r.candidate) for r in found] == [(DEPTH, "keras-stock"), (ALL_POOLING, AS_BUILT)]
    assert found[-1].baseline == AS_BUILT
    assert found[0].figures["throughput_images_per_second"] == pytest.approx(8 / 1.01, rel=1e-3)


def test_run_entry_in_a_resumed_run_reads_its_records_back(tmp_path, monkeypatch):
    raced = []

    def race_once(entry, fleet, plan):
        raced.append(entry)
        return stepped({AS_BUILT: 1.0, f"{GLOBAL}=mean-of-means": 0.9})

    monkeypatch.setattr(study, "race_network", race_once)
    found = []
    for resume in (False, True):
        options = RunOptions(folder=tmp_path / "run", resume=resume)
        with Run(options, progress=lambda _: None, pool=FakeFleet()) as run:
            found.append(study.run_entry(ENTRY, run))
    assert len(raced) == 1
    assert found[0] == found[1] == read_run(tmp_path / "run").networks


def test_latencies_are_told_by_percentile():
    found = percentiles([i / 1000 for i in range(1001)])
    assert found["latency_p50_seconds"] == pytest.approx(0.5)
    assert found["latency_p99.9_seconds"] == pytest.approx(0.999)
    assert found["latency_calls"] == 1001


def test_scaled_samples_keep_their_places():
    found = scaled(samples(2.0), 0.5)
    assert found.seconds[0] == 1.0
    assert found.process == (0, 1, 2)


def test_pooling_alone_runs_often_enough_and_within_memory():
    assert alone_copies(()) == 0
    assert alone_copies((DEPTH_POOL,)) == study.ALONE_CALLS
    large = Pool(layer="l", kind="x", op=GLOBAL, shape=(64, 112, 112, 96))
    assert alone_copies((large,)) == 1
    assert alone_copies((DEPTH_POOL,) * 40) == 1


def test_outputs_are_shaped_as_the_layers():
    assert output_shape(DEPTH_POOL) == (8, 4, 4, 4)
    assert output_shape(GLOBAL_POOL) == (8, 4)
    kept = Pool(layer="k", kind="x", op=GLOBAL, shape=(8, 4, 4, 5), keepdims=True)
    assert output_shape(kept) == keep_shape(kept) == (8, 1, 1, 5)


def test_an_error_is_told_against_the_largest_value():
    a = np.array([1.0, 100.0])
    assert normwise_error(a + np.array([1.0, 0.0]), a) == pytest.approx(0.01)
    assert normwise_error(a, a[:1]) == math.inf
    assert normwise_error(a * np.nan, a) == math.inf


def test_open_sizes_are_taken_from_the_option():
    assert fix_shape((None, None, None, 3), 4, (8, 9, 3)) == (4, 8, 9, 3)
    assert fix_shape((None, 8, 8, 3), 4, None) == (4, 8, 8, 3)
    with pytest.raises(UsageError, match="--input 224x224x3"):
        fix_shape((None, None, None, 3), 4, None)
    with pytest.raises(UsageError, match="does not fit"):
        fix_shape((None, 8, 8, 3), 4, (9, 9, 3))


@pytest.mark.slow
def test_a_head_is_raced_whole():
    from poolbench.engine.race import Plan
    from poolbench.models.advise import _Fleet

    entry = Entry(
        name="mobilenetv2-head",
        source=Source(kind="head", name="mobilenetv2", image=(96, 96, 3)),
        direction="training",
        batch=4,
        processes=2,
        budget_seconds=1.0,
        latency_calls=100,
        candidates={GLOBAL: ("layer-global_avg_pool", "avg_pool2d")},
    )
    fleet = _Fleet()
    try:
        raced = study.race_network(entry, fleet, Plan(timeout_seconds=180.0))
    finally:
        fleet.close()
    records = network_records(raced)
    assert [record.status for record in records] == ["ok"] * 3
    assert all(record.share is not None and record.share[1] > 0 for record in records)
    assert all(record.figures["latency_calls"] == 100 for record in records)
