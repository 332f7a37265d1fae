"""A DICOM series → CTVolume: which files make the scan, in which order, on which grid.

pydicom parses and decodes (pylibjpeg's decoders), highdicom reads enhanced multi-frame objects. Slices are
ordered and spaced by ImagePositionPatient along their normal, never by name, InstanceNumber or SliceThickness.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import defaultdict
from dataclasses import dataclass

import highdicom
import numpy as np
import pydicom
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from mu2llm.ct import geometry
from mu2llm.ct.codes import MAX_BYTES, Rejection
from mu2llm.ct.hounsfield import needs_table, to_hu
from mu2llm.ct.sources import DICOM, Part, kind_of
from mu2llm.ct.volume import CTVolume, build

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_AXIAL = 0.7  # cosine between the slices' normal and the body's long axis
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "AcquisitionNumber", "BitsAllocated", "SharedFunctionalGroupsSequence",
]  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One DICOM file: its header without pixels, and its bytes when they are wanted."""

    part: Part
    header: pydicom.Dataset

    @property
    def series(self) -> str:
        return str(self.header.get("SeriesInstanceUID") or "")

    @property
    def frames(self) -> int:
        return int(self.header.get("NumberOfFrames") or 1)

    def position(self, direction: np.ndarray) -> float:
        return float(np.array(self.header.ImagePositionPatient, float) @ direction)


def read(
    parts: list[Part],
    uri: str,
    series: str | None = None,
    rescale: tuple[float, float] | None = None,
    accept: frozenset[str] = frozenset(),
) -> CTVolume:
    """Files of a folder, zip or list → the CTVolume of one series among them; as `mu2llm.ct.read`."""
    slices, warnings = _parse(parts, uri)
    chosen = _choose(slices, uri, series)
    if len(chosen) < len(slices):
        warnings.add("files_set_aside")
    _check_decodable(chosen, uri)
    if not chosen[0].header.get("Modality"):
        warnings.add("no_modality")
    if chosen[0].frames > 1:
        return _read_enhanced(chosen[0], uri, warnings)
    directions, assumed = _directions(chosen[0].header, uri, accept)
    if assumed:
        warnings.add("orientation_assumed")
    chosen, dropped = _order(chosen, np.cross(directions[0], directions[1]), uri)
    return _stack(chosen, directions, uri, warnings | dropped, rescale)


def _parse(parts: list[Part], uri: str) -> tuple[list[Slice], set[str]]:
    """The headers of all files that are DICOM, and warning codes for those that are not or cannot be parsed."""
    slices, warnings = [], set()
    for part in parts:
        data = part.load()
        if kind_of(data[:352]) != DICOM:
            empty_or_cut = not data.strip(b"\0")
            warnings.add("unreadable_files" if empty_or_cut else "files_set_aside")
            continue
        try:
            _check_deflated(data, uri)
            header = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=_TAGS)
            header.decode()
            slices.append(Slice(part, header))
        except Rejection:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            if len(parts) == 1:
                raise Rejection(uri, "corrupt", f"damaged DICOM: {error}") from error
            warnings.add("unreadable_files")
    if not slices:
        if not parts:
            raise Rejection(uri, "empty", "there are no files")
        raise Rejection(uri, "unsupported_format", f"none of {len(parts)} files is DICOM")
    return slices, warnings


def _check_deflated(data: bytes, uri: str) -> None:
    """Rejects a deflated file that inflates beyond all measure, before pydicom inflates it whole."""
    if data[128:132] != b"DICM":
        return
    stream = io.BytesIO(data)
    stream.seek(132)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    limit = MAX_BYTES // 4
    if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[stream.tell() :], limit + 1)) > limit:
        raise Rejection(uri, "too_large", f"one deflated file holds more than {limit} bytes")


