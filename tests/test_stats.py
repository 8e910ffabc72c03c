"""The statistics have their nominal error rates in simulation, and their properties."""

import itertools
import math
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poolbench.core.records import Samples
from poolbench.stats import batch, estimate, planning
from poolbench.stats import verdict as verdicts

ALLOCATIONS, ROUNDS = 3, 5


def make_noise(kind, generator, shape):
    if kind == "heavy-tailed":
        return 0.01 * generator.standard_t(2, shape)
    noise = generator.normal(0, 0.01, shape)
    if kind == "drifting":
        slope = generator.normal(0, 0.005, (*shape[:-1], 1))
        return noise + slope * (np.arange(shape[-1]) - (shape[-1] - 1) / 2)
    if kind == "AR(1)":
        for k in range(1, shape[-1]):
            noise[..., k] = 0.7 * noise[..., k - 1] + math.sqrt(1 - 0.49) * noise[..., k]
    return noise


def make_cubes(kind, runs, processes, *, truth=0.0, spread=0.01, seed=3):
    """Logs of a candidate's seconds, a run a row."""
    generator = np.random.default_rng(seed)
    effects = generator.normal(0, spread, (runs, processes, 1, 1))
    effects = effects + generator.normal(0, 0.01, (runs, processes, ALLOCATIONS, 1))
    return truth + effects + make_noise(kind, generator, (runs, processes, ALLOCATIONS, ROUNDS))


def make_units(kind, runs, processes, **more):
    """A run a row, a process's log ratio to a baseline of the same noise a column: what intervals are made of."""
    candidate = make_cubes(kind, runs, processes, **more)
    baseline = make_noise(kind, np.random.default_rng(4), candidate.shape)
    return estimate.process_values(candidate - baseline)


def coverage(units, truth):
    mean, error, degrees = estimate.mean_and_error(units)
    return float(np.mean(np.abs(mean - truth) <= estimate.quantile(0.95, degrees) * error))


