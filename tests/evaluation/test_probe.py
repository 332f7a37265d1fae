"""The linear probe's parts: areas and ranks that are known, a label that features tell and one that they do not."""

import numpy as np
import pytest
import torch

from mu2llm.evaluation import probe
from mu2llm.green.lexicon import LABELS


def test_the_area_is_how_often_one_that_has_it_scores_above_one_that_lacks_it():
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.random(40), 1), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert probe.auroc(scores, labels, np.ones((1, 40)))[0] == pytest.approx(np.mean(pairs))
    twice = np.concatenate([np.arange(40), np.flatnonzero(labels)[:5]])
    draws = np.bincount(twice, minlength=40)[None].astype(float)
    expected = probe.auroc(scores[twice], labels[twice], np.ones((1, 45)))
    np.testing.assert_allclose(probe.auroc(scores, labels, draws), expected)


def test_the_effective_rank_is_the_number_of_directions():
    rng = np.random.default_rng(0)
    features = torch.zeros(1000, 16)
    features[:, :5] = torch.from_numpy(np.linalg.qr(rng.standard_normal((1000, 5)))[0])
    assert probe.effective_rank(features) == pytest.approx(5, abs=0.05)
    assert probe.effective_rank(features[:, :1] * torch.ones(16)) == pytest.approx(1, abs=0.01)


def test_a_label_that_features_hold_is_read_and_one_that_they_do_not_is_not():
    rng = np.random.default_rng(0)
    train, choose, test = (split(rng, n) for n in (200, 100, 400))
    probabilities, thresholds = probe._fitted(train, choose, test.features)
    areas = [probe.auroc(probabilities[:, i], test.labels[:, i], np.ones((1, 400)))[0] for i in range(2)]
    assert areas[0] > 0.95 and 0.35 < areas[1] < 0.65
    told = probabilities > thresholds
    f1 = 2 * (told & test.labels)[:, 0].sum() / (told[:, 0].sum() + test.labels[:, 0].sum())
    assert f1 > 0.8


def split(rng, n):
    labels = np.zeros((n, len(LABELS)), dtype=bool)
    labels[:, :2] = rng.random((n, 2)) < 0.2
    features = rng.standard_normal((n, 8)) + 3.0 * labels[:, :1] * (np.arange(8) == 3)
    return probe.Scans([], torch.from_numpy(features).float(), labels, None)


def test_labels_are_asked_for_as_the_model_was_trained():
    assert "left pleural effusion" in probe.label_texts("Pleural effusion", "finding")
    assert probe.label_texts("Cardiomegaly", "finding") == ["cardiomegaly"]
    assert "There is pleural effusion." in probe.label_texts("Pleural effusion", "sentence")
    assert all(probe.label_texts(label, "finding") for label in LABELS)
