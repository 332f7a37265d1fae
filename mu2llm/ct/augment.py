"""Augmentation that leaves every word of the report true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def augment_batch(scans: np.ndarray, rows: Sequence[int], seed: int) -> np.ndarray:
    """Scans (B, T, C, K, H, W) → the same shape and dtype, each augmented by `seed` and its row of the stream: the same
    whichever worker reads it, and after a resume."""
    return np.stack(
        [augment(scan, np.random.default_rng([seed, int(row)])) for scan, row in zip(scans, rows, strict=True)]
    )


def augment(voxels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Voxels (…, K, H, W) → the same shape and dtype: another gain, noise and place in the plane.

    Nothing is mirrored or turned: a report says left and right (METHOD.md §2.8, 4), and sizes stay as they are.
    Black (padding, air) stays black. Integers are taken as 0…255, floats as 0…1.
    """
    top = 255.0 if voxels.dtype.kind in "iu" else 1.0
    gain, noise = np.float32(rng.uniform(0.9, 1.1)), np.float32(0.01 * top)
    shift = [int(rng.integers(-size // 32, size // 32 + 1)) for size in voxels.shape[-2:]]
    changed = _shift(voxels, shift)
    for plane in changed.reshape(-1, *voxels.shape[-2:]):  # a view: one plane at a time is in float32
        bright = plane * gain + rng.standard_normal(plane.shape, dtype=np.float32) * noise * (plane > 0)
        np.clip(bright, 0, top, out=bright)
        plane[:] = np.rint(bright) if top == 255.0 else bright
    return changed


def _shift(voxels: np.ndarray, shift: list[int]) -> np.ndarray:
    """Moves the last two axes by whole voxels, black coming in."""
    moved = np.zeros(voxels.shape, voxels.dtype)
    to, source = [], []
    for by, size in zip(shift, voxels.shape[-2:], strict=True):
        to.append(slice(max(by, 0), size + min(by, 0)))
        source.append(slice(max(-by, 0), size + min(-by, 0)))
    moved[..., to[0], to[1]] = voxels[..., source[0], source[1]]
    return moved