def _choose(slices: list[Slice], uri: str, series: str | None) -> list[Slice]:
    """The slices of one grid in one series: the one asked for, else the largest axial one of CT images."""
    if series is not None:
        named = [each for each in slices if series in (each.series, str(each.header.get("SeriesDescription", "")))]
        if not named:
            known = ", ".join(sorted({each.series for each in slices}))
            raise Rejection(uri, "no_series", f"no series {series}; there are {known}")
        slices = named
    images = [each for each in slices if each.header.get("Rows") and each.header.get("Columns")]
    ct = [each for each in images if (each.header.get("Modality") or "CT") == "CT"]
    if not ct:
        modalities = sorted({str(each.header.get("Modality") or "none") for each in slices})
        if all(modality in ("CT", "none") for modality in modalities):
            raise Rejection(uri, "no_images", "DICOM without pixels")
        raise Rejection(uri, "other_modality", f"modality {', '.join(modalities)}, expected CT")
    grey = [each for each in ct if int(each.header.get("SamplesPerPixel") or 1) == 1]
    if not grey:
        raise Rejection(uri, "rgb", "colour pixels: a screen save or rendered image, not HU")
    scans = [each for each in grey if not _is_localiser(each.header)] or grey
    grids: dict[tuple[object, ...], list[Slice]] = defaultdict(list)
    for each in scans:
        grids[_grid(each)].append(each)
    return max(grids.items(), key=lambda item: (_rank(item[1]), str(item[0])))[1]


def _is_localiser(header: pydicom.Dataset) -> bool:
    kinds = [str(value).upper() for value in _sequence(header.get("ImageType"))]
    return "LOCALIZER" in kinds or str(header.get("SOPClassUID", "")).startswith(_SECONDARY_CAPTURE)


def _sequence(value: object) -> list[object]:
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]


def _numbers(header: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """A header's numbers, or None where they are missing or not `count` finite ones."""
    values = np.array(_sequence(header.get(name)), float)
    return tuple(values) if values.shape == (count,) and np.isfinite(values).all() else None


def _grid(each: Slice) -> tuple[object, ...]:
    """What the slices of one scan share."""
    header = each.header
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    spacing = _numbers(header, "PixelSpacing", 2)
    return (
        each.series,
        int(header.Rows),
        int(header.Columns),
        tuple(np.round(orientation, 2)) if orientation else None,
        tuple(np.round(spacing, 3)) if spacing else None,
        each.header.SOPInstanceUID if each.frames > 1 else None,
    )


def _rank(slices: list[Slice]) -> tuple[bool, int]:
    """Axial before others, then the one with most voxels."""
    header = slices[0].header
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    normal = np.cross(orientation[:3], orientation[3:]) if orientation else np.array([0, 0, 1])
    voxels = sum(each.frames for each in slices) * int(header.Rows) * int(header.Columns)
    return bool(abs(normal[2]) > _AXIAL) or slices[0].frames > 1, voxels


def _check_decodable(slices: list[Slice], uri: str) -> None:
    voxels = sum(int(each.header.Rows) * int(each.header.Columns) * each.frames for each in slices)
    if voxels * 2 > MAX_BYTES:
        raise Rejection(uri, "too_large", f"{voxels} voxels are more than {MAX_BYTES} bytes")
    for each in slices:
        syntax = UID(getattr(each.header.file_meta, "TransferSyntaxUID", "") or "")
        if not syntax or syntax in pydicom.uid.UncompressedTransferSyntaxes:
            continue
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise Rejection(uri, "undecodable", f"no decoder for transfer syntax {syntax.name} ({syntax})")


def _directions(header: pydicom.Dataset, uri: str, accept: frozenset[str]) -> tuple[np.ndarray, bool]:
    """Unit vectors (LPS) along a row and along a column, and whether they had to be assumed."""
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    if orientation is None:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri, "unknown_orientation", "no ImageOrientationPatient; accept unknown_orientation to take it as axial"
            )
        return np.array([[1.0, 0, 0], [0, 1.0, 0]]), True
    directions = np.array(orientation).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if abs(lengths - 1).max() > 0.01 or abs(directions[0] @ directions[1]) > 0.01:
        raise Rejection(
            uri, "bad_geometry", f"ImageOrientationPatient {orientation} is not two perpendicular unit vectors"
        )
    return directions / lengths[:, None], False


