"""What is to be tracked, kept on the local disk until the store has it: a file of JSON lines for each run.

Whoever trains only appends here, which no server can slow. `sender` reads it, in order. Files are named by the run's
key, which sorts by time, so parents come before their children. `<key>.sent` says how far the store has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mu2llm import storage
from mu2llm.tracking.client import shown

logger = logging.getLogger(__name__)
ENTRIES = 1000
"""Most entries that are read at a time."""


def folder(uri: str) -> Path:
    """Where entries for a store wait: below `MU2LLM_SPOOL`, else the user's state folder, else (containers often have
    no home that can be written) the folder for temporary files."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    root = Path(os.environ.get("MU2LLM_SPOOL") or Path(state) / "mu2llm" / "spool")
    if not _writable(root):
        root = Path(tempfile.gettempdir()) / "mu2llm-spool"
    return root / hashlib.sha256(uri.encode()).hexdigest()[:12]


def _writable(path: Path) -> bool:
    there = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
    return not str(path).startswith("~") and there.is_dir() and os.access(there, os.W_OK)


def new_key() -> str:
    """A name for a run that no other has and that sorts by time."""
    return f"{int(time.time() * 1000):011x}{secrets.token_hex(6)}"


class Spool:
    """The entries that wait for one store."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, uri: str) -> Spool:
        """The spool of a store, which it names for people."""
        spool = cls(folder(uri))
        spool.path.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(str(spool.path / "store.txt"), f"{shown(uri)}\n".encode())
        return spool

    def append(self, key: str, entry: dict[str, Any]) -> None:
        """Adds an entry to a run. A disk that is full costs a warning, never the training."""
        line = json.dumps(entry, default=str).encode() + b"\n"
        try:
            with self._locked(), open(self.path / f"{key}.jsonl", "ab+") as stream:
                end = stream.seek(0, os.SEEK_END)
                if end:
                    stream.seek(end - 1)
                    if stream.read(1) != b"\n":  # a writer was killed within its line
                        line = b"\n" + line
                stream.write(line)
        except OSError as error:
            logger.warning("tracking: not recorded in %s: %s", self.path, error)

    def runs(self) -> list[str]:
        """The keys of the runs that have a file here, oldest first."""
        return sorted(path.stem for path in self.path.glob("*.jsonl"))

    def waiting(self) -> int:
        """How many entries the store does not have yet."""
        return sum(len(self._lines(key, self.sent(key)[0])) for key in self.runs())

    def refused(self) -> list[dict[str, Any]]:
        """The entries that the store will never take, each with `why`."""
        lines = [line for path in sorted(self.path.glob("*.refused")) for line in path.read_text().split("\n")]
        return [json.loads(line) for line in lines if line]

    def sent(self, key: str) -> tuple[int, str]:
        """(bytes of the run's file that the store has, the run's id there or "")."""
        try:
            found = json.loads((self.path / f"{key}.sent").read_bytes())
        except FileNotFoundError:
            return 0, ""
        return found["bytes"], found["run_id"]

    def mark(self, key: str, sent: int, run_id: str) -> None:
        storage.write_json(str(self.path / f"{key}.sent"), {"bytes": sent, "run_id": run_id})

    def refuse(self, key: str, entry: dict[str, Any], why: str) -> None:
        """Sets an entry aside that the store will never take."""
        logger.warning("tracking store refuses an entry of run %s: %s; it is kept in %s", key, why, self.path)
        with open(self.path / f"{key}.refused", "a") as stream:
            stream.write(json.dumps({**entry, "why": why}) + "\n")

    def read(self, key: str) -> list[tuple[dict[str, Any] | None, int]]:
        """The next entries of a run, each with the place behind it; None for a line that a kill cut short."""
        place, entries = self.sent(key)[0], []
        for line in self._lines(key, place)[:ENTRIES]:
            place += len(line)
            try:
                entries.append((json.loads(line), place))
            except ValueError:
                entries.append((None, place))
        return entries

    def retire(self, key: str) -> bool:
        """Removes a run's file, unless something was added that is not sent yet."""
        path = self.path / f"{key}.jsonl"
        with self._locked():
            if path.stat().st_size > self.sent(key)[0]:
                return False
            path.unlink()
            (self.path / f"{key}.sent").unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether this process may send now: one at a time does, so that order is kept."""
        with open(self.path / "sending.lock", "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _lines(self, key: str, place: int) -> list[bytes]:
        """The whole lines of a run's file from a place on."""
        try:
            with open(self.path / f"{key}.jsonl", "rb") as stream:
                stream.seek(place)
                data = stream.read()
        except FileNotFoundError:
            return []
        return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / "writing.lock", "w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield
