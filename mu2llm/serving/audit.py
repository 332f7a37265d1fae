"""Who did what: the service's audit log, one small file an entry under `serving.state`, which it only ever adds to."""

from __future__ import annotations

import hashlib
import re
import uuid
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mu2llm import storage
from mu2llm.errors import UserError

Action = Literal["scan", "scan_deleted", "job", "generated", "edited", "accepted", "rejected", "deleted"]
FOLDER = "audit"
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Entry(BaseModel):
    """One write, without any content. `principal` is who asked: a key's id, `token`, `KEY/SUBJECT` where a trusted
    proxy named the subject, empty where no key is needed."""

    model_config = ConfigDict(frozen=True)
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    time: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"), description="ISO 8601, UTC"
    )
    principal: str
    action: Action
    about: str = Field(description="id of the draft, job or scan; empty for a correction of a text that was sent")
    checkpoint: str = ""
    scan_sha256: str = ""
    text_sha256: str = Field("", description="of the draft's text as it is behind the action")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def append(state: str, entry: Entry) -> None:
    """Adds it; no name is ever used twice. Raises Failure or OSError where storage refuses."""
    name = f"{entry.time.replace(':', '')}-{entry.id}.json"
    storage.write_bytes(storage.join(state, FOLDER, entry.time[:10], name), entry.model_dump_json().encode())


def entries(state: str, day: str = "") -> list[Entry]:
    """All, or those of one day (2026-11-28, UTC), in the order of their times. A UserError where that is no day, or
    nothing was ever written."""
    if day and not _DAY.fullmatch(day):
        raise UserError(f"--day {day} is no day such as 2026-11-28")
    folder = storage.join(state, FOLDER)
    names = sorted("/".join(info.path.split("/")[-2:]) for info in storage.list_files(folder))
    if not names:
        raise UserError(f"{state} has no audit log; give the service's place (serving.state) with --state")
    read = (storage.read_bytes(storage.join(folder, name)) for name in names if name.startswith(day))
    return [Entry.model_validate_json(data) for data in read]
