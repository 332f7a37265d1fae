"""The scans below `--volumes`, listed once: which are there, how large, and which no manifest names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow.fs as pafs

from mu2llm import storage

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".npy", ".zip", ".dcm")
_DETACHED = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz")}
"""Headers whose voxels lie beside them, and the suffixes that the writers of these formats give those."""


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
class Volumes:
    """Files and folders below a root by their path relative to it; `named` are those that the manifest names."""

    root: str
    files: dict[str, Facts]
    folders: dict[str, Facts] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    by_tail: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def below(cls, root: str) -> Volumes:
        """Lists a root; one that is not there has no files."""
        found = cls(root, {path: Facts.of(path, info) for path, info in storage.files_below(root).items()})
        for path, facts in found.files.items():
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
        known = uri.startswith(base) and not relative.startswith("..")
        return known and relative not in self.files and relative not in self.folders

    def facts(self, uri: str) -> Facts | None:
        """Of a volume below the root; of other places nothing is known until they are read."""
        relative = uri.removeprefix(self.root.rstrip("/") + "/")
        facts = self.files.get(relative) or self.folders.get(relative)
        name, suffix = os.path.splitext(relative)
        for data in _DETACHED.get(suffix.lower(), ()):
            facts = facts and facts.joined(self.files.get(name + data, Facts()))
        return facts

    def unnamed(self) -> list[str]:
        """Scans that no row names; of a folder of DICOM files the folder."""
        found: dict[str, None] = {}
        for path in self.files:
            parts = path.split("/")
            if any("/".join(parts[:depth]) in self.named for depth in range(1, len(parts) + 1)):
                continue
            if path.lower().endswith(".dcm"):
                found[os.path.dirname(path) or "."] = None
            elif path.lower().endswith(SUFFIXES):
                found[path] = None
        return list(found)


def _above(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path
