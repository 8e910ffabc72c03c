"""The acceptance checks and the comparison with other tools."""

import math
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
from acceptance import checks, criteria, loops, measurements, tool_comparison, tools
from poolbench.core.errors import UsageError
from poolbench.core.records import Contention, Environment, TimeBreakdown
from poolbench.engine import aa
from poolbench.engine.rounds import block_calls
from poolbench.store.journal import JOURNAL, encode_line
from poolbench.worker import contender, messages
from synthetic_races import CALM, measured, race_of, samples


def quiet_races():
    scale = measurements.SCALES["full"]
    return [
        *(race_of(measurements.RACE, seed) for seed in range(scale.races)),
        *(race_of(measurements.TEN, seed) for seed in range(scale.tens)),
    ]


def test_criteria_quiet_machine_pass():
    races = quiet_races()
    assert len(aa.of_injected(races, 0.0)) >= 300
    for found in (
        criteria.check_alarms(races),
        criteria.check_undecided(races),
        criteria.check_power(races, 0.10, 0.05, 0.95),
        criteria.check_equal([race_of(measurements.TEN, seed) for seed in range(20)]),
    ):
        assert found.passed, found.text


def test_criteria_noisy_machine_fail():
    races = [race_of(measurements.RACE, seed, noise=0.5) for seed in range(5)]
    assert not criteria.check_undecided(races).passed
    assert not criteria.check_power(races, 0.10, 0.05, 0.95).passed


def test_check_pairs_short_time_limit_fails():
    races = [race_of(measurements.PAIR, seed) for seed in range(20)]
    assert criteria.check_pairs(races, 10.0).passed
    assert not criteria.check_pairs(races, 1.0).passed


@pytest.mark.parametrize(("late", "passes"), [(2, True), (3, False)])
def test_check_pairs_late_pair_counts_as_missed(late, passes):
    times = [11.0] * late + [9.0] * (20 - late)
    races = [race_of(measurements.PAIR, seed, seconds=s) for seed, s in enumerate(times)]
    found = criteria.check_pairs(races, 10.0)
    assert found.figures["slower"] == 20
    assert found.figures["in_time"] == 20 - late
    assert found.passed is passes


def test_check_equal_sole_winner_fails():
    race = race_of(measurements.RACE)
    generator = np.random.default_rng(1)
    faster = {**race.equal, "copy-1": samples(0.8, generator)}
    wrong = aa.CopiesRace(
        compared=race.compared, equal=faster, contention=CALM, blocks=1, seconds=1.0
    )
    assert not criteria.check_equal([wrong]).passed


def test_criteria_no_measurements_fail():
    assert not criteria.at_most(1.0, 0, 0)
    assert not criteria.check_widths([], 0.08, None).passed


def run_of(ratio, seed, noise=0.002):
    generator = np.random.default_rng(seed)
    found = [measured(aa.BASELINE, 1.0, generator, noise=noise)]
    found += [
        measured(f"copy-{n}", ratio, generator, noise=noise, kind="candidate") for n in range(1, 9)
    ]
    return measurements.compare_measurements(found)


def test_check_runs_opposite_verdicts_fail():
    agreeing = criteria.check_runs([run_of(0.8, seed) for seed in range(3)])
    assert agreeing.passed
    assert len(agreeing.figures["covered"]) == 2
    turned = criteria.check_runs([run_of(0.8, 0), run_of(1.3, 1)])
    assert not turned.passed
    assert turned.figures["turned"] == 8


@pytest.fixture(scope="module")
def stored_runs(tmp_path_factory):
    """Measurements over three synthetic runs of one code, stored."""
    results = tmp_path_factory.mktemp("results")
    cases = [
        synthetic.op_case(op, mode=mode) for op in synthetic.FACTORS for mode in ("graph", "xla")
    ]
    for seed in range(3):
        folder = results / f"run-{seed}"
        folder.mkdir()
        found = synthetic.records(seed, cases=cases, with_extras=False)
        end = TimeBreakdown(seconds={"samples": 1.0}, wall_seconds=1.0)
        lines = [synthetic.header(folder.name), *found, end]
        (folder / JOURNAL).write_bytes(b"".join(map(encode_line, lines)))
    return measurements.Measurements(
        measurements.SCALES["quick"],
        default_runs=[str(results / f"run-{seed}") for seed in (2, 1, 0)],
        progress=lambda _: None,
    )


def test_stored_runs_of_one_code_agree_and_none_is_slower(stored_runs):
    agreed = criteria.check_agreements(stored_runs.agreements)
    assert agreed.passed and len(agreed.figures["inside"]) == 2
    assert agreed.figures["comparisons"] == [18, 18]
    assert criteria.check_falsely_slower(stored_runs.falsely_slower).passed


