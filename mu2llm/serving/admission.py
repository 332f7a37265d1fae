"""What lies in memory of the requests that were let in: the bytes of their bodies, as they come."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mu2llm.serving.problems import Problem

RETRY_S = 2.0
ANYBODY = ""  # whose requests have no key


@dataclass
class Body:
    """Of one request, by the bytes of it that have come; `bodies` counts them."""

    key: str
    bodies: Bodies
    size: int = 0
    arriving: bool = True

    def grow(self, more: int) -> None:
        """So many bytes have come; answers 429 where there is no room for them."""
        self.bodies.check(self.key, more)
        self._count(self.size + more)

    def arrived(self, size: int) -> None:
        """The body is there, and what is kept of it takes `size` bytes."""
        self._count(size)
        if self.arriving:
            self.bodies.arriving[self.key] -= 1
            self.arriving = False

    def _count(self, size: int) -> None:
        self.bodies.held[self.key] += size - self.size
        self.size = size


class Bodies:
    """At most `most` bytes at a time, and `at_once` requests on their way: what has come counts, not what was
    announced. Where there are keys, one has half of both at most, and so leaves room to others."""

    def __init__(self, most: int, at_once: int) -> None:
        self.most, self.at_once = most, at_once
        self.held: Counter[str] = Counter()
        self.arriving: Counter[str] = Counter()

    @contextlib.contextmanager
    def holding(self, announced: int, key: str = ANYBODY) -> Iterator[Body]:
        """Answers 429 at once where there is no room now for what is announced; what comes keeps its room while the
        block lasts."""
        if self.arriving[key] >= _share(self.at_once, key):
            raise Problem(429, "busy", "too many uploads are on their way; try again in a moment", RETRY_S)
        self.check(key, announced)
        body = Body(key, self)
        self.arriving[key] += 1
        try:
            yield body
        finally:
            body.arrived(0)
            if not self.held[key] and not self.arriving[key]:
                del self.held[key], self.arriving[key]

    def check(self, key: str, more: int) -> None:
        """A 429 where so many more bytes are too many, for the key or for all."""
        if self.held[key] + more > _share(self.most, key) or self.held.total() + more > self.most:
            raise Problem(429, "busy", "too much is being received; try again in a moment", RETRY_S)


def _share(of: int, key: str) -> int:
    return of if key == ANYBODY else max(1, of // 2)
