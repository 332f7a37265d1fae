"""Findings against the truth, labels, CRG: by hand and against scikit-learn's definitions."""

import numpy as np
import pytest

from mu2llm.evaluation import clinical
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.records import Finding


def f(name, side=None):
    return Finding(name=name, side=side)


def value(statistic):
    estimate = Bootstrap(range(len(statistic.rows)), resamples=200).estimate(statistic)
    return None if estimate is None else estimate.value


TRUTH = [[f("pleural effusion", "left"), f("liver lesion")], [f("pleural effusion", "right")], [], [f("liver lesion")]]


def test_strict_asks_for_the_side_and_any_side_does_not():
    wrong_side = [[f("pleural effusion", "right"), f("liver lesion")], [f("pleural effusion", "right")], [], []]
    scores = clinical.finding_metrics(TRUTH, wrong_side)
    # strict: effusion TP 1, FP 1, FN 1 → .5; lesion TP 1, FN 1 → 2/3
    assert value(scores["finding_f1"]) == pytest.approx((0.5 + 2 / 3) / 2)
    assert value(scores["finding_f1_any_side"]) == pytest.approx((1 + 2 / 3) / 2)
    assert value(scores["finding_recall"]) == pytest.approx((0.5 + 0.5) / 2)
    assert value(scores["finding_precision"]) == pytest.approx((0.5 + 1) / 2)


def test_no_side_where_there_is_one_is_wrong_and_a_side_where_there_is_none_does_not_matter():
    read = [[f("pleural effusion"), f("liver lesion", "right")], [f("pleural effusion")], [], [f("liver lesion")]]
    tally = clinical.tally_findings(TRUTH, read)
    assert tally.names == ("liver lesion", "pleural effusion")
    assert tally.counts.sum(axis=0).tolist() == [[2, 0, 0], [0, 2, 2]]


def test_bilateral_is_both_sides_and_twice_is_once():
    tally = clinical.tally_findings(
        [[f("pleural effusion", "bilateral")]],
        [[f("pleural effusion", "left"), f("pleural effusion", "left"), f("pleural effusion", "right")]],
    )
    assert tally.counts[0].tolist() == [[2, 0, 0]]


def test_perfect_is_1_and_silence_is_0_and_findings_unknown_to_the_truth_do_not_count():
    assert value(clinical.finding_metrics(TRUTH, TRUTH)["finding_f1"]) == 1
    assert value(clinical.finding_metrics(TRUTH, [[]] * 4)["finding_f1"]) == 0
    extra = [[*findings, f("hiatal hernia")] for findings in TRUTH]
    assert value(clinical.finding_metrics(TRUTH, extra)["finding_f1"]) == 1


def test_no_finding_in_the_truth_is_no_score():
    assert value(clinical.finding_metrics([[], []], [[], [f("renal cyst", "left")]])["finding_f1"]) is None


def test_interval_is_over_cases_and_n_counts_them_all():
    estimate = Bootstrap(range(4), resamples=300).estimate(
        clinical.finding_metrics(TRUTH, [TRUTH[0], [], [], TRUTH[3]])["finding_f1"]
    )
    assert estimate.n == 4
    assert estimate.low < estimate.value < estimate.high == 1


LABELS = ("A", "B", "C")


def test_labels_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, given = rng.random((40, 3)) < 0.3, rng.random((40, 3)) < 0.4
    tally = clinical.tally_labels(_rows(true), _rows(given), LABELS)
    scores = {name: value(statistic) for name, statistic in clinical.label_metrics(tally).items()}
    for average in ("macro", "micro"):
        expected = metrics.precision_recall_fscore_support(true, given, average=average)
        for rate, number in zip(("precision", "recall", "f1"), expected, strict=False):
            assert scores[f"ce_{average}_{rate}"] == pytest.approx(number)
    each = metrics.f1_score(true, given, average=None)
    assert [value(s) for s in tally.by_name("f1").values()] == pytest.approx(list(each))


def _rows(table):
    return [dict(zip(LABELS, map(int, row), strict=True)) for row in table]


def test_macro_is_over_the_labels_of_the_truth():
    tally = clinical.tally_labels([{"A": 1}, {"A": 1}], [{"A": 1, "B": 1}, {}], LABELS)
    scores = {name: value(statistic) for name, statistic in clinical.label_metrics(tally).items()}
    assert scores["ce_macro_f1"] == pytest.approx(2 / 3)  # of A alone
    assert scores["ce_micro_f1"] == pytest.approx(0.5)  # B's false positive counts here


def crg_of(truth, given):
    return value(clinical.crg(clinical.tally_labels(truth, given, LABELS)))


def test_crg_by_hand():
    truth = [{"A": 1}, {"B": 1}]  # X = 6, A = 2, r = 1, U = 2
    assert crg_of(truth, truth) == pytest.approx(1)
    assert crg_of(truth, [{}, {}]) == pytest.approx(2 / (4 + 2))
    # TP 1, FN 1, FP 1: s = 1 − 1 − 1 = −1
    assert crg_of(truth, [{"A": 1}, {"C": 1}]) == pytest.approx(2 / 5)
    assert crg_of([{}, {}], [{}, {}]) is None
