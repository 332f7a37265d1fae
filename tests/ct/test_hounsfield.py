"""The metadata table's slope and intercept: applied exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from ct_scans import chest, enhanced, nifti, slices, to_bytes

from mu2llm.ct import Rejection, admit, read


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


@pytest.mark.parametrize("padding", [-500, -1000, -1024, -2000, -3024, -32768, np.nan])
@pytest.mark.parametrize("share", [2, 8])
@pytest.mark.parametrize("offset", [1000, 1024, 8192])
def test_raw_values_with_low_padding_are_not_hu(padding, share, offset):
    raw = chest().astype(np.float32) + offset
    raw[:share] = raw[-share:] = padding
    assert "not_hu" in read(nifti(raw)).warnings
    assert "not_hu" not in read(nifti(raw), rescale=(1, -offset)).warnings
    if not np.isnan(padding):
        assert "not_hu" in read(nifti(raw.astype(np.int16))).warnings


@pytest.mark.parametrize("padding", [-2000, -1, 0, 3000])
@pytest.mark.parametrize("multi_frame", [False, True])
def test_raw_dicom_values_with_padding_are_not_hu(padding, multi_frame):
    for tags in ({"RescaleSlope": None, "RescaleIntercept": None}, {"RescaleIntercept": 0}):
        datasets = slices(chest(), **tags)
        for each in datasets:
            pixels = np.frombuffer(each.PixelData, "<i2").reshape(each.Rows, each.Columns).copy()
            pixels[:3] = padding
            each.PixelData = pixels.tobytes()
            each.add_new("PixelPaddingValue", "SS", padding)
        files = [to_bytes(each) for each in ([enhanced(datasets)] if multi_frame else datasets)]
        with pytest.raises(Rejection, match="not_hu"):
            admit(read(files))


@pytest.mark.parametrize("padding", [-1024, -2000, -3024, np.nan])
def test_hu_with_padding_are_hu(padding):
    for hu in (chest(), np.clip(chest(), -150, 400), np.where(chest() < -900, -1024, chest())):
        stored = hu.astype(np.float32)
        stored[:6] = stored[-6:] = padding
        assert "not_hu" not in read(nifti(stored)).warnings
    body = np.full((20, 20, 20), -1000.0)
    body[5:15, 5:15] = 40
    assert read(nifti(body)).warnings == ()
