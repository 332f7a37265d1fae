"""NRRD (.nrrd; .nhdr with its data file): the header → where the voxels lie.

Source: the definition of the format, https://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from mu2llm.ct import sources, voxels
from mu2llm.ct.raster import LPS, Raster, affine_of, in_mm, lines, numbers, put, whole
from mu2llm.ct.voxels import Stored
from mu2llm.errors import Rejection

_NAMES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPES = {name: code for code, names in _NAMES.items() for name in names}
_PACKINGS: dict[str, Literal["raw", "gzip"]] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_SPACES = {
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(3)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0])),
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS),
}
_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
_COLOURS = {"rgb-color", "rgba-color", "3-color", "4-color", "hsv-color", "xyz-color"}
_ORIENTED = {"domain", "space", "???", "none"}  # kinds of an axis along which the body lies


def header(stream: sources.Stream, uri: str, accept: frozenset[str]) -> Raster:
    """The header at the start of a stream, which is left where the header ends. Raises Rejection."""
    fields = _fields(stream, uri)
    file = fields.get("data file", "")
    if file.upper().startswith("LIST") or "%" in file:
        raise Rejection(uri, "unsupported_format", "voxels in several files; write them as one .nrrd")
    kept = _axes(fields, uri)
    axes, origin, warnings = _geometry(fields, kept, uri, accept)
    if whole(fields, "line skip", uri, "0") != [0]:
        raise Rejection(uri, "undecodable", "lines to be skipped before the voxels; write them without")
    return Raster(
        stored=_stored(fields, kept, uri),
        affine=affine_of(axes, origin),
        warnings=frozenset(warnings),
        packing=_packing(fields, uri),
        data_file=file,
        skip=(whole(fields, "byte skip", uri, "0") or [0])[0],
    )


def _fields(stream: sources.Stream, uri: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    text = lines(stream, uri)
    next(text, "")  # NRRD000n
    for line in text:
        if not line.strip():
            return fields
        name, colon, value = line.partition(":")
        if line.startswith("#") or value.startswith("="):  # comments; keys of one's own
            continue
        if not colon:
            raise Rejection(uri, "corrupt", f"a line of the header is no `field: value`: {line[:60]!r}")
        name = " ".join(name.lower().split())
        put(fields, _ALIASES.get(name, name), value, uri)
    if "data file" not in fields:
        raise Rejection(uri, "truncated", "the file ends within its header")
    return fields


def _axes(fields: dict[str, str], uri: str) -> list[int]:
    """Which axes are the volume's: all but those of one element that a fourth dimension has."""
    sizes = whole(fields, "sizes", uri)
    count = len(sizes)
    if whole(fields, "dimension", uri) != [count] or not 1 <= count <= 16:
        raise Rejection(uri, "corrupt", f"dimension is {fields['dimension'][:60]!r}, and there are {count} sizes")
    kinds = (fields.get("kinds", "").lower().split() + ["???"] * count)[:count]
    for kind, size in zip(kinds, sizes, strict=True):
        if kind in _COLOURS or (kind == "complex" and size > 1):
            raise Rejection(uri, "complex" if kind == "complex" else "rgb", f"an axis of kind {kind}, not HU")
        if kind not in _ORIENTED and size > 1:
            raise Rejection(uri, "not_3d", f"an axis of kind {kind} with {size} elements, expected one 3-D volume")
    kept = list(range(count))
    for axis in reversed(range(count)):
        if len(kept) > 3 and sizes[axis] == 1:
            kept.remove(axis)
    return kept


def _stored(fields: dict[str, str], kept: list[int], uri: str) -> Stored:
    sizes = whole(fields, "sizes", uri)
    code = _TYPES.get(" ".join(fields.get("type", "").lower().split()))
    if code is None:
        raise Rejection(uri, "corrupt", f"type is {fields.get('type', '')[:60]!r}, expected one of numbers")
    endian = fields.get("endian", "" if code[1] != "1" else "little").lower()
    if endian not in ("little", "big"):
        raise Rejection(uri, "corrupt", f"endian is {endian[:60]!r}, expected little or big")
    if any(size < 1 for size in sizes):
        raise Rejection(uri, "empty", f"no voxels: sizes {sizes}")
    shape = voxels.check_shape([sizes[axis] for axis in kept], uri)
    return Stored(shape, np.dtype(f"{'>' if endian == 'big' else '<'}{code}"))


def _packing(fields: dict[str, str], uri: str) -> Literal["raw", "gzip"]:
    named = fields.get("encoding", "").lower()
    if named not in _PACKINGS:
        raise Rejection(uri, "undecodable", f"encoding is {named[:60]!r}; write it with raw or gzip")
    return _PACKINGS[named]


def _geometry(
    fields: dict[str, str], kept: list[int], uri: str, accept: frozenset[str]
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Axes (3, 3) in columns and origin, in mm and RAS+, of the kept dimensions."""
    if len(kept) != 3:
        voxels.check_shape(whole(fields, "sizes", uri), uri)
    warnings = set()
    space = _SPACES.get(fields.get("space", "").lower())
    directions = _directions(fields, kept, uri)
    if space is None or directions is None:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri,
                "unknown_orientation",
                f"space is {fields.get('space', '')[:60]!r}{'' if directions is not None else ', without directions'}; "
                "accept unknown_orientation to take the axes for LPS",
            )
        warnings.add("orientation_assumed")
        space = LPS if space is None else space
    if directions is None:
        count = len(whole(fields, "sizes", uri))
        directions = np.diag(numbers(fields.get("spacings", ""), "spacings", count, uri)[kept])
    origin = numbers(fields.get("space origin", "(0,0,0)").strip("()"), "space origin", 3, uri)
    scale = _scale(fields, uri)
    if scale != 1:
        warnings.add("units_converted")
    return space @ directions * scale, space @ origin * scale, warnings


def _directions(fields: dict[str, str], kept: list[int], uri: str) -> np.ndarray | None:
    if "space directions" not in fields:
        return None
    found = re.findall(r"\(([^()]*)\)|none", fields["space directions"])
    if len(found) != len(whole(fields, "sizes", uri)):
        raise Rejection(uri, "bad_geometry", "not as many space directions as sizes")
    return np.stack([numbers(found[axis], "space directions", 3, uri) for axis in kept], axis=1)


def _scale(fields: dict[str, str], uri: str) -> float:
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if len(units) > 1:
        raise Rejection(uri, "bad_geometry", f"space units differ: {', '.join(sorted(units))[:60]}")
    return in_mm(units.pop(), uri) if units else 1.0
