"""MetaImage (.mha; .mhd with its .raw or .zraw): the header → where the voxels lie.

Source: ITK's MetaIO documentation, https://docs.itk.org/en/latest/learn/metaio.html. SimpleITK is not used: it takes
paths alone, so that a URI or an upload would go through a file, and it decodes before sizes could be checked.
"""

from __future__ import annotations

import zlib

import numpy as np

from mu2llm.ct import sources, voxels
from mu2llm.ct.raster import LPS, Raster, affine_of, in_mm, lines, numbers, put, whole
from mu2llm.ct.voxels import Stored
from mu2llm.errors import Rejection

_TYPES = {
    **{"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4"},
    **{"LONG": "i4", "ULONG": "u4", "LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4", "DOUBLE": "f8"},
}
_DATA = "ElementDataFile"
_OTHER_MODALITIES = {"MET_MOD_MR", "MET_MOD_NM", "MET_MOD_US", "MET_MOD_PET"}


def header(stream: sources.Stream, uri: str, accept: frozenset[str]) -> Raster:
    """The header at the start of a stream, which is left where the header ends. Raises Rejection."""
    fields: dict[str, str] = {}
    for line in lines(stream, uri):
        name, equals, value = line.partition("=")
        if not equals and line.strip():
            raise Rejection(uri, "corrupt", f"a line of the header is no `name = value`: {line[:60]!r}")
        if equals:
            put(fields, name.strip(), value, uri)
        if name.strip() == _DATA:
            break
    else:
        raise Rejection(uri, "truncated", f"the header ends before {_DATA}")
    _check_kind(fields, uri)
    axes, origin, warnings = _geometry(fields, uri, accept)
    file = fields[_DATA]
    if not file or file.upper().startswith("LIST") or "%" in file:
        raise Rejection(uri, "unsupported_format", "voxels in several files; write them as one .mha")
    return Raster(
        stored=_stored(fields, uri),
        affine=affine_of(axes, origin),
        warnings=frozenset(warnings),
        packing="zlib" if _true(fields.get("CompressedData")) else "raw",
        data_file="" if file.upper() == "LOCAL" else file,
        skip=(whole(fields, "HeaderSize", uri, "0") or [0])[0],
    )


def encode(hu: np.ndarray, affine: np.ndarray) -> bytes:
    """HU (x, y, z) int16 with their affine (mm, RAS+) → an .mha, its voxels compressed as ITK does it."""
    axes = LPS @ affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    voxels = zlib.compress(hu.astype("<i2").tobytes(order="F"), 1)
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": True,
        "CompressedDataSize": len(voxels),
        "TransformMatrix": _row((axes / spacing).T),
        "Offset": _row(LPS @ affine[:3, 3]),
        "ElementSpacing": _row(spacing),
        "DimSize": _row(hu.shape),
        "ElementType": "MET_SHORT",
        _DATA: "LOCAL",
    }
    return "".join(f"{name} = {value}\n" for name, value in fields.items()).encode() + voxels


def _row(values: np.ndarray | tuple[int, ...]) -> str:
    return " ".join(f"{value:.12g}" for value in np.ravel(values))


def _check_kind(fields: dict[str, str], uri: str) -> None:
    if fields.get("ObjectType", "Image").lower() != "image":
        raise Rejection(uri, "unsupported_format", f"a MetaIO file of {fields['ObjectType'][:60]!r}, not an image")
    if fields.get("Modality", "").upper() in _OTHER_MODALITIES:
        raise Rejection(uri, "other_modality", f"Modality is {fields['Modality']}")
    if not _true(fields.get("BinaryData", "True")):
        raise Rejection(uri, "undecodable", "voxels written as text; write them as binary data")


def _stored(fields: dict[str, str], uri: str) -> Stored:
    kind = fields.get("ElementType", "").removeprefix("MET_")
    if kind not in _TYPES:
        raise Rejection(uri, "corrupt", f"ElementType is {fields.get('ElementType', '')[:60]!r}, no type of MetaImage")
    channels = whole(fields, "ElementNumberOfChannels", uri, "1")
    if channels != [1]:
        colour = kind == "UCHAR" and channels in ([3], [4])
        raise Rejection(uri, "rgb" if colour else "not_3d", f"{channels} numbers a voxel, not HU")
    shape = voxels.check_shape(whole(fields, "DimSize", uri), uri)
    big = _true(fields.get("BinaryDataByteOrderMSB") or fields.get("ElementByteOrderMSB"))
    slope, intercept = (
        float(numbers(fields.get(f"ElementToIntensityFunction{name}", default), name, 1, uri)[0])
        for name, default in (("Slope", "1"), ("Offset", "0"))
    )
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise Rejection(uri, "corrupt", f"a slope of {slope} and an offset of {intercept} make no HU")
    return Stored(shape, np.dtype(f"{'>' if big else '<'}{_TYPES[kind]}"), (slope, intercept))


def _geometry(fields: dict[str, str], uri: str, accept: frozenset[str]) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Axes (3, 3) in columns and origin, in mm and RAS+, of the first three dimensions."""
    sizes = whole(fields, "DimSize", uri)
    count, warnings = len(sizes), set()
    if whole(fields, "NDims", uri) == [count] and count < 3:
        voxels.check_shape(sizes, uri)
    if whole(fields, "NDims", uri) != [count] or count > 10:
        raise Rejection(uri, "corrupt", f"NDims is {fields['NDims'][:60]!r}, and DimSize has {count} numbers")
    spacing = _first(fields, "ElementSpacing", "ElementSize")
    if spacing is None:
        raise Rejection(uri, "bad_geometry", "no ElementSpacing")
    sides = numbers(spacing, "ElementSpacing", count, uri)[:3]
    if (sides <= 0).any():
        raise Rejection(uri, "bad_geometry", f"ElementSpacing is {spacing[:60]}; each must be above 0")
    matrix = _first(fields, "TransformMatrix", "Orientation", "Rotation")
    if matrix is None:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri, "unknown_orientation", "no TransformMatrix; accept unknown_orientation to take the axes for LPS"
            )
        warnings.add("orientation_assumed")
    turned = np.eye(count) if matrix is None else numbers(matrix, "TransformMatrix", count**2, uri)
    directions = turned.reshape(count, count).T[:3, :3]  # the file has one axis after the other
    origin = numbers(_first(fields, "Offset", "Position", "Origin") or " ".join("0" * count), "Offset", count, uri)[:3]
    unit = fields.get("DistanceUnits", "mm")
    scale = 1.0 if unit == "?" else in_mm(unit, uri)
    if scale != 1:
        warnings.add("units_converted")
    return LPS @ (directions * sides) * scale, LPS @ origin * scale, warnings


def _first(fields: dict[str, str], *names: str) -> str | None:
    """The value of the first of several names for the same."""
    return next((fields[name] for name in names if name in fields), None)


def _true(text: str | None) -> bool:
    return (text or "")[:1] in ("T", "t", "1")
