"""Which DICOM files make one scan, and in which order: parse, choose a series, order its slices.

Slices are ordered by ImagePositionPatient along their normal, never by name, InstanceNumber or SliceThickness.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    UncompressedTransferSyntaxes,
)

from mu2llm.ct.codes import MAX_BYTES
from mu2llm.ct.sources import DICOM, NIFTI, Part, kind_of
from mu2llm.errors import Rejection

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CLASSES_OF_CT = ("CT", "EnhancedCT", "LegacyConvertedEnhancedCT", "SecondaryCapture", "Multiframe")
_AXIAL = 0.7  # cosine between the slices' normal and the body's long axis
_SAME_PLACE_MM = 0.01
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "AcquisitionNumber",
]  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """What one DICOM file's header says, and its bytes when they are wanted. Numbers that are missing or no
    numbers are None; `spacing` is (between rows, between columns) in mm; directions are LPS."""

    part: Part
    instance: str
    series: str
    description: str
    modality: str
    acquisition: str
    syntax: UID
    rows: int
    columns: int
    frames: int
    grey: bool
    localiser: bool
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None

    @property
    def voxels(self) -> int:
        return self.rows * self.columns * self.frames

    def dataset(self, uri: str) -> pydicom.Dataset:
        """The whole file."""
        try:
            dataset = pydicom.dcmread(io.BytesIO(self.part.load()), force=True)
            if not self.syntax:  # files from before there was meta information
                implicit, _ = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            return dataset
        except Rejection:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            raise Rejection(uri, "corrupt", f"{self.part.name}: damaged DICOM: {_first_line(error)}") from error


def parse(parts: list[Part], uri: str) -> tuple[list[Slice], set[str]]:
    """The headers of the files that are DICOM, and warning codes for those that are not or cannot be parsed."""
    slices: list[Slice] = []
    warnings = set()
    kinds = set()
    for part in parts:
        data = part.load()
        kind = kind_of(data)
        kinds.add(kind)
        if kind != DICOM:
            warnings.add("unreadable_files" if data.count(0) == len(data) else "files_set_aside")
            continue
        try:
            _check_deflated(data, uri)
            slices.append(_parse_header(part, data))
        except Rejection:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            if len(parts) == 1:
                raise Rejection(uri, "corrupt", f"damaged DICOM: {_first_line(error)}") from error
            warnings.add("unreadable_files")
    if not slices:
        raise _nothing(len(parts), kinds, uri)
    return slices, warnings


def _nothing(files: int, kinds: set[str], uri: str) -> Rejection:
    if not files:
        return Rejection(uri, "empty", "there are no files")
    if DICOM in kinds:
        return Rejection(uri, "corrupt", f"none of {files} files can be parsed")
    hint = "; name the NIfTI file itself" if NIFTI in kinds or "gzip" in kinds else ""
    return Rejection(uri, "unsupported_format", f"none of {files} files is DICOM{hint}")


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


def _parse_header(part: Part, data: bytes) -> Slice:
    header = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=[*_TAGS])
    kinds = [str(value).upper() for value in _sequence(header.get("ImageType"))]
    capture = str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    return Slice(
        part=part,
        instance=str(header.get("SOPInstanceUID") or ""),
        series=str(header.get("SeriesInstanceUID") or ""),
        description=str(header.get("SeriesDescription") or ""),
        modality=_modality(header),
        acquisition=str(header.get("AcquisitionNumber") or ""),
        syntax=UID(str(getattr(header.file_meta, "TransferSyntaxUID", "") or "")),
        rows=int(header.get("Rows") or 0),
        columns=int(header.get("Columns") or 0),
        frames=int(header.get("NumberOfFrames") or 1),
        grey=int(header.get("SamplesPerPixel") or 1) == 1 and photometric.startswith("MONOCHROME"),
        localiser="LOCALIZER" in kinds or capture,
        position=_numbers(header.get("ImagePositionPatient"), 3),
        orientation=_numbers(header.get("ImageOrientationPatient"), 6),
        spacing=_numbers(header.get("PixelSpacing"), 2),
    )


def _modality(header: pydicom.Dataset) -> str:
    """What the file calls itself: its Modality; where pixels come without one, their class, if that is none of CT."""
    stated = str(header.get("Modality") or "").strip().upper()
    kind = UID(str(header.get("SOPClassUID") or "")).keyword
    if stated or not header.get("Rows") or kind.startswith(_CLASSES_OF_CT):
        return stated
    return kind


def _sequence(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    numbers = tuple(float(each) for each in _sequence(value))
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def choose(slices: list[Slice], uri: str, series: str | None) -> list[Slice]:
    """The slices of one grid in one series: the one asked for, else the largest axial one of CT images."""
    if series is not None:
        named = [each for each in slices if series in (each.series, each.description)]
        if not named:
            known = ", ".join(sorted({each.series for each in slices}))
            raise Rejection(uri, "no_series", f"no series {series}; there are {known}")
        slices = named
    ct = [each for each in slices if each.modality in ("CT", "")]
    if not ct:
        raise Rejection(uri, "other_modality", f"modality {_listed(slices)}, expected CT")
    images = [each for each in ct if each.rows and each.columns]
    if not images:
        raise Rejection(uri, "no_images", "DICOM without pixels")
    grey = [each for each in images if each.grey]
    if not grey:
        raise Rejection(uri, "rgb", "colour pixels: a screen save or rendered image, not HU")
    grids: list[list[Slice]] = []
    for each in [each for each in grey if not each.localiser] or grey:
        grid = next((grid for grid in grids if _share_grid(grid[0], each)), None)
        grids.append([each]) if grid is None else grid.append(each)
    return max(grids, key=lambda grid: (*_rank(grid), grid[0].series))


def _listed(slices: list[Slice]) -> str:
    return ", ".join(sorted({each.modality for each in slices}))


def _share_grid(one: Slice, other: Slice) -> bool:
    """Whether two slices can be of one scan; every multi-frame object is a scan of its own."""
    if (one.series, one.rows, one.columns) != (other.series, other.rows, other.columns):
        return False
    return (
        one.frames == other.frames == 1
        and _are_close(one.orientation, other.orientation, 0.02)
        and _are_close(one.spacing, other.spacing, 0.001)
    )


def _are_close(one: tuple[float, ...] | None, other: tuple[float, ...] | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.abs(np.subtract(one, other)).max() <= tolerance)


def _rank(slices: list[Slice]) -> tuple[bool, int]:
    """Axial before others, then the one with most voxels."""
    turned = slices[0].orientation
    axial = turned is None or bool(abs(np.cross(turned[:3], turned[3:])[2]) > _AXIAL)
    return axial, sum(each.voxels for each in slices)


def check_decodable(slices: list[Slice], uri: str) -> None:
    """Rejects what is too large, or in a transfer syntax that no installed decoder knows."""
    voxels = sum(each.voxels for each in slices)
    if voxels * 2 > MAX_BYTES:
        raise Rejection(uri, "too_large", f"{voxels} voxels are more than {MAX_BYTES} bytes")
    for syntax in {each.syntax for each in slices} - {UID("")} - set(UncompressedTransferSyntaxes):
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise Rejection(uri, "undecodable", f"no decoder for transfer syntax {syntax.name} ({syntax})")


def directions(first: Slice, uri: str, accept: frozenset[str]) -> tuple[np.ndarray, bool]:
    """Unit vectors (LPS) along a row and along a column, and whether they had to be assumed."""
    if first.orientation is None:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri, "unknown_orientation", "no ImageOrientationPatient; accept unknown_orientation to take it as axial"
            )
        return np.array([[1.0, 0, 0], [0, 1.0, 0]]), True
    vectors = np.array(first.orientation).reshape(2, 3)
    lengths = np.linalg.norm(vectors, axis=1)
    if abs(lengths - 1).max() > 0.01 or abs(vectors[0] @ vectors[1]) > 0.01:
        raise Rejection(
            uri, "bad_geometry", f"ImageOrientationPatient {first.orientation} is not two perpendicular unit vectors"
        )
    return vectors / lengths[:, None], False


def order(slices: list[Slice], normal: np.ndarray, uri: str) -> tuple[list[Slice], np.ndarray, set[str]]:
    """Slices by position along their normal, one at each position, their origins (n, 3) in mm (LPS), and warnings."""
    placed = []
    for each in slices:
        if each.position is None or each.spacing is None:
            raise Rejection(uri, "no_positions", f"no ImagePositionPatient or PixelSpacing in {each.part.name}")
        placed.append((float(np.dot(each.position, normal)), each))
    if len(placed) == 1:
        raise Rejection(uri, "single_slice", "one slice alone is no volume")
    placed.sort(key=lambda item: (item[0], item[1].part.name))
    unique = _drop_copies(placed, uri)
    warnings = {"duplicates_dropped"} if len(unique) < len(placed) else set()
    if _has_double(unique):
        unique = _largest_acquisition(unique, uri)
        warnings.add("files_set_aside")
    if len(unique) == 1:
        raise Rejection(uri, "single_slice", f"{len(slices)} copies of one slice are no volume")
    ordered = [each for _, each in unique]
    return ordered, np.array([each.position for each in ordered]), warnings


Placed = list[tuple[float, Slice]]


def _has_double(placed: Placed) -> bool:
    return bool((np.diff([place for place, _ in placed]) < _SAME_PLACE_MM).any())


def _drop_copies(placed: Placed, uri: str) -> Placed:
    """Drops slices whose instance or pixels are already there at the same position."""
    kept: Placed = []
    for place, each in placed:
        same = [other for other_place, other in kept[-8:] if place - other_place < _SAME_PLACE_MM]
        if not any(_is_copy(each, other, uri) for other in same):
            kept.append((place, each))
    return kept


def _is_copy(one: Slice, other: Slice, uri: str) -> bool:
    if one.instance and one.instance == other.instance:
        return True
    first, second = (hashlib.sha256(each.dataset(uri).get("PixelData") or b"").digest() for each in (one, other))
    return first == second


def _largest_acquisition(placed: Placed, uri: str) -> Placed:
    """Of several acquisitions at the same positions the largest, if it is in order by itself."""
    acquisitions: dict[str, Placed] = defaultdict(list)
    for place, each in placed:
        acquisitions[each.acquisition].append((place, each))
    _, chosen = max(acquisitions.items(), key=lambda item: (len(item[1]), item[0]))
    if _has_double(chosen):
        raise Rejection(
            uri, "duplicate_positions", "different slices lie at one position: several phases in one series?"
        )
    return chosen


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
