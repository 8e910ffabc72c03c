"""Intervals that hold between runs, in simulation and by their properties.

The simulated comparisons are like a default sweep's: 45% near ties, the others up to a factor of
six either way, a fifth in eager mode, a fifth single-threaded, within-run errors around 1.2% with
four degrees of freedom. Four comparisons share a race, whose effects correlate by 0.2.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poolbench.stats import prior, runs
from poolbench.stats.estimate import difference, from_error

COMPARISONS, MACHINES, DEGREES = 132, 15, 4
EFFECTS = (0.0, 0.01, 0.02, 0.04)


def simulate(form, effect, count, *, machines=MACHINES, seed=0):
    """Yield (table of `count` runs, estimates of the next run) per machine.

    The run effect has a standard deviation of `effect` in every comparison ('constant'), or has the
    form of the shipped prior with `effect` at a log ratio of 1 ('prior').
    """
    generator = np.random.default_rng(seed)
    size = (machines, COMPARISONS, count + 1)
    unlike = generator.uniform(-math.log(6), math.log(6), COMPARISONS)
    near = generator.normal(0, 0.03, COMPARISONS)
    truth = np.where(generator.random(COMPARISONS) < 0.45, near, unlike)
    kind = generator.choice(3, COMPARISONS, p=(0.2, 0.2, 0.6))
    classes = {"eager": kind == 0, "one_thread": kind == 1}
    tau = np.full(COMPARISONS, effect)
    if form == "prior":
        tau = prior.SHIPPED.tau(truth, **classes) * effect / prior.SHIPPED.slope
    race = np.repeat(generator.normal(size=(machines, COMPARISONS // 4, count + 1)), 4, axis=1)
    moved = math.sqrt(0.8) * generator.normal(size=size) + math.sqrt(0.2) * race
    error = np.exp(generator.normal(math.log(0.012), 0.5, COMPARISONS))[:, None]
    value = truth[:, None] + tau[:, None] * moved + error * generator.normal(size=size)
    seen = error * np.sqrt(generator.chisquare(DEGREES, size) / DEGREES)
    for values, errors in zip(value, seen):
        rows = [
            [from_error(v, e, DEGREES, DEGREES + 1) for v, e in zip(*row)]
            for row in zip(values[:, :-1].tolist(), errors[:, :-1].tolist())
        ]
        yield prior.tabulate(rows, **classes), values[:, -1]


def covered(form, effect, count, known=prior.SHIPPED):
    """Return the share of next runs' estimates inside their prediction intervals."""
    inside = [
        found.next_run.low <= value <= found.next_run.high
        for table, new in simulate(form, effect, count)
        for found, value in zip(runs.combine(table, known), new)
    ]
    return np.mean(inside)


@pytest.mark.parametrize("form", ["prior", "constant"])
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_combine_several_runs_covers_the_next_run(form, effect, count):
    assert 0.93 <= covered(form, effect, count) <= 0.975


@pytest.mark.parametrize("form", ["prior", "constant"])
@pytest.mark.parametrize("effect", EFFECTS)
def test_combine_one_run_with_prior_of_earlier_pairs_covers_the_next_run(form, effect):
    earlier = [table for table, _ in simulate(form, effect, 2, machines=3, seed=1)]
    assert 0.93 <= covered(form, effect, 1, prior.fit_prior(earlier)) <= 0.975


def test_combine_one_run_with_shipped_prior_covers_only_effects_of_its_size():
    # One run shows nothing of what lies between runs, so that no estimator could do better.
    assert 0.93 <= covered("prior", prior.SHIPPED.slope, 1) <= 0.975
    assert covered("constant", 0.0, 1) > 0.975
    assert covered("prior", 1.6 * prior.SHIPPED.slope, 1) < 0.93
    assert covered("constant", 0.04, 1) < 0.8


def test_combine_more_runs_narrows_the_mean():
    def width(count):
        table, _ = next(simulate("prior", 0.025, count))
        return np.median([found.mean.half_width for found in runs.combine(table)])

    assert width(1) > 1.3 * width(3) > 1.3 * 1.3 * width(8)


def make_one(log_ratio=0.0, error=0.004, degrees=9):
    return from_error(log_ratio, error, degrees, degrees + 1)


def widen(estimate, **kind):
    return runs.widen(estimate, **{"eager": False, "one_thread": False, **kind})


def test_widen_near_tie_stays_narrow_and_unlike_sides_do_not():
    one = make_one()
    found = widen(one)
    assert found.source == "prior" and found.runs == 1
    assert one.half_width < found.mean.half_width < 0.015
    assert found.mean.half_width < found.next_run.half_width < 0.021
    assert widen(make_one(1.0)).mean.half_width > 0.035
    factor = prior.SHIPPED.one_thread
    assert widen(one, one_thread=True).tau == pytest.approx(factor * prior.SHIPPED.base)
    assert widen(one, eager=True).tau == pytest.approx(prior.SHIPPED.eager * prior.SHIPPED.base)


def test_widen_estimate_without_interval_has_none():
    found = widen(from_error(0.1, math.nan, 0, 1))
    assert found.mean.low is None and found.next_run.low is None


@settings(max_examples=50)
@given(st.floats(-3, 3), st.floats(1e-4, 0.2), st.integers(1, 20))
def test_widen_any_estimate_keeps_value_and_mirrors(value, error, degrees):
    found, mirrored = (
        widen(make_one(value, error, degrees)),
        widen(make_one(-value, error, degrees)),
    )
    assert found.mean.log_ratio == pytest.approx(value)
    assert found.mean.standard_error > error
    assert mirrored.mean.low == pytest.approx(-found.mean.high)


