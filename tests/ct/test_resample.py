"""The matrices of separable resampling."""

from __future__ import annotations

import numpy as np
import pytest

from mu2llm.ct.resample import resample, smoothed_linear_weights, triangle_weights


@pytest.mark.parametrize(
    ("start", "step", "count"), [(0, 1, 12), (0.5, 2, 6), (1.2, 0.3, 20), (-3, 2.5, 9), (30, 1, 2)]
)
def test_triangles_keep_constants_and_ramps(start, step, count):
    weights = triangle_weights(12, start, step, count)
    assert weights.shape == (count, 12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    places = start + step * np.arange(count)
    inside = (places - max(step, 1) >= -1) & (places + max(step, 1) <= 12)
    np.testing.assert_allclose((weights @ np.arange(12.0))[inside], places[inside], atol=0.05 * step)


def test_aligned_corners_keep_the_corners():
    weights = smoothed_linear_weights(5, 9, smooth=True)  # it grows, so nothing is smoothed
    np.testing.assert_allclose(weights @ np.arange(5.0), np.arange(9) / 2)


@pytest.mark.parametrize(("size", "count"), [(2, 1), (5, 1), (9, 2), (300, 3)])
def test_a_gaussian_wider_than_the_axis(size, count):
    weights = smoothed_linear_weights(size, count, smooth=True)
    assert weights.shape == (count, size)
    assert np.isfinite(weights.toarray()).all()


def test_axes_are_resampled_one_by_one():
    volume = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
    matrices = [triangle_weights(size, 0.2, 1.3, count) for size, count in ((6, 3), (7, 5), (8, 4))]
    expected = np.einsum("az,by,cx,zyx->abc", *[each.toarray() for each in matrices], volume)
    np.testing.assert_allclose(resample(volume, tuple(matrices), lambda plane: plane), expected, atol=1e-5)
