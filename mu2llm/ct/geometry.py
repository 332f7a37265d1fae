"""Where voxels lie in the body: soundness, closest canonical axes, straight grids, equal steps.

Arrays are (x, y, z) with an affine to mm in RAS+, as nibabel has them, unless said otherwise.
"""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
from nibabel import affines

from mu2llm.ct.codes import AIR_HU, MAX_VOXELS
from mu2llm.errors import Rejection

_STRAIGHT = 1e-3  # cosine between axes below which a grid counts as straight (0.06°)
_MAX_SHEAR = 0.71  # cosine: 45°; gantries tilt by 30° at most
_SPACING_MM = (0.01, 30.0)
_OBLIQUE_DEGREES = 1.0
_MOST_RESAMPLED = 1.5  # slices of the result for one that was scanned
SAME_PLACE_MM = 0.01


def check_affine(affine: np.ndarray, uri: str) -> None:
    """Rejects an affine that cannot be one of a scan."""
    if not np.isfinite(affine).all():
        raise Rejection(uri, "bad_geometry", "the affine is not finite")
    spacing = affines.voxel_sizes(affine)
    low, high = _SPACING_MM
    if (spacing < low).any() or (spacing > high).any():
        sizes = "×".join(f"{size:g}" for size in spacing)
        raise Rejection(uri, "bad_geometry", f"voxels of {sizes} mm; each side must be {low:g} to {high:g} mm")
    if max(np.abs(_cosines(affine))) > _MAX_SHEAR or abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.3:
        raise Rejection(uri, "bad_geometry", "the affine is singular or sheared by more than 45°")


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Array and affine in the closest canonical (RAS+) axes, as views, and the axes as stored, such as "LPS"."""
    orientation = nib.orientations.io_orientation(affine)
    stored = "".join(nib.orientations.ornt2axcodes(orientation))
    turned = nib.orientations.apply_orientation(array, orientation)
    return turned, affine @ nib.orientations.inv_ornt_aff(orientation, array.shape), stored


def as_stored(array: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `canonical`: array and affine in the axes of the file, as views."""
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    return nib.orientations.apply_orientation(array, back), affine @ nib.orientations.inv_ornt_aff(back, array.shape)


def is_oblique(affine: np.ndarray) -> bool:
    """Whether an axis of the grid is more than a degree off the body's closest one."""
    return bool(np.degrees(affines.obliquity(affine)).max() > _OBLIQUE_DEGREES)


def is_sheared(affine: np.ndarray) -> bool:
    return bool(max(np.abs(_cosines(affine))) > _STRAIGHT)


