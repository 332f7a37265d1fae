"""What MetaImage and NRRD share: lines of text that say where the voxels lie, and the voxels, packed or not, behind
them or in a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mu2llm.ct import sources, voxels
from mu2llm.ct.codes import MAX_BYTES
from mu2llm.ct.volume import CTVolume, build
from mu2llm.ct.voxels import Stored
from mu2llm.errors import Rejection

Beside = Callable[[str], AbstractContextManager[tuple[sources.Stream, int]]]
"""Opens a file beside the header by its name: the stream and its bytes."""
LPS = np.diag([-1.0, -1.0, 1.0])
"""Axes to the patient's left, back and head → RAS+."""
_LINE, _LINES = 2**16, 4096  # of a header
_MM = {"mm": 1.0, "millimeter": 1.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "cm": 10.0, "m": 1000.0}


@dataclass(frozen=True)
class Raster:
    """What a text header says of a scan. `affine` is in mm, RAS+; `data_file` is "" where the voxels follow the
    header; `skip` bytes of it come first, -1: all but the voxels."""

    stored: Stored
    affine: np.ndarray
    warnings: frozenset[str]
    packing: Literal["raw", "zlib", "gzip"] = "raw"
    data_file: str = ""
    skip: int = 0


def read(
    raster: Raster,
    stream: sources.Stream,
    size: int,
    uri: str,
    format: str,
    beside: Beside | None,
    rescale: tuple[float, float] | None,
) -> CTVolume:
    """A header, and the stream behind it in a file of at most `size` bytes, → CTVolume; as in `mu2llm.ct.read`.

    `beside` opens files in the same folder; None where there is no folder, as with bytes.
    """
    with ExitStack() as opened:
        if raster.data_file:
            stream, size = opened.enter_context(_open(raster.data_file, uri, beside))
        most = size if raster.packing == "raw" else size * sources.GZIP_RATIO
        voxels.check_promise(raster.stored.shape, raster.stored.dtype, most, uri)
        _skip(stream, raster, size, uri)
        if raster.packing == "gzip":
            stream = opened.enter_context(sources.gunzip(stream, uri))
        elif raster.packing == "zlib":
            stream = sources.Inflated(stream, uri)
        hu, warnings = voxels.read(stream, raster.stored, uri, rescale)
    return build(hu, raster.affine, uri, raster.warnings | warnings, format=format)


def _open(name: str, uri: str, beside: Beside | None) -> AbstractContextManager[tuple[sources.Stream, int]]:
    if sources.climbs(name) or not name.isprintable():
        raise Rejection(uri, "unsafe_archive", f"the header names {name!r}, which is not in its own folder")
    if beside is None:
        raise Rejection(uri, "truncated", f"a header alone: its voxels are in {name}; give one file that holds both")
    return beside(name)


def _skip(stream: sources.Stream, raster: Raster, size: int, uri: str) -> None:
    skip = raster.skip
    if skip == -1:
        if raster.packing != "raw" or not raster.data_file:
            raise Rejection(uri, "undecodable", "voxels are counted from the end of a file that is packed or this one")
        skip = size - int(np.prod(raster.stored.shape)) * raster.stored.dtype.itemsize
    if not 0 <= skip <= MAX_BYTES:
        raise Rejection(uri, "corrupt", f"the voxels are said to start at byte {skip}")
    if len(stream.read(skip)) < skip:
        raise Rejection(uri, "truncated", "the file ends before its voxels begin")


# ---- what headers are made of


def lines(stream: sources.Stream, uri: str) -> Iterator[str]:
    """The header's lines without their ends; stops where the file does. Rejection `corrupt` for no text."""
    for _ in range(_LINES):
        line = stream.readline(_LINE)
        if not line:
            return
        if len(line) == _LINE or b"\0" in line:
            raise Rejection(uri, "corrupt", "the header is no text")
        yield line.decode("latin-1").rstrip("\r\n")
    raise Rejection(uri, "corrupt", f"a header of more than {_LINES} lines")


def put(fields: dict[str, str], name: str, value: str, uri: str) -> None:
    """A field of the header; Rejection `corrupt` where it has one of that name."""
    if name in fields:
        raise Rejection(uri, "corrupt", f"the header says {name} twice")
    fields[name] = value.strip()


def whole(fields: Mapping[str, str], name: str, uri: str, default: str | None = None) -> list[int]:
    """A field's whole numbers; Rejection `corrupt` where it is missing or no numbers."""
    text = fields.get(name, default)
    try:
        return [int(part) for part in (text or "").split()] if text is not None else _missing(name, uri)
    except ValueError as error:
        raise Rejection(uri, "corrupt", f"{name} is {_short(text)}, expected whole numbers") from error


def numbers(text: str, name: str, count: int, uri: str) -> np.ndarray:
    """`count` numbers; Rejection `bad_geometry` where they are others."""
    try:
        found = np.array([float(part) for part in text.replace(",", " ").split()])
    except ValueError as error:
        raise Rejection(uri, "bad_geometry", f"{name} is {_short(text)}, expected {count} numbers") from error
    if len(found) != count:
        raise Rejection(uri, "bad_geometry", f"{name} has {len(found)} numbers, expected {count}")
    return found


def in_mm(unit: str, uri: str) -> float:
    """Millimetres of a unit of length."""
    scale = _MM.get(unit.strip().lower().rstrip("s") if len(unit) > 3 else unit.strip().lower())
    if scale is None:
        raise Rejection(uri, "bad_geometry", f"lengths are in {_short(unit)}; known are {', '.join(_MM)}")
    return scale


def affine_of(axes: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Columns of axes (3, 3) and an origin (3,) → (4, 4)."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    return affine


def _missing(name: str, uri: str) -> list[int]:
    raise Rejection(uri, "corrupt", f"the header has no {name}")


def _short(text: str | None) -> str:
    return repr((text or "")[:60])
