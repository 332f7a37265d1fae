"""Scans that were sent once and are named by an id, for a while: `scans/<id>/` under `serving.state`."""

from __future__ import annotations

import io
import re
import uuid
import zipfile
from collections.abc import Sequence
from datetime import datetime, timedelta

from pydantic import BaseModel

from mu2llm import storage
from mu2llm.serving import audit
from mu2llm.serving.problems import Problem
from mu2llm.serving.store import now

URI = "scan:"  # before an id, where a URI is expected
RECORD = "scan.json"
_ID = re.compile(r"[0-9a-f]{32}")


class StoredScan(BaseModel):
    """Whose it is, until when it is there, and its files' number and bytes."""

    id: str
    principal: str
    files: int
    size: int
    expires: datetime


class Scans:
    """Every method does storage and may take its time: call it from a thread."""

    def __init__(self, state: str, minutes: float, most: int) -> None:
        self.state, self.kept_for, self.most = state, timedelta(minutes=minutes), most
        self.folder = storage.join(state, "scans")

    def check_room(self) -> None:
        """A 429 where as many scans lie there as may."""
        there = sum(now() - time <= self.kept_for for time in self._newest().values())
        if there >= self.most:
            raise Problem(429, "busy", f"{there} scans are kept (serving.max_scans); delete one, or try later", 60)

    def add(self, files: list[bytes], principal: str) -> StoredScan:
        """Its entry in the audit log, its files, and last its record: what has one is whole."""
        made = StoredScan(
            id=uuid.uuid4().hex,
            principal=principal,
            files=len(files),
            size=sum(len(data) for data in files),
            expires=now() + self.kept_for,
        )
        audit.append(self.state, audit.Entry(principal=principal, action="scan", about=made.id))
        for number, data in enumerate(files):
            storage.write_bytes(self._file(made.id, number), data)
        storage.write_bytes(storage.join(self.folder, made.id, RECORD), made.model_dump_json().encode())
        return made

    def find(self, identity: str, principal: str) -> StoredScan:
        """A 404 where there is none, no longer, or another's."""
        record = storage.join(self.folder, identity, RECORD)
        if _ID.fullmatch(identity) and storage.exists(record):
            found = StoredScan.model_validate(storage.read_json(record))
            if found.principal == principal and found.expires > now():
                return found
        raise _gone()

    def read(self, stored: StoredScan) -> tuple[bytes, ...]:
        """Its files; a 404 where it was deleted meanwhile."""
        try:
            return tuple(storage.read_bytes(self._file(stored.id, number)) for number in range(stored.files))
        except FileNotFoundError:
            raise _gone() from None

    def delete(self, identity: str, principal: str) -> None:
        """Before its time; a 404 as `find`."""
        stored = self.find(identity, principal)
        audit.append(self.state, audit.Entry(principal=principal, action="scan_deleted", about=identity))
        storage.delete(storage.join(self.folder, stored.id))

    def forget_old(self) -> int:
        """Deletes those whose time is over, and what came of uploads that broke off; how many."""
        gone = [identity for identity, time in self._newest().items() if now() - time > self.kept_for]
        for identity in gone:
            storage.delete(storage.join(self.folder, identity))
        return len(gone)

    def _newest(self) -> dict[str, datetime]:
        """Id → when the last of its files was stored."""
        newest: dict[str, datetime] = {}
        for info in storage.list_files(self.folder):
            identity, time = info.path.rsplit("/", 2)[-2], info.mtime or now()
            newest[identity] = max(time, newest.get(identity, time))
        return newest

    def _file(self, identity: str, number: int) -> str:
        return storage.join(self.folder, identity, f"{number:05d}")


def packed(files: Sequence[bytes]) -> bytes:
    """The file that was sent, or a zip of several."""
    if len(files) == 1:
        return files[0]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for number, data in enumerate(files):
            archive.writestr(f"{number:05d}", data)
    return made.getvalue()


def _gone() -> Problem:
    return Problem(404, "not_found", "there is no scan under this id, or no longer; send it to /v1/scans again")
