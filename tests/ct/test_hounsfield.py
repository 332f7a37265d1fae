"""The metadata table's slope and intercept: applied exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from ct_scans import chest, nifti, slices, to_bytes

from mu2llm.ct import read


def padded_chest() -> np.ndarray:
    hu = chest()
    hu[:2] = -1024
    return hu


@pytest.mark.parametrize("intercept", [-1024, -8192])
@pytest.mark.parametrize("padding", [None, -3000])
def test_raw_values_get_the_table_once(intercept, padding):
    hu = padded_chest()
    raw = hu - np.int16(intercept)
    if padding is not None:
        raw[:2] = padding - intercept
    volume = read(nifti(raw), rescale=(1, intercept))
    np.testing.assert_array_equal(volume.hu, hu)
    assert "rescaled_by_table" in volume.warnings
    assert "not_hu" not in volume.warnings


@pytest.mark.parametrize("intercept", [-1024, -8192])
@pytest.mark.parametrize("padding", [-1024, -8192])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_values_in_hu_are_recognised(intercept, padding, dtype):
    hu = padded_chest()
    stored = hu.astype(dtype)
    stored[:2] = padding
    volume = read(nifti(stored), rescale=(1, intercept))
    np.testing.assert_array_equal(volume.hu, hu)
    assert "already_rescaled" in volume.warnings


def test_soft_tissue_alone_in_hu_is_recognised():
    hu = np.random.default_rng(0).normal(60, 20, (9, 9, 9)).astype(np.int16)
    np.testing.assert_array_equal(read(nifti(hu), rescale=(1, -1024)).hu, hu)


def test_the_headers_own_scaling_is_not_repeated():
    raw = (chest() + 1024).astype(np.int16)
    volume = read(nifti(raw, scaling=(1, -1024)), rescale=(1, -1024))
    np.testing.assert_array_equal(volume.hu, chest())
    assert volume.warnings == ("already_rescaled",)


def test_dicom_that_scales_itself_is_not_scaled_again():
    volume = read([to_bytes(each) for each in slices(chest())], rescale=(1, -8192))
    np.testing.assert_array_equal(volume.hu, chest())
    assert volume.warnings == ("already_rescaled",)


def test_no_table_and_an_identity_say_nothing():
    assert read(nifti(chest()), rescale=(1, 0)).warnings == ()
