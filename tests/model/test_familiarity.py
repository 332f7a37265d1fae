"""Which scans are unlike the training scans."""

import pytest
import torch

from mu2llm.model.familiarity import Familiarity, describe, pooled, unlike


def features(count, seed, shift=0.0):
    mixed = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ mixed + shift


@pytest.fixture(scope="module")
def known():
    return Familiarity.of(features(400, 1))


def test_scans_like_the_training_scans_have_every_percentile_alike(known):
    percentiles = torch.tensor(known.percentiles(features(2000, 2)))
    assert 45 < percentiles.mean() < 55
    assert (percentiles > 99.5).float().mean() < 0.03  # half of one in a hundred, and the chance of 400 scans
    assert (percentiles > 90).float().mean() == pytest.approx(0.1, abs=0.04)


def test_others_are_beyond_all_of_them_and_are_said_to_be(known):
    assert known.percentiles(features(3, 3, shift=30.0)) == [100.0] * 3
    assert unlike(100.0) and not unlike(99.5) and not unlike(None)
    assert describe(100.0).startswith("unlike the training scans") and describe(50.0) == ""
    assert "keeps no statistics" in describe(None)


def test_the_direction_counts_and_not_the_length_alone(known):
    narrow = torch.linalg.eigh(torch.cov(features(400, 1).T)).eigenvectors[:, 0] * 3
    wide = torch.linalg.eigh(torch.cov(features(400, 1).T)).eigenvectors[:, -1] * 3
    assert known.percentiles(narrow[None])[0] > known.percentiles(wide[None])[0]


def test_distances_are_of_scans_that_were_no_part_of_their_statistics():
    few = features(50, 4)  # 50 scans of 6 numbers: fitted on themselves they would all seem near
    known = Familiarity.of(few)
    own = torch.tensor(known.percentiles(few))
    assert own.mean() < 50


def test_too_few_scans_tell_nothing():
    assert Familiarity.of(features(49, 1)) is None


def test_it_lies_in_the_checkpoint_and_older_ones_have_none(known, tmp_path):
    assert Familiarity.read(str(tmp_path)) is None
    known.write(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["familiarity.safetensors"]
    read = Familiarity.read(str(tmp_path))
    assert all(torch.equal(vars(read)[name], x) for name, x in vars(known).items())


def test_empty_chunks_do_not_count():
    x = torch.arange(24.0).reshape(1, 3, 4, 2)
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(pooled(x, mask), x[:, :2].mean((1, 2)))
    assert torch.equal(pooled(x.half(), mask), pooled(x, mask))
