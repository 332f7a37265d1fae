"""Requests → batches: those that wait are written together, each is told of its tokens, and any may leave."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mu2llm.evaluation.decoding import Decoding

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


class Batcher(Generic[T]):
    """Takes rows and hands them, up to `size` of the same decoding at a time, to `run` in one thread of its own."""

    def __init__(self, run: Callable[[list[Row[T]]], None], size: int, wait: float) -> None:
        self.run, self.size, self.wait = run, size, wait
        self.waiting: deque[Row[T]] = deque()
        self._arrival = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def add(self, row: Row[T]) -> Row[T]:
        if self._loop is None:
            self._loop = asyncio.create_task(self._work())
        self.waiting.append(row)
        self._arrival.set()
        return row

    def leave(self, row: Row[T]) -> None:
        """The client is gone: a waiting row goes, a running one is written no further."""
        row.left = True
        if row in self.waiting:
            self.waiting.remove(row)

    @property
    def broken(self) -> bool:
        return self._loop is not None and self._loop.done()

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            deadline = time.monotonic() + self.wait
            while len(self.waiting) < self.size and (left := deadline - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.005))
            rows = self._take()
            if not self.waiting:
                self._arrival.clear()
            if rows:
                await asyncio.to_thread(self._run, rows)

    def _take(self) -> list[Row[T]]:
        """The first that waits and those that can be written with it, in the order of their arrival."""
        if not self.waiting:
            return []
        decoding = self.waiting[0].decoding
        rows = [row for row in self.waiting if row.decoding == decoding][: self.size]
        for row in rows:
            self.waiting.remove(row)
        return rows

    def _run(self, rows: list[Row[T]]) -> None:
        try:
            self.run(list(rows))
        except Exception as error:
            if len(rows) == 1:
                rows[0].finish(error)
                return
            for row in rows:  # one that cannot be written fails alone; what is over is not written again
                if not row.left and not row.answered:
                    self._run([row])
