"""`read`: any source of one scan → CTVolume, or a Rejection that says why not."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs

from mu2llm.ct import dicom, nifti, sources
from mu2llm.ct.codes import check_accept
from mu2llm.ct.volume import CTVolume
from mu2llm.errors import Rejection

_HEAD = 1024


def read(
    source: str | Path | bytes | Sequence[bytes],
    *,
    series: str | None = None,
    rescale: tuple[float, float] | None = None,
    accept: Iterable[str] = (),
) -> CTVolume:
    """One scan in HU, (x, y, z) on a straight grid in RAS+ axes, in mm.

    `source` is a path or URI (s3://, gs://) of a NIfTI, a DICOM file, a zip or a folder of DICOM files, or the
    bytes of one of them, or a list of the bytes of DICOM files; any of them may be gzipped. `series` picks a DICOM
    series by its instance UID or description, with `#2` the second of several scans in it; a NIfTI has none.
    `rescale` is (slope, intercept) from a metadata table: applied once, and not at all where the values are in HU
    already. `accept` lists codes to let in: unknown_orientation, series_per_slice.

    Raises Rejection (a code of `REASONS`) for what is wrong with the scan, OSError for storage that cannot be
    reached or refuses, UserError for an unknown scheme or code. What was set right is in `.warnings`.
    """
    codes = check_accept(accept)
    if isinstance(source, list | tuple) and len(source) != 1:
        return dicom.read(sources.byte_parts(source, "bytes"), "bytes", series, rescale, codes)
    if isinstance(source, bytes | bytearray | memoryview | list | tuple):
        data = bytes(source[0] if isinstance(source, list | tuple) else source)
        return _read_file(io.BufferedReader(io.BytesIO(data)), len(data), "bytes", series, rescale, codes)
    uri = str(source)
    filesystem, found = sources.info(uri)
    if found.type == pafs.FileType.Directory:
        return dicom.read(sources.folder_parts(filesystem, found.path, uri), uri, series, rescale, codes)
    if found.type != pafs.FileType.File:
        raise Rejection(uri, "unsupported_format", "neither a file nor a folder")
    with sources.open_stream(filesystem, found.path) as stream:
        return _read_file(stream, found.size, uri, series, rescale, codes)


def _read_file(
    stream: io.BufferedReader,
    size: int,
    uri: str,
    series: str | None,
    rescale: tuple[float, float] | None,
    accept: frozenset[str],
) -> CTVolume:
    """One file of `size` bytes, of whatever kind its first bytes say."""
    head = stream.peek(_HEAD)
    if not head:
        raise Rejection(uri, "empty", "the file has no bytes")
    kind = sources.kind_of(head)
    sources.check_suffix(uri, kind)
    if kind == sources.UNKNOWN:
        raise Rejection(uri, "unsupported_format", "neither NIfTI nor DICOM nor a zip of DICOM files")
    if kind == sources.GZIP:
        with sources.gunzip(stream, uri) as inner:
            if sources.kind_of(inner.peek(_HEAD)[:_HEAD]) != sources.DICOM:
                return _read_nifti(inner, size * sources.GZIP_RATIO, uri, series, rescale, accept)
            sources.check_suffix(uri.removesuffix(".gz"), sources.DICOM)
            data = sources.gunzipped_dicom(inner, size, uri)
        kind = sources.DICOM
    elif kind == sources.NIFTI:
        return _read_nifti(stream, size, uri, series, rescale, accept)
    else:
        sources.check_sizes(uri, 1, size)
        data = stream.read()
    name = uri.rsplit("/", 1)[-1]
    parts = sources.zip_parts(data, uri) if kind == sources.ZIP else [sources.Part(name, partial(bytes, data))]
    return dicom.read(parts, uri, series, rescale, accept)


def _read_nifti(
    stream: sources.Stream,
    most: int,
    uri: str,
    series: str | None,
    rescale: tuple[float, float] | None,
    accept: frozenset[str],
) -> CTVolume:
    if series is not None:
        raise Rejection(uri, "no_series", f"no series {series}: a NIfTI is one scan and names no series")
    return nifti.read(stream, most, uri, rescale, accept)
