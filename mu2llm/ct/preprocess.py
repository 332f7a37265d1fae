"""CTVolume → model input, as a PreprocessSpec says: crop, grid, windows, chunks, quantised.

One separable resampling from stored voxels to the model's grid; nothing of full resolution but the scan itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mu2llm.ct import geometry
from mu2llm.ct.codes import in_order
from mu2llm.ct.resample import Plane, linear_weights, resample, smoothed_linear_weights, triangle_weights
from mu2llm.ct.volume import CTVolume
from mu2llm.errors import UserError
from mu2llm.records import PLAIN_FITS, PreprocessSpec

if TYPE_CHECKING:
    from scipy import sparse

_BODY_HU = -300
_BODY_SHARE = 0.01  # share of a plane that must be body
_CROP_STEP = 4  # voxels looked at on each axis to find the body

SPECS: dict[str, PreprocessSpec] = {
    # the published input (METHOD.md §2.1), number for number but for values below −1024, which `read` clips
    "reference": PreprocessSpec(
        name="reference",
        orientation="as_stored",
        percentiles=(0.5, 99.5),
        fit="reference",
        grid=(256, 256, 256),
        chunks=8,
        dtype="float32",
    ),
    # the same grid, but in mm, in HU windows (lung, soft tissue, bone), in one orientation
    "corrected": PreprocessSpec(
        name="corrected",
        spacing_mm=(1.5, 1.5, 1.5),
        windows=((-1000, 200), (-120, 220), (100, 1100)),
        fit="isotropic",
        grid=(256, 256, 256),
        chunks=8,
    ),
    "demo": PreprocessSpec(
        name="demo",
        windows=((-1000, 200), (-120, 220), (100, 1100)),
        fit="stretch",
        grid=(32, 64, 64),
        chunks=4,
    ),
}


@dataclass(frozen=True)
class ModelInput:
    """What the model sees of one scan, or of the series of an examination, whose chunks stand one behind the other.

    `voxels` (T, C, K, H, W) of the spec's dtype (uint8: 0…255 stands for 0…1), `chunk_mask` (T,) True where a
    chunk holds any of the scan. `affine` maps the whole grid's (column w, row h, slice k) of the first series to mm in
    RAS+: of chunks along the slices alone k is t·K + k of the chunk; `whole` puts tiles together.
    `spec_hash` is of the spec that it was prepared by.
    """

    voxels: np.ndarray
    chunk_mask: np.ndarray
    affine: np.ndarray
    spec_hash: str


def input_key(voxels: np.ndarray, chunk_mask: np.ndarray) -> str:
    """A name for what the model sees of a scan: the same wherever the same scan is prepared by the same spec."""
    return hashlib.blake2b(voxels.tobytes() + chunk_mask.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Axis:
    """How one axis of the scan meets the grid: fitted voxel i is centred at scan voxel start + i·step and lies at
    place offset + i of the grid; there are `count` of them."""

    start: float
    step: float
    count: int
    offset: int
    weights: sparse.csr_matrix


def prepare(scans: CTVolume | Sequence[CTVolume], spec: PreprocessSpec) -> ModelInput:
    """A scan, or the series of an examination, → the model's input as `spec` says; a UserError for more series than it
    reads. Each is prepared as if it were alone; of those that are missing the chunks are empty.

    Slices, rows and columns run as its `axes` say; with orientation `as_stored` they are the file's third, first and
    second axis."""
    volumes = [scans] if isinstance(scans, CTVolume) else scans
    if not 0 < len(volumes) <= spec.series:
        raise UserError(f"{len(volumes)} series of an examination; spec {spec.title} reads {spec.series}")
    parts = [_prepared(volume, spec) for volume in volumes]
    if spec.series == 1:
        return parts[0]
    voxels, mask = np.zeros(spec.shape, spec.dtype), np.zeros(spec.shape[0], bool)
    for number, part in enumerate(parts):
        own = slice(number * spec.chunks, (number + 1) * spec.chunks)
        voxels[own], mask[own] = part.voxels, part.chunk_mask
    return ModelInput(voxels, mask, parts[0].affine, spec.hash)


def warnings(volumes: Sequence[CTVolume], spec: PreprocessSpec) -> tuple[str, ...]:
    """What was set right in the series of an examination, and whether there are fewer than `spec` reads."""
    codes = {code for volume in volumes for code in volume.warnings}
    return in_order(codes | {"series_missing"} if len(volumes) < spec.series else codes)


def _prepared(volume: CTVolume, spec: PreprocessSpec) -> ModelInput:
    """One series by itself: voxels (chunks, C, K, H, W)."""
    scan, to_ras = _axes(volume, spec)
    values, floor = _values(scan, spec)
    exact = spec.percentiles is not None or spec.fit in PLAIN_FITS
    box = _foreground(scan, floor, exact) if spec.crop_foreground else _whole(scan)
    axes = _fit(scan.shape, box, np.linalg.norm(to_ras[:3, 2::-1], axis=0), spec)
    grid = resample(scan, (axes[0].weights, axes[1].weights, axes[2].weights), values)
    to_scan = np.diag([*(axis.step for axis in axes[::-1]), 1.0])
    to_scan[:3, 3] = [axis.start - axis.step * axis.offset for axis in axes[::-1]]
    around = scan.min() if spec.fit == "torchio" else None
    return ModelInput(_voxels(grid, axes, spec, around), _chunk_mask(axes, spec), to_ras @ to_scan, spec.hash)


def whole(voxels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Chunks (T, C, K, H, W) → the first series' whole grid (C, Z, Y, X)."""
    parts = voxels[: spec.chunks].reshape(*spec.tiling, *voxels.shape[1:])
    return np.ascontiguousarray(parts.transpose(3, 0, 4, 1, 5, 2, 6)).reshape(voxels.shape[1], *spec.grid)


