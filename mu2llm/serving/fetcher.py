"""The process that brings what a URI names onto the disk, for one that decodes it without a network.

It has the credentials of storage and archives, and of a scan it reads text headers and DICOM's tags, no voxels.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from mu2llm import storage
from mu2llm.ct import metaimage, nrrd, sources
from mu2llm.errors import Rejection
from mu2llm.serving import dicomweb
from mu2llm.serving.refusal import Refusal, attempted

_READS = 16
_ACCEPTED = frozenset({"unknown_orientation"})  # which is for the reader to refuse
_HEADED = {sources.METAIMAGE: metaimage.header, sources.NRRD: nrrd.header}


@dataclass(frozen=True)
class Fetch:
    """An (allowed) URI, the empty local folder that takes what it names, and of how many series of a study."""

    uri: str
    folder: str
    series: int = 1


def is_remote(source: str) -> bool:
    """Whether it must be fetched: not what lies on this machine already."""
    return dicomweb.is_one(source) or storage.is_remote(source)


def fetch(asked: Fetch, max_slices: int) -> str:
    """The local path of the copy: a file of the same name, or a folder. Raises Rejection, OSError."""
    folder = Path(asked.folder)
    if dicomweb.is_one(asked.uri):
        for number, data in enumerate(dicomweb.fetch(asked.uri, max_slices, asked.series)):
            (folder / f"{number}.dcm").write_bytes(data)
        return asked.folder
    filesystem, found = sources.info(asked.uri)
    if found.type == pafs.FileType.Directory:
        _fetch_folder(filesystem, found.path, asked)
        return asked.folder
    sources.check_sizes(asked.uri, 1, found.size)
    local = folder / asked.uri.rsplit("/", 1)[-1]
    _copy(filesystem, found.path, local)
    if name := _voxels_beside(local):
        if sources.climbs(name):
            raise Rejection("", "unsafe_archive", "the header names a file that is not in its own folder")
        beside = filesystem.get_file_info(f"{found.path.rpartition('/')[0]}/{name}")
        if beside.type == pafs.FileType.File:  # what is not there, the reader says
            sources.check_sizes(asked.uri, 1, beside.size)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(filesystem, beside.path, folder / name)
    return str(local)


def _fetch_folder(filesystem: pafs.FileSystem, path: str, asked: Fetch) -> None:
    """The files below it, numbered: their own folders say nothing to who reads a series, and may climb."""
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = sorted((each for each in found if each.type == pafs.FileType.File), key=lambda each: each.path)
    sources.check_sizes(asked.uri, len(files), sum(each.size for each in files))

    def copy(number: int) -> None:
        each = files[number]
        _copy(filesystem, each.path, Path(asked.folder, f"{number:05} {each.base_name}"))

    with ThreadPoolExecutor(_READS) as pool:
        list(pool.map(copy, range(len(files))))


def _voxels_beside(path: Path) -> str:
    """The file that a header of its own names for its voxels; "" where it names none, or is no sound header."""
    with path.open("rb") as stream:
        kind = sources.kind_of(stream.peek(1024))
        try:
            return _HEADED[kind](stream, "", _ACCEPTED).data_file if kind in _HEADED else ""
        except Rejection:  # the reader says why
            return ""


def _copy(filesystem: pafs.FileSystem, path: str, local: Path) -> None:
    with sources.open_stream(filesystem, path) as stream, local.open("wb") as target:
        shutil.copyfileobj(stream, target, 2**23)


def answer(asked: tuple[Fetch, int]) -> str | Refusal:
    """In the child: the path, or why there is none."""
    return attempted(lambda: fetch(*asked))
