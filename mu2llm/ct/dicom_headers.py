"""What the header of a DICOM file says of its slices: one of a classic object, each frame of a multi-frame one.

Of an enhanced object an attribute stands in a frame's functional groups, else in the shared ones, else at the top
level, where classic objects have it (PS3.3 C.7.6.16). Both kinds of one scan give the same slices.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mu2llm.ct.codes import MAX_BYTES
from mu2llm.ct.sources import DICOM, GZIP, NIFTI, ZIP, Part, check_sizes, kind_of, zip_parts
from mu2llm.records import Rejection

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CLASSES_OF_CT = ("CT", "EnhancedCT", "LegacyConvertedEnhancedCT", "SecondaryCapture", "Multiframe")
_ZIPS_IN_ZIPS = 2
_PROJECTIONS = {"MIP", "MINIP", "MAX_IP", "MIN_IP", "MAXIP", "AVERAGE", "AVERAGE_IP", "MEAN_IP", "PROJECTION IMAGE"}

# What tells the scans of one series apart, and the functional group that holds it in enhanced objects.
CLUES: dict[str, str] = {
    "StudyInstanceUID": "",
    "SeriesNumber": "",
    "FrameOfReferenceUID": "",
    "ImageType": "CTImageFrameTypeSequence",
    "StackID": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "TemporalPositionIdentifier": "",
    "DimensionIndexValues": "FrameContentSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "KVP": "CTXRayDetailsSequence",
    "EchoNumbers": "",
    "NominalPercentageOfCardiacPhase": "CardiacSynchronizationSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "AcquisitionNumber": "",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "AcquisitionDateTime": "",
    "AcquisitionTime": "",
    "FrameAcquisitionDateTime": "FrameContentSequence",
    "FrameReferenceDateTime": "FrameContentSequence",
    "TriggerTime": "",
    "ContentTime": "",
    "SOPInstanceUID": "",  # of multi-frame objects alone
}
# They may change from slice to slice without any meaning.
WEAK_CLUES = {
    "StudyInstanceUID", "FrameOfReferenceUID", "SliceThickness", "AcquisitionDateTime", "AcquisitionTime",
    "FrameAcquisitionDateTime", "FrameReferenceDateTime", "TriggerTime", "ContentTime",
}  # fmt: skip

_NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "RescaleSlope": 1,
            "RescaleIntercept": 1}  # fmt: skip
_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "ConcatenationUID", "InConcatenationNumber",
    "InConcatenationTotalNumber", *_NUMBERS, *CLUES,
]  # fmt: skip
_PLACES = {tag_for_keyword(each) for each in ("InStackPositionNumber", "ImagePositionPatient", "ImagePositionVolume")}


class Unreadable(ValueError):
    """A tag whose value cannot be read; its message names both."""


@dataclass(frozen=True)
class Slice:
    """One slice as its file's header says, and the file's bytes when they are wanted. What is missing is None or
    empty; `spacing` is (between rows, between columns) in mm; directions and places are LPS, in mm. `frame` counts
    from 0; `clues` are the values of CLUES, `piece` is which of how many objects of a concatenation."""

    part: Part
    frame: int
    frames: int
    instance: str
    series: str
    description: str
    modality: str
    syntax: UID
    rows: int
    columns: int
    grey: bool
    localiser: bool
    projection: bool
    original: bool
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float | None
    intercept: float | None
    clues: tuple[str, ...]
    piece: tuple[str, int, int]

    def dataset(self, uri: str) -> pydicom.Dataset:
        """The whole file; Rejection `corrupt` where it is damaged."""
        try:
            dataset = pydicom.dcmread(io.BytesIO(self.part.load()), force=True)
            if not self.syntax:  # files from before there was meta information
                implicit, _ = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            return dataset
        except Rejection:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            raise Rejection(uri, "corrupt", f"{self.part.name}: damaged DICOM: {first_line(error)}") from error


def parse(parts: list[Part], uri: str, depth: int = 0) -> tuple[list[Slice], set[str]]:
    """The slices of the files that are DICOM, and warning codes for those that are not or cannot be parsed.

    Where there is no DICOM but zips, theirs; `depth` is how many zips the parts lie in beside the first.
    Rejection where there are none: `empty`, `unsupported_format`, or `corrupt`, which names what cannot be read."""
    slices: list[Slice] = []
    warnings: set[str] = set()
    kinds, damages, zips = set(), [], []
    for part in parts:
        data = part.load()
        kind = kind_of(data)
        kinds.add(kind)
        if kind == ZIP:
            zips.append(part)
        if kind != DICOM:
            warnings.add("unreadable_files" if data.count(0) == len(data) else "files_set_aside")
            continue
        try:
            _check_deflated(data, uri)
            slices += _slices(part, data)
        except Rejection:
            raise
        except Exception as error:  # pydicom raises many kinds for damaged files
            damages.append(f"{part.name}: {first_line(error)}")
            warnings.add("unreadable_files")
    if slices:
        return slices, warnings
    if zips and not damages:
        return _parse_zips(zips, uri, depth + 1)
    raise _nothing(len(parts), kinds, damages, uri)


def _parse_zips(zips: list[Part], uri: str, depth: int) -> tuple[list[Slice], set[str]]:
    if depth > _ZIPS_IN_ZIPS:
        raise Rejection(uri, "unsafe_archive", f"zips in more than {_ZIPS_IN_ZIPS} other zips; unpack them first")
    parts = [part for each in zips for part in zip_parts(each.whole(), uri)]
    check_sizes(uri, len(parts), 0)
    return parse(parts, uri, depth)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _nothing(files: int, kinds: set[str], damages: list[str], uri: str) -> Rejection:
    if not files:
        return Rejection(uri, "empty", "there are no files")
    if damages:
        which = "damaged DICOM" if files == 1 else f"none of {len(damages)} DICOM files can be read"
        return Rejection(uri, "corrupt", f"{which}: {damages[0]}")
    hint = "; name the NIfTI file itself" if NIFTI in kinds or GZIP in kinds else ""
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


def _slices(part: Part, data: bytes) -> Iterator[Slice]:
    header = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=[*_TAGS])
    frames = int(_value(header, "NumberOfFrames") or 1)
    groups = list(_value(header, "PerFrameFunctionalGroupsSequence") or [])
    shared = list(_value(header, "SharedFunctionalGroupsSequence") or [])[:1]
    if groups and len(groups) != frames:
        raise Unreadable(f"PerFrameFunctionalGroupsSequence has {len(groups)} items for {frames} frames")
    photometric = str(_value(header, "PhotometricInterpretation") or "MONOCHROME2")
    common = {
        "part": part,
        "frames": frames,
        "instance": _text(header, "SOPInstanceUID"),
        "series": _text(header, "SeriesInstanceUID"),
        "description": str(_value(header, "SeriesDescription") or ""),
        "modality": _modality(header),
        "syntax": UID(str(getattr(header.file_meta, "TransferSyntaxUID", "") or "")),
        "rows": int(_value(header, "Rows") or 0),
        "columns": int(_value(header, "Columns") or 0),
        "grey": int(_value(header, "SamplesPerPixel") or 1) == 1 and photometric.startswith("MONOCHROME"),
        "piece": _piece(header),
    }
    capture = _text(header, "SOPClassUID").startswith(_SECONDARY_CAPTURE)
    dimensions = _dimensions(header)
    for frame in range(frames):
        holders = [*groups[frame : frame + 1], *shared]
        numbers = {name: _numbers(_holder(header, holders, _GROUPS[name], name), name) for name in _NUMBERS}
        if frames > 1 and not groups:
            numbers["ImagePositionPatient"] = None  # it is one frame's at most
        clues = {name: _clue(header, holders, name, dimensions) for name in CLUES}
        clues["SOPInstanceUID"] = common["instance"] if frames > 1 else ""
        kinds = clues["ImageType"].upper().split("\\")
        yield Slice(
            **common,
            frame=frame,
            localiser="LOCALIZER" in kinds or capture,
            projection=bool(_PROJECTIONS & set(kinds)),
            original=kinds[0] == "ORIGINAL",
            position=numbers["ImagePositionPatient"],
            orientation=numbers["ImageOrientationPatient"],
            spacing=numbers["PixelSpacing"],
            slope=(numbers["RescaleSlope"] or (None,))[0],
            intercept=(numbers["RescaleIntercept"] or (None,))[0],
            clues=tuple(clues.values()),
        )


def _modality(header: pydicom.Dataset) -> str:
    """What the file calls itself: its Modality; where pixels come without one, their class, if that is none of CT."""
    stated = str(_value(header, "Modality") or "").strip().upper()
    kind = UID(_text(header, "SOPClassUID")).keyword
    if stated or not header.get("Rows") or kind.startswith(_CLASSES_OF_CT):
        return stated
    return kind


def _piece(header: pydicom.Dataset) -> tuple[str, int, int]:
    number, total = (_value(header, name) or 0 for name in ("InConcatenationNumber", "InConcatenationTotalNumber"))
    return _text(header, "ConcatenationUID"), int(number), int(total)


def _dimensions(header: pydicom.Dataset) -> list[int]:
    """Which of the dimension indices say something else than a frame's place in its stack."""
    dimensions = _value(header, "DimensionIndexSequence") or []
    return [index for index, each in enumerate(dimensions) if each.get("DimensionIndexPointer") not in _PLACES]