def test_slow_down_multiplies_one_candidate_and_compare_names_it(stored_runs):
    before, after = stored_runs.stored_runs[:2]
    op, name = "depth_max_pool", "transpose-reduce_max"
    other = measurements.slow_down(after, op, name, 1.25)
    for old, new in zip(after.measurements, other.measurements, strict=True):
        factor = 1.25 if (old.case.op, old.candidate) == (op, name) else 1.0
        assert new.samples.seconds == pytest.approx([factor * s for s in old.samples.seconds])
    assert measurements.slower_between(before, other, Path("none")) == {(op, name)}


def test_criteria_of_stored_runs_fail_beyond_their_bounds(stored_runs):
    assert not criteria.check_falsely_slower([0] * 19 + [2]).passed
    assert criteria.check_falsely_slower([0] * 19 + [1]).passed
    assert not criteria.check_falsely_slower([0] * 18 + [1]).passed
    trials = {f"trial {n}": n >= 2 for n in range(40)}
    assert criteria.check_slowed_found(trials).passed
    lost = criteria.check_slowed_found(trials | {"trial 7": False})
    assert not lost.passed and "trial 7" in lost.figures["missed"]
    one, *_ = stored_runs.agreements
    assert not criteria.check_agreements([replace(one, reversed=1)]).passed


def test_compare_measurements_incomplete_ones_are_left_out():
    generator = np.random.default_rng(0)
    found = measurements.compare_measurements(
        [
            measured(aa.BASELINE, 1.0, generator),
            measured("bandwidth-read", 1.0, generator, kind="probe"),
            measured("copy-1", 1.0, generator, status="wrong"),
            measured("copy-2", 20.0, generator, stopped_early=True),
            measured("copy-3", 1.0, generator),
        ]
    )
    assert [name for _, name in found] == ["copy-3"]


@pytest.mark.parametrize(
    ("seconds", "passes"),
    [
        ({"start": 20.0, "samples": 25.0, "warmup": 25.0, "other": 5.0}, True),
        ({"start": 20.0, "samples": 20.0, "warmup": 20.0, "other": 5.0}, False),
        ({"start": 20.0, "samples": 25.0, "warmup": 25.0, "other": 15.0}, False),
    ],
)
def test_check_shares_start_of_workers_is_excluded(seconds, passes):
    assert (
        criteria.check_shares(TimeBreakdown(seconds=seconds, wall_seconds=120.0)).passed is passes
    )


@pytest.mark.parametrize(("ratios", "passes"), [((1.01, 0.97), True), ((1.0, 1.06), False)])
def test_check_bias_one_turn_off_fails(ratios, passes):
    assert criteria.check_bias(ratios).passed is passes


@pytest.mark.parametrize(("ratios", "passes"), [((0.9, 1.1), True), ((0.9, 1.0), False)])
def test_check_sleep_slower_without_idle_states_fails(ratios, passes):
    assert criteria.check_sleep(ratios).passed is passes


def test_check_widths_wide_intervals_fail():
    found = list(run_of(0.8, 0).values())
    assert criteria.check_widths(found, 0.08, 0.0).passed
    assert not criteria.check_widths(found, 1e-6, None).passed


def test_check_contention_unnoticed_load_fails():
    busy = Contention(
        steal=0.0, others=0.4, blocks_marked=400, blocks_redone=10, involuntary_switches=1
    )
    assert criteria.check_contention([race_of(measurements.RACE, contention=busy)]).passed
    assert not criteria.check_contention([race_of(measurements.RACE)]).passed


def test_check_time_more_than_three_times_fails():
    races = {s: [race_of(measurements.PAIR, seconds=s)] for s in (1.0, 2.9, 3.1)}
    assert criteria.check_time(races[1.0], races[2.9]).passed
    assert not criteria.check_time(races[1.0], races[3.1]).passed


def test_pick_name_or_prefix_selects_checks():
    assert checks.pick(["slower-1"]) == ["slower-1"]
    assert checks.pick(["aa"]) == ["aa-alarms", "aa-undecided"]
    assert checks.pick([]) == list(checks.CHECKS)
    with pytest.raises(UsageError, match="nonsense"):
        checks.pick(["nonsense"])


def test_run_check_missing_run_fails_with_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    gathered = measurements.Measurements(
        measurements.SCALES["quick"], default_runs=[], progress=lambda _: None
    )
    entry = checks.run_check("default-shares", gathered, {})
    assert not entry.passed
    assert "nox -s bench-cpu" in entry.found


def test_run_check_single_default_run_fails_with_reason():
    gathered = measurements.Measurements(
        measurements.SCALES["quick"], default_runs=["one"], progress=lambda _: None
    )
    entry = checks.run_check("default-again", gathered, {})
    assert not entry.passed
    assert "one is the only default run" in entry.found


def result_of(name, passed=True):
    return checks.CheckResult(
        name=name, requirement="r", found="f", passed=passed, seconds=1.0, created="now", source={}
    )