def _order(slices: list[Slice], normal: np.ndarray, uri: str) -> tuple[list[Slice], set[str]]:
    """Slices by position along their normal, one at each position."""
    for each in slices:
        if _numbers(each.header, "ImagePositionPatient", 3) is None:
            raise Rejection(uri, "no_positions", f"no ImagePositionPatient in {each.part.name}")
    if _numbers(slices[0].header, "PixelSpacing", 2) is None:
        raise Rejection(uri, "no_positions", f"no PixelSpacing in {slices[0].part.name}")
    slices = sorted(slices, key=lambda each: (each.position(normal), each.part.name))
    if len(slices) == 1:
        raise Rejection(uri, "single_slice", "one slice alone is no volume")
    unique = _drop_duplicates(slices, normal)
    if any(gap < 0.01 for gap in np.diff([each.position(normal) for each in unique])):
        unique = _largest_acquisition(unique, normal, uri)
    if len(unique) == 1:
        raise Rejection(uri, "single_slice", f"{len(slices)} copies of one slice are no volume")
    return unique, {"duplicates_dropped"} if len(unique) < len(slices) else set()


def _drop_duplicates(slices: list[Slice], normal: np.ndarray) -> list[Slice]:
    """Drops slices whose instance or pixels are already there at the same position."""
    kept: list[Slice] = []
    for each in slices:
        same = [other for other in kept[-4:] if abs(other.position(normal) - each.position(normal)) < 0.01]
        if not any(_is_same(each, other) for other in same):
            kept.append(each)
    return kept


def _is_same(one: Slice, other: Slice) -> bool:
    uid = one.header.get("SOPInstanceUID")
    return bool(uid and uid == other.header.get("SOPInstanceUID")) or _pixel_hash(one) == _pixel_hash(other)


def _pixel_hash(each: Slice) -> str:
    pixels = pydicom.dcmread(io.BytesIO(each.part.load()), force=True).get("PixelData") or b""
    return hashlib.sha256(pixels).hexdigest()


def _largest_acquisition(slices: list[Slice], normal: np.ndarray, uri: str) -> list[Slice]:
    """Of several acquisitions at the same positions the largest, if each by itself is in order."""
    acquisitions: dict[str, list[Slice]] = defaultdict(list)
    for each in slices:
        acquisitions[str(each.header.get("AcquisitionNumber", ""))].append(each)
    chosen = max(acquisitions.items(), key=lambda item: (len(item[1]), item[0]))[1]
    if any(gap < 0.01 for gap in np.diff([each.position(normal) for each in chosen])):
        raise Rejection(
            uri, "duplicate_positions", "different slices lie at one position: several phases in one series?"
        )
    return chosen