def _holder(header: pydicom.Dataset, frame_and_shared: list[pydicom.Dataset], group: str, name: str) -> pydicom.Dataset:
    """Where an attribute of a frame stands: its own functional group, the shared one, or the top level."""
    for groups in frame_and_shared:
        for item in list(groups.get(group) or [])[:1] if group else []:
            if name in item:
                return item
    return header


def _clue(header: pydicom.Dataset, frame_and_shared: list[pydicom.Dataset], name: str, dimensions: list[int]) -> str:
    group = CLUES[name]
    if name == "ImageType":
        typed = _holder(header, frame_and_shared, group, "FrameType")
        return _text(typed, "FrameType") if typed is not header else _text(header, "ImageType")
    holder = _holder(header, frame_and_shared, group, name)
    if name != "DimensionIndexValues":
        return _text(holder, name)
    values = np.ravel(_value(holder, name) or [])
    return "\\".join(f"{values[index]:06d}" for index in dimensions if index < len(values))


def _value(dataset: pydicom.Dataset, name: str) -> Any:
    try:
        return dataset.get(name)
    except Exception as error:  # pydicom raises many kinds
        raise Unreadable(f"{name} {_raw(dataset, name)!r} cannot be read") from error


def _raw(dataset: pydicom.Dataset, name: str) -> Any:
    element = dataset.get_item(name)
    return None if element is None else element.value


def _text(dataset: pydicom.Dataset, name: str) -> str:
    """A value as text, its parts between backslashes. Most are read as they stand in the file, without pydicom."""
    element = dataset.get_item(name)
    value = None if element is None else element.value
    if value is None:
        return ""
    if isinstance(value, bytes):
        if element.VR in ("US", "UL", "SS", "SL", "FD", "FL"):
            value = _value(dataset, name)
        else:
            return value.decode("latin-1").strip(" \0")
    return "\\".join(map(str, value)) if isinstance(value, list | pydicom.multival.MultiValue) else str(value)


def _numbers(dataset: pydicom.Dataset, name: str) -> tuple[float, ...] | None:
    """The numbers of a tag, whatever VR it was written with, a decimal comma read as meant; None where it is missing
    or empty, Unreadable where it is neither."""
    text = _text(dataset, name).replace("\0", "").strip()
    if not text:
        return None
    try:
        numbers = tuple(float(each.replace(",", ".")) for each in text.split("\\"))
    except ValueError:
        numbers = ()
    if len(numbers) != _NUMBERS[name] or not np.isfinite(numbers).all():
        raise Unreadable(f"{name} is {text!r}, expected {_NUMBERS[name]} number(s)")
    return numbers
