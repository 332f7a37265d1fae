"""Requests on their way to the writing thread: who waits, who is told of pieces of the text, who has left."""

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
class Row(Generic[T]):
    """One request: `asked` is what to write, `decoding` how; the answer comes through `pieces` and `done`."""

    asked: T
    decoding: Decoding
    streamed: bool = False
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: float = field(default_factory=time.monotonic)
    left: bool = False
    answered: bool = False
    told: str = ""

    def __post_init__(self) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.done: asyncio.Future[Any] = self.loop.create_future()

    def tell(self, piece: str) -> None:
        """A piece of the text was written; from the writing thread."""
        self.told += piece
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


class Waiting(Generic[T]):
    """Rows to be written, in the order of their arrival: added in the event loop, taken by the writing thread."""

    def __init__(self) -> None:
        self._rows: deque[Row[T]] = deque()
        self._lock = threading.Lock()
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row[T]) -> Row[T]:
        with self._lock:
            self._rows.append(row)
        self._arrival.set()
        return row

    async def arrival(self) -> None:
        """Returns when somebody waits."""
        while not self._rows:
            self._arrival.clear()
            await self._arrival.wait()

    def take(self, most: int) -> list[Row[T]]:
        """The first that wait, at most so many."""
        with self._lock:
            return [self._rows.popleft() for _ in range(min(most, len(self._rows)))]

    def leave(self, row: Row[T]) -> None:
        """The client is gone: a waiting row goes, a running one is written no further."""
        row.left = True
        with self._lock:
            if row in self._rows:
                self._rows.remove(row)
