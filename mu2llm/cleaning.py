"""What lies below a URI that nothing refers to any more: shards, pairs, caches, remains of kills, and what a pipeline
made by an earlier configuration.

A pipeline's result is of an earlier configuration where its last finished run did not take it; it stays where the
registry, or a checkpoint that stays, refers to it. Other checkpoints are never among it, nor what an interrupted stage
needs to go on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow.fs as pafs
from pydantic import BaseModel

from mu2llm import artefacts, places, storage, tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.cases.shards import INDEX
from mu2llm.errors import UserError
from mu2llm.places import Places
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
        return cls(root, storage.files_below(root))

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
    earlier = _earlier(tree)
    referred = _referred(tree, earlier)
    found = []
    for path, kind, why in _outermost([*_steps(tree, earlier - referred), *_folders(tree, referred), *_partial(tree)]):
        files = tree.below(path)
        age = (time.time() - max(file.mtime.timestamp() for file in files)) / DAY_S
        if age >= older_than_days:
            size = sum(file.size for file in files)
            found.append(Leftover(uri=tree.uri(path), kind=kind, why=why, bytes=size, age_days=round(age, 2)))
    return sorted(found, key=lambda each: (-each.bytes, each.uri))


def remove(leftovers: list[Leftover]) -> None:
    for each in leftovers:
        artefacts.discard(each.uri) if each.kind == "step" else storage.delete(each.uri)


def _earlier(tree: _Tree) -> set[str]:
    """The places of pipelines below the root that their last run did not take."""
    outs = [tree.uri(path.removesuffix(f"/{places.FILE}")) for path in tree.files if path.endswith(f"/{places.FILE}")]
    outs += [tree.root] if places.FILE in tree.files else []
    return {_same(uri) for out in outs for uri in Places.open(out).unused()}


def _referred(tree: _Tree, earlier: set[str]) -> set[str]:
    """Every URI that the registry, or a checkpoint below the root, leads to: of an earlier configuration's checkpoints
    only those that another one came from. Checkpoints, shards, pairs, and what the pairs were made of."""
    open_ = [uri for path in tree.folders_with(Checkpoint.FILE) if (uri := _same(tree.uri(path))) not in earlier]
    open_ += sorted(tracking.checkpoints())
    referred: set[str] = set()
    while open_:
        uri = _same(open_.pop())
        if uri in referred or not storage.exists(storage.join(uri, Checkpoint.FILE)):
            continue
        referred.add(uri)
        lineage = open_checkpoint(uri).lineage
        open_ += [lineage.parent] if lineage.parent else []
        if lineage.data:
            referred.add(_same(lineage.data))
            if storage.exists(storage.join(lineage.data, Preferences.FILE)):
                preferences = Preferences.open(lineage.data)
                referred |= {_same(uri) for uri in (preferences.shards, preferences.corrected) if uri}
                open_.append(preferences.checkpoint)
    return referred


def _same(uri: str) -> str:
    """One spelling of a place, also of what the embedded server serves."""
    return storage.absolute(storage.lasting(uri)).removeprefix("file://").rstrip("/")


def _steps(tree: _Tree, unused: set[str]) -> Iterator[tuple[str, str, str]]:
    """Results of a pipeline's earlier configurations, with what an interrupted one left."""
    root = f"{_same(tree.root)}/"
    for uri in sorted(unused):
        for path in (uri.removeprefix(root), uri.removeprefix(root) + STATE):
            if uri.startswith(root) and tree.below(path):
                yield path, "step", "of an earlier configuration of its pipeline; nothing refers to it"


def _outermost(found: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Of folders within each other the outer ones, each once."""
    kept: dict[str, tuple[str, str, str]] = {}
    for each in sorted(found, key=lambda each: each[0].count("/")):
        parts = each[0].split("/")
        if not any("/".join(parts[:n]) in kept for n in range(1, len(parts) + 1)):
            kept[each[0]] = each
    return list(kept.values())


def _folders(tree: _Tree, referred: set[str]) -> Iterator[tuple[str, str, str]]:
    """(path, kind, why) of whole folders."""
    unused = "no checkpoint and no registry entry refers to it"
    for path in tree.folders_with(INDEX):
        if "/features/" in f"/{path}":
            why = _useless(tree.uri(path))
            yield from [(path, "features", why)] if why else []
        elif _same(tree.uri(path)) not in referred:
            yield path, "shards", unused
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


def _useless(features: str) -> str:
    """Why cached features are not read any more; "" where they may be."""
    index, shards = storage.read_json(storage.join(features, INDEX)), features.rpartition("/features/")[0]
    made_by = index.get("checkpoint")
    if made_by is not None and not storage.exists(storage.join(made_by, Checkpoint.FILE)):
        return "the checkpoint whose vision made them is gone"
    made_of, described = index.get("parent_checksum"), storage.join(shards, INDEX)
    if made_of and storage.exists(described) and storage.read_json(described).get("checksum") != made_of:
        return "the shards have changed since they were made"
    return ""


def _partial(tree: _Tree) -> Iterator[tuple[str, str, str]]:
    for path in tree.files:
        if PARTIAL.search(f"/{path}"):
            yield path, "partial", "a write that was interrupted"
