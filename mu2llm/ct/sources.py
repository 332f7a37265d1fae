"""From a path, URI or bytes to streams: what kind of file it is, and archives opened within limits.

What is wrong with a file is a Rejection; storage that cannot be reached or refuses is an OSError.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Protocol

import pyarrow.fs as pafs
from isal import igzip, isal_zlib

from mu2llm import storage
from mu2llm.ct.codes import MAX_BYTES, MAX_FILES
from mu2llm.errors import Rejection

GZIP, ZIP, NIFTI, DICOM, UNKNOWN = "gzip", "zip", "NIfTI", "DICOM", "unknown"
METAIMAGE, NRRD = "MetaImage", "NRRD"
GZIP_RATIO = 1032  # deflate packs no better
_SUFFIXES = {
    **{".nii.gz": GZIP, ".gz": GZIP, ".nii": NIFTI, ".dcm": DICOM, ".zip": ZIP},
    **{".mha": METAIMAGE, ".mhd": METAIMAGE, ".nrrd": NRRD, ".nhdr": NRRD},
}
_META = re.compile(rb"\s*(?:ObjectType|NDims|Comment)\s*=")  # one of them is a MetaImage's first line
_SLACK = 2**20  # bytes that may follow the voxels
_BLOCK = 2**23  # bytes a request to object storage
_HEAD = 1024
_BOMB_BYTES, _BOMB_RATIO = 2**26, 200  # larger members that pack better are no pixels
_REMOTE_READS = 16


class Stream(Protocol):
    """What a file is read through."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Part:
    """One file of several: its name, and its bytes when they are wanted: of DICOM all, gzipped or not, of other files
    the first ones. `whole` gives all of any file."""

    name: str
    load: Callable[[], bytes]
    whole: Callable[[], bytes] = bytes


def kind_of(head: bytes) -> str:
    """What the first bytes (at least 132 of them) say that a file is."""
    if head[:2] == b"\x1f\x8b":
        return GZIP
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZIP
    if head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        return NIFTI
    if head[:7] == b"NRRD000":
        return NRRD
    if _META.match(head):
        return METAIMAGE
    # without a preamble DICOM starts with an element of group 0002 or 0008, little endian
    if head[128:132] == b"DICM" or (len(head) > 8 and head[0] in (2, 8) and head[1] == 0 and head[3] == 0):
        return DICOM
    return UNKNOWN


def suffix_of(head: bytes) -> str:
    """The suffix that a file of these first bytes is to have; "" where they say nothing."""
    kind = kind_of(head)
    return next((suffix for suffix, known in _SUFFIXES.items() if known == kind), "")


def check_suffix(uri: str, kind: str) -> None:
    """Rejects a name that says another format than the content is: the sign of a broken export or download."""
    name = uri.rsplit("/", 1)[-1].lower()
    suffix = next((known for known in _SUFFIXES if name.endswith(known)), None)
    if suffix and _SUFFIXES[suffix] != kind:
        what = "no format that is known here" if kind == UNKNOWN else kind
        raise Rejection(uri, "wrong_suffix", f"named {suffix}, but the content is {what}; mend the name or the file")


def info(uri: str) -> tuple[pafs.FileSystem, pafs.FileInfo]:
    """What is under a URI; Rejection `not_found` where nothing is."""
    filesystem, path = storage.resolve(uri)
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.NotFound:
        raise Rejection(uri, "not_found", "there is nothing under this path")
    return filesystem, found


@contextmanager
def open_stream(filesystem: pafs.FileSystem, path: str) -> Iterator[io.BufferedReader]:
    """A file as a buffered stream, read once from its start in large blocks."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        yield io.BufferedReader(stream, _BLOCK)


@contextmanager
def open_beside(filesystem: pafs.FileSystem, path: str, uri: str, name: str) -> Iterator[tuple[Stream, int]]:
    """A file in the folder of `path` and its bytes; Rejection `not_found` where it is not there."""
    other = f"{path.rpartition('/')[0]}/{name}"
    found = filesystem.get_file_info(other)
    if found.type != pafs.FileType.File:
        raise Rejection(uri, "not_found", f"its voxels are in {name}, which is not beside it")
    with open_stream(filesystem, other) as stream:
        yield stream, found.size


@contextmanager
def gunzip(stream: Stream, uri: str) -> Iterator[igzip.IGzipFile]:
    """The decompressed stream; what is wrong with the gzip becomes a Rejection."""
    try:
        with igzip.IGzipFile(fileobj=stream, mode="rb") as inner:
            yield inner
    except EOFError as error:
        raise Rejection(uri, "truncated", "the gzip stream ends too early") from error
    except (gzip.BadGzipFile, isal_zlib.IsalError, zlib.error) as error:  # type: ignore[misc]  # its stub is wrong
        raise Rejection(uri, "corrupt", f"damaged gzip: {error}") from error


class Inflated:
    """A zlib stream, decompressed as it is read."""

    def __init__(self, stream: Stream, uri: str) -> None:
        self._stream, self._uri = stream, uri
        self._zlib = isal_zlib.decompressobj()

    def read(self, size: int = -1, /) -> bytes:
        """Some of what is left, at most `size` bytes; b"" at the end. Rejection `truncated` or `corrupt`."""
        try:
            while not self._zlib.eof:
                block = self._zlib.unconsumed_tail or self._stream.read(_BLOCK)
                if found := self._zlib.decompress(block, max(size, 0)):
                    return found
                if not block:
                    raise Rejection(self._uri, "truncated", "the zlib stream ends too early")
        except isal_zlib.IsalError as error:  # type: ignore[misc]  # its stub is wrong
            raise Rejection(self._uri, "corrupt", f"damaged zlib stream: {error}") from error
        return b""

    def readline(self, size: int = -1, /) -> bytes:
        raise io.UnsupportedOperation("voxels have no lines")


def gunzipped_dicom(stream: Stream, packed: int, uri: str) -> bytes:
    """All of a DICOM file from its decompressed stream; Rejection `too_large` where its `packed` bytes hold more than
    pixels can."""
    limit = min(MAX_BYTES, max(_BOMB_BYTES, _BOMB_RATIO * packed))
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise Rejection(uri, "too_large", f"{packed} bytes of gzip unpack to more than {limit}")
    return data


def fill(stream: Stream, buffer: memoryview, uri: str) -> None:
    """Reads exactly the buffer's bytes; Rejection `truncated` where there are fewer."""
    done = 0
    while done < len(buffer):
        block = stream.read(min(_BLOCK, len(buffer) - done))
        if not block:
            raise Rejection(uri, "truncated", f"{len(buffer) - done} bytes of the voxels are missing")
        buffer[done : done + len(block)] = block
        done += len(block)