def tiled(grids: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Whole grids (B, C, Z, Y, X) → their chunks (B, chunks, C, K, H, W)."""
    count, channels = grids.shape[:2]
    along, down, across = spec.tiling
    depth, height, width = spec.shape[2:]
    parts = grids.reshape(count, channels, along, depth, down, height, across, width).transpose(0, 2, 4, 6, 1, 3, 5, 7)
    return np.ascontiguousarray(parts).reshape(count, spec.chunks, channels, depth, height, width)


def _axes(volume: CTVolume, spec: PreprocessSpec) -> tuple[np.ndarray, np.ndarray]:
    """A view of the scan as (slices, rows, columns), and the affine of (column, row, slice)."""
    if spec.orientation == "RAS":
        turned, affine = geometry.as_stored(volume.hu, volume.affine, spec.axes)
        return turned, affine[:, [2, 1, 0, 3]]
    stored, affine = geometry.as_stored(volume.hu, volume.affine, volume.stored_axes)
    return stored.transpose(2, 0, 1), affine[:, [1, 0, 2, 3]]


def _values(scan: np.ndarray, spec: PreprocessSpec) -> tuple[Plane, float]:
    """What is resampled, as a function of a plane in HU, and the HU above which there is foreground."""
    if spec.percentiles is None:
        assert spec.windows is not None
        low, high = min(low for low, _ in spec.windows), max(high for _, high in spec.windows)
        if spec.fit in PLAIN_FITS:
            return lambda plane: plane.astype(np.float32), low
        return lambda plane: np.clip(plane, low, high).astype(np.float32), _BODY_HU
    low, high = (float(bound) for bound in np.percentile(scan, spec.percentiles))
    width = (high - low) or 1.0
    return lambda plane: np.clip((plane - low) / width, 0, 1).astype(np.float32), low


def _whole(scan: np.ndarray) -> list[tuple[int, int]]:
    return [(0, size) for size in scan.shape]


def _foreground(scan: np.ndarray, floor: float, exact: bool) -> list[tuple[int, int]]:
    """Bounds (first, behind last) along each axis of what is above `floor`: every such voxel (`exact`, the published
    way), else the planes with at least 1 % of such voxels, which leaves stray ones out."""
    step = 1 if exact else _CROP_STEP
    counts = [np.zeros(size, int) for size in (len(range(0, size, step)) for size in scan.shape)]
    for index, plane in enumerate(scan[::step]):
        above = plane[::step, ::step] > floor
        counts[0][index] = np.count_nonzero(above)
        counts[1] += np.count_nonzero(above, axis=1)
        counts[2] += np.count_nonzero(above, axis=0)
    voxels = np.prod([len(count) for count in counts])
    box = []
    for count, size in zip(counts, scan.shape, strict=True):
        found = np.flatnonzero(count >= (1 if exact else max(1, _BODY_SHARE * voxels / len(count))))
        if not found.size:
            return _whole(scan)
        box.append((max(0, int(found[0]) * step - step + 1), min(size, int(found[-1]) * step + step)))
    return box


def _fit(
    shape: tuple[int, ...], box: list[tuple[int, int]], spacing: np.ndarray, spec: PreprocessSpec
) -> tuple[Axis, Axis, Axis]:
    """The three axes (slices, rows, columns) as `spec.fit` says."""
    sizes = np.array([high - low for low, high in box])
    if spec.fit == "reference":
        return _fit_reference(shape, box, sizes, spec)
    if spec.fit in PLAIN_FITS:
        return _fit_plain(shape, box, spacing, spec)
    if spec.fit == "stretch":
        steps = sizes / spec.grid
    else:
        voxel = np.array(spec.spacing_mm or (1.0, 1.0, 1.0))
        scale = (sizes * spacing / voxel / spec.grid).max()
        steps = voxel / spacing * (max(scale, 1.0) if spec.spacing_mm else scale)
    axes = []
    for size, (low, high), step, places in zip(shape, box, steps, spec.grid, strict=True):
        count = int(np.clip(np.ceil((high - low) / step - 1e-6), 1, places))
        start = (low + high - 1 - step * (count - 1)) / 2
        weights = triangle_weights(size, start, step, count)
        axes.append(Axis(start, step, count, (places - count) // 2, weights))
    return axes[0], axes[1], axes[2]


def _fit_reference(
    shape: tuple[int, ...], box: list[tuple[int, int]], sizes: np.ndarray, spec: PreprocessSpec
) -> tuple[Axis, Axis, Axis]:
    """METHOD.md §2.1: rows and columns by one ratio, slices kept or squeezed, padding behind."""
    from scipy import sparse

    ratio = min(places / size for places, size in zip(spec.grid[1:], sizes[1:].tolist(), strict=True))
    counts = [min(int(sizes[0]), spec.grid[0]), *(max(1, int(size * ratio)) for size in sizes[1:].tolist())]
    smooth = any(count < size for count, size in zip(counts, sizes, strict=True))
    axes = []
    for full, (low, high), count in zip(shape, box, counts, strict=True):
        inner = smoothed_linear_weights(high - low, count, smooth)
        left, right = sparse.csr_matrix((count, low)), sparse.csr_matrix((count, full - high))
        weights = sparse.hstack([left, inner, right], format="csr")
        axes.append(Axis(low, (high - low - 1) / max(count - 1, 1), count, 0, weights))
    return axes[0], axes[1], axes[2]


def _fit_plain(
    shape: tuple[int, ...], box: list[tuple[int, int]], spacing: np.ndarray, spec: PreprocessSpec
) -> tuple[Axis, Axis, Axis]:
    """The scan at its own scale, or at `spacing_mm`, its middle cut or padded to the grid.

    `torchio`: Resample, about the middle, and CropOrPad, of TorchIO. `monai`: Spacing, from the first voxel on,
    SpatialPad and CenterSpatialCrop of MONAI. `tiles`: as `monai`, cut to as many whole tiles as the scan fills, which
    are the first of the grid; what is smaller than a tile is padded to one (SPECTRE's windows).
    """
    wanted = spacing if spec.spacing_mm is None else np.array(spec.spacing_mm)
    axes = []
    sides = zip(shape, box, spacing, wanted, spec.grid, spec.tiling, strict=True)
    for size, (low, high), stored, voxel, places, tiles in sides:
        step, inside = float(voxel / stored), high - low
        if spec.fit == "torchio":
            whole = max(1, int(np.floor(inside / step + 1e-9)))
            start = (low + high - 1 - step * (whole - 1)) / 2
        else:
            whole = int(np.rint((inside - 1) / step)) + 1
            start = float(low)
        if spec.fit == "tiles":
            places = places // tiles * int(np.clip(whole // (places // tiles), 1, tiles))
        count = min(whole, places)
        odd = spec.fit == "torchio"  # the larger half in front, where MONAI has it behind
        first, offset = ((left + odd) // 2 for left in (whole - count, places - count))
        start += step * first
        axes.append(Axis(start, step, count, offset, linear_weights(size, start, step, count)))
    return axes[0], axes[1], axes[2]


def _voxels(
    grid: np.ndarray, axes: tuple[Axis, Axis, Axis], spec: PreprocessSpec, around: np.number | None
) -> np.ndarray:
    """The resampled scan in its place, windowed into channels, cut into chunks, quantised; HU `around` it, or black."""
    _, channels, *chunk = spec.shape
    depth, height, width = chunk
    along, down, across = spec.tiling
    voxels = np.zeros((along, down, across, channels, depth, height, width), spec.dtype)
    rows, columns = (slice(axis.offset, axis.offset + axis.count) for axis in axes[1:])
    for channel in range(channels):
        outside = 0 if around is None else _windowed(np.float32(around), channel, spec)
        if outside:
            voxels[:, :, :, channel] = outside
        plane = np.full(spec.grid[1:], outside, spec.dtype)
        for index in range(axes[0].count):
            tile, place = divmod(axes[0].offset + index, depth)
            plane[rows, columns] = _windowed(grid[index], channel, spec)
            voxels[tile, :, :, channel, place] = plane.reshape(down, height, across, width).transpose(0, 2, 1, 3)
    return voxels.reshape(spec.chunks, channels, *chunk)


def _windowed(plane: np.ndarray | np.float32, channel: int, spec: PreprocessSpec) -> np.ndarray:
    """HU, or what percentiles made of them, as a channel stores them."""
    if spec.windows is not None:
        low, high = spec.windows[channel]
        plane = np.clip((plane - low) / (high - low), 0, 1)
    return np.rint(plane * 255) if spec.dtype == "uint8" else np.asarray(plane)


def _chunk_mask(axes: tuple[Axis, Axis, Axis], spec: PreprocessSpec) -> np.ndarray:
    """(T,): the tiles that hold any of the scan along all three axes."""
    held = []
    for axis, places, tiles in zip(axes, spec.grid, spec.tiling, strict=True):
        filled = np.zeros(places, bool)
        filled[axis.offset : axis.offset + axis.count] = True
        held.append(filled.reshape(tiles, -1).any(axis=1))
    return np.einsum("z,y,x->zyx", *held).reshape(-1)
