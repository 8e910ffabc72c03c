"""Races of a model's step: plan, records, and (slow) one real race."""

import dataclasses
import math
from types import SimpleNamespace

import msgspec
import numpy as np
import poolbench.ops  # noqa: F401 (registers the ops)
import pytest
from poolbench.core.records import ALL_POOLING, Measurement, Samples
from poolbench.core.registry import REGISTRY
from poolbench.models import steps
from poolbench.models.pools import Pool
from poolbench.models.probe import Form
from poolbench.models.replace import compare
from poolbench.models.results import (
    Described,
    Entry,
    Stepped,
    model_records,
    percentiles,
    scaled,
)
from poolbench.models.steps import ISOLATED, ORIGINAL, isolated_copies, parse_contender
from poolbench.models.study import contenders, run_entry
from poolbench.models.suite import entries_of
from poolbench.models.zoo import Source

DEPTH, GLOBAL = "depth_max_pool", "global_avg_pool"
DEPTH_FORM = Form(op=DEPTH, parameters={"pool_size": 3, "padding": "valid"})
DEPTH_POOL = Pool(
    names=("d",), kind="DepthMaxPool2D", title="depthwise max pooling of 3", given=(8, 4, 4, 12),
    made=(8, 4, 4, 4), form=DEPTH_FORM,
)  # fmt: skip
GLOBAL_POOL = Pool(
    names=("g",), kind="GlobalAveragePooling2D", title="global average pooling", given=(8, 4, 4, 4),
    made=(8, 4), form=Form(op=GLOBAL),
)  # fmt: skip
OTHER_POOL = Pool(
    names=("m",),
    kind="MaxPooling2D",
    title="max pooling of 2x2",
    given=(8, 4, 4, 4),
    made=(8, 2, 2, 4),
)
ENTRY = Entry(name="n", source=Source(kind="textbook"), direction="training", batch=8)


def samples(seconds):
    """One block in each of 3 processes, a little slower each."""
    return Samples(
        process=(0, 1, 2), allocation=(0,) * 3, round=(0,) * 3, calls=(1,) * 3,
        seconds=tuple(seconds * (1 + 0.01 * r) for r in range(3)), contended=(0,) * 3,
    )  # fmt: skip


def described(*pools, **fields):
    return Described(pools=pools, **{"traced": 8} | fields)


def stepped(seconds, *, pools=(DEPTH_POOL, GLOBAL_POOL), status="ok", **fields):
    measured = {
        name: Measurement(
            case=ENTRY.case,
            candidate=name,
            status=status,
            baseline=ORIGINAL,
            samples=samples(value),
        )
        for name, value in seconds.items()
    }
    return Stepped(entry=ENTRY, described=described(*pools), measurements=measured, **fields)


def test_suite_every_entry_names_registered_candidates():
    for sweep in ("default", "quick"):
        for entry in entries_of(sweep):
            for op, names in entry.candidates.items():
                assert set(names) <= set(REGISTRY.of(op)), entry.label


def test_suite_default_holds_three_applications_and_their_heads():
    names = {entry.name for entry in entries_of("default")}
    networks = {"resnet50", "mobilenetv2", "efficientnetb0"}
    assert names == {"textbook", *networks, *(f"{name}-head" for name in networks)}
    assert {e.direction for e in entries_of("default")} == {"forward", "training"}


def test_suite_labels_differ():
    labels = [entry.label for entry in entries_of("default")]
    assert len(set(labels)) == len(labels)


def test_entry_case_has_the_axes_of_a_model():
    assert (ENTRY.case.op, ENTRY.case.model, ENTRY.case.batch) == ("model", "n", 8)


def test_contenders_each_candidate_races_replaced_and_isolated():
    names = [r.name for r in contenders(ENTRY, described(GLOBAL_POOL))]
    assert names[:2] == [ORIGINAL, ISOLATED + ORIGINAL]
    steps = {name for name in names if not name.startswith(ISOLATED)}
    assert {ISOLATED + name for name in steps} == set(names) - steps
    assert f"{GLOBAL}={REGISTRY.ops[GLOBAL].baseline}" in steps


def test_contenders_model_without_pools_races_itself():
    assert [r.name for r in contenders(ENTRY, described())] == [ORIGINAL]


def test_contenders_pool_of_no_op_races_as_it_is():
    assert [r.name for r in contenders(ENTRY, described(OTHER_POOL))] == [
        ORIGINAL,
        ISOLATED + ORIGINAL,
    ]


def test_contenders_stand_ins_leave_isolated_pooling():
    from poolbench.models.config import Unknown

    unknown = (Unknown(name="l", kind="Lambda"),)
    found = contenders(ENTRY, described(GLOBAL_POOL, unknown=unknown))
    assert all(r.name.startswith(ISOLATED) for r in found)


def test_contenders_large_model_replaces_nothing():
    entry = Entry(
        name="n", source=Source(kind="textbook"), direction="forward", batch=1, replaced=False
    )
    names = [r.name for r in contenders(entry, described(GLOBAL_POOL))]
    assert [name for name in names if not name.startswith(ISOLATED)] == [ORIGINAL]


