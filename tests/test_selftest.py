"""The proofs of the harness: what they count, when they stop, how the bars judge."""

import math
import re

import msgspec
import numpy as np
import pytest
from poolbench.core.errors import UsageError
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import Contention, Measurement, Samples, Selftest, TimeBreakdown
from poolbench.engine import aa, selftest
from poolbench.engine.rounds import block_calls
from poolbench.engine.scheduler import WorkerPool
from poolbench.proof import acceptance, evidence, judges, peers, versus
from poolbench.store.journal import decode_line, encode_line
from poolbench.worker import session

CASE = aa.CASE
CALM = Contention(steal=0.0, others=0.0, blocks_marked=0, blocks_redone=0, involuntary_switches=0)


def samples(ratio, generator, noise=0.002, processes=5):
    places = [(r, a, k) for r in range(processes) for a in range(4) for k in range(2)]
    process, allocation, number = zip(*places, strict=True)
    seconds = tuple(1e-3 * ratio * np.exp(noise * generator.normal(size=len(places))))
    return Samples(
        process=process, allocation=allocation, round=number, seconds=seconds,
        calls=(1,) * len(places), contended=(0,) * len(places),
    )  # fmt: skip


def measured(name, ratio, generator, **fields):
    return Measurement(
        case=fields.pop("case", CASE), candidate=name, status=fields.pop("status", "ok"),
        baseline=fields.pop("baseline", aa.BASELINE), contention=fields.pop("contention", CALM),
        samples=samples(ratio, generator, fields.pop("noise", 0.002)), **fields,
    )  # fmt: skip


def race_of(design, seed=0, noise=0.002, seconds=2.0, contention=CALM):
    generator = np.random.default_rng(seed)
    names = aa.copy_names(design)
    found = {
        name: measured(name, 1 + injected, generator, noise=noise, contention=contention)
        for name, injected in names.items()
    }
    return aa.judge_copies(names, found, seconds)


def test_copies_are_named_by_what_is_injected():
    design = aa.Design(plain=2, slowdowns=(0.01, 0.1))
    names = aa.copy_names(design)
    assert next(iter(names)) == aa.BASELINE
    assert sorted(names.values()) == [0.0, 0.0, 0.0, 0.01, 0.1]
    assert all(aa.slowdown_of(name) == injected for name, injected in names.items())


def test_a_name_that_is_no_copys_is_refused():
    with pytest.raises(ValueError, match="max_pool"):
        aa.slowdown_of("max_pool")


def test_a_delayed_call_waits_for_what_it_is_told_and_then_calls():
    now = iter(np.arange(0.0, 10.0, 0.25))
    log = []

    def clock():
        log.append(next(now))
        return log[-1]

    delayed = aa.delay_call(lambda x: x + 1, 1.0, clock)
    assert delayed(1) == 2
    assert log[-1] - log[0] == 1.0


def test_without_a_delay_the_clock_is_read_but_twice():
    reads = []
    aa.delay_call(lambda: None, 0.0, lambda: reads.append(1) or 5.0)()
    assert len(reads) == 2


def test_a_series_stops_before_a_race_that_would_end_too_late():
    now = [0.0]

    def race(number):
        now[0] += 10.0
        return number

    series = aa.race_series(race, 100, until=35.0, clock=lambda: now[0])
    assert list(series) == [0, 1, 2]


def test_a_series_has_at_least_one_race():
    assert list(aa.race_series(lambda n: n, 5, until=-1.0, clock=lambda: 0.0)) == [0]


def test_a_copy_that_did_not_run_is_an_error_in_one_line():
    generator = np.random.default_rng(0)
    names = {"copy-0": 0.0, "copy-1": 0.0}
    found = {name: measured(name, 1.0, generator) for name in names}
    found["copy-1"] = msgspec.structs.replace(found["copy-1"], status="crashed", reason="SIGKILL")
    with pytest.raises(aa.ProofError, match="copy-1: crashed: SIGKILL"):
        aa.judge_copies(names, found, 1.0)


def test_an_unknown_candidate_cannot_be_copied():
    with pytest.raises(aa.ProofError, match="nothing-like-it"):
        aa.source_of(aa.Design(plain=1, source="nothing-like-it"))


