"""The self-test: counts, time limit and records."""

import json
import math
import re
import zlib

import msgspec
import numpy as np
import pytest
from poolbench.core.plan import Plan, WorkerSpec
from poolbench.core.records import Selftest
from poolbench.engine import aa, selftest
from poolbench.engine.pool import WorkerPool
from poolbench.store.journal import decode_line, encode_line
from synthetic_races import measured, race_of


def test_copy_names_say_what_is_injected():
    design = aa.Design(plain=2, slowdowns=(0.01, 0.1))
    names = aa.copy_names(design)
    assert next(iter(names)) == aa.BASELINE
    assert sorted(names.values()) == [0.0, 0.0, 0.0, 0.01, 0.1]
    assert all(aa.slowdown_of(name) == injected for name, injected in names.items())


def test_slowdown_of_another_name_is_refused():
    with pytest.raises(ValueError, match="max_pool"):
        aa.slowdown_of("max_pool")


def test_delay_call_waits_then_calls():
    now = iter(np.arange(0.0, 10.0, 0.25))
    log = []

    def clock():
        log.append(next(now))
        return log[-1]

    delayed = aa.delay_call(lambda x: x + 1, 1.0, clock)
    assert delayed(1) == 2
    assert log[-1] - log[0] == 1.0


def test_delay_call_without_a_delay_reads_the_clock_twice():
    reads = []
    aa.delay_call(lambda: None, 0.0, lambda: reads.append(1) or 5.0)()
    assert len(reads) == 2


def test_race_series_stops_before_a_race_that_would_end_too_late():
    now = [0.0]

    def race(number):
        now[0] += 10.0
        return number

    series = aa.race_series(race, 100, until=35.0, clock=lambda: now[0])
    assert list(series) == [0, 1, 2]


def test_race_series_without_time_has_one_race():
    assert list(aa.race_series(lambda n: n, 5, until=-1.0, clock=lambda: 0.0)) == [0]


def test_judge_copies_of_a_failed_copy_is_an_error_in_one_line():
    generator = np.random.default_rng(0)
    names = {"copy-0": 0.0, "copy-1": 0.0}
    found = {name: measured(name, 1.0, generator) for name in names}
    found["copy-1"] = msgspec.structs.replace(found["copy-1"], status="crashed", reason="SIGKILL")
    with pytest.raises(aa.ProofError, match="copy-1: crashed: SIGKILL"):
        aa.judge_copies(names, found, 1.0)


def test_source_of_an_unknown_candidate_is_refused():
    with pytest.raises(aa.ProofError, match="nothing-like-it"):
        aa.source_of(aa.Design(plain=1, source="nothing-like-it"))


def test_summarise_counts_the_verdicts():
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


def test_summarise_of_noisy_races_has_a_higher_floor_and_less_power():
    races = [race_of(selftest.DESIGN, seed, noise=0.2) for seed in range(5)]
    records = {(r.injected, r.margin): r for r in selftest.summarise(races, selftest.DESIGN, 60.0)}
    assert records[0.01, 0.0].power < 0.5
    assert records[0.0, 0.05].noise_floor > 0.02


def test_selftest_records_survive_the_journal():
    for record in selftest.summarise([race_of(selftest.DESIGN)], selftest.DESIGN, 60.0):
        assert decode_line(encode_line(record).rstrip(b"\n"))[0] == record


def test_selftest_record_without_the_new_fields_is_read():
    fields = dict.fromkeys(("comparisons", "faster", "slower", "same", "undecided"), 0)
    fields |= dict.fromkeys(("injected", "margin", "noise_floor", "seconds"), 0.5)
    body = json.dumps([{"type": "selftest"} | fields]).encode()
    (old,) = decode_line(b'{"crc32":"%08x","schema":2,"records":%s}' % (zlib.crc32(body), body))
    assert old == Selftest(**fields, kind="aa", power=None, figures={})


def test_describe_names_alarms_power_and_floor():
    text = selftest.describe(selftest.summarise([race_of(selftest.DESIGN)], selftest.DESIGN, 60.0))
    assert f"0 false alarms in {selftest.DESIGN.plain} comparisons" in text
    assert "slower by 10%, margin 5%: SLOWER in 1 of 1 (power 100%)" in text
    assert re.search(r"noise floor: \d+\.\d+%", text)


def test_newest_run_is_no_reference_run(tmp_path):
    assert selftest.newest_run(tmp_path) is None
    for name in ("a-run", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_text("{}\n")
    assert selftest.newest_run(tmp_path) == tmp_path / "a-run"


# For once, a real race of copies.


@pytest.mark.slow
def test_race_copies_for_real_finds_a_doubled_call():
    """A call made twice as long is seen on any machine; of a busy one no finer figure is asserted."""
    plan = Plan(processes=1, allocations=2, rounds=3, block_seconds=0.003)
    design = aa.Design(plain=1, slowdowns=(1.0,), plan=plan)
    pool = WorkerPool()
    try:
        pool.prepare((WorkerSpec(),), 1)
        race = aa.race_copies(design, pool)
    finally:
        pool.close()
    assert [one.injected for one in race.compared] == [0.0, 1.0]
    assert set(race.equal) == {"copy-0", "copy-1"}
    assert race.blocks >= 3 * 2 * 1
    assert all(math.isfinite(one.found.log_ratio) for one in race.compared)
    assert race.compared[1].found.log_ratio > 0
