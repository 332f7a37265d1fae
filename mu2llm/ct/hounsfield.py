"""Stored values → HU: scaling, padding, the metadata table's rescale, and whether it can be HU at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mu2llm.ct.codes import AIR_HU

_AIR = (-1100, -300)  # air and lung
_TISSUE = (-200, 300)  # fat to enhanced organs
_SAMPLE = 500_000  # voxels looked at to judge a distribution


def to_hu(
    planes: np.ndarray,
    slopes: Sequence[float],
    intercepts: Sequence[float],
    padding: Sequence[int | None] | None = None,
) -> tuple[np.ndarray, set[str]]:
    """Stored planes (n, h, w) → HU of the same shape, and the warning codes of what was set right.

    Plane i becomes slopes[i]·value + intercepts[i]. Whole numbers come back as int16, others as float32
    (rounding each as its float64 value would). padding[i] is plane i's stored value for what was not measured.
    Works plane by plane, never on a float64 volume; int16 that needs no scaling is changed in place.
    """
    padding = padding or [None] * len(planes)
    if planes.dtype == np.int16 and set(padding) == {None} and set(slopes) == {1} and set(intercepts) == {0}:
        warnings = {"padding_clipped"} if planes.min() < AIR_HU else set()
        return np.maximum(planes, AIR_HU, out=planes), warnings
    warnings = set()
    hu = np.empty(planes.shape, np.int16)
    for index, plane in enumerate(planes):
        values = _scale(plane, slopes[index], intercepts[index])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            warnings.add("nonfinite_filled")
            values = np.nan_to_num(values, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
        below = values < AIR_HU
        if padding[index] is not None:
            below |= plane == padding[index]
        if below.any():
            warnings.add("padding_clipped")
            values[below] = AIR_HU
        if hu.dtype == np.int16 and not _fits_int16(values):
            hu = hu.astype(np.float32)
        hu[index] = values if hu.dtype == np.int16 else _to_float32(values)
    return hu, warnings


def _scale(plane: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    small = plane.dtype.kind in "iu" and plane.dtype.itemsize <= 4
    if small and float(slope).is_integer() and float(intercept).is_integer() and abs(slope) < 2**15:
        return plane.astype(np.int64) * int(slope) + int(intercept)
    with np.errstate(over="ignore", invalid="ignore"):
        return plane.astype(np.float64) * slope + intercept


def _fits_int16(values: np.ndarray) -> bool:
    whole = values.dtype.kind == "i" or bool((np.rint(values) == values).all())
    return whole and values.max() <= np.iinfo(np.int16).max


def _to_float32(values: np.ndarray) -> np.ndarray:
    """float64 → float32 that rounds to the same whole number."""
    limit = np.finfo(np.float32).max
    near = np.clip(values, -limit, limit).astype(np.float32)
    whole = np.rint(values)
    off = np.rint(near) != whole
    if off.any():
        near[off] = np.nextafter(near[off], whole[off].astype(np.float32))
    return near


def needs_table(planes: np.ndarray, header: tuple[float, float], table: tuple[float, float]) -> bool:
    """Whether the metadata table's (slope, intercept) still has to be applied after the header's.

    CT-RATE's first release stores raw values whose slope and intercept are in a table alone; later releases
    are in HU already. Applied to HU once more, everything less dense than soft tissue would fall below −1100
    (nothing does but padding), or no soft tissue would be left; then it has been applied.
    """
    slope, intercept = table
    if (slope, intercept) == (1, 0) or header == table:
        return False
    stored = sample(planes).astype(np.float64) * header[0] + header[1]
    stored = stored[np.isfinite(stored)]
    measured = stored[stored > stored.min()] if stored.size else stored
    if not measured.size:
        return True
    scaled = measured * slope + intercept
    return bool((scaled < _AIR[0]).mean() < 0.1 and _share(scaled, _TISSUE) >= 0.05)


def cannot_be_hu(hu: np.ndarray) -> bool:
    """True where no CT has such values: none of fat, lung or air, or next to none of soft tissue.

    MR, label maps, 8-bit exports and raw values have nothing below −80; a CT that was rescaled twice has no
    soft tissue left.
    """
    values = sample(hu)
    return bool((values < -80).mean() < 0.001 or _share(values, _TISSUE) < 0.005)


def sample(values: np.ndarray) -> np.ndarray:
    """Evenly spaced voxels of a volume, at most half a million or so."""
    step = max(1, int(np.ceil((values.size / _SAMPLE) ** (1 / 3))))
    return values[::step, ::step, ::step].ravel()


def _share(values: np.ndarray, bounds: tuple[int, int]) -> float:
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean())
