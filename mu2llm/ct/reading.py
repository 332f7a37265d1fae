"""`read`: any source of one scan → CTVolume, or a Rejection that says why not; `read_several`: of its series."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from mu2llm.ct import dicom, metaimage, nifti, nrrd, raster, sources
from mu2llm.ct.codes import REASONS, check_accept
from mu2llm.ct.volume import CTVolume, admit
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

    `source` is a path or URI (s3://, gs://) of a NIfTI, a MetaImage (.mha; .mhd with its data file beside it), an NRRD
    (.nrrd; .nhdr likewise), a DICOM file, a zip or a folder of DICOM files, or the bytes of one of them, or a list of
    the bytes of DICOM files; any of them may be gzipped. `series` picks a DICOM series by its instance UID or
    description, with `#2` the second of several scans in it; other formats have none.
    `rescale` is (slope, intercept) from a metadata table: applied once, and not at all where the values are in HU
    already. `accept` lists codes to let in: unknown_orientation, series_per_slice.

    Raises Rejection (a code of `REASONS`) for what is wrong with the scan, OSError for storage that cannot be
    reached or refuses, UserError for an unknown scheme or code. What was set right is in `.warnings`.
    """
    (volume,) = _read(source, _Wanted(series, rescale, check_accept(accept)))
    return volume


def read_several(
    source: str | Path | bytes | Sequence[bytes],
    most: int,
    *,
    rescale: tuple[float, float] | None = None,
    accept: Iterable[str] = (),
) -> list[CTVolume]:
    """At most so many of the series of an examination that lie in one place, each as `read` gives it and let in by
    `admit`. The first is the one that `read` takes; then come, from the largest to the smallest, the axial ones of the
    same study that are no projections and cover at least half of its length.

    Raises as `read` does; of series behind the first what is wrong is no Rejection but the first one's warning
    `series_unusable`. What is not DICOM is one series.
    """
    wanted = _Wanted(None, rescale, check_accept(accept), most)
    return [admit(volume, wanted.accept) for volume in _read(source, wanted)]


def _read(source: str | Path | bytes | Sequence[bytes], wanted: _Wanted) -> list[CTVolume]:
    if isinstance(source, list | tuple) and len(source) != 1:
        return wanted.dicom(sources.byte_parts(source, "bytes"), "bytes")
    if isinstance(source, bytes | bytearray | memoryview | list | tuple):
        data = bytes(source[0] if isinstance(source, list | tuple) else source)
        return _read_file(io.BufferedReader(io.BytesIO(data)), len(data), "bytes", wanted, None)
    uri = str(source)
    filesystem, found = sources.info(uri)
    if found.type == pafs.FileType.Directory:
        return wanted.dicom(sources.folder_parts(filesystem, found.path, uri), uri)
    if found.type != pafs.FileType.File:
        raise Rejection(uri, "unsupported_format", "neither a file nor a folder")
    with sources.open_stream(filesystem, found.path) as stream:
        beside = partial(sources.open_beside, filesystem, found.path, uri)
        return _read_file(stream, found.size, uri, wanted, beside)


class _Wanted(NamedTuple):
    """What `read` is asked for besides the source."""

    series: str | None
    rescale: tuple[float, float] | None
    accept: frozenset[str]
    most: int = 1

    def dicom(self, parts: list[sources.Part], uri: str) -> list[CTVolume]:
        """The series among DICOM files, one unless more are wanted."""
        if self.most == 1:
            return [dicom.read(parts, uri, self.series, self.rescale, self.accept)]
        return dicom.read_several(parts, uri, self.most, self.rescale, self.accept)


def _read_file(
    stream: io.BufferedReader, size: int, uri: str, wanted: _Wanted, beside: raster.Beside | None
) -> list[CTVolume]:
    """One file of `size` bytes, of whatever kind its first bytes say."""
    head = stream.peek(_HEAD)
    if not head:
        raise Rejection(uri, "empty", "the file has no bytes")
    kind = sources.kind_of(head)
    sources.check_suffix(uri, kind)
    if kind == sources.UNKNOWN:
        raise Rejection(uri, "unsupported_format", REASONS["unsupported_format"])
    if kind == sources.GZIP:
        with sources.gunzip(stream, uri) as inner:
            within = sources.kind_of(inner.peek(_HEAD)[:_HEAD])
            if within != sources.DICOM:
                return [_read_headed(inner, within, size * sources.GZIP_RATIO, uri, wanted, beside)]
            sources.check_suffix(uri.removesuffix(".gz"), sources.DICOM)
            data = sources.gunzipped_dicom(inner, size, uri)
        kind = sources.DICOM
    elif kind in (sources.NIFTI, sources.METAIMAGE, sources.NRRD):
        return [_read_headed(stream, kind, size, uri, wanted, beside)]
    else:
        sources.check_sizes(uri, 1, size)
        data = stream.read()
    name = uri.rsplit("/", 1)[-1]
    parts = sources.zip_parts(data, uri) if kind == sources.ZIP else [sources.Part(name, partial(bytes, data))]
    return wanted.dicom(parts, uri)


def _read_headed(
    stream: sources.Stream, kind: str, most: int, uri: str, wanted: _Wanted, beside: raster.Beside | None
) -> CTVolume:
    """A header and at most `most` bytes of it and its voxels: NIfTI, MetaImage or NRRD."""
    if wanted.series is not None:
        what = kind if kind in (sources.METAIMAGE, sources.NRRD) else sources.NIFTI
        raise Rejection(uri, "no_series", f"no series {wanted.series}: a {what} is one scan and names no series")
    if kind in (sources.METAIMAGE, sources.NRRD):
        header = (metaimage if kind == sources.METAIMAGE else nrrd).header(stream, uri, wanted.accept)
        return raster.read(header, stream, most, uri, kind, beside, wanted.rescale)
    return nifti.read(stream, most, uri, wanted.rescale, wanted.accept)
