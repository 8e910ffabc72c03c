"""Predictions before a run starts: its duration and its resolution."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import synthetic
from poolbench.core.plan import Plan
from poolbench.core.records import Samples
from poolbench.stats import estimate, planning
from poolbench.store.journal import read_run

CASE = synthetic.op_case("depth_max_pool")


def samples(values):
    """Values (process, allocation, round) as a contender's samples."""
    places = list(np.ndindex(values.shape))
    process, allocation, round_ = zip(*places, strict=True)
    return Samples(
        process=process, allocation=allocation, round=round_, calls=(1,) * len(places),
        seconds=tuple(values.ravel().tolist()), contended=(0,) * len(places),
    )  # fmt: skip


@pytest.mark.parametrize(
    "levels", [(0.0, 0.0, 0.1), (0.05, 0.0, 0.1), (0.0, 0.2, 0.1), (0.1, 0.1, 0.3)]
)
def test_the_components_are_those_that_were_put_in(levels):
    rng = np.random.default_rng(5)
    process, allocation, round_ = (
        scale * rng.standard_normal(shape)
        for scale, shape in zip(levels, [(60, 1, 1), (60, 8, 1), (60, 8, 9)], strict=True)
    )
    found = planning.components(
        samples(np.exp(process + allocation + round_)), samples(np.ones((60, 8, 9)))
    )
    assert (found.process, found.allocation, found.round) == pytest.approx(levels, abs=0.025)
    assert found.rounds == 9


def test_training_with_xla_is_predicted_to_open_for_longest():
    def seconds(**axes):
        case = synthetic.op_case("depth_max_pool", **axes)
        return planning.predict_seconds({case: ("a", "b")}, Plan())

    found = [
        seconds(direction=d, mode=m) for d in ("forward", "training") for m in ("graph", "xla")
    ]
    assert found == sorted(found) and found[0] < found[-1]
    assert found[0] > Plan().budget_seconds


def test_a_level_that_was_not_repeated_has_no_component():
    once = samples(np.ones((1, 4, 4)))
    assert planning.components(once, once) is None


@pytest.fixture
def results(tmp_path, monkeypatch):
    head = synthetic.header()
    head = msgspec.structs.replace(head, options=head.options | {"budget_seconds": 7.0})
    synthetic.write(tmp_path / "before", synthetic.race(CASE, np.random.default_rng(1)), head)
    monkeypatch.setattr(planning, "machine_facts", lambda: head.environment.machine)
    return tmp_path


def test_resolution_text_uses_newest_run_of_this_machine(results):
    assert "reckoned from before" in planning.resolution_text(results, Plan())


def test_resolution_predicted_width_equals_that_of_the_run(results):
    run = read_run(results / "before")
    timed = {m.candidate: m for m in run.measurements}
    widths = [
        estimate.estimate(m.samples, timed[m.baseline].samples).half_width
        for m in timed.values() if m.kind == "candidate" and m.candidate != m.baseline
    ]  # fmt: skip
    plan = Plan(allocations=planning.allocations_of(run.measurements[0]))
    assert planning.resolution_of(run, plan) == pytest.approx(np.median(widths), rel=0.5)
    assert planning.resolution_of(run, replace(plan, processes=20)) < planning.resolution_of(
        run, plan
    )


def test_resolution_text_other_machine_or_no_run_is_unknown(results, monkeypatch):
    monkeypatch.setattr(planning, "machine_facts", lambda: {"processor": "another"})
    assert "not known" in planning.resolution_text(results, Plan())
    assert "not known" in planning.resolution_text(results / "before" / "nothing", Plan())


def test_resolution_text_unreadable_run_is_skipped(results):
    broken = results / "newer" / "journal.jsonl"
    broken.parent.mkdir()
    broken.write_text("no journal")
    assert "reckoned from before" in planning.resolution_text(results, Plan())