def test_the_records_count_what_was_found():
    races = [race_of(selftest.DESIGN, seed) for seed in range(10)]
    records = {(r.injected, r.margin): r for r in selftest.summarise(races, selftest.DESIGN, 60.0)}
    same = records[0.0, 0.05]
    assert same.kind == "aa" and same.power is None
    assert same.comparisons == same.same == 10 * selftest.DESIGN.plain
    assert 0 < same.noise_floor < 0.01
    assert records[0.05, 0.0].power == records[0.10, 0.05].power == 1.0
    assert all(
        r.faster + r.slower + r.same + r.undecided == r.comparisons for r in records.values()
    )


def test_noise_hides_a_small_slowdown_and_raises_the_floor():
    races = [race_of(selftest.DESIGN, seed, noise=0.2) for seed in range(5)]
    records = {(r.injected, r.margin): r for r in selftest.summarise(races, selftest.DESIGN, 60.0)}
    assert records[0.01, 0.0].power < 0.5
    assert records[0.0, 0.05].noise_floor > 0.02


def test_the_records_come_back_from_the_journal_as_they_went_in():
    for record in selftest.summarise([race_of(selftest.DESIGN)], selftest.DESIGN, 60.0):
        assert decode_line(encode_line(record).rstrip(b"\n")) == record


def test_a_record_of_before_the_new_fields_can_be_read():
    old = Selftest(
        injected=0.0, margin=0.05, comparisons=1, faster=0, slower=0, same=1, undecided=0,
        noise_floor=0.01, seconds=1.0,
    )  # fmt: skip
    assert (old.kind, old.power, old.figures) == ("aa", None, {})


def test_the_summary_names_alarms_power_and_floor():
    text = selftest.describe(selftest.summarise([race_of(selftest.DESIGN)], selftest.DESIGN, 60.0))
    assert f"0 false alarms in {selftest.DESIGN.plain} comparisons" in text
    assert "slower by 10%, margin 5%: SLOWER in 1 of 1 (power 100%)" in text
    assert re.search(r"noise floor: \d+\.\d+%", text)


def test_the_newest_run_is_nobody_elses_reference(tmp_path):
    assert selftest.newest_run(tmp_path) is None
    for name in ("a-run", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_text("")
    assert selftest.newest_run(tmp_path) == tmp_path / "a-run"


# The bars.


def quiet_races():
    scale = evidence.SCALES["full"]
    return [
        *(race_of(evidence.RACE, seed) for seed in range(scale.races)),
        *(race_of(evidence.TEN, seed) for seed in range(scale.tens)),
    ]


def test_a_calm_machine_passes_the_bars_of_copies():
    races = quiet_races()
    assert len(aa.of_injected(races, 0.0)) >= 300
    for found in (
        judges.judge_alarms(races),
        judges.judge_undecided(races),
        judges.judge_power(races, 0.10, 0.05, 0.95),
        judges.judge_equal([race_of(evidence.TEN, seed) for seed in range(20)]),
    ):
        assert found.passed, found.text


def test_a_wild_machine_fails_them():
    races = [race_of(evidence.RACE, seed, noise=0.5) for seed in range(5)]
    assert not judges.judge_undecided(races).passed
    assert not judges.judge_power(races, 0.10, 0.05, 0.95).passed


def test_one_percent_must_be_found_in_time():
    races = [race_of(evidence.PAIR, seed) for seed in range(20)]
    assert judges.judge_pairs(races, 10.0).passed
    assert not judges.judge_pairs(races, 1.0).passed


@pytest.mark.parametrize(("late", "passes"), [(2, True), (3, False)])
def test_a_pair_that_takes_too_long_has_not_found_it(late, passes):
    times = [11.0] * late + [9.0] * (20 - late)
    races = [race_of(evidence.PAIR, seed, seconds=s) for seed, s in enumerate(times)]
    found = judges.judge_pairs(races, 10.0)
    assert found.figures["slower"] == 20
    assert found.figures["in_time"] == 20 - late
    assert found.passed is passes


def test_a_sole_winner_among_equals_fails():
    race = race_of(evidence.RACE)
    generator = np.random.default_rng(1)
    faster = {**race.equal, "copy-1": samples(0.8, generator)}
    wrong = aa.CopiesRace(
        compared=race.compared, equal=faster, contention=CALM, blocks=1, seconds=1.0
    )
    assert not judges.judge_equal([wrong]).passed


def test_nothing_seen_passes_no_bar():
    assert not judges.at_most(1.0, 0, 0)
    assert not judges.judge_widths([], 0.08, None).passed


def run_of(ratio, seed, noise=0.002):
    generator = np.random.default_rng(seed)
    found = [measured(aa.BASELINE, 1.0, generator, noise=noise)]
    found += [
        measured(f"copy-{n}", ratio, generator, noise=noise, kind="candidate") for n in range(1, 9)
    ]
    return evidence.compare_measurements(found)


def test_runs_that_agree_pass_and_a_verdict_that_turns_fails():
    agreeing = judges.judge_runs([run_of(0.8, seed) for seed in range(3)])
    assert agreeing.passed
    assert len(agreeing.figures["covered"]) == 2
    turned = judges.judge_runs([run_of(0.8, 0), run_of(1.3, 1)])
    assert not turned.passed
    assert turned.figures["turned"] == 8


def test_probes_failures_and_settled_ones_are_not_compared():
    generator = np.random.default_rng(0)
    found = evidence.compare_measurements(
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
        ({"start": 20.0, "samples": 40.0, "other": 5.0}, True),
        ({"start": 20.0, "samples": 20.0, "other": 5.0}, False),
        ({"start": 20.0, "samples": 40.0, "other": 15.0}, False),
    ],
)
def test_shares_are_of_the_time_after_the_start(seconds, passes):
    assert judges.judge_shares(TimeBreakdown(seconds=seconds, wall_seconds=120.0)).passed is passes


