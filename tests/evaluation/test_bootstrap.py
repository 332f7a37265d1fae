"""Intervals: against scipy, coverage, pairing, patients, seeds, nothing to estimate."""

import numpy as np
import pytest
from scipy import stats

from mu2llm.evaluation.bootstrap import Bootstrap, Statistic

RNG = np.random.default_rng(0)
VALUES = RNG.beta(2, 5, size=60)


def test_agrees_with_scipy():
    ours = Bootstrap(range(60), resamples=20000).mean(VALUES)
    theirs = stats.bootstrap((VALUES,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert ours.value == pytest.approx(VALUES.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours.n == 60


def test_same_seed_same_interval_other_seed_another():
    first, again, other = (Bootstrap(range(60), seed=seed).mean(VALUES) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_interval_covers_the_truth_about_95_times_in_100():
    hits = 0
    for trial in range(100):
        sample = np.random.default_rng(trial).normal(0.3, 1, size=80)
        estimate = Bootstrap(range(80), resamples=200, seed=trial).mean(sample)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= hits / 100 <= 0.99


def test_paired_difference_is_narrower_than_the_runs_intervals():
    noise = RNG.normal(0, 0.3, size=60)
    ours, theirs = 0.5 + noise + 0.05, 0.5 + noise
    bootstrap = Bootstrap(range(60))
    difference = bootstrap.difference(Statistic.mean(ours), Statistic.mean(theirs))
    assert difference.value == pytest.approx(0.05)
    assert difference.low == pytest.approx(0.05) and difference.high == pytest.approx(0.05)
    assert bootstrap.mean(ours).low < bootstrap.mean(theirs).high


def test_missing_values_are_left_out_and_counted_out():
    values = [0.5, None, 1.0, np.nan]
    estimate = Bootstrap(range(4)).mean(values)
    assert estimate.value == pytest.approx(0.75)
    assert estimate.n == 2
    pair = Statistic.mean(values), Statistic.mean([0.25, 0.0, None, 0.0])
    difference = Bootstrap(range(4)).difference(*pair)
    assert (difference.value, difference.n) == (0.25, 1)


def test_nothing_to_estimate_is_none():
    assert Bootstrap(range(2)).mean([None, None]) is None
    assert Bootstrap([]).mean([]) is None


def test_whole_patients_are_drawn():
    patients = ["a"] * 30 + ["b"] * 30
    draws = Bootstrap(patients).draws
    assert (draws[:, :30] == draws[:, :1]).all() and (draws[:, 30:] == draws[:, 30:31]).all()
    # two patients with opposite values: the interval must span both, though there are 60 cases
    estimate = Bootstrap(patients).mean([0.0] * 30 + [1.0] * 30)
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_seeds_that_differ_widen_the_interval_as_they_must():
    """Patients alone say ±2·sd(patient)/√n; what differs between seeds was left out."""
    seeds, n, of_seeds, of_patients = 4, 50, 0.2, 0.2
    widths, narrow, rng = [], [], np.random.default_rng(0)
    for trial in range(60):
        drawn = rng.normal(0, of_seeds, seeds)[:, None] + rng.normal(0, of_patients, (1, n)) + np.zeros((seeds, n))
        found = [Statistic.mean(each) for each in drawn]
        bootstrap = Bootstrap(range(n), 400, seed=trial)
        crossed, pooled = bootstrap.over_seeds(found), bootstrap.mean(drawn.mean(axis=0))
        assert crossed.value == pytest.approx(pooled.value)
        widths.append(((crossed.high - crossed.low) / 3.92) ** 2)
        narrow.append(((pooled.high - pooled.low) / 3.92) ** 2)
    true = of_seeds**2 / seeds + of_patients**2 / n
    assert np.mean(widths) == pytest.approx(true, rel=0.35)
    assert np.mean(narrow) < true / 5


def test_a_difference_over_seeds_is_paired_by_seed_and_case():
    rng = np.random.default_rng(1)
    theirs = [rng.uniform(0, 1, 20) + seed for seed in (0.0, 0.3, 0.6)]
    bootstrap = Bootstrap(range(20), 200)
    found = bootstrap.difference_over_seeds(*([Statistic.mean(x + by) for x in theirs] for by in (0.1, 0.0)))
    assert (found.value, found.low, found.high, found.n) == (*[pytest.approx(0.1)] * 3, 20)
    alone = Statistic.mean(theirs[0])
    assert bootstrap.over_seeds([alone]) == bootstrap.estimate(alone) and bootstrap.over_seeds([]) is None


def test_a_metric_of_sums():
    counts = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]] * 5, dtype=float)
    statistic = Statistic(counts, lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2]))
    f1 = Bootstrap(range(15)).estimate(statistic)
    assert f1.value == pytest.approx(0.5)
    assert f1.low < 0.5 < f1.high and f1.n == 15


def test_some_of_the_cases():
    some = Statistic.mean([0.0, None, 1.0, 1.0]).where(np.array([False, True, True, True]))
    estimate = Bootstrap(range(3)).estimate(some)
    assert (estimate.value, estimate.n) == (1.0, 2)


def test_wrong_number_of_cases_says_so():
    with pytest.raises(ValueError, match="a statistic of 2 cases, expected 3"):
        Bootstrap(range(3)).mean([1.0, 2.0])
