"""The report uses the device's clock on a GPU, and wall time if there is no other."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import synthetic
from poolbench.core.records import Measurement
from poolbench.report import machine_tables, tables
from poolbench.report.compare import compare_runs
from poolbench.report.figures.files import clock_note
from poolbench.report.frame import lay_out
from poolbench.report.recommend import answer
from poolbench.store.journal import StoredRun, read_run

CASE = synthetic.op_case("depth_max_pool", mode="graph", device="gpu:0")
PINNED = "slices-maximum"
LAUNCH = 300e-6


def by_device(m, *, slowed=1.0, pinned=(PINNED,)):
    """The measurement as a GPU gives it: its own time in `samples`, launching in `wall_samples`."""
    if m.status != "ok" or m.candidate in pinned:
        return m
    wall = tuple(LAUNCH + seconds / 100 for seconds in m.samples.seconds)
    own = tuple(slowed * seconds / 100 for seconds in m.samples.seconds)
    return msgspec.structs.replace(
        m,
        clock="device",
        samples=msgspec.structs.replace(m.samples, seconds=own),
        wall_samples=msgspec.structs.replace(m.samples, seconds=wall),
        device_seconds=float(np.median(own)),
        energy_joules=0.1,
    )


def run_of(folder, slowed=None):
    found = synthetic.race(CASE, np.random.default_rng(1))
    records = [by_device(m, slowed=(slowed or {}).get(m.candidate, 1.0)) for m in found]
    head = synthetic.header(devices={"cpu:0": "CPU", "gpu:0": "Synthetic GPU"})
    return synthetic.write(folder, records, head)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return lay_out(read_run(run_of(tmp_path_factory.mktemp("clocks") / "gpu")))


def row(loaded, name):
    return loaded.table.set_index("candidate").loc[name]


def test_ratios_and_shares_of_the_bandwidth_limit_are_of_the_device(loaded):
    layer = row(loaded, "layer-depth_max_pool")
    assert layer["clock"] == "device"
    assert layer["ratio"] == pytest.approx(2.1 / 3.1, rel=0.1)
    assert layer["verdict"] == "FASTER"
    assert layer["wall_seconds"] == pytest.approx(LAUNCH, rel=0.5)
    assert layer["seconds"] < layer["wall_seconds"]
    assert 0.3 < layer["efficiency"] < 0.7


def test_candidate_without_device_time_is_compared_by_wall_time(loaded):
    pinned, baseline = row(loaded, PINNED), row(loaded, "reshape-reduce_max")
    assert pinned["clock"] == "wall"
    assert pinned["ratio"] == pytest.approx(pinned["seconds"] / baseline["wall_seconds"], rel=0.1)
    assert np.isnan(pinned["efficiency"])  # a probe's wall time is launching


def test_the_best_are_chosen_among_those_of_the_device_s_clock(loaded):
    (choice,) = answer(loaded).choices
    assert PINNED not in choice.best
    text = " ".join(tables.sentences(loaded, choice))
    assert "by the device's clock (" in text and "from Python)" in text


def test_the_only_one_of_the_device_s_clock_is_not_the_only_right_one():
    found = synthetic.race(CASE, np.random.default_rng(1))
    right = [m.candidate for m in found if m.status == "ok" and m.kind == "candidate"]
    records = tuple(by_device(m, pinned=right[1:]) for m in found)
    run = StoredRun(path=Path("gpu"), header=synthetic.header(), records=records)
    answers = answer(lay_out(run))
    (choice,) = answers.choices
    assert choice.best == (right[0],) and not choice.alone
    (profile,) = answers.profiles.values()
    assert not set(profile) & set(right[1:]), "timed by another clock is neither slow nor failed"


def test_the_page_says_which_clock(loaded):
    note = clock_note(loaded, "depth_max_pool", "gpu:0")
    assert note.startswith("Times are by the device's own clock")
    assert note.endswith(f"By the wall's clock: graph {PINNED}.")
    cpu = lay_out(
        dataclasses.replace(
            loaded.run,
            records=tuple(
                msgspec.structs.replace(r, clock="wall", wall_samples=type(r.samples)())
                if isinstance(r, Measurement)
                else r
                for r in loaded.run.records
            ),
        )
    )
    assert clock_note(cpu, "depth_max_pool", "gpu:0") == ""


def test_the_device_s_table_has_both_times_and_the_energy(loaded):
    table = machine_tables.device_table(loaded).set_index("candidate")
    assert table.loc["layer-depth_max_pool", "energy a call"] == "100 mJ"
    assert table.loc["layer-depth_max_pool", "on the device"] != ""
    assert table.loc[PINNED, "on the device"] == ""
    assert all(table["called"] != "")


def test_two_runs_are_compared_by_the_device_s_clock(tmp_path):
    base = read_run(run_of(tmp_path / "base"))
    same = read_run(run_of(tmp_path / "same"))
    slow = read_run(run_of(tmp_path / "slow", {"layer-depth_max_pool": 1.25}))
    assert not compare_runs(base, same).slower
    (slower,) = compare_runs(base, slow).slower
    assert "layer-depth_max_pool" in slower


def test_time_on_a_gpu_names_its_clock(loaded):
    assert tables.time_text(row_at(loaded, PINNED)).startswith("called: ")
    assert " (called: " in tables.time_text(row_at(loaded, "layer-depth_max_pool"))
    assert tables.time_text({**row_at(loaded, PINNED), "device": "cpu:0"})[0].isdigit()


def row_at(loaded, name):
    return loaded.row(loaded.table["candidate"].tolist().index(name))