def test_moderate_without_noise_is_limmas_formula():
    found = prior.moderate(
        np.array([0.02**2]), np.array([0.05**2]), np.array([2]), np.zeros(1), 8.0
    )
    assert found[0] == pytest.approx((8 * 0.02**2 + 2 * 0.05**2) / 10)


def make_table(rows):
    return prior.tabulate(rows, eager=[False] * len(rows), one_thread=[False] * len(rows))


def test_combine_comparison_missing_from_runs_keeps_what_there_is():
    table = make_table([[make_one(0.1)] * 3, [make_one(0.1), None, None], [None, None, None]])
    whole, single, nothing = runs.combine(table)
    assert (whole.runs, single.runs, nothing.runs) == (3, 1, 0)
    assert whole.source == single.source == "this machine: 3 runs"
    assert whole.mean.half_width < single.mean.half_width < math.inf
    assert nothing.mean.low is None and math.isnan(nothing.mean.log_ratio)


def test_combine_noisy_run_counts_by_its_processes():
    table = make_table([[make_one(0.0, 0.01, 9), make_one(0.3, 0.03, 1)]])
    assert runs.combine(table)[0].mean.log_ratio < 0.15


def test_combine_comparison_of_two_modes_widens_itself_and_not_the_rest():
    generator = np.random.default_rng(0)
    rows = [[make_one(v) for v in row] for row in generator.normal(0, 0.005, (60, 4)).tolist()]
    calm = runs.combine(make_table(rows))
    *rest, odd = runs.combine(make_table([*rows, [make_one(v) for v in (0, 0.4, 0, 0.4)]]))
    assert odd.next_run.half_width > 0.3
    widths = [np.median([one.next_run.half_width for one in some]) for some in (calm, rest)]
    assert widths[1] < 1.1 * widths[0]


def test_fit_prior_recovers_constants_of_simulated_runs():
    truth = prior.Prior(base=0.01, slope=0.04, eager=1.0, one_thread=1.0, provenance="")
    generator = np.random.default_rng(2)
    value = generator.uniform(-1.2, 1.2, 3000)
    eager, one_thread = generator.random((2, 3000)) < 0.3
    tau = truth.tau(value, eager=eager, one_thread=one_thread)
    heavy = np.sqrt(8 / generator.chisquare(8, (3000, 1)))
    moved = value[:, None] + tau[:, None] * heavy * generator.normal(size=(3000, 2))
    rows = [[make_one(v, 1e-4) for v in row] for row in moved.tolist()]
    found = prior.fit_prior([prior.tabulate(rows, eager=eager, one_thread=one_thread)])
    assert (found.base, found.slope) == pytest.approx((0.01, 0.04), rel=0.1)
    assert (found.eager, found.one_thread) == pytest.approx((1.0, 1.0), rel=0.1)
    assert found.provenance == "3000 comparisons of 2 runs, 1 machine(s)"


def test_fit_prior_keeps_what_no_comparison_shows():
    assert prior.fit_prior([make_table([[make_one()]])]) == prior.SHIPPED
    found = prior.fit_prior([make_table([[make_one(-0.05), make_one(0.05)]] * 20)])
    assert found.eager == pytest.approx(prior.SHIPPED.eager)
    assert found.base > 4 * prior.SHIPPED.base


def test_check_same_machine_other_processor_is_refused_by_name():
    one = {"processor": "A", "threads": 2}
    runs.check_same_machine([one, dict(one)])
    with pytest.raises(ValueError, match="processor is 'A' in run 1 and 'B' in run 3"):
        runs.check_same_machine([one, one, {"processor": "B", "threads": 2}])
    with pytest.raises(ValueError, match="release is None in run 1 and '6' in run 2"):
        runs.check_same_machine([one, {**one, "release": "6"}])


def test_coverage_two_runs_counts_what_agrees():
    pairs = [(widen(make_one(0.0)), widen(make_one(v))) for v in (0.0, 0.01, -0.01, 0.5)]
    found = runs.coverage([*pairs, (widen(make_one()), widen(from_error(0.0, math.nan, 0, 1)))])
    assert (found.inside, found.comparisons, found.observed, found.nominal) == (3, 4, 0.75, 0.95)
    assert (found.low, found.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert found.deviation > 10
    with pytest.raises(ValueError, match="both runs have"):
        runs.coverage([])


def test_coverage_single_runs_of_the_priors_form_is_nominal():
    pairs = []
    for table, new in simulate("prior", prior.SHIPPED.slope, 1):
        kinds = zip(table.eager, table.one_thread)
        first = runs.combine(table)
        second = [
            widen(make_one(v, math.sqrt(noise), DEGREES), eager=kind[0], one_thread=kind[1])
            for v, noise, kind in zip(new, table.noise[:, 0], kinds)
        ]
        pairs += zip(first, second)
    found = runs.coverage(pairs)
    assert 0.93 <= found.observed <= 0.975
    assert found.deviation == pytest.approx(1.0, abs=0.15)


def test_detectable_slowdown_is_shown_in_nine_of_ten():
    before = widen(make_one(0.2, 0.01))
    slowdown = runs.detectable_slowdown(difference(before.mean, before.mean), margin=0.05)
    assert 0.1 < slowdown < 0.2
    generator = np.random.default_rng(0)
    noise = before.mean.standard_error * math.sqrt(2) * generator.normal(size=20000)
    found = difference(before.mean, before.mean)
    reach = math.log1p(slowdown) + noise - (found.log_ratio - found.low)
    assert np.mean(reach > math.log1p(0.05)) == pytest.approx(0.9, abs=0.02)
    assert runs.detectable_slowdown(from_error(0.0, math.nan, 0, 1)) == math.inf
