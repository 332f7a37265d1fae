"""A scan as the model sees it → pictures of its three planes, small enough to lie in a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

MOST_TILES = 32
LONGEST = 160
"""Slices of a plane, and pixels of a slice's longer side, at most."""


@dataclass(frozen=True)
class Plane:
    """Slices of one plane side by side in one picture (a data URI), each shown `width` × `height` mm large."""

    name: str
    picture: str
    tiles: int
    width: float
    height: float


def planes(voxels: np.ndarray, affine: np.ndarray) -> list[Plane]:
    """(T, C, K, H, W) and the grid's affine → axial, coronal and sagittal slices in radiological view.

    Patient's right is at the left, front and head are up. The first three channels (windows) are the picture's red,
    green and blue, for the page to choose from; one channel is all three.
    """
    volume = _volume(voxels)
    flips = tuple(2 - axis for axis in range(3) if affine[axis, axis] > 0)  # towards right, front, head: to be turned
    volume = np.flip(volume, flips)
    depth, height, width = (float(np.linalg.norm(affine[:3, axis])) * volume.shape[2 - axis] for axis in (2, 1, 0))
    return [
        _plane("axial", np.flip(volume, 0), width, height),
        _plane("coronal", volume.transpose(1, 0, 2, 3), width, depth),
        _plane("sagittal", volume.transpose(2, 0, 1, 3), height, depth),
    ]


def _volume(voxels: np.ndarray) -> np.ndarray:
    """(slices, rows, columns, 3) uint8"""
    scaled = voxels if voxels.dtype == np.uint8 else (np.clip(voxels.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    chunks, channels, slices, height, width = scaled.shape
    volume = scaled.transpose(0, 2, 3, 4, 1).reshape(chunks * slices, height, width, channels)
    return volume[..., [min(i, channels - 1) for i in range(3)]]


def _plane(name: str, slices: np.ndarray, width: float, height: float) -> Plane:
    """Evenly chosen slices (n, rows, columns, 3) in one row."""
    chosen = np.unique(np.linspace(0, len(slices) - 1, min(MOST_TILES, len(slices))).round().astype(int))
    step = max(1, -(-max(slices.shape[1:3]) // LONGEST))
    strip = np.concatenate(list(slices[chosen, ::step, ::step]), axis=1)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(strip)).save(stream, "JPEG", quality=82, subsampling=0)
    uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return Plane(name, uri, len(chosen), width, height)