def check_end(stream: Stream, uri: str) -> None:
    """Reads on to the stream's end, and so to its checksum; Rejection `corrupt` where much follows the voxels."""
    if len(stream.read(_SLACK + 1)) > _SLACK:
        raise Rejection(uri, "corrupt", f"more than {_SLACK} bytes follow the voxels that the header promises")


def folder_parts(filesystem: pafs.FileSystem, path: str, uri: str) -> list[Part]:
    """The files below a folder or prefix, and those in its zips. Remote ones are fetched at once, in parallel."""
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = sorted((each for each in found if each.type == pafs.FileType.File), key=lambda each: each.path)
    check_sizes(uri, len(files), 0)

    def load(each: pafs.FileInfo, whole: bool = False) -> bytes:
        with filesystem.open_input_stream(each.path, compression=None, buffer_size=_BLOCK) as stream:
            return _load(stream, each.size, uri, whole)

    names = [PurePosixPath(each.path).name for each in files]
    if isinstance(filesystem, pafs.LocalFileSystem):
        return [
            Part(name, partial(load, each), partial(load, each, True)) for name, each in zip(names, files, strict=True)
        ]
    check_sizes(uri, len(files), sum(each.size for each in files))
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        contents = list(pool.map(load, files))
    return [
        Part(name, partial(bytes, data), partial(load, each, True))
        for name, data, each in zip(names, contents, files, strict=True)
    ]


def byte_parts(files: Sequence[bytes], uri: str) -> list[Part]:
    """Files that are in memory already."""

    def load(data: bytes) -> bytes:
        return _load(io.BytesIO(data), len(data), uri)

    return [Part(f"file {n}", partial(load, data), partial(bytes, data)) for n, data in enumerate(files, 1)]


def zip_parts(data: bytes, uri: str) -> list[Part]:
    """The files in a zip, decompressed in memory when wanted: nothing is ever written to disk.

    Rejection: `corrupt`, `unsafe_archive`, `too_large`."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises many kinds for damaged archives
        raise Rejection(uri, "corrupt", f"damaged zip: {error}") from error
    check_sizes(uri, len(members), sum(member.file_size for member in members))
    for member in members:
        _check_member(member, uri)

    def load(member: zipfile.ZipInfo, whole: bool = False) -> bytes:
        try:
            with archive.open(member) as stream:
                return _load(stream, member.file_size, uri, whole)
        except Rejection:
            raise
        except Exception as error:  # zipfile and zlib raise many kinds
            raise Rejection(uri, "corrupt", f"damaged zip member {member.filename}: {error}") from error

    return [Part(member.filename, partial(load, member), partial(load, member, True)) for member in members]


def _load(stream: Stream, size: int, uri: str, whole: bool = False) -> bytes:
    """All of a DICOM file of `size` bytes, of a gzipped one what it unpacks to; of any other file its first bytes only,
    unless the `whole` of it is wanted."""
    head = stream.read(_HEAD)
    packed = _holds_dicom(head)
    if not (packed or whole or kind_of(head) == DICOM):
        return head
    check_sizes(uri, 1, size)
    data = head + stream.read()
    if not packed:
        return data
    with gunzip(io.BufferedReader(io.BytesIO(data)), uri) as inner:
        return gunzipped_dicom(inner, size, uri)


def _holds_dicom(head: bytes) -> bool:
    """Whether the first bytes are those of a gzipped DICOM file."""
    try:
        return kind_of(head) == GZIP and kind_of(isal_zlib.decompressobj(wbits=31).decompress(head, _HEAD)) == DICOM
    except isal_zlib.IsalError:  # type: ignore[misc]  # its stub is wrong; damaged: then nothing says that it was DICOM
        return False


def climbs(name: str) -> bool:
    """Whether a name leads out of its own folder: an absolute one, one with `..`, a drive or a URI."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1])


def _check_member(member: zipfile.ZipInfo, uri: str) -> None:
    if climbs(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
        raise Rejection(uri, "unsafe_archive", f"member {member.filename!r} points outside the archive")
    if member.flag_bits & 1:
        raise Rejection(uri, "unsafe_archive", f"member {member.filename!r} is encrypted")
    if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
        raise Rejection(uri, "too_large", f"member {member.filename!r} unpacks to {member.file_size} bytes")


def check_sizes(uri: str, files: int, size: int) -> None:
    """Rejects more files or bytes than a scan can have."""
    if files > MAX_FILES:
        raise Rejection(uri, "too_large", f"{files} files; a scan has at most {MAX_FILES}")
    if size > MAX_BYTES:
        raise Rejection(uri, "too_large", f"{size} bytes; a scan has at most {MAX_BYTES}")