KINDS = ("independent", "AR(1)", "drifting", "heavy-tailed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [3, 5, 10])
def test_a_95_percent_interval_covers_in_93_to_97_percent(kind, processes):
    assert 0.93 <= coverage(make_units(kind, 6000, processes), 0.0) <= 0.97


LOOKS, MARGIN, PRECISION = (5, 7, 10), 0.05, 0.02


def stop(units, first, truth):
    """(covered, called SLOWER) of each run of schema 1, whose races looked whether they could stop."""
    covered, slower = np.zeros(len(units), bool), np.zeros(len(units), bool)
    going = np.ones(len(units), bool)
    for count in sorted({first, *LOOKS}):
        mean, error, degrees = estimate.mean_and_error(units[:, :count])
        reach = estimate.quantile(0.995, degrees) * error
        clear = np.abs(np.abs(mean) - math.log1p(MARGIN)) > reach
        done = going & ((np.expm1(reach) <= PRECISION) | clear | (count >= LOOKS[-1]))
        reported = estimate.reported_confidence(first, LOOKS[-1])
        reach = estimate.quantile(reported, degrees) * error
        covered[done] = (np.abs(mean - truth) <= reach)[done]
        slower[done] = (mean - reach > math.log1p(MARGIN))[done]
        going &= ~done
    return covered.mean(), slower.mean()


@pytest.mark.parametrize("first", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_reported_confidence_after_looks_keeps_coverage_and_false_alarms(kind, first):
    for spread in (0.003, 0.01, 0.02, 0.04):
        for truth in (0.0, 0.03, math.log(1.05), 0.06):
            units = make_units(kind, 3000, 10, truth=truth, spread=spread)
            covered, slower = stop(units, first, truth)
            assert covered >= 0.93
            if truth <= math.log(1.05):
                assert slower <= 0.025 + 0.009  # three standard errors of 3000 runs


def test_two_modes_are_covered_in_83_percent_at_five_processes():
    generator = np.random.default_rng(5)
    units = make_units("independent", 20000, 5)
    units += math.log(1.3) * (generator.random((20000, 5)) < 0.3)
    assert round(coverage(units, 0.3 * math.log(1.3)), 2) == 0.83


def test_log_ratios_pair_by_process_allocation_and_round():
    one = np.log([[[4.0, 1.0]], [[1.0, 1.0]]])
    other = np.log([[[1.0, 3.0]], [[2.0, 2.0]]])
    paired = estimate.log_ratios(make_samples(one), make_samples(other))
    assert np.exp(paired.value).tolist() == pytest.approx([4.0, 1 / 3, 0.5, 0.5])
    assert paired.process.tolist() == [0, 0, 1, 1]
    assert paired.round.tolist() == [0, 1, 0, 1]


def make_samples(cube):
    rows = [(*place, float(np.exp(value))) for place, value in np.ndenumerate(cube)]
    process, allocation, number, seconds = zip(*rows, strict=True)
    zeros = (0,) * len(rows)
    return Samples(
        process=process, allocation=allocation, round=number, seconds=seconds,
        calls=(1,) * len(rows), contended=zeros,
    )  # fmt: skip


def make_pair(seed=0, processes=5):
    return tuple(map(make_samples, make_cubes("independent", 2, processes, seed=seed)))


@pytest.mark.parametrize(("processes", "kept"), [(1, 60), (2, 75)])
def test_log_ratios_contended_blocks_are_left_out_where_enough_are_clean(processes, kept):
    """Of five processes of fifteen blocks: all blocks count where two have no clean one."""
    one, other = make_pair()
    busy = msgspec.structs.replace(one, contended=tuple(int(p < processes) for p in one.process))
    for pair in ((busy, other), (other, busy)):
        paired = estimate.log_ratios(*pair)
        assert len(paired.value) == kept
        assert paired.contended_used == (kept == 75)


def test_interquartile_mean_ignores_the_outer_quarters_and_what_is_missing():
    missing = math.nan
    rows = [[-100.0, 1, 2, 100], [4, missing, missing, missing], [missing] * 4]
    found = estimate.interquartile_mean(np.array(rows))
    assert found[:2].tolist() == [1.5, 4.0]
    assert math.isnan(found[2])
    assert math.isnan(estimate.interquartile_mean(np.empty((1, 0)))[0])


def look_up(pairs, estimates):
    """Return an estimator of these pairs, whose estimates are known."""
    known = {(id(a), id(b)): one for (a, b), one in zip(pairs, estimates, strict=True)}
    return lambda a, b: known[id(a), id(b)]


@pytest.mark.slow
def test_ten_equal_candidates_have_a_false_sole_winner_in_at_most_5_percent():
    alone = 0
    for seed in range(100):
        cubes = make_cubes("independent", 10, 5, seed=seed)
        samples = {str(n): make_samples(cube) for n, cube in enumerate(cubes)}
        pairs = list(itertools.combinations(samples.values(), 2))
        # All at once: one by one they take ten times as long, and are equal (tests/test_report.py).
        found = verdicts.best_set(samples, estimator=look_up(pairs, batch.estimate_all(pairs)))
        assert found.best in found.names
        alone += len(found) == 1
    assert alone <= 5


def test_the_core_is_what_estimate_runs():
    one, other = make_cubes("independent", 2, 5)
    units = estimate.process_values(one - other)
    found = estimate.estimate(make_samples(one), make_samples(other))
    mean, error, _ = estimate.mean_and_error(units)
    assert (found.log_ratio, found.standard_error) == pytest.approx((mean, error))


def scale(samples, factor):
    seconds = tuple(factor * value for value in samples.seconds)
    return msgspec.structs.replace(samples, seconds=seconds)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_scale_of_both_sides_does_not_matter_and_swapping_negates(seed, factor):
    one, other = make_pair(seed)
    found = estimate.estimate(one, other)
    scaled = estimate.estimate(scale(one, factor), scale(other, factor))
    swapped = estimate.estimate(other, one)
    assert scaled.log_ratio == pytest.approx(found.log_ratio, abs=1e-9)
    assert swapped.log_ratio == pytest.approx(-found.log_ratio, abs=1e-12)
    assert swapped.low == pytest.approx(-found.high, abs=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_the_order_of_blocks_does_not_matter(seed):
    one, other = make_pair(seed)
    order = list(range(len(one)))
    random.Random(seed).shuffle(order)
    shuffled = Samples(
        **{name: tuple(getattr(one, name)[i] for i in order) for name in one.__struct_fields__}
    )
    assert estimate.estimate(shuffled, other) == estimate.estimate(one, other)


def test_estimate_one_outlier_round_hardly_changes_it():
    one, other = make_pair()
    slow = msgspec.structs.replace(one, seconds=(1000 * one.seconds[0], *one.seconds[1:]))
    found, usual = estimate.estimate(slow, other), estimate.estimate(one, other)
    assert abs(found.log_ratio - usual.log_ratio) < 0.005


def test_one_process_has_no_interval_unless_allocations_are_asked_for():
    pair = make_pair(processes=1)
    assert estimate.estimate(*pair).low is None
    assert verdicts.verdict(estimate.estimate(*pair)) == "UNDECIDED"
    assert estimate.estimate(*pair, level="allocation").processes == ALLOCATIONS


def test_nothing_paired_has_no_estimate():
    assert math.isnan(estimate.estimate(make_pair()[0], Samples()).ratio)


@pytest.mark.parametrize(
    ("truth", "expected"), [(-0.3, "FASTER"), (0.3, "SLOWER"), (0.0, "SAME"), (0.0488, "UNDECIDED")]
)
def test_verdicts(truth, expected):
    comparisons = verdicts.compare_run({0: estimate.from_error(truth, 0.004, 4, 5)}, 0.05)
    assert comparisons[0].verdict == expected


def test_undecided_comparison_predicts_processes_needed():
    at_edge = math.log1p(0.05)
    pairs = {value: estimate.from_error(value, 0.01, 4, 5) for value in (0.03, at_edge)}
    found = verdicts.compare_run(pairs, 0.05)
    assert {one.verdict for one in found.values()} == {"UNDECIDED"}
    # With eight processes the half-width, t(7) sqrt(5 / 8) 0.01, is first below log(1.05) - 0.03.
    assert found[0.03].processes_needed == 3
    assert found[at_edge].processes_needed is None, "no number of processes decides at the margin"


def test_best_set_leaves_out_the_slower_and_keeps_what_is_tied():
    one, _ = make_pair()
    found = verdicts.best_set({"slow": scale(one, 1.2), "one": one, "twin": scale(one, 1.0)})
    assert set(found) == {"one", "twin"} and found.best != "slow"
    with pytest.raises(ValueError, match="at least one name"):
        verdicts.best_set({})


def test_compare_run_adjusts_p_as_benjamini_and_hochberg_do():
    pairs = {n: estimate.from_error(0.1 + 0.02 * n, 0.03, 4, 5) for n in range(3)}
    c, b, a = (verdicts.compare_run({n: pairs[n]})[n].adjusted_p for n in range(3))
    assert a < b < c
    found = verdicts.compare_run(pairs)
    expected = [c, min(3 * b / 2, c), min(3 * a, 3 * b / 2, c)]
    assert [found[n].adjusted_p for n in range(3)] == pytest.approx(expected)
    assert verdicts.compare_run({}) == {}


def test_differences_and_means_of_estimates():
    a, b = estimate.from_error(0.2, 0.03, 4, 5), estimate.from_error(0.1, 0.04, 4, 5)
    assert estimate.difference(a, b).log_ratio == pytest.approx(0.1)
    assert estimate.difference(a, b).standard_error == pytest.approx(0.05)
    assert estimate.geometric_mean([a, b]).log_ratio == pytest.approx(0.15)


def test_two_mode_processes_are_flagged_among_quiet_ones():
    quiet = {n: estimate.from_error(0.0, 0.004 + 0.0001 * n, 4, 5) for n in range(20)}
    assert verdicts.flag_disagreeing({**quiet, "odd": estimate.from_error(0.05, 0.05, 4, 5)}) == {
        "odd"
    }


def test_resolution_needs_two_processes_and_narrows_with_more():
    widths = [
        planning.resolution(
            process=0.01, allocation=0.01, round=0.01, processes=n, allocations=4, rounds=4
        )
        for n in (1, 3, 10)
    ]
    assert widths[0] == math.inf > widths[1] > widths[2]
