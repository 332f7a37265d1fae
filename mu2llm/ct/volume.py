"""CTVolume: one scan in HU, in RAS+ axes, with where it came from and what was set right."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from nibabel import affines

from mu2llm.ct import geometry
from mu2llm.ct.codes import check_accept, in_order
from mu2llm.ct.hounsfield import cannot_be_hu
from mu2llm.errors import Rejection


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A scan in HU.

    `hu` is (x, y, z) in the closest canonical axes (RAS+: x to the patient's right, y to the front, z up),
    int16, or float32 where HU are not whole numbers, never below −1024. `affine` maps voxel (x, y, z) to mm.
    `warnings` are codes of `mu2llm.ct.WARNINGS`. `stored_axes` are the axes of the file, such as "LPS", and
    `format` is NIfTI, MetaImage, NRRD or DICOM; `modality` and `series` (its instance UID) are what DICOM says.
    `others` are the scans in the same place that were not read: the name by which `read` takes them → what tells them
    apart.
    """

    hu: np.ndarray
    affine: np.ndarray
    uri: str = ""
    warnings: tuple[str, ...] = ()
    modality: str = ""
    series: str = ""
    stored_axes: str = "RAS"
    format: str = ""
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z in mm."""
        x, y, z = affines.voxel_sizes(self.affine)
        return float(x), float(y), float(z)

    @property
    def hu_range(self) -> tuple[float, float]:
        return float(self.hu.min()), float(self.hu.max())

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the array rounded to int16 (little-endian), (x, y, z) in C order."""
        digest = hashlib.sha256()
        for start in range(0, self.hu.shape[0], 32):
            slab = self.hu[start : start + 32]
            if slab.dtype != np.int16:
                slab = np.clip(np.rint(slab), -(2**15), 2**15 - 1)
            digest.update(np.ascontiguousarray(slab, "<i2").tobytes())
        return digest.hexdigest()


def build(
    hu: np.ndarray,
    affine: np.ndarray,
    uri: str,
    warnings: Iterable[str],
    format: str = "",
    modality: str = "",
    series: str = "",
) -> CTVolume:
    """HU in any axes, with their affine → a CTVolume on a straight grid in RAS+; Rejection for impossible geometry."""
    geometry.check_affine(affine, uri)
    if min(hu.shape) < 2:
        raise Rejection(uri, "single_slice", f"a volume of {'×'.join(map(str, hu.shape))} voxels is one slice or less")
    codes = set(warnings)
    hu, affine, stored = geometry.canonical(hu, affine)
    if cannot_be_hu(hu, bool(codes & {"padding_clipped", "nonfinite_filled"})):
        codes.add("not_hu")
    if geometry.is_sheared(affine):
        hu, affine = geometry.straighten(hu, affine, uri)
        codes.add("tilt_resampled")
    if geometry.is_oblique(affine):
        codes.add("oblique")
    return CTVolume(hu, affine, uri, in_order(codes), modality, series, stored, format)


def admit(volume: CTVolume, accept: Iterable[str] = ()) -> CTVolume:
    """The volume, where it may go into a model; else a Rejection (`not_hu`), unless accepted by its code."""
    if "not_hu" in volume.warnings and "not_hu" not in check_accept(accept):
        low, high = volume.hu_range
        raise Rejection(
            volume.uri,
            "not_hu",
            f"values from {low:g} to {high:g} cannot be CT in HU (MR, label map, 8-bit export, scaled twice?); "
            "accept not_hu to use it all the same",
        )
    return volume


def usable(reads: Iterable[Callable[[], CTVolume]], most: int) -> list[CTVolume]:
    """What at most so many of the series of an examination give. A Rejection of the first is raised; of others it is
    passed over, with the warning `series_unusable` on the first."""
    volumes: list[CTVolume] = []
    rejected = False
    for read in reads:
        if len(volumes) == most:
            break
        try:
            volumes.append(read())
        except Rejection:
            if not volumes:
                raise
            rejected = True
    return [warned(volumes[0], "series_unusable"), *volumes[1:]] if rejected else volumes


def warned(volume: CTVolume, code: str) -> CTVolume:
    """The volume with one warning more."""
    return replace(volume, warnings=in_order((*volume.warnings, code)))
