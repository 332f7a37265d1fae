"""The scans below `--volumes`, listed once: which are there, how large, and which no manifest names.

A root of DICOM series has millions of files: they are listed by tasks, folder by folder, and what is kept of a series'
slices is what they are together.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow.fs as pafs
import ray

from mu2llm import storage

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".npy", ".zip", ".dcm")
_DETACHED = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz")}
"""Headers whose voxels lie beside them, and the suffixes that the writers of these formats give those."""

SLICE_BYTES = 4 * 2**20  # a file of as many is a scan of its own
SHARED_FROM = 64  # folders, from which they are listed by tasks
A_TASK = 32  # folders of a task, at least
TASKS = 256  # at most
LISTING_CPUS = 0.25  # a task mostly waits for storage


def stem(path: str) -> str:
    """The name of a scan: the last part of its path without suffix."""
    name = path.rstrip("/").rpartition("/")[2]
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


class Facts(NamedTuple):
    """What a listing says of a scan, be it a file or a folder: its bytes, and a number that becomes another when any
    of its files does."""

    bytes: int = 0
    stamp: int = 0

    @classmethod
    def of(cls, path: str, info: pafs.FileInfo) -> Facts:
        digest = hashlib.sha256(f"{path} {info.size} {info.mtime_ns}".encode()).digest()
        return cls(info.size, int.from_bytes(digest[:8]))

    def joined(self, other: Facts) -> Facts:
        return Facts(self.bytes + other.bytes, self.stamp ^ other.stamp)


@dataclass
class Listing:
    """What lies below a root: single files by their path, and of the slices of each folder what they are together.

    `dicom` are the folders with slices that are named .dcm.
    """

    files: dict[str, Facts] = field(default_factory=dict)
    slices: dict[str, Facts] = field(default_factory=dict)
    dicom: set[str] = field(default_factory=set)

    def add(self, path: str, info: pafs.FileInfo) -> None:
        """Takes a file in, by its path relative to the root."""
        facts, (folder, _, name) = Facts.of(path, info), path.rpartition("/")
        if not folder or not _may_be_slice(name, info.size):
            self.files[path] = facts
            return
        self.slices[folder] = self.slices.get(folder, Facts()).joined(facts)
        if name.lower().endswith(".dcm"):
            self.dicom.add(folder)

    def join(self, other: Listing) -> None:
        """Takes in a listing of other folders."""
        self.files |= other.files
        self.slices |= other.slices
        self.dicom |= other.dicom

    @classmethod
    def of(cls, root: str) -> Listing:
        """Lists a root, folder by folder until there are several to share out; those are listed by Ray's tasks."""
        found, folders = cls(), [""]
        while folders and len(folders) < SHARED_FROM:
            level, folders = folders, []
            for folder in level:
                base = storage.absolute(storage.join(root, folder) if folder else root)
                for info in storage.list_folder(base):
                    path = f"{folder}/{info.base_name}".lstrip("/")
                    if info.type == pafs.FileType.Directory:
                        folders.append(path)
                    elif info.type == pafs.FileType.File:
                        found.add(path, info)
        size = max(A_TASK, -(-len(folders) // TASKS))
        for part in _each_listed(root, [folders[at : at + size] for at in range(0, len(folders), size)]):
            found.join(part)
        return found


def _each_listed(root: str, shares: list[list[str]]) -> Iterator[Listing]:
    if ray.is_initialized():
        task = ray.remote(num_cpus=LISTING_CPUS)(_listed_below)
        yield from (ray.get(each) for each in [task.remote(root, folders) for folders in shares])
        return
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        yield from pool.map(lambda folders: _listed_below(root, folders), shares)


def _listed_below(root: str, folders: list[str]) -> Listing:
    """The task: all that lies below some folders of a root."""
    found = Listing()
    for folder in folders:
        for path, info in storage.files_below(storage.join(root, folder)).items():
            found.add(f"{folder}/{path}", info)
    return found


def _may_be_slice(name: str, size: int) -> bool:
    """Whether a file is one of many that make a scan, as DICOM series are stored: of their names and of their size."""
    suffix = os.path.splitext(name)[1].lower()
    return size < SLICE_BYTES and (suffix in ("", ".dcm", ".ima") or suffix[1:].isdigit())


@dataclass
class Volumes:
    """Files and folders below a root by their path relative to it; `named` are those that the manifest names.

    Of slices only their folder is kept: `dicom` are folders of slices that are named .dcm. One that a manifest names
    by itself is asked for.
    """

    root: str
    files: dict[str, Facts]
    folders: dict[str, Facts] = field(default_factory=dict)
    dicom: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    by_tail: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def below(cls, root: str) -> Volumes:
        """Lists a root; one that is not there has no files. Of a public bucket nothing is listed, and nothing missed:
        manifests name its URIs."""
        if storage.is_public(root):
            return cls("", {})
        listing = Listing.of(root)
        found = cls(root, dict(sorted(listing.files.items())), dicom=listing.dicom)
        within = [(path, facts) for path, facts in found.files.items()]
        within += [(f"{folder}/", facts) for folder, facts in sorted(listing.slices.items())]
        for path, facts in within:
            for folder in _above(path):
                found.folders[folder] = found.folders.get(folder, Facts()).joined(facts)
        for path in [*found.files, *sorted(found.folders)]:
            parts = path.split("/")
            for tail in {parts[-1], "/".join(parts[-2:])}:
                found.by_tail.setdefault(tail, []).append(path)
        return found

    def name(self, path: str) -> str:
        """The URI of a volume that a manifest names."""
        self.named.add(os.path.normpath(path))
        return storage.below(self.root, path)

    def locate(self, path: str, least: int) -> str | None:
        """The relative path of a file or folder, also one that a manifest names by another machine's path: the same
        place, else the only one whose path ends in the same two parts, or at least in the same `least`."""
        relative = os.path.normpath(path)
        if relative in self.files or relative in self.folders:
            return relative
        for parts in range(2, least - 1, -1):
            found = self.find("/".join(relative.split("/")[-parts:]))
            if len(found) == 1:
                return found[0]
        return None

    def scan(self, path: str, least: int) -> str:
        """The URI of a scan; a NIfTI of the same name is taken where the manifest names an array (.npy)."""
        nifti = self.locate(path.removesuffix(".npy") + ".nii.gz", least) if path.endswith(".npy") else None
        return self.name(nifti or self.locate(path, least) or path)

    def beside(self, manifest: str, path: str) -> str:
        """The URI of a text that a manifest names: below the root, else in the manifest's folder."""
        relative = self.locate(path, least=2)
        return storage.join(self.root, relative) if relative else storage.below(storage.parent(manifest), path)

    def find(self, tail: str) -> list[str]:
        """Relative paths of the files and folders whose last part, or last two, are given."""
        return self.by_tail.get(tail, [])

    def missing(self, uri: str) -> bool:
        """Whether a volume below the root is not there; of other places nothing is known until they are read."""
        base = self.root.rstrip("/") + "/"
        relative = uri.removeprefix(base)
        if not uri.startswith(base) or relative.startswith(".."):
            return False
        return relative not in self.files and relative not in self.folders and self._slice(relative) is None

    def facts(self, uri: str) -> Facts | None:
        """Of a volume below the root; of other places nothing is known until they are read."""
        relative = uri.removeprefix(self.root.rstrip("/") + "/")
        facts = self.files.get(relative) or self.folders.get(relative) or self._slice(relative)
        name, suffix = os.path.splitext(relative)
        for data in _DETACHED.get(suffix.lower(), ()):
            facts = facts and facts.joined(self.files.get(name + data, Facts()))
        return facts

    def _slice(self, relative: str) -> Facts | None:
        """A file that counts as a slice and is named by itself, such as a small multi-frame object, if it is there."""
        if os.path.dirname(relative) not in self.folders or not _may_be_slice(os.path.basename(relative), 0):
            return None
        found = storage.info(storage.join(self.root, relative))
        return Facts.of(relative, found) if found.type == pafs.FileType.File else None

    def unnamed(self) -> list[str]:
        """Scans that no row names; of a folder of DICOM files the folder."""
        singly = {os.path.dirname(path) for path in self.named}  # folders of which single slices are named
        scans = [path for path in self.files if path.lower().endswith(SUFFIXES)]
        single = {os.path.dirname(path) or "." if path.lower().endswith(".dcm") else path: path for path in scans}
        places = {**single, **{folder: folder for folder in sorted(self.dicom - singly)}}
        return [place for place, path in places.items() if not self._is_named(path)]

    def _is_named(self, path: str) -> bool:
        """Whether a row names a file or folder, or one that it lies in."""
        parts = path.split("/")
        return any("/".join(parts[:depth]) in self.named for depth in range(1, len(parts) + 1))


def _above(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path
