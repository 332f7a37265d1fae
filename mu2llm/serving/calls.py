"""Calls of a deployment from the ingress: time limits, and what follows where a replica dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from mu2llm.serving.problems import Problem

logger = logging.getLogger("ray.serve")
LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)  # with a replica
ATTEMPTS = 8  # of a call whose replica died
BACK_OFF_S = 0.2  # before the second attempt; doubled before each further one, up to 2 s


class Calls:
    """Of one deployment; `retries` counts what was done again."""

    def __init__(self, name: str, handle: DeploymentHandle, retries: Counter) -> None:
        self.name, self.handle, self.retries = name, handle, retries

    async def ask(self, method: str, *arguments: Any, deadline: float = float("inf")) -> Any:
        """One call, done again where its replica died."""
        for attempt in range(ATTEMPTS):
            try:
                return await self.once(method, *arguments, deadline=deadline)
            except LOST:
                await self.again(attempt)
        raise self.lost()

    async def once(self, method: str, *arguments: Any, deadline: float = float("inf")) -> Any:
        """One call; raises one of LOST where its replica died."""
        with self._refusals():
            async with limit(deadline):
                return await _await(getattr(self.handle, method).remote(*arguments))

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What Serve says instead of the deployment, as a client is told."""
        try:
            yield
        except BackPressureError:
            raise Problem(429, "busy", "the queue is full; try again in a moment", 2) from None
        except DeploymentUnavailableError:
            raise self.down() from None

    async def stream(self, request: Any, told: int, deadline: float) -> AsyncGenerator[Any]:
        """Pieces of the text behind its first `told` characters, then the end; begun anew where a replica died."""
        for attempt in range(ATTEMPTS):
            response: Any = self.handle.options(stream=True).stream.remote(request)
            passed = 0
            try:
                while True:
                    with self._refusals():
                        async with limit(deadline):
                            piece = await anext(response)
                    if not isinstance(piece, str):
                        yield piece
                        return
                    new = piece[max(0, told - passed) :]
                    passed += len(piece)
                    if new:
                        told += len(new)
                        yield new
            except LOST:
                await self.again(attempt)
            finally:
                response.cancel()
        raise self.lost()

    async def again(self, attempt: int) -> None:
        """Before a call is done again whose replica, or a process of it, died."""
        self.retries.inc(1, {"called": self.name})
        logger.warning("a process of the %s died; attempt %d", self.name, attempt + 2)
        await back_off(attempt)

    def down(self) -> Problem:
        return Problem(503, f"{self.name}_down", f"the {self.name} is not available; try again in a moment", 5)

    def lost(self) -> Problem:
        return Problem(503, "lost", f"{ATTEMPTS} replicas of the {self.name} died over this; its log says why", 10)


async def back_off(attempt: int) -> None:
    await asyncio.sleep(min(2.0, BACK_OFF_S * 2**attempt))


async def _await(response: Any) -> Any:
    """The answer; who no longer waits for it cancels the work."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextlib.asynccontextmanager
async def limit(deadline: float) -> AsyncIterator[None]:
    """A 503 at the deadline (of time.monotonic)."""
    left = max(0.0, deadline - time.monotonic())
    try:
        async with asyncio.timeout(None if left == float("inf") else left):
            yield
    except TimeoutError:
        raise Problem(
            503, "timeout", "not done in time (serving.request_seconds); send less, or a scan to /v1/jobs", 10
        ) from None
