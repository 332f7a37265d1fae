"""The scans below `--volumes`, listed once: which are there, how large, and which no manifest names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from mu2llm import storage

SUFFIXES = (".nii", ".nii.gz", ".dcm", ".zip", ".npy")


@dataclass
class Volumes:
    """Files below a root, by their path relative to it; `named` are those that the manifest names."""

    root: str
    files: dict[str, int]
    folders: set[str]
    named: set[str] = field(default_factory=set)
    by_name: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def below(cls, root: str) -> Volumes:
        """Lists a root; one that is not there has no files."""
        base = storage.resolve(root)[1].rstrip("/") + "/"
        files = {info.path.removeprefix(base): info.size for info in storage.list_files(root)}
        folders = {os.path.dirname(path) for path in files}
        for folder in list(folders):
            while folder := os.path.dirname(folder):
                folders.add(folder)
        by_name: dict[str, list[str]] = {}
        for path in [*files, *sorted(folders)]:
            by_name.setdefault(os.path.basename(path), []).append(path)
        return cls(root, files, folders, by_name=by_name)

    def name(self, path: str) -> str:
        """The URI of a volume that a manifest names: relative to the root, or a URI or absolute path as it is."""
        if "://" in path or path.startswith("/"):
            return path
        relative = os.path.normpath(path)
        self.named.add(relative)
        return storage.join(self.root, relative)

    def find(self, name: str) -> list[str]:
        """Relative paths of the files and folders of a name, wherever they lie below the root."""
        return self.by_name.get(name, [])

    def missing(self, uri: str) -> bool:
        """Whether a volume below the root is not there; of other places nothing is known until they are read."""
        relative = self._relative(uri)
        return relative is not None and relative not in self.files and relative not in self.folders

    def _relative(self, uri: str) -> str | None:
        base = str(self.root).rstrip("/") + "/"
        return uri.removeprefix(base) if uri.startswith(base) else None

    @property
    def sizes(self) -> dict[str, int]:
        return {storage.join(self.root, path): size for path, size in self.files.items()}

    def unnamed(self) -> list[str]:
        """Scans that no row names; of a folder of DICOM files the folder."""
        found: dict[str, None] = {}
        for path in self.files:
            parents = path.split("/")
            if any("/".join(parents[:depth]) in self.named for depth in range(1, len(parents) + 1)):
                continue
            if path.lower().endswith(".dcm"):
                found[os.path.dirname(path) or "."] = None
            elif path.lower().endswith(SUFFIXES):
                found[path] = None
        return list(found)