def environment_of(processor):
    machine = {"processor": processor}
    return Environment(machine=machine, devices={}, versions={}, settings={}, source={})


def test_merge_single_check_replaces_its_own_result_only():
    old = checks.Acceptance(
        environment=environment_of("a"), checks=(result_of("aa-alarms"), result_of("ten-equal"))
    )
    new = checks.Acceptance(
        environment=environment_of("a"), checks=(result_of("ten-equal", passed=False),)
    )
    merged = checks.merge(old, new)
    assert [(e.name, e.passed) for e in merged.checks] == [
        ("aa-alarms", True),
        ("ten-equal", False),
    ]
    elsewhere = checks.Acceptance(environment=environment_of("b"), checks=new.checks)
    assert [e.name for e in checks.merge(old, elsewhere).checks] == ["ten-equal"]


def test_store_result_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "acceptance.json"
    monkeypatch.setattr(checks, "STORED", path)
    assert checks.read_stored(path) is None
    whole = checks.Acceptance(environment=environment_of("a"), checks=(result_of("aa-alarms"),))
    checks.store(whole)
    assert checks.read_stored(path) == whole


def test_main_bad_option_prints_one_line(capsys):
    assert checks.main(["--only", "nonsense"]) == 2
    assert tool_comparison.main(["--tool", "nonsense"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("nonsense" in line for line in lines)
    assert tool_comparison.main(["--invocations", "1"]) == 2
    assert "whole number from 2" in capsys.readouterr().err


# The comparison with other tools.


def invocation_of(tool, turn, spread, generator, statistic="min"):
    noise = spread * generator.normal(size=4)
    truth = (0.0, math.log(1.5), math.log(1.01), math.log(1.05))
    names = ("copy", "view", "slower-1", "slower-5")
    ratios = {name: t + e for name, t, e in zip(names, truth, noise, strict=True)}
    return tool_comparison.Invocation(
        tool=tool, turn=turn, log_ratios={statistic: ratios}, seconds=3.0
    )


def comparison_of(spreads, turns=40):
    generator = np.random.default_rng(0)
    return [
        invocation_of(tool, turn, spread, generator)
        for tool, spread in spreads.items()
        for turn in range(turns)
    ]


def test_summarise_smaller_spread_wins_and_finds_slowdown():
    found = tool_comparison.summarise(
        comparison_of({"ours": 0.002, "timeit": 0.05, "pyperf": 0.03})
    )
    by_tool = {one.tool: one for one in found}
    assert by_tool["ours"].spread == pytest.approx(0.002, rel=0.4)
    assert by_tool["ours"].power["0.05"] == 1.0
    assert by_tool["timeit"].power["0.01"] < 0.5
    assert tool_comparison.best_other_tool(found, "spread").tool == "pyperf"
    assert all(holds for _, holds in tool_comparison.judge(found))


def test_judge_equal_tools_fails_both_criteria():
    found = tool_comparison.summarise(comparison_of({"ours": 0.03, "timeit": 0.03}))
    assert not any(holds for _, holds in tool_comparison.judge(found))


def test_run_all_every_tool_takes_turns_and_failures_are_kept():
    def run(tool, turn):
        return tool_comparison.Invocation(
            tool=tool, turn=turn, seconds=1.0, reason="no such module"
        )

    said = []
    *_, found = tool_comparison.run_all(["a", "b"], 3, run, said.append)
    assert sorted((one.tool, one.turn) for one in found) == [(t, n) for t in "ab" for n in range(3)]
    assert all("no such module" in line for line in said)
    assert tool_comparison.summarise(found) == []


def test_our_plan_rounds_fill_the_given_seconds():
    for seconds, processes, allocations in ((0.0001, 3, 4), (0.0009, 5, 2), (0.004, 1, 1)):
        call = contender.OpenedContender(call_seconds=seconds, read_nbytes=3 << 20)
        plan = tools.our_plan(0.5, processes, allocations, call)
        _, calls = block_calls(seconds, plan.block_seconds, nbytes=3 << 20)
        timed = plan.processes * plan.allocations * plan.rounds * calls * seconds
        assert timed == pytest.approx(0.5, rel=0.05)


def test_to_log_ratios_are_relative_to_baseline():
    times = {"min": {"native": 2.0, "copy": 2.0, "view": 4.0}}
    assert tools.to_log_ratios(times) == {"min": {"copy": 0.0, "view": math.log(2)}}


@pytest.mark.parametrize("function", [loops.time_loop, loops.time_loop_without_idle])
def test_worker_may_run_the_functions_of_a_check(function, monkeypatch):
    for name in (messages.MODULES_VARIABLE, "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(Path(loops.__file__).with_name("__main__.py")), run_name="imported")
    modules = os.environ[messages.MODULES_VARIABLE].split(",")
    name = f"{function.__module__}:{function.__qualname__}"
    assert messages.find_function(name, modules) is function
