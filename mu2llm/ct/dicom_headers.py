"""What the header of a DICOM file says of its slices: one of a classic object, each frame of a multi-frame one.

Of an enhanced object an attribute stands in a frame's functional groups, else in the shared ones, else at the top
level, where classic objects have it (PS3.3 C.7.6.16). Both kinds of one scan give the same slices.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pydicom
from pydicom.filereader import read_dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mu2llm.ct.codes import MAX_BYTES, MAX_FILES
from mu2llm.ct.dicom_tags import Unreadable, holder, numbers, tag, text, value
from mu2llm.ct.sources import DICOM, GZIP, NIFTI, ZIP, Part, check_sizes, kind_of, zip_parts
from mu2llm.errors import Rejection

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

_NUMBERS = [  # tag, the functional group that holds it in enhanced objects, how many numbers
    ("ImagePositionPatient", "PlanePositionSequence", 3),
    ("ImageOrientationPatient", "PlaneOrientationSequence", 6),
    ("PixelSpacing", "PixelMeasuresSequence", 2),
    ("RescaleSlope", "PixelValueTransformationSequence", 1),
    ("RescaleIntercept", "PixelValueTransformationSequence", 1),
]
_TAGS = [tag(name) for name in [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence", "ConcatenationUID", "InConcatenationNumber",
    "InConcatenationTotalNumber", *(name for name, *_ in _NUMBERS), *CLUES,
]]  # fmt: skip
_PLACES = {tag(name) for name in ("InStackPositionNumber", "ImagePositionPatient", "ImagePositionVolume")}


@dataclass(frozen=True)
class Slice:
    """One slice as its file's header says, and the file's bytes when they are wanted. What is missing is None or
    empty; `spacing` is (between rows, between columns) in mm; directions and places are LPS, in mm. `frame` counts
    from 0; `clues` are the values of CLUES, `piece` is which of how many objects of a concatenation."""

    part: Part
    frames: int
    series: str
    description: str
    modality: str
    syntax: UID
    rows: int
    columns: int
    grey: bool
    piece: tuple[str, int, int]
    frame: int = 0
    localiser: bool = False
    projection: bool = False
    original: bool = False
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    slope: float | None = None
    intercept: float | None = None
    clues: tuple[str, ...] = ()

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
    """The slice of a classic object, or those of a multi-frame one, in the file's order."""
    header = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=_TAGS)
    frames = int(value(header, "NumberOfFrames") or 1)
    groups = list(value(header, "PerFrameFunctionalGroupsSequence") or [])
    shared = list(value(header, "SharedFunctionalGroupsSequence") or [])[:1]
    if not 1 <= frames <= MAX_FILES or (groups and len(groups) != frames):
        raise Unreadable(f"NumberOfFrames is {frames}, PerFrameFunctionalGroupsSequence has {len(groups)} items")
    photometric = str(value(header, "PhotometricInterpretation") or "MONOCHROME2")
    whole = Slice(
        part=part,
        frames=frames,
        series=text(header, "SeriesInstanceUID"),
        description=str(value(header, "SeriesDescription") or ""),
        modality=_modality(header),
        syntax=UID(str(getattr(header.file_meta, "TransferSyntaxUID", "") or "")),
        rows=int(value(header, "Rows") or 0),
        columns=int(value(header, "Columns") or 0),
        grey=int(value(header, "SamplesPerPixel") or 1) == 1 and photometric.startswith("MONOCHROME"),
        piece=_piece(header),
    )
    capture = text(header, "SOPClassUID").startswith(_SECONDARY_CAPTURE)
    dimensions = _dimensions(header)
    for frame in range(frames):
        holders = [*groups[frame : frame + 1], *shared]
        position, orientation, spacing, slope, intercept = (
            numbers(holder(header, holders, sequence, name), name, count) for name, sequence, count in _NUMBERS
        )
        clues = {name: _clue(header, holders, name, dimensions) for name in CLUES}
        clues["SOPInstanceUID"] = text(header, "SOPInstanceUID") if frames > 1 else ""
        kinds = clues["ImageType"].upper().split("\\")
        yield replace(
            whole,
            frame=frame,
            localiser="LOCALIZER" in kinds or capture,
            projection=bool(_PROJECTIONS & set(kinds)),
            original=kinds[0] == "ORIGINAL",
            position=position if groups or frames == 1 else None,  # of many frames, it is one's at most
            orientation=orientation,
            spacing=spacing,
            slope=slope[0] if slope else None,
            intercept=intercept[0] if intercept else None,
            clues=tuple(clues.values()),
        )


def _modality(header: pydicom.Dataset) -> str:
    """What the file calls itself: its Modality; where pixels come without one, their class, if that is none of CT."""
    stated = str(value(header, "Modality") or "").strip().upper()
    kind = UID(text(header, "SOPClassUID")).keyword
    if stated or not header.get("Rows") or kind.startswith(_CLASSES_OF_CT):
        return stated
    return kind


def _piece(header: pydicom.Dataset) -> tuple[str, int, int]:
    number, total = (value(header, name) or 0 for name in ("InConcatenationNumber", "InConcatenationTotalNumber"))
    return text(header, "ConcatenationUID"), int(number), int(total)


def _dimensions(header: pydicom.Dataset) -> list[int]:
    """Which of the dimension indices say something else than a frame's place in its stack."""
    dimensions = value(header, "DimensionIndexSequence") or []
    return [index for index, each in enumerate(dimensions) if each.get("DimensionIndexPointer") not in _PLACES]


def _clue(header: pydicom.Dataset, groups: list[pydicom.Dataset], name: str, dimensions: list[int]) -> str:
    """The value of one of CLUES for a frame with these functional groups."""
    sequence = CLUES[name]
    if name == "ImageType":
        typed = holder(header, groups, sequence, "FrameType")
        return text(typed, "FrameType") or text(header, "ImageType")
    found = holder(header, groups, sequence, name)
    if name == "SliceThickness":
        thickness = numbers(found, name, 1)
        return "" if thickness is None else f"{thickness[0]:.1f}"
    if name != "DimensionIndexValues":
        return text(found, name)
    values = np.ravel(value(found, name) or [])
    return "\\".join(f"{values[index]:06d}" for index in dimensions if index < len(values))
