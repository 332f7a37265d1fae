"""NIfTI-1 and -2 → CTVolume. nibabel reads the header; the voxels stream into one array of their own type."""

from __future__ import annotations

from collections.abc import Iterator

import nibabel as nib
import numpy as np
from nibabel import affines

from mu2llm.ct import sources, voxels
from mu2llm.ct.codes import MAX_BYTES
from mu2llm.ct.volume import CTVolume, build
from mu2llm.errors import Rejection

Header = nib.Nifti1Header | nib.Nifti2Header
_SIZES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_UNITS_MM = {1: 1000.0, 3: 0.001}  # metres and micrometres


def read(
    stream: sources.Stream, most: int, uri: str, rescale: tuple[float, float] | None, accept: frozenset[str]
) -> CTVolume:
    """A decompressed NIfTI stream of at most `most` bytes → CTVolume; the rest as in `mu2llm.ct.read`."""
    header, warnings = _read_header(stream, uri)
    shape, dtype = _layout(header, uri)
    voxels.check_promise(shape, dtype, most, uri)
    affine, geometry_warnings = _affine(header, shape, uri, accept)
    scaling = _scaling(header, uri)
    _skip_to_voxels(stream, header, uri)
    hu, voxel_warnings = voxels.read(stream, voxels.Stored(shape, dtype, scaling), uri, rescale)
    return build(hu, affine, uri, warnings | geometry_warnings | voxel_warnings, format=sources.NIFTI)


def _read_header(stream: sources.Stream, uri: str) -> tuple[Header, set[str]]:
    block = stream.read(348)
    little = int.from_bytes(block[:4], "little")
    size = little if little in _SIZES else int.from_bytes(block[:4], "big")
    if size not in _SIZES:
        raise Rejection(uri, "unsupported_format", "not a NIfTI: its first four bytes are not a header's size")
    block += stream.read(size - 348)
    if len(block) < size:
        raise Rejection(uri, "truncated", f"{len(block)} bytes where a NIfTI header has {size}")
    try:
        header = _SIZES[size](block, check=False)
        if bytes(header["magic"])[:2] != b"n+":
            raise Rejection(uri, "unsupported_format", "an Analyze file or half of a NIfTI pair; give one .nii file")
        sizes = header["pixdim"][1:4].copy()
        if (sizes == 0).any():  # the library would make them 1 mm; without them a qform says nothing
            header["qform_code"] = 0
        header.check_fix(logger=nib.imageglobals.logger, error_level=40)
    except Rejection:
        raise
    except Exception as error:  # nibabel raises many kinds for damaged headers
        raise Rejection(uri, "corrupt", f"damaged NIfTI header: {error}") from error
    return header, {"spacing_repaired"} if (sizes < 0).any() else set()


def _layout(header: Header, uri: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and type of the voxels, if they are one volume of real numbers within the limits."""
    try:
        dtype = header.get_data_dtype()
        shape = tuple(int(size) for size in header.get_data_shape())
    except Exception as error:
        raise Rejection(uri, "corrupt", f"damaged NIfTI header: {error}") from error
    if dtype.fields:
        raise Rejection(uri, "rgb", "colour voxels, not HU")
    if dtype.kind == "c":
        raise Rejection(uri, "complex", f"voxels of {dtype}, not HU")
    return voxels.check_shape(shape, uri), dtype


def _scaling(header: Header, uri: str) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except Exception as error:
        raise Rejection(uri, "corrupt", f"damaged NIfTI scaling: {error}") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept))


def _affine(header: Header, shape: tuple[int, ...], uri: str, accept: frozenset[str]) -> tuple[np.ndarray, set[str]]:
    """The affine in mm: the sform where there is a sound one, else the qform; and warnings."""
    forms = list(_forms(header, uri))
    warnings = set()
    if not forms:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri, "unknown_orientation", "no sound qform or sform; accept unknown_orientation to guess the axes"
            )
        forms, warnings = [header.get_base_affine()], {"orientation_assumed"}
    affine = forms[0].astype(np.float64)
    corner = np.array([*shape, 1.0])
    if len(forms) == 2 and np.abs(forms[0] @ corner - forms[1] @ corner).max() > 1.0:
        warnings.add("forms_differ")
    elif not np.allclose(affines.voxel_sizes(affine), header["pixdim"][1:4], rtol=0.01):
        warnings.add("spacing_differs")
    unit = _UNITS_MM.get(int(header["xyzt_units"]) & 7)
    if unit:
        affine[:3] *= unit
        warnings.add("units_converted")
    return affine, warnings


def _forms(header: Header, uri: str) -> Iterator[np.ndarray]:
    if header["sform_code"] > 0:
        sform = header.get_sform()
        if np.isfinite(sform).all() and np.linalg.det(sform[:3, :3]) != 0:
            yield sform
    if header["qform_code"] > 0:
        try:
            yield header.get_qform()
        except Exception as error:
            raise Rejection(uri, "bad_geometry", f"damaged qform: {error}") from error


def _skip_to_voxels(stream: sources.Stream, header: Header, uri: str) -> None:
    offset = int(header.get_data_offset())
    gap = offset - int(header["sizeof_hdr"])
    if gap < 0 or gap > MAX_BYTES:
        raise Rejection(uri, "corrupt", f"the voxels are said to start at byte {offset}")
    if len(stream.read(gap)) < gap:
        raise Rejection(uri, "truncated", "the file ends before its voxels begin")
