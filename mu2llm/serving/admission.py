"""What lies in memory of the requests that were let in: the bytes of their bodies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from mu2llm.serving.problems import Problem

RETRY_S = 2.0


@dataclass
class Body:
    """Of one request: what it says that it will send, then, by `Bodies.settle`, what has come."""

    size: int


class Bodies:
    """At most `most` bytes at a time; one alone is let in whatever its size, which `Guard` limits."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[Body]:
        """Answers 429 before a body is read for which there is no room; else keeps its room while the block lasts."""
        if self.held and self.held + size > self.most:
            raise Problem(429, "busy", "too much is being received; try again in a moment", RETRY_S)
        body = Body(size)
        self.held += size
        try:
            yield body
        finally:
            self.held -= body.size

    def settle(self, body: Body, size: int) -> None:
        """The body is there and takes `size` bytes: what was counted for it beyond that is free again."""
        self.held += size - body.size
        body.size = size
