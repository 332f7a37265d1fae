"""GREEN and length: what longer reports gain is told apart from what better ones do."""

import numpy as np
import pytest

from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.length import at_matched_length, correlation

RNG = np.random.default_rng(0)
WORDS = RNG.integers(5, 80, 200)
REPORTS = [" ".join(["word"] * n) for n in WORDS]


def estimate(statistic):
    return Bootstrap(range(len(statistic.rows)), 200).estimate(statistic)


def test_correlation_is_pearsons():
    scores = np.clip(np.log(WORDS) / 6 + RNG.normal(0, 0.1, 200), 0, 1).tolist()
    assert estimate(correlation(scores, REPORTS)).value == pytest.approx(np.corrcoef(np.log(WORDS), scores)[0, 1])
    some = [None if i % 4 == 0 else score for i, score in enumerate(scores)]
    kept = np.arange(200) % 4 > 0
    found = estimate(correlation(some, REPORTS))
    assert found.n == 150
    assert found.value == pytest.approx(np.corrcoef(np.log(WORDS)[kept], np.array(scores)[kept])[0, 1])


def test_no_correlation_of_what_does_not_vary():
    assert estimate(correlation([0.5] * 200, REPORTS)) is None
    assert estimate(correlation([0.1, 0.9], ["a b", "c d"])) is None


def test_a_gain_by_words_alone_is_none_at_matched_length():
    longer = [f"{report} {' '.join(['more'] * n)}" for report, n in zip(REPORTS, RNG.integers(1, 60, 200), strict=True)]
    base = RNG.uniform(0.2, 0.5, 200)
    ratio = np.array([np.log(len(a.split()) / len(b.split())) for a, b in zip(longer, REPORTS, strict=True)])
    by_length = (base + 0.1 * ratio).tolist()
    found = estimate(at_matched_length((by_length, longer), (base.tolist(), REPORTS)))
    assert np.mean(by_length) - base.mean() > 0.03
    assert found.value == pytest.approx(0, abs=1e-9) and found.n == 200
    better = [score + 0.05 for score in by_length]
    assert estimate(at_matched_length((better, longer), (base.tolist(), REPORTS))).value == pytest.approx(0.05)


def test_of_equal_lengths_it_is_the_difference():
    found = estimate(at_matched_length(([0.5, 0.7, None], ["a", "b", "c"]), ([0.25, 0.25, 0.25], ["d", "e", "f"])))
    assert found.value == pytest.approx(0.35) and found.n == 2
