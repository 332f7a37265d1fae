"""Augmentation that leaves every word of the report true."""

from __future__ import annotations

import numpy as np


def augment(voxels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Voxels (…, T, C, K, H, W) → the same shape and dtype: another gain, noise and place in the plane.

    Nothing is mirrored or turned: a report says left and right (METHOD.md §2.8, 4), and sizes stay as they are.
    Black (padding, air) stays black. Integers are taken as 0…255, floats as 0…1.
    """
    top = 255.0 if voxels.dtype.kind in "iu" else 1.0
    height, width = voxels.shape[-2:]
    shift = [int(rng.integers(-size // 32, size // 32 + 1)) for size in (height, width)]
    moved = _shift(voxels, shift)
    bright = moved.astype(np.float32) * np.float32(rng.uniform(0.9, 1.1))
    bright += rng.standard_normal(moved.shape, dtype=np.float32) * np.float32(0.01 * top) * (moved > 0)
    np.clip(bright, 0, top, out=bright)
    return (np.rint(bright) if top == 255.0 else bright).astype(voxels.dtype)


def _shift(voxels: np.ndarray, shift: list[int]) -> np.ndarray:
    """Moves the last two axes by whole voxels, black coming in."""
    moved = np.zeros_like(voxels)
    to, source = [], []
    for by, size in zip(shift, voxels.shape[-2:], strict=True):
        to.append(slice(max(by, 0), size + min(by, 0)))
        source.append(slice(max(-by, 0), size + min(-by, 0)))
    moved[..., to[0], to[1]] = voxels[..., source[0], source[1]]
    return moved
