"""Stored values → HU: scaling, padding, the metadata table's rescale, and whether it can be HU at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mu2llm.ct.codes import AIR_HU

_AIR_FLOOR = -1100  # noise in air reaches no lower
_TISSUE = (-200, 300)  # fat to enhanced organs
_LEAST_DENSE = -80  # some fat, lung or air in a CT is below
_RAW_TISSUE = (700, 1500)  # soft tissue where 1024 was not taken off
_SAMPLE = 500_000  # voxels looked at to judge a distribution


Scaling = tuple[float, float]
Padding = tuple[int, int]  # the least and the greatest stored value for what was not measured


def to_hu(
    planes: np.ndarray, scalings: Sequence[Scaling], paddings: Sequence[Padding | None] | None = None
) -> tuple[np.ndarray, set[str]]:
    """Stored planes (n, h, w) → HU of the same shape, and the warning codes of what was set right.

    Plane i becomes slope·value + intercept by scalings[i]; paddings[i] are its stored values for what was not
    measured. Whole numbers come back as int16, others as float32 (which round as their float64 value would).
    Works plane by plane, never on a float64 volume; int16 that needs no scaling is changed in place.
    """
    if planes.dtype == np.int16 and not any(paddings or ()) and set(scalings) == {(1.0, 0.0)}:
        warnings = {"padding_clipped"} if planes.min() < AIR_HU else set()
        return np.maximum(planes, AIR_HU, out=planes), warnings
    return to_hu_by_plane(planes, planes.shape, scalings, paddings)


def to_hu_by_plane(
    planes: Iterable[np.ndarray],
    shape: tuple[int, ...],
    scalings: Sequence[Scaling],
    paddings: Sequence[Padding | None] | None = None,
) -> tuple[np.ndarray, set[str]]:
    """As `to_hu`, of planes (h, w) that come one by one and make a volume of `shape` (n, h, w)."""
    warnings = set()
    hu = np.empty(shape, np.int16)
    paddings = paddings or [None] * len(scalings)
    for index, (plane, scaling, padding) in enumerate(zip(planes, scalings, paddings, strict=True)):
        values = _scale(plane, *scaling)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            warnings.add("nonfinite_filled")
            values = np.nan_to_num(values, nan=AIR_HU, posinf=AIR_HU, neginf=AIR_HU)
        below = values < AIR_HU
        if padding is not None:
            below |= (plane >= padding[0]) & (plane <= padding[1])
        if below.any():
            warnings.add("padding_clipped")
            values[below] = AIR_HU
        if hu.dtype == np.int16 and not _fits_int16(values):
            hu = hu.astype(np.float32)
        hu[index] = values if hu.dtype == np.int16 else _to_float32(values)
    return hu, warnings


def _scale(plane: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    small = plane.dtype.kind in "iu" and plane.dtype.itemsize <= 4
    if small and slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**24:
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


def apply_table(
    planes: np.ndarray,
    scalings: Sequence[Scaling],
    table: Scaling | None,
    paddings: Sequence[Padding | None] = (),
) -> tuple[list[Scaling], set[str]]:
    """Each plane's scaling with the metadata table's on top, where it is still to be applied; and a warning code.

    `planes` (n, h, w) are stored values, `paddings` those for what was not measured."""
    if table is None or table == (1, 0):
        return list(scalings), set()
    if scalings[0] == table or _is_hu_already(planes, scalings[0], table, next(iter(paddings), None)):
        return list(scalings), {"already_rescaled"}
    slope, intercept = table
    return [(slope * own, slope * shift + intercept) for own, shift in scalings], {"rescaled_by_table"}


def _is_hu_already(planes: np.ndarray, scaling: Scaling, table: Scaling, padding: Padding | None) -> bool:
    """Whether values are HU before the metadata table's slope and intercept.

    CT-RATE's first release stores raw values whose slope and intercept are in a table alone; later releases
    are in HU. Rescaled once more, all that is less dense than soft tissue would fall below −1100 (where nothing
    is but padding), or no soft tissue would be left.
    """
    stored = sample(planes)
    if padding is not None:
        stored = stored[(stored < padding[0]) | (stored > padding[1])]
    values = stored.astype(np.float64) * scaling[0] + scaling[1]
    values = values[np.isfinite(values)]
    measured = values[values > values.min()] if values.size else values
    if not measured.size:
        return False
    again = measured * table[0] + table[1]
    return bool((again < _AIR_FLOOR).mean() >= 0.1 or _share(again, _TISSUE) < 0.05)


def cannot_be_hu(hu: np.ndarray, padded: bool = False) -> bool:
    """True where no CT has such values: none of fat, lung or air, or next to none of soft tissue.

    MR, label maps, 8-bit exports and raw values have nothing below −80; a CT that was rescaled twice has no
    soft tissue left. What was not measured counts as neither: where padding was set to −1024 (`padded`) all of
    −1024 is left out, else a few low values alone beside the soft tissue of raw values are taken for padding.
    """
    values = sample(hu)
    measured = values[values > AIR_HU] if padded else values
    low = measured[measured < _LEAST_DENSE]
    if low.size < 0.001 * measured.size or not low.size or _share(measured, _TISSUE) < 0.005:
        return True
    return len(np.unique(low)) <= 3 and _share(measured, _RAW_TISSUE) > 0.1


def sample(values: np.ndarray) -> np.ndarray:
    """Evenly spaced voxels of a volume, at most half a million or so."""
    step = max(1, int(np.ceil((values.size / _SAMPLE) ** (1 / 3))))
    return values[::step, ::step, ::step].ravel()


def _share(values: np.ndarray, bounds: tuple[int, int]) -> float:
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean())
