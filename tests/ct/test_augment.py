"""Augmentation never makes the report wrong."""

from __future__ import annotations

import numpy as np
import pytest

from mu2llm.ct import augment, augment_batch

SHAPE = (2, 1, 8, 64, 64)


def lesion_on_one_side() -> np.ndarray:
    """A body with a lesion right, front and above of its middle."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[..., 8:56, 8:56] = 100
    voxels[1, :, 2:6, 36:44, 40:50] = 220
    return voxels


def centre(voxels: np.ndarray) -> np.ndarray:
    weight = (voxels > 170).astype(float)
    return np.array([(weight.sum(axis=tuple({0, 1, 2, 3, 4} - {axis})) * np.arange(SHAPE[axis])).sum() / weight.sum()
                     for axis in (0, 2, 3, 4)])  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_left_stays_left_up_stays_up_and_front_stays_front(seed):
    voxels = lesion_on_one_side()
    changed = augment(voxels, np.random.default_rng(seed))
    assert (changed.shape, changed.dtype) == (voxels.shape, voxels.dtype)
    assert np.abs(centre(changed) - centre(voxels)).max() < 2.5  # it is 9 columns right of the middle
    assert (changed > 170).sum() == (voxels > 170).sum()  # and as large as it was


def test_it_changes_something_and_the_same_seed_changes_the_same():
    voxels = lesion_on_one_side()
    first, again, other = (augment(voxels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != voxels).any() and (first != other).any()
    np.testing.assert_array_equal(voxels, lesion_on_one_side())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_floats_stay_between_0_and_1_and_padding_black(dtype):
    voxels = (lesion_on_one_side() / 255).astype(dtype)
    voxels[0] = 0
    changed = augment(voxels, np.random.default_rng(0))
    assert changed.dtype == dtype
    assert changed.min() >= 0 and 0.5 < changed.max() <= 1
    assert not changed[0].any()


def test_a_scan_is_augmented_by_its_row_whichever_batch_it_is_in():
    scans = np.stack([lesion_on_one_side()] * 3)
    whole = augment_batch(scans, [4, 5, 6], seed=1)
    np.testing.assert_array_equal(augment_batch(scans[1:2], [5], seed=1)[0], whole[1])
    assert all((whole[i] != whole[i + 1]).any() for i in range(2))
    assert (augment_batch(scans, [4, 5, 6], seed=2) != whole).any()
