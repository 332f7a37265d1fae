"""Scans that crashed their reader twice: they are kept out, by their digest, so that they cannot do it again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging

from ray.exceptions import NodeDiedError

from mu2llm.ct import sources
from mu2llm.errors import Failure, Rejection, UserError
from mu2llm.serving.calls import ATTEMPTS, LOST, Calls
from mu2llm.serving.decoder import Reading, Scan
from mu2llm.serving.problems import Problem
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.store import Store

logger = logging.getLogger("ray.serve")
CRASHES = 2


class CarefulReader:
    """Reads scans in the readers' processes. A scan over which one crashed is tried once more, at a time when no other
    such scan is, so that it answers for itself alone."""

    def __init__(self, calls: Calls, store: Store) -> None:
        self.calls, self.store = calls, store
        self._kept_out: set[str] = set()
        self._suspects = asyncio.Lock()

    async def learn(self) -> None:
        """Which scans other processes of the service, or this one before its restart, keep out. Raises Failure."""
        self._kept_out = await asyncio.to_thread(self.store.quarantined)

    async def read(self, reading: Reading, deadline: float) -> Scan | Refusal:
        """The scan, or why there is none; a Problem (422, `crashed`) for what is kept out."""
        if self._kept_out and await asyncio.to_thread(digest_of, reading.source) in self._kept_out:
            raise _crashed()
        crashes = 0
        for attempt in range(ATTEMPTS):
            try:
                async with self._suspects if crashes else contextlib.nullcontext():
                    result: Scan | Refusal = await self.calls.once("read", reading, deadline=deadline)
                if result != Refusal("crashed"):
                    return result
                crashes += 1
            except LOST as error:
                # with its node, it was no scan's fault
                crashes += not (isinstance(error, NodeDiedError) or getattr(error, "preempted", False))
            if crashes == CRASHES:
                await self._keep_out(reading)
                raise _crashed()
            await self.calls.again(attempt)
        raise self.calls.lost()

    async def _keep_out(self, reading: Reading) -> None:
        digest = await asyncio.to_thread(digest_of, reading.source)
        self._kept_out.add(digest)
        logger.error("a scan crashed its reader %d times and is kept out: sha256 %s", CRASHES, digest)
        try:
            await asyncio.to_thread(self.store.add_quarantined, digest)
        except (Failure, OSError) as error:
            logger.error("that could not be stored, and holds until a restart: %s", type(error).__name__)


def _crashed() -> Problem:
    return Problem(422, "crashed", "reading the scan crashed the reader; check the file with mu2llm inspect")


def digest_of(source: list[bytes] | str) -> str:
    """SHA-256 in hex: of an upload's bytes; of a URI and what storage says of it (size, time of its last change)."""
    digest = hashlib.sha256()
    for data in source if isinstance(source, list) else [_identity(source)]:
        digest.update(data)
    return digest.hexdigest()


def _identity(uri: str) -> bytes:
    try:
        told = sources.info(uri)[1]
    except (Rejection, UserError, OSError):  # of an archive, for one
        return uri.encode()
    return f"{uri} {told.size} {told.mtime_ns}".encode()