@pytest.mark.parametrize(("ratios", "passes"), [((1.01, 0.97), True), ((1.0, 1.06), False)])
def test_every_turn_of_the_bias_counts(ratios, passes):
    assert judges.judge_bias(ratios).passed is passes


def test_contention_must_be_marked_and_seen():
    busy = Contention(
        steal=0.0, others=0.4, blocks_marked=400, blocks_redone=10, involuntary_switches=1
    )
    assert judges.judge_contention([race_of(evidence.RACE, contention=busy)]).passed
    assert not judges.judge_contention([race_of(evidence.RACE)]).passed


def test_three_times_the_time_is_the_most():
    races = {s: [race_of(evidence.PAIR, seconds=s)] for s in (1.0, 2.9, 3.1)}
    assert judges.judge_time(races[1.0], races[2.9]).passed
    assert not judges.judge_time(races[1.0], races[3.1]).passed


def test_a_bar_is_picked_by_name_or_by_how_some_begin():
    assert acceptance.pick(["slower-1"]) == ["slower-1"]
    assert acceptance.pick(["aa"]) == ["aa-alarms", "aa-undecided"]
    assert acceptance.pick([]) == list(acceptance.BARS)
    with pytest.raises(UsageError, match="nonsense"):
        acceptance.pick(["nonsense"])


def test_evidence_that_cannot_be_had_fails_its_bar_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    gathered = evidence.Evidence(evidence.SCALES["quick"], default_runs=[], progress=lambda _: None)
    entry = acceptance.judge_bar("default-shares", gathered, {})
    assert not entry.passed
    assert "nox -s bench-cpu" in entry.found


def test_whether_a_default_run_holds_takes_two_of_them():
    gathered = evidence.Evidence(
        evidence.SCALES["quick"], default_runs=["one"], progress=lambda _: None
    )
    entry = acceptance.judge_bar("default-again", gathered, {})
    assert not entry.passed
    assert "one is the only default run" in entry.found


def entry_of(name, passed=True):
    return acceptance.Entry(
        name=name, requirement="r", found="f", passed=passed, seconds=1.0, created="now", source={}
    )


def environment_of(processor):
    from poolbench.core.records import Environment

    machine = {"processor": processor}
    return Environment(machine=machine, devices={}, versions={}, settings={}, source={})


def test_a_bar_run_singly_replaces_its_own_result_only():
    old = acceptance.Acceptance(
        environment=environment_of("a"), bars=(entry_of("aa-alarms"), entry_of("ten-equal"))
    )
    new = acceptance.Acceptance(
        environment=environment_of("a"), bars=(entry_of("ten-equal", passed=False),)
    )
    merged = acceptance.merge(old, new)
    assert [(e.name, e.passed) for e in merged.bars] == [("aa-alarms", True), ("ten-equal", False)]
    elsewhere = acceptance.Acceptance(environment=environment_of("b"), bars=new.bars)
    assert [e.name for e in acceptance.merge(old, elsewhere).bars] == ["ten-equal"]