def straighten(hu: np.ndarray, affine: np.ndarray, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Resamples a sheared grid onto a straight one that holds all of it, linear, −1024 outside.

    The two axes that are closest to perpendicular keep their direction (of a tilted gantry, the slice plane:
    then slices only shift within themselves and nothing is blurred between them); the third becomes their normal.
    """
    straight, third = _straight_axes(affine)
    corners = np.array(list(itertools.product(*[(0, size - 1) for size in hu.shape])))
    places = (np.linalg.inv(straight) @ affine[:3, :3] @ corners.T).T
    first = places.min(axis=0)
    shape = tuple(int(n) for n in np.ceil(places.max(axis=0) - first - 1e-6).astype(int) + 1)
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise Rejection(uri, "too_large", f"straightened it would have {'×'.join(map(str, shape))} voxels")
    grid = np.eye(4)
    grid[:3, :3] = straight
    grid[:3, 3] = affine[:3, 3] + straight @ first
    there = np.linalg.inv(affine) @ grid
    if _only_shifts(there, third, shape):
        return _shift_slices(hu, there, third, shape), grid
    from scipy import ndimage  # half a second of CPU: only where a scan is tilted

    out = ndimage.affine_transform(
        hu, there[:3, :3], there[:3, 3], output_shape=shape, order=1, mode="grid-constant", cval=AIR_HU
    )
    return out, grid


def _only_shifts(there: np.ndarray, third: int, shape: tuple[int, ...]) -> bool:
    """Whether a map between grids leaves each slice along an axis as it is, but for its place in its own plane."""
    rest = (there - np.eye(4))[:3]
    within = np.arange(3) != third
    rest[within, third] = rest[within, 3] = 0
    return bool((np.abs(rest) @ [*shape, 1] < 0.02).all())  # voxels, at the far corner


def _shift_slices(hu: np.ndarray, there: np.ndarray, third: int, shape: tuple[int, ...]) -> np.ndarray:
    """What the general resampling gives, some thirty times faster: every slice moved within its plane, linear."""
    slices = np.moveaxis(hu, third, 0)
    rows, columns = (axis for axis in range(3) if axis != third)
    out = np.empty((shape[third], shape[rows], shape[columns]), hu.dtype)
    for index, plane in enumerate(slices):
        moved = plane
        for axis, size in enumerate(out.shape[1:]):
            by = there[(rows, columns)[axis], third] * index + there[(rows, columns)[axis], 3]
            moved = _shifted(moved, float(by), axis, size)
        out[index] = np.rint(moved) if hu.dtype.kind == "i" else moved
    return np.moveaxis(out, 0, third)


def _shifted(plane: np.ndarray, by: float, axis: int, size: int) -> np.ndarray:
    """Place i of an axis is place i + `by` of the plane's, between two of them linearly; −1024 beyond its ends."""
    first = int(np.floor(by + 1e-6))
    share = np.float32(max(by - first, 0.0))
    low = _taken(plane, first, axis, size)
    return low if share < 1e-4 else low * (1 - share) + _taken(plane, first + 1, axis, size) * share


def _taken(plane: np.ndarray, first: int, axis: int, size: int) -> np.ndarray:
    """`size` places of an axis from the `first` on (may be negative), −1024 beyond the ends; float32."""
    along = np.moveaxis(plane, axis, 0)
    out = np.full((size, along.shape[1]), AIR_HU, np.float32)
    start, stop = max(first, 0), min(first + size, len(along))
    if stop > start:
        out[start - first : stop - first] = along[start:stop]
    return np.moveaxis(out, 0, axis)


def _straight_axes(affine: np.ndarray) -> tuple[np.ndarray, int]:
    """The axes of the straight grid, and which of them is the normal of the other two."""
    axes = affine[:3, :3]
    pairs = [(0, 1), (0, 2), (1, 2)]
    first, second = pairs[int(np.argmin(np.abs(_cosines(affine))))]
    third = 3 - first - second
    straight = axes.copy()
    length = np.linalg.norm(axes, axis=0)
    along = axes[:, second] - axes[:, first] * (axes[:, first] @ axes[:, second]) / length[first] ** 2
    straight[:, second] = along / np.linalg.norm(along) * length[second]
    normal = np.cross(straight[:, first], straight[:, second])
    normal /= np.linalg.norm(normal)
    straight[:, third] = normal * (normal @ axes[:, third])
    return straight, third


def _cosines(affine: np.ndarray) -> np.ndarray:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.array([axes[:, 0] @ axes[:, 1], axes[:, 0] @ axes[:, 2], axes[:, 1] @ axes[:, 2]])


def check_gaps(positions: np.ndarray, uri: str) -> None:
    """Rejects slices at ascending `positions` (mm) with a gap that nobody can interpolate over."""
    gaps = np.diff(positions)
    usual, widest = float(np.median(gaps)), float(gaps.max())
    if widest > _SPACING_MM[1] or widest > max(10.0, 3 * usual):
        raise Rejection(uri, "slice_gap", f"two neighbouring slices are {widest:.1f} mm apart, usually {usual:.2f} mm")


def has_even_steps(places: np.ndarray) -> bool:
    """Whether two or more ascending places (mm) are equal steps, but for what rounding them has done."""
    off = float(np.abs(places - fitted_places(places)).max())
    step = float(places[-1] - places[0]) / (len(places) - 1)
    whole = np.abs(places - np.rint(places)).max() < 1e-3
    rounding = 0.51 if whole else 0.09  # a decimal of each coordinate
    return off <= min(max(rounding, 0.05 * step), 0.2 * step)  # by a missing slice they are further off


def fitted_places(places: np.ndarray) -> np.ndarray:
    """The equal steps (mm) that ascending places are closest to, with no more digits than rounded places determine."""
    index = np.arange(len(places)) - (len(places) - 1) / 2
    step = float(index @ places / (index @ index))
    off = np.abs(places - places.mean() - step * index).max()
    digits = int(np.ceil(-np.log10(max(2 * off / (len(places) - 1), 1e-12))))
    return np.asarray(places.mean() + round(step, digits) * index)


def same_place_mm(places: np.ndarray) -> float:
    """How near two of ascending places (mm) are that no scan has apart: 2 % of the widest gap, 0.1 mm at most."""
    return max(SAME_PLACE_MM, min(0.1, 0.02 * float(np.diff(places).max())))


def check_even_count(places: np.ndarray, uri: str) -> None:
    """Rejects unequal steps whose interpolation would make many more slices than there are."""
    count = len(_even_places(places)[1])
    if count > _MOST_RESAMPLED * len(places):
        raise Rejection(
            uri, "irregular_positions", f"{len(places)} slices at unequal steps would become {count} at equal ones"
        )


def _even_places(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ascending places (mm) are taken to be, and equal steps over them: of slices that lie on a grid which lacks
    some, the grid's, so that each stays as it is; else steps of the median gap."""
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    index = np.cumsum([0, *np.maximum(1, np.rint(gaps / usual))])
    step, start = np.polyfit(index, places, 1)
    if np.abs(start + step * index - places).max() <= max(0.09, 0.05 * step):
        return start + step * index, start + step * np.arange(index[-1] + 1)
    count = max(2, round((places[-1] - places[0]) / usual) + 1)
    return places, np.linspace(places[0], places[-1], count)


def even_steps(planes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Planes (n, h, w) at ascending places (mm) → planes at equal steps and their places, by linear interpolation;
    both ends are kept within half a step."""
    places, wanted = _even_places(places)
    after = np.clip(np.searchsorted(places, wanted), 1, len(places) - 1)
    weight = np.clip((wanted - places[after - 1]) / (places[after] - places[after - 1]), 0, 1)
    even = np.empty((len(wanted), *planes.shape[1:]), planes.dtype)
    for index, (right, share) in enumerate(zip(after, weight, strict=True)):
        mixed = planes[right - 1] * (1 - share) + planes[right] * share
        even[index] = np.rint(mixed) if planes.dtype.kind == "i" else mixed
    return even, wanted
