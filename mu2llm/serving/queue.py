"""Requests on their way to the writing thread: who waits, who is sent pieces of the text, who has gone away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mu2llm.engine.sampling import Decoding

T = TypeVar("T")


@dataclass(eq=False)
class QueuedRequest(Generic[T]):
    """`request` is what to write, `decoding` how; the answer comes through `pieces` and `done`. `abandoned`: its client
    is gone."""

    request: T
    decoding: Decoding
    streamed: bool = False
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: float = field(default_factory=time.monotonic)
    abandoned: bool = False
    answered: bool = False
    sent: str = ""

    def __post_init__(self) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.done: asyncio.Future[Any] = self.loop.create_future()

    def send(self, piece: str) -> None:
        """A piece of the text was written; from the writing thread."""
        self.sent += piece
        self.loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def finish(self, result: Any) -> None:
        """The answer, or the exception to raise; from the writing thread."""
        self.answered = True
        self.loop.call_soon_threadsafe(self._finish, result)

    def _finish(self, result: Any) -> None:
        self._pieces.put_nowait(None)
        if not self.done.done():
            self.done.set_exception(result) if isinstance(result, Exception) else self.done.set_result(result)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, several pieces at once where the reader is slow."""
        over = False
        while not over:
            new = [await self._pieces.get()]
            while not self._pieces.empty():
                new.append(self._pieces.get_nowait())
            over = None in new
            text = "".join(piece for piece in new if piece is not None)
            if text:
                yield text


class RequestQueue(Generic[T]):
    """Requests to be written, in the order of their arrival: added in the event loop, taken by the writing thread."""

    def __init__(self) -> None:
        self._requests: deque[QueuedRequest[T]] = deque()
        self._lock = threading.Lock()
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, queued: QueuedRequest[T]) -> QueuedRequest[T]:
        with self._lock:
            self._requests.append(queued)
        self._arrival.set()
        return queued

    async def arrival(self) -> None:
        """Returns when somebody waits."""
        while not self._requests:
            self._arrival.clear()
            await self._arrival.wait()

    def take(self, most: int) -> list[QueuedRequest[T]]:
        """The first that wait, at most so many."""
        with self._lock:
            return [self._requests.popleft() for _ in range(min(most, len(self._requests)))]

    def leave(self, queued: QueuedRequest[T]) -> None:
        """The client is gone: a waiting request goes, a running one is written no further."""
        queued.abandoned = True
        with self._lock:
            if queued in self._requests:
                self._requests.remove(queued)
