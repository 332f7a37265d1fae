"""Separable resampling: one sparse matrix an axis, a volume read plane by plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

Plane = Callable[[np.ndarray], np.ndarray]


def triangle_weights(size: int, start: float, step: float, count: int) -> sparse.csr_matrix:
    """Linear interpolation that averages where it shrinks: (count, size), rows sum to 1.

    Output i is centred at voxel start + i·step of the input (in voxels, centres at whole numbers), with a
    triangle max(step, 1) wide on either side; beyond the ends the last voxels count more.
    """
    from scipy import sparse  # half a second of CPU, which who only reads scans need not wait for

    reach = max(step, 1.0)
    centres = start + step * np.arange(count)
    taps = np.arange(int(np.ceil(2 * reach)) + 1)
    columns = np.floor(centres - reach).astype(int)[:, None] + 1 + taps
    weights = np.maximum(1 - np.abs(columns - centres[:, None]) / reach, 0)
    weights[(columns < 0) | (columns >= size)] = 0
    missing = weights.sum(axis=1) == 0
    columns = np.clip(columns, 0, size - 1)
    weights[missing, 0] = 1
    rows = np.repeat(np.arange(count), len(taps))
    flat = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32).ravel()
    return sparse.csr_matrix((flat, (rows, columns.ravel())), shape=(count, size))


def linear_weights(size: int, start: float, step: float, count: int) -> sparse.csr_matrix:
    """Linear interpolation at start + i·step: (count, size); beyond the ends the last voxel."""
    from scipy import sparse

    places = np.clip(start + step * np.arange(count), 0, size - 1)
    low = np.minimum(places.astype(int), size - 1)
    share = (places - low).astype(np.float32)
    rows = np.repeat(np.arange(count), 2)
    columns = np.stack([low, np.minimum(low + 1, size - 1)], axis=1).ravel()
    return sparse.csr_matrix((np.stack([1 - share, share], axis=1).ravel(), (rows, columns)), shape=(count, size))


def smoothed_linear_weights(size: int, count: int, smooth: bool) -> sparse.csr_matrix:
    """What the published preprocessing does to one axis: (count, size).

    Linear interpolation with aligned corners; where any axis shrinks (`smooth`), after a Gaussian of
    σ = (size/count − 1)/2, integrated over voxels, cut at 4σ and zero beyond the ends (METHOD.md §2.1).
    """
    from scipy import sparse, special

    places = np.arange(count) * ((size - 1) / max(count - 1, 1))
    low = np.minimum(places.astype(int), size - 1)
    share = places - low
    rows = np.arange(count)
    linear = sparse.csr_matrix((1 - share, (rows, low)), shape=(count, size))
    linear += sparse.csr_matrix((share, (rows, np.minimum(low + 1, size - 1))), shape=(count, size))
    sigma = (size / count - 1) / 2
    if not smooth or sigma <= 0:
        return linear.tocsr().astype(np.float32)
    tail = int(max(sigma * 4, 0.5) + 0.5)
    tail = min(tail, size - 1)
    edges = (np.arange(-tail, tail + 2) - 0.5) / sigma / np.sqrt(2)
    kernel = np.diff(special.erf(edges)) / 2
    gaussian = sparse.diags([np.full(size, k) for k in kernel], range(-tail, tail + 1), shape=(size, size))
    return (linear @ gaussian).tocsr().astype(np.float32)


def resample(
    volume: np.ndarray,
    weights: tuple[sparse.csr_matrix, sparse.csr_matrix, sparse.csr_matrix],
    values: Plane,
) -> np.ndarray:
    """(z, y, x) of any type → float32 (counts of the three matrices); `values` maps each plane to float32 first.

    One plane is in float32 at a time, and only rows and columns that the matrices read.
    """
    along_z, along_y, along_x = weights
    to = along_z.tocsc()
    rows, columns = _span(along_y), _span(along_x)
    along_y, along_x = along_y[:, rows], along_x[:, columns]
    out = np.zeros((along_z.shape[0], along_y.shape[0], along_x.shape[0]), np.float32)
    for index in range(to.shape[1]):
        entries = slice(to.indptr[index], to.indptr[index + 1])
        if not to.data[entries].any():
            continue
        plane = along_y @ values(volume[index, rows, columns])
        plane = (along_x @ np.ascontiguousarray(plane.T)).T
        for target, share in zip(to.indices[entries], to.data[entries], strict=True):
            out[target] += share * plane
    return out


def _span(weights: sparse.csr_matrix) -> slice:
    used = weights.indices[weights.data != 0]
    return slice(int(used.min()), int(used.max()) + 1)