def test_contenders_known_failure_is_asked_of_the_pool():
    entry = Entry(
        name="n", source=Source(kind="textbook"), direction="training", batch=8,
        candidates={DEPTH: ("lambda-max_pool",)},
    )  # fmt: skip
    (step,) = [
        r for r in contenders(entry, described(DEPTH_POOL)) if r.name == f"{DEPTH}=lambda-max_pool"
    ]
    known = [failure for failure in step.failures if failure.when(entry.case)]
    assert any("no gradient over the depth" in failure.reason for failure in known)
    assert not any("evenly" in failure.matches for failure in known)


def test_parse_contender_says_what_is_replaced():
    assert parse_contender(f"{ISOLATED}{DEPTH}=a-b") == {DEPTH: "a-b"}
    assert parse_contender(ORIGINAL) == parse_contender(ISOLATED + ORIGINAL) == {}


def test_share_is_pooling_time_over_step_time():
    copies = isolated_copies((DEPTH_POOL, GLOBAL_POOL))
    raced = stepped({ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.05 * copies})
    assert raced.rough_share() == pytest.approx(0.05)
    low, share, high = raced.share()
    assert share == pytest.approx(0.05)
    assert 0.04 < low < share < high < 0.06


def test_share_without_a_step_that_runs_is_none():
    raced = stepped({ORIGINAL: 1.0, ISOLATED + ORIGINAL: 0.1}, status="unsupported")
    assert raced.share() is None
    assert raced.share("none") is None
    assert raced.rough_share() is None


def test_model_records_original_is_last_and_its_own_baseline():
    step = f"{DEPTH}=keras-stock"
    found = model_records(
        stepped({ORIGINAL: 2.0, ISOLATED + ORIGINAL: 1.0, step: 1.0, ISOLATED + step: 1.0})
    )
    assert [(r.op, r.candidate) for r in found] == [(DEPTH, "keras-stock"), (ALL_POOLING, ORIGINAL)]
    assert found[-1].baseline == ORIGINAL
    assert found[0].figures["throughput_images_per_second"] == pytest.approx(8 / 1.01, rel=1e-3)


@pytest.mark.fault("a resumed run of models", "models that are there are not measured again")
def test_run_entry_of_a_resumed_run_returns_its_records():
    entry = entries_of("quick")[0]
    (record,) = model_records(stepped({ORIGINAL: 2.0, ISOLATED + ORIGINAL: 1.0}))
    axes = {name: getattr(entry, name) for name in ("direction", "mode", "batch")}
    record = msgspec.structs.replace(record, model=entry.name, **axes)
    resumed = SimpleNamespace(
        options=SimpleNamespace(plan=None), networks=[record], worker=lambda *_: None,
        journal=lambda: None,
    )  # fmt: skip
    assert run_entry(entry, resumed) == [record]


def test_percentiles_of_latencies():
    found = percentiles([i / 1000 for i in range(1001)])
    assert found["latency_p50_seconds"] == pytest.approx(0.5)
    assert found["latency_p99.9_seconds"] == pytest.approx(0.999)
    assert found["latency_calls"] == 1001


def test_scaled_samples_keep_their_places():
    found = scaled(samples(2.0), 0.5)
    assert found.seconds[0] == 1.0
    assert found.process == (0, 1, 2)


def test_share_divides_by_the_copies_of_the_batch_that_was_raced():
    """The model is described at a batch of 2, where more copies fit."""
    pool = Pool(names=("p",), kind="x", title="", given=(2, 64, 64, 64), made=(2, 32, 32, 64))
    found = described(pool, traced=2)
    for batch in (2, 8, 32):
        raced = Stepped(
            entry=dataclasses.replace(ENTRY, batch=batch), described=found, measurements={}
        )
        whole = msgspec.structs.replace(pool, given=(batch, *pool.given[1:]))
        assert raced.copies == isolated_copies((whole,))
    assert isolated_copies((pool,)) != isolated_copies((whole,))


def test_isolated_copies_outweigh_a_call_within_memory():
    assert isolated_copies(()) == 0
    assert isolated_copies((DEPTH_POOL,)) == steps.ISOLATED_CALLS
    large = Pool(names=("l",), kind="x", title="", given=(64, 112, 112, 96), made=(64, 96))
    assert isolated_copies((large,)) == 1
    assert isolated_copies((DEPTH_POOL,) * 40) == 1


def test_compare_is_relative_to_the_largest_value():
    a = np.array([1.0, 100.0])
    assert compare([a], [a + np.array([1.0, 0.0])]) == pytest.approx(0.01)
    assert compare([a], [a[:1]]) == math.inf
    assert compare([a], [a * np.nan]) == math.inf


def test_compare_beside_an_infinite_value_other_values_count():
    a = np.array([-np.inf, 1.0])
    assert compare([a], [np.array([-np.inf, 2.0])]) == 1.0
    assert compare([a], [a]) == 0.0


@pytest.mark.slow
def test_head_of_a_network_is_raced_whole():
    from poolbench.core.plan import Plan, WorkerSpec
    from poolbench.engine.pool import WorkerPool
    from poolbench.models.study import race_model

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
    pool = WorkerPool()
    pool.prepare((WorkerSpec(),), 1)
    try:
        raced = race_model(entry, pool, Plan(timeout_seconds=900.0))
    finally:
        pool.close()
    records = model_records(raced)
    assert [record.status for record in records] == ["ok"] * 3
    assert all(record.share is not None and record.share[1] > 0 for record in records)
    assert all(record.figures["latency_calls"] == 100 for record in records)