def test_the_result_comes_back_from_its_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "acceptance.json"
    monkeypatch.setattr(acceptance, "STORED", path)
    assert acceptance.read_stored(path) is None
    whole = acceptance.Acceptance(environment=environment_of("a"), bars=(entry_of("aa-alarms"),))
    acceptance.store(whole)
    assert acceptance.read_stored(path) == whole


def test_doors_answer_bad_input_with_one_line(capsys):
    assert acceptance.main(["--only", "nonsense"]) == 2
    assert versus.main(["--tool", "nonsense"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("nonsense" in line for line in lines)
    assert versus.main(["--invocations", "1"]) == 2
    assert "whole number from 2" in capsys.readouterr().err


# The peers.


def invocation_of(tool, turn, spread, generator, statistic="min"):
    noise = spread * generator.normal(size=4)
    truth = (0.0, math.log(1.5), math.log(1.01), math.log(1.05))
    names = ("copy", "view", "slower-1", "slower-5")
    ratios = {name: t + e for name, t, e in zip(names, truth, noise, strict=True)}
    return versus.Invocation(tool=tool, turn=turn, log_ratios={statistic: ratios}, seconds=3.0)


def versus_of(spreads, turns=40):
    generator = np.random.default_rng(0)
    return [
        invocation_of(tool, turn, spread, generator)
        for tool, spread in spreads.items()
        for turn in range(turns)
    ]


def test_what_spreads_less_wins_and_what_is_injected_stands_out():
    found = versus.summarise(versus_of({"ours": 0.002, "timeit": 0.05, "pyperf": 0.03}))
    by_tool = {one.tool: one for one in found}
    assert by_tool["ours"].spread == pytest.approx(0.002, rel=0.4)
    assert by_tool["ours"].power["0.05"] == 1.0
    assert by_tool["timeit"].power["0.01"] < 0.5
    assert versus.best_peer(found, "spread").tool == "pyperf"
    assert all(holds for _, holds in versus.judge(found))


def test_being_no_better_than_a_peer_fails_both_bars():
    found = versus.summarise(versus_of({"ours": 0.03, "timeit": 0.03}))
    assert not any(holds for _, holds in versus.judge(found))


def test_every_tool_takes_its_turn_and_a_failure_is_kept():
    def run(tool, turn):
        return versus.Invocation(tool=tool, turn=turn, seconds=1.0, reason="no such module")

    said = []
    *_, found = versus.run_all(["a", "b"], 3, run, said.append)
    assert sorted((one.tool, one.turn) for one in found) == [(t, n) for t in "ab" for n in range(3)]
    assert all("no such module" in line for line in said)
    assert versus.summarise(found) == []


def test_equal_measuring_time_is_as_many_rounds_as_fill_it():
    for seconds, processes, allocations in ((0.0001, 3, 4), (0.0009, 5, 2), (0.004, 1, 1)):
        call = session.OpenedContender(call_seconds=seconds, read_nbytes=3 << 20)
        plan = peers.our_plan(0.5, processes, allocations, call)
        _, calls = block_calls(seconds, plan.block_seconds, nbytes=3 << 20)
        timed = plan.processes * plan.allocations * plan.rounds * calls * seconds
        assert timed == pytest.approx(0.5, rel=0.05)


def test_log_ratios_are_to_the_baseline():
    times = {"min": {"native": 2.0, "copy": 2.0, "view": 4.0}}
    assert peers.to_log_ratios(times) == {"min": {"copy": 0.0, "view": math.log(2)}}


# For once, a real race of copies.


def test_a_real_race_of_copies_knows_its_own_truth():
    """A call made twice as long is seen on any machine; of a busy one no finer figure is asserted."""
    plan = Plan(processes=1, allocations=2, rounds=3, block_seconds=0.003)
    design = aa.Design(plain=1, slowdowns=(1.0,), plan=plan)
    fleet = WorkerPool((), None)
    try:
        fleet.use(WorkerSpec(), 1)
        race = aa.race_copies(design, fleet)
    finally:
        fleet.close()
    assert [one.injected for one in race.compared] == [0.0, 1.0]
    assert set(race.equal) == {"copy-0", "copy-1"}
    assert race.blocks >= 3 * 2 * 1
    assert all(math.isfinite(one.found.log_ratio) for one in race.compared)
    assert race.compared[1].found.log_ratio > 0
