"""Voxels that follow a header as plain numbers: checked before they are read, then streamed into one array as HU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mu2llm.ct import sources
from mu2llm.ct.codes import MAX_VOXELS
from mu2llm.ct.hounsfield import Scaling, apply_table, to_hu, to_hu_by_plane
from mu2llm.errors import Rejection


@dataclass(frozen=True)
class Stored:
    """What a file holds: `shape` (x, y, z), x fastest, numbers of `dtype`, which slope and intercept make HU."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    scaling: Scaling = (1.0, 0.0)


def check_shape(shape: Sequence[int], uri: str) -> tuple[int, int, int]:
    """The shape of one volume within the limits, trailing axes of one voxel left out; else a Rejection."""
    if any(size < 1 for size in shape) or not shape:
        raise Rejection(uri, "empty", f"no voxels: shape {tuple(shape)}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Rejection(uri, "not_3d", f"{len(shape)}-D of shape {tuple(shape)}, expected one 3-D volume")
    if math.prod(shape) > MAX_VOXELS:
        raise Rejection(uri, "too_large", f"{'×'.join(map(str, shape))} voxels; a scan has at most {MAX_VOXELS}")
    return shape[0], shape[1], shape[2]


def check_promise(shape: Sequence[int], dtype: np.dtype, most: int, uri: str) -> None:
    """Rejects a header that promises more voxels than `most` bytes, which is all that the file can hold."""
    promised = math.prod(shape) * dtype.itemsize
    if promised > most:
        raise Rejection(uri, "truncated", f"the header promises {promised} bytes of voxels; the file cannot hold them")


def read(stream: sources.Stream, stored: Stored, uri: str, rescale: Scaling | None) -> tuple[np.ndarray, set[str]]:
    """The stream's voxels, up to its end, → HU (x, y, z) and warnings; `rescale` is the metadata table's."""
    shape, dtype = stored.shape, stored.dtype
    scalings = [stored.scaling] * shape[2]
    table_warnings: set[str] = set()
    if dtype.itemsize > 2 and rescale is None:  # wide ones take several times the memory of their HU
        planes = (_fill(stream, (1, *shape[1::-1]), dtype, uri)[0] for _ in range(shape[2]))
        hu, warnings = to_hu_by_plane(planes, shape[::-1], scalings)
    else:
        whole = _fill(stream, shape[::-1], dtype, uri)
        scalings, table_warnings = apply_table(whole, scalings, rescale)
        hu, warnings = to_hu(whole, scalings)
    sources.check_end(stream, uri)
    return hu.transpose(2, 1, 0), warnings | table_warnings


def _fill(stream: sources.Stream, shape: tuple[int, ...], dtype: np.dtype, uri: str) -> np.ndarray:
    """The next voxels as (z, y, x), C order, in the machine's byte order."""
    planes = np.empty(shape, dtype)
    sources.fill(stream, planes.view(np.uint8).reshape(-1).data, uri)
    return planes if dtype.isnative else planes.byteswap(inplace=True).view(dtype.newbyteorder())