def _stack(
    slices: list[Slice], directions: np.ndarray, uri: str, warnings: set[str], rescale: tuple[float, float] | None
) -> CTVolume:
    """Ordered slices → volume, with equal steps."""
    places = np.array([each.header.ImagePositionPatient for each in slices], float)
    positions = places @ np.cross(directions[0], directions[1])
    geometry.check_gaps(positions, uri)
    step = (places[-1] - places[0]) / (positions[-1] - positions[0])  # mm along the stack per mm along the normal
    if np.abs(places - places[0] - np.outer(positions - positions[0], step)).max() > 1.0:
        raise Rejection(uri, "irregular_positions", "the slices' origins do not lie on one line")
    planes, slopes, intercepts, padding = _decode(slices, uri, warnings)
    if rescale is not None:
        if needs_table(planes, (slopes[0], intercepts[0]), rescale):
            intercepts = [value * rescale[0] + rescale[1] for value in intercepts]
            slopes = [value * rescale[0] for value in slopes]
            warnings.add("rescaled_by_table")
        else:
            warnings.add("already_rescaled")
    hu, scaling_warnings = to_hu(planes, slopes, intercepts, padding)
    if not geometry.has_even_steps(positions):
        hu, positions = geometry.even_steps(hu, positions)
        scaling_warnings.add("gap_resampled")
    row_mm, column_mm = _numbers(slices[0].header, "PixelSpacing", 2) or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * column_mm
    affine[:3, 1] = directions[1] * row_mm
    affine[:3, 2] = step * (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = places[0]
    return _build(hu, _LPS_TO_RAS @ affine, uri, warnings | scaling_warnings, slices[0])


def _build(hu: np.ndarray, affine: np.ndarray, uri: str, warnings: set[str], first: Slice) -> CTVolume:
    modality = str(first.header.get("Modality") or "")
    return build(hu.transpose(2, 1, 0), affine, uri, warnings, format=DICOM, modality=modality, series=first.series)


def _decode(
    slices: list[Slice], uri: str, warnings: set[str]
) -> tuple[np.ndarray, list[float], list[float], list[int | None]]:
    """Stored values (n, rows, columns), and each slice's slope, intercept and padding value."""
    planes: np.ndarray | None = None
    slopes, intercepts, padding = [], [], []
    for index, each in enumerate(slices):
        try:
            dataset = pydicom.dcmread(io.BytesIO(each.part.load()), force=True)
            pixels = dataset.pixel_array
            slopes.append(float(dataset.get("RescaleSlope") or 1))
            intercepts.append(float(dataset.get("RescaleIntercept") or 0))
            if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset:
                warnings.add("no_rescale")
            padding.append(_padding(dataset, pixels.dtype))
        except Exception as error:  # pydicom and its decoders raise many kinds
            raise Rejection(uri, "undecodable", _why(each, error)) from error
        if planes is None:
            planes = np.empty((len(slices), *pixels.shape), pixels.dtype)
        if pixels.shape != planes.shape[1:]:
            raise Rejection(
                uri, "corrupt", f"{each.part.name}: pixels of shape {pixels.shape}, expected {planes.shape[1:]}"
            )
        if pixels.dtype != planes.dtype:
            planes = planes.astype(np.promote_types(planes.dtype, pixels.dtype))
        planes[index] = pixels
    assert planes is not None
    return planes, slopes, intercepts, padding


def _padding(dataset: pydicom.Dataset, dtype: np.dtype) -> int | None:
    """PixelPaddingValue as the pixels hold it: files disagree on whether it is signed."""
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    bits = 8 * dtype.itemsize
    value %= 2**bits
    return value - 2**bits if dtype.kind == "i" and value >= 2 ** (bits - 1) else value


def _why(each: Slice, error: Exception) -> str:
    syntax = UID(getattr(each.header.file_meta, "TransferSyntaxUID", "") or "")
    return f"{each.part.name}, transfer syntax {syntax.name or 'none'} ({syntax}): {str(error).splitlines()[0]}"


def _read_enhanced(each: Slice, uri: str, warnings: set[str]) -> CTVolume:
    """An enhanced multi-frame CT, whose frames highdicom puts in order and scales."""
    try:
        image = highdicom.imread(io.BytesIO(each.part.load()))
        volume = image.get_volume(apply_real_world_transform=False, dtype=np.float32)
        planes, affine = np.ascontiguousarray(volume.array), volume.affine
    except Exception as error:  # highdicom, pydicom and decoders raise many kinds
        raise Rejection(uri, "enhanced_unreadable", f"{each.frames} frames: {str(error).splitlines()[0]}") from error
    if planes.ndim != 3:
        raise Rejection(uri, "rgb", "colour frames, not HU")
    hu, scaling_warnings = to_hu(planes, [1] * len(planes), [0] * len(planes))
    return _build(hu, _LPS_TO_RAS @ affine[:, [2, 1, 0, 3]], uri, warnings | scaling_warnings, each)
