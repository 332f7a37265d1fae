"""What lies below a URI that no checkpoint and no registry entry refers to: shards, pairs, caches, remains of kills.

Checkpoints themselves are never among it, nor what an interrupted stage needs to go on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.fs as pafs
from pydantic import BaseModel

from mu2llm import storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases.shards import INDEX
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint
from mu2llm.stages.preferences import Preferences

PARTIAL = re.compile(r"/\.[^/]+\.\d+\.[0-9a-f]{8}$")  # what `storage` writes to before the file appears
STATE = ".state"
EVALUATED = "metrics.json"
DAY_S = 86400


class Leftover(BaseModel):
    """A file or folder to remove, why, how large it is and how many days ago it was last written to."""

    uri: str
    kind: str
    why: str
    bytes: int
    age_days: float


@dataclass
class _Tree:
    """One listing of everything below a URI: path below it → file."""

    root: str
    files: dict[str, pafs.FileInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, root: str) -> _Tree:
        if not storage.exists(root):
            raise UserError(f"{root}: there is nothing to look through")
        base = storage.resolve(root)[1].rstrip("/") + "/"
        return cls(root, {each.path.removeprefix(base): each for each in storage.list_files(root)})

    def folders_with(self, name: str) -> list[str]:
        """The folders that hold a file of that name, as paths below the root; "" is the root itself."""
        return [path.rpartition("/")[0] for path in self.files if path.rpartition("/")[2] == name]

    def below(self, folder: str) -> list[pafs.FileInfo]:
        return [file for path, file in self.files.items() if path == folder or path.startswith(f"{folder}/")]

    def uri(self, path: str) -> str:
        return storage.join(self.root, path) if path else self.root


def find(root: str, older_than_days: float = 1) -> list[Leftover]:
    """What can go below `root`, largest first; what was written to within `older_than_days` may be in use and stays.

    Raises UserError where there is nothing, or the registry, which says what is needed, cannot be asked.
    """
    tree = _Tree.of(storage.absolute(root))
    referred = _referred(tree)
    found = []
    for path, kind, why in (*_folders(tree, referred), *_partial(tree)):
        files = tree.below(path)
        age = (time.time() - max(file.mtime.timestamp() for file in files)) / DAY_S
        if age >= older_than_days:
            size = sum(file.size for file in files)
            found.append(Leftover(uri=tree.uri(path), kind=kind, why=why, bytes=size, age_days=round(age, 2)))
    return sorted(found, key=lambda each: (-each.bytes, each.uri))


def remove(leftovers: list[Leftover]) -> None:
    for each in leftovers:
        storage.delete(each.uri)


def _referred(tree: _Tree) -> set[str]:
    """Every URI that a checkpoint below the root or in the registry came from: shards, pairs, and the pairs' shards."""
    open_ = [tree.uri(path) for path in tree.folders_with(Checkpoint.FILE)] + sorted(tracking.checkpoints())
    seen: set[str] = set()
    referred: set[str] = set()
    while open_:
        uri = _same(open_.pop())
        if uri in seen or not storage.exists(storage.join(uri, Checkpoint.FILE)):
            continue
        seen.add(uri)
        lineage = open_checkpoint(uri).lineage
        open_ += [lineage.parent] if lineage.parent else []
        if lineage.data:
            referred.add(_same(lineage.data))
            if storage.exists(storage.join(lineage.data, Preferences.FILE)):
                referred.add(_same(Preferences.open(lineage.data).shards))
    return referred


def _same(uri: str) -> str:
    """One spelling of a place, also of what the embedded server serves."""
    return storage.absolute(storage.lasting(uri)).removeprefix("file://").rstrip("/")


def _folders(tree: _Tree, referred: set[str]) -> Iterator[tuple[str, str, str]]:
    """(path, kind, why) of whole folders; of nested ones the outermost."""
    unused = "no checkpoint and no registry entry refers to it"
    gone: list[str] = []
    for path in sorted(tree.folders_with(INDEX), key=len):
        inside = any(path.startswith(f"{outer}/") for outer in gone)
        if not inside and "/features/" not in f"/{path}" and _same(tree.uri(path)) not in referred:
            gone.append(path)
            yield path, "shards", unused
        elif not inside and "/features/" in f"/{path}" and not _encoder_is_there(tree.uri(path)):
            yield path, "features", "the checkpoint whose vision made them is gone"
    for path in tree.folders_with(Preferences.FILE):
        if _same(tree.uri(path)) not in referred:
            yield path, "preferences", unused
    yield from _states(tree)


def _states(tree: _Tree) -> Iterator[tuple[str, str, str]]:
    """What a resume would need of stages and evaluations that are done."""
    predictions, done = f"predictions{STATE}", set(tree.folders_with(Checkpoint.FILE))
    for path in sorted({path[: path.index(f"{STATE}/") + len(STATE)] for path in tree.files if f"{STATE}/" in path}):
        if path.removesuffix(STATE) in done:
            yield path, "state", "the stage that it was kept for is done"
        elif path.endswith(predictions) and path.removesuffix(predictions) + EVALUATED in tree.files:
            yield path, "state", "the evaluation that it was kept for is done"


def _encoder_is_there(features: str) -> bool:
    made_by = storage.read_json(storage.join(features, INDEX)).get("checkpoint")
    return made_by is None or storage.exists(storage.join(made_by, Checkpoint.FILE))


def _partial(tree: _Tree) -> Iterator[tuple[str, str, str]]:
    for path in tree.files:
        if PARTIAL.search(f"/{path}"):
            yield path, "partial", "a write that was interrupted"
