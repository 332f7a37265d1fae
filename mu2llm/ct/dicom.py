"""A DICOM series → CTVolume: pixels decoded by pydicom (pylibjpeg's decoders), slices put on one straight grid;
enhanced multi-frame objects by highdicom."""

from __future__ import annotations

import io

import numpy as np
import pydicom
from pydicom.uid import UncompressedTransferSyntaxes

from mu2llm.ct import dicom_series, geometry
from mu2llm.ct.dicom_series import Slice
from mu2llm.ct.hounsfield import Padding, Scaling, apply_table, to_hu
from mu2llm.ct.sources import DICOM, Part
from mu2llm.ct.volume import CTVolume, build
from mu2llm.errors import Rejection

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(
    parts: list[Part],
    uri: str,
    series: str | None = None,
    rescale: tuple[float, float] | None = None,
    accept: frozenset[str] = frozenset(),
) -> CTVolume:
    """Files of a folder, zip or list → the CTVolume of one series among them; as `mu2llm.ct.read`."""
    slices, warnings = dicom_series.parse(parts, uri)
    chosen = dicom_series.choose(slices, uri, series)
    if len(chosen) < len(slices):
        warnings.add("files_set_aside")
    dicom_series.check_decodable(chosen, uri)
    if not chosen[0].modality:
        warnings.add("no_modality")
    if chosen[0].frames > 1:
        return _read_enhanced(chosen[0], uri, warnings)
    directions, assumed = dicom_series.directions(chosen[0], uri, accept)
    if assumed:
        warnings.add("orientation_assumed")
    ordered, origins, order_warnings = dicom_series.order(chosen, np.cross(directions[0], directions[1]), uri)
    return _stack(ordered, directions, origins, uri, warnings | order_warnings, rescale)


def _stack(
    slices: list[Slice],
    directions: np.ndarray,
    origins: np.ndarray,
    uri: str,
    warnings: set[str],
    rescale: tuple[float, float] | None,
) -> CTVolume:
    """Ordered slices → volume, at equal steps."""
    positions = origins @ np.cross(directions[0], directions[1])
    geometry.check_gaps(positions, uri)
    step = (origins[-1] - origins[0]) / (positions[-1] - positions[0])  # along the stack, per mm along the normal
    if np.abs(origins - origins[0] - np.outer(positions - positions[0], step)).max() > 1.0:
        raise Rejection(uri, "irregular_positions", "the slices' origins do not lie on one line")
    hu, decode_warnings = _decode(slices, uri, rescale)
    if not geometry.has_even_steps(positions):
        hu, positions = geometry.even_steps(hu, positions)
        decode_warnings.add("gap_resampled")
    between_rows, between_columns = slices[0].spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * between_columns
    affine[:3, 1] = directions[1] * between_rows
    affine[:3, 2] = step * (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = origins[0]
    return _build(hu, affine, uri, warnings | decode_warnings, slices[0])


def _build(hu: np.ndarray, affine_lps: np.ndarray, uri: str, warnings: set[str], first: Slice) -> CTVolume:
    """HU (slices, rows, columns) and the affine of (column, row, slice) to LPS → CTVolume."""
    return build(
        hu.transpose(2, 1, 0),
        _LPS_TO_RAS @ affine_lps,
        uri,
        warnings,
        format=DICOM,
        modality=first.modality,
        series=first.series,
    )


def _decode(slices: list[Slice], uri: str, rescale: tuple[float, float] | None) -> tuple[np.ndarray, set[str]]:
    """Slices → HU (n, rows, columns) and warning codes."""
    warnings = set()
    planes = np.empty((len(slices), slices[0].rows, slices[0].columns), np.int16)
    scalings, paddings = [], []
    for index, each in enumerate(slices):
        pixels, scaling, padding = _pixels(each, uri)
        if pixels.dtype != planes.dtype:
            planes = planes.astype(pixels.dtype if index == 0 else np.promote_types(planes.dtype, pixels.dtype))
        planes[index] = pixels
        if scaling is None:
            warnings.add("no_rescale")
        scalings.append(scaling or (1.0, 0.0))
        paddings.append(padding)
    scalings, table_warnings = apply_table(planes, scalings, rescale)
    hu, scaling_warnings = to_hu(planes, scalings, paddings)
    return hu, warnings | table_warnings | scaling_warnings


def _pixels(each: Slice, uri: str) -> tuple[np.ndarray, Scaling | None, Padding | None]:
    """Stored values (rows, columns), slope and intercept if there are any, and the padding values."""
    dataset = each.dataset(uri)
    try:
        pixels = dataset.pixel_array
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
        scaling = None if slope is None or intercept is None else (float(slope), float(intercept))
        padding = _padding(dataset, pixels.dtype)
    except BaseException as error:  # pydicom and its decoders raise many kinds
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # the RLE decoder's, in Rust
            raise
        reason = "corrupt" if each.syntax in UncompressedTransferSyntaxes else "undecodable"
        why = (str(error).splitlines() or [type(error).__name__])[0]
        syntax = f"transfer syntax {each.syntax.name} ({each.syntax})"
        raise Rejection(uri, reason, f"{each.part.name}, {syntax}: {why}") from error
    if pixels.shape != (each.rows, each.columns):
        raise Rejection(uri, "corrupt", f"{each.part.name}: pixels of shape {pixels.shape}")
    if scaling is not None and not np.isfinite(scaling).all():
        raise Rejection(uri, "corrupt", f"{each.part.name}: rescale slope and intercept are {scaling}")
    return pixels, scaling, padding


def _padding(dataset: pydicom.Dataset, dtype: np.dtype) -> Padding | None:
    """From PixelPaddingValue to PixelPaddingRangeLimit, as the pixels hold them: files disagree on the sign."""
    value = _as_pixel(dataset.get("PixelPaddingValue"), dtype)
    if value is None:
        return None
    limit = _as_pixel(dataset.get("PixelPaddingRangeLimit"), dtype)
    return (value, value) if limit is None else (min(value, limit), max(value, limit))


def _as_pixel(value: object, dtype: np.dtype) -> int | None:
    if not isinstance(value, int):
        return None
    bits = 8 * dtype.itemsize
    stored = int(value) % 2**bits
    return stored - 2**bits if dtype.kind == "i" and stored >= 2 ** (bits - 1) else stored


def _read_enhanced(each: Slice, uri: str, warnings: set[str]) -> CTVolume:
    """An enhanced multi-frame CT, whose frames highdicom puts in order and scales."""
    import highdicom  # a second to import, and rarely needed

    try:
        image = highdicom.imread(io.BytesIO(each.part.load()))
        volume = image.get_volume(apply_real_world_transform=False, dtype=np.float32)
        planes, affine = np.ascontiguousarray(volume.array), volume.affine
    except Exception as error:  # highdicom, pydicom and their decoders raise many kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise Rejection(uri, "enhanced_unreadable", f"{each.frames} frames: {why}") from error
    hu, scaling_warnings = to_hu(planes, [(1.0, 0.0)] * len(planes))
    return _build(hu, affine[:, [2, 1, 0, 3]], uri, warnings | scaling_warnings, each)
