"""API keys: random, several, with scopes; only their SHA-256 is stored.

A key is `mu2_<id>_<secret>`; the secret has 256 random bits, so a plain hash of it is as good as a slow one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from mu2llm import storage
from mu2llm.errors import Failure, UserError
from mu2llm.serving.admission import ANYBODY
from mu2llm.serving.problems import Problem

logger = logging.getLogger("ray.serve")
Scope = Literal["read", "score", "correct"]
SCOPES: tuple[Scope, ...] = ("read", "score", "correct")
FILE = "keys.json"
REFRESH_S = 5.0  # until a new or revoked key is noticed
WAIT_S = 2.0  # of a request, for keys that are being read
TOKEN = "token"  # whose requests have the token that `mu2llm serve` prints; a key's id is hexadecimal
MAX_SUBJECT = 200  # characters
KEPT_S = 600.0  # for which the last keys hold while none can be read


class Key(BaseModel):
    """What is stored of a key. Scopes: `read` reports, jobs and samples, `score` by GREEN, `correct` reports."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    made: str


class _File(BaseModel):
    keys: tuple[Key, ...] = ()


def list_keys(state: str) -> tuple[Key, ...]:
    """A Failure where they cannot be read."""
    uri = storage.join(state, FILE)
    try:
        return _File.model_validate(storage.read_json(uri)).keys if storage.exists(uri) else ()
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise Failure(
            f"{uri}: the API keys cannot be read: {why}; restore the file, or delete it and make keys anew"
        ) from error


def make_key(state: str, name: str, scopes: tuple[str, ...]) -> str:
    """A new key, as it is told once and never stored; a UserError names a scope that there is not."""
    for scope in scopes:
        if scope not in SCOPES:
            raise UserError(f"scope {scope!r} is not known; there are {', '.join(SCOPES)}")
    identity, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    key = Key(id=identity, name=name, scopes=scopes, sha256=hash_of(secret), made=made)  # type: ignore[arg-type]
    _write(state, (*list_keys(state), key))
    return f"mu2_{identity}_{secret}"


def revoke_key(state: str, identity: str) -> None:
    """A UserError where there is no such key."""
    keys = list_keys(state)
    left = tuple(key for key in keys if key.id != identity)
    if len(left) == len(keys):
        known = ", ".join(key.id for key in keys) or "none"
        raise UserError(f"key {identity!r} is not known; there are {known}")
    _write(state, left)


def _write(state: str, keys: tuple[Key, ...]) -> None:
    storage.write_json(storage.join(state, FILE), _File(keys=keys).model_dump(mode="json"))


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def principal(key: str, subjects: Sequence[str], trusted: Collection[str]) -> str:
    """Who asks: the key's id, or `KEY/SUBJECT` where the key is one of the `trusted` proxies', which say for whom they
    ask; `subjects` are the values of their header. Raises 403 where another key does so, 400 for no or a bad subject
    of a proxy."""
    if key not in trusted:
        if subjects:
            raise Problem(403, "subject", "this key may not ask in the name of others; see serving.trusted_proxies")
        return key
    name = subjects[0].strip() if len(subjects) == 1 else ""
    if not name or len(name) > MAX_SUBJECT or not name.isprintable():
        raise Problem(400, "subject", f"a trusted proxy names one subject, of at most {MAX_SUBJECT} letters")
    return f"{key}/{name}"


class Doorkeeper:
    """Says whether a request may pass; reads the keys anew every few seconds.

    While they cannot be read the last ones hold, for `KEPT_S`; without any nobody passes. `token_sha256` is of the
    token of this start of the service, which opens everything.
    """

    def __init__(self, state: str, needed: bool, token_sha256: str = "") -> None:
        self.state, self.needed, self.token_sha256 = state, needed, token_sha256
        self._keys: dict[str, Key] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def check(self, given: str | None, scope: Scope) -> str:
        """Whose request it is: the key's id, empty where none is needed. Raises 401 without a valid key, 403 where the
        key lacks the scope, 503 where the keys cannot be read."""
        if not self.needed:
            return ANYBODY
        if self.token_sha256 and hmac.compare_digest(self.token_sha256, hash_of(given or "")):
            return TOKEN
        await self._refresh()
        if time.monotonic() - self._read_at > KEPT_S:
            raise Problem(503, "keys", "the API keys cannot be read now; try again in a moment", REFRESH_S)
        key = self._find(given or "")
        if key is None:
            detail = "send an API key (mu2llm key make) or the token of mu2llm serve, as Authorization: Bearer KEY"
            raise Problem(401, "no_key", detail)
        if scope not in key.scopes:
            raise Problem(403, "scope", f"this key has not the scope {scope!r}; ask for one that has")
        return key.id

    async def _refresh(self) -> None:
        """Waits for storage, but not long: one that hangs must not hold up every request."""
        if self._reading is None:
            if time.monotonic() - self._tried_at < REFRESH_S:
                return
            self._tried_at = time.monotonic()
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait([self._reading], timeout=max(0.0, self._tried_at + WAIT_S - time.monotonic()))

    async def _read(self) -> None:
        try:
            keys = await asyncio.to_thread(list_keys, self.state)
            self._keys, self._read_at = {key.id: key for key in keys}, time.monotonic()
        except (Failure, UserError) as error:
            logger.error("%s", error)
        finally:
            self._tried_at, self._reading = time.monotonic(), None

    def _find(self, given: str) -> Key | None:
        prefix, _, rest = given.partition("_")
        identity, _, secret = rest.partition("_")
        key = self._keys.get(identity) if prefix == "mu2" else None
        return key if key and hmac.compare_digest(key.sha256, hash_of(secret)) else None
