"""Whose each place below a pipeline's `out` is: the first configuration's result has the plain name, others go beside.

`<out>/steps/places.json` is written before anything is made at a place, so a run that was killed finds its own again.
"""

from __future__ import annotations

import time
from typing import Self

from pydantic import BaseModel

from mu2llm import storage

FILE = "steps/places.json"


class Place(BaseModel):
    """Identity of the result, and when (Unix seconds) a run last took the place."""

    identity: str
    used: float


class Places(BaseModel):
    """Path below `out` → whose it is. `last_run` is when the last run that came to its end began."""

    out: str
    places: dict[str, Place] = {}
    last_run: float | None = None

    @classmethod
    def open(cls, out: str) -> Self:
        path = storage.join(out, FILE)
        return cls(out=out, **storage.read_json(path)) if storage.exists(path) else cls(out=out)

    def take(self, plain: str, identity: str) -> str:
        """The URI for a result: where it was before, else `plain` if that was nobody's and is empty, else beside it."""
        beside = f"{plain}-{identity}"
        known, other = (self.places.get(self._path(uri)) for uri in (plain, beside))
        first = known.identity == identity if known else other is None and not _taken(plain)
        uri = plain if first else beside
        self.places[self._path(uri)] = Place(identity=identity, used=time.time())
        self._write()
        return uri

    def finished(self, started: float) -> None:
        """A run that began then has come to its end: what it did not take is of earlier configurations."""
        self.last_run = started
        self._write()

    def uris(self) -> list[str]:
        """Of all places that were taken."""
        return [storage.below(self.out, path) for path in self.places]

    def unused(self) -> list[str]:
        """The URIs of the places that no run has taken since the last finished one began."""
        since = self.last_run or 0
        return [storage.below(self.out, path) for path, place in self.places.items() if place.used < since]

    def _path(self, uri: str) -> str:
        return storage.lasting(uri).removeprefix(f"{self.out.rstrip('/')}/")

    def _write(self) -> None:
        storage.write_json(storage.join(self.out, FILE), self.model_dump(mode="json", exclude={"out"}))


def _taken(uri: str) -> bool:
    return storage.exists(uri) or storage.exists(f"{uri}.state")
