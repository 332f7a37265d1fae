"""Answers that come piece by piece: server-sent events of ours, and as OpenAI's clients want them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mu2llm.serving import formats
from mu2llm.serving.decoder import Scan
from mu2llm.serving.faults import where
from mu2llm.serving.problems import Problem, internal
from mu2llm.serving.service import Made, Service, Work

logger = logging.getLogger("ray.serve")
BEAT_S = 10.0
BEAT = b": still here\n\n"
FIRST_S = 3.0  # for which a stream waits for its scan before it begins


class Stream(StreamingResponse):
    """Server-sent events, with a sign of life where none has come for a while; `held` is let go when they end or the
    client has left, begun or not."""

    def __init__(self, events: AsyncGenerator[bytes], held: contextlib.ExitStack) -> None:
        headers = {"X-Accel-Buffering": "no"}  # or nginx holds them back
        super().__init__(alive(events), headers=headers, media_type=formats.EVENTS)
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


async def alive(events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The same, with a comment whenever nothing has come for `BEAT_S`: networks cut connections that are silent."""

    async def following() -> bytes | None:
        return await anext(events, None)

    coming = asyncio.create_task(following())
    try:
        while True:
            if not (await asyncio.wait([coming], timeout=BEAT_S))[0]:
                yield BEAT
            elif (event := coming.result()) is None:
                return
            else:
                yield event
                coming = asyncio.create_task(following())
    finally:
        coming.cancel()
        await asyncio.wait([coming])
        await events.aclose()


@contextlib.asynccontextmanager
async def read(service: Service, work: Work) -> AsyncIterator[asyncio.Task[Scan]]:
    """The scan on its way, after a moment in which what is wrong with it can still be the answer's status. It is read
    no further where the block fails."""
    reading = asyncio.create_task(service.read(work))
    try:
        await asyncio.wait([reading], timeout=FIRST_S)
        if reading.done():
            reading.result()
        yield reading
    except BaseException:
        reading.cancel()
        raise


async def parts(service: Service, work: Work, reading: asyncio.Task[Scan]) -> AsyncGenerator[Scan | str | Made]:
    """The scan as it was read, the text piece by piece, the report."""
    try:
        scan = await reading
        yield scan
        async for part in service.stream(work, scan):
            yield part
    finally:
        reading.cancel()


async def events(parts: AsyncGenerator[Scan | str | Made]) -> AsyncGenerator[bytes]:
    """The report as events; whatever goes wrong becomes the event `error`."""
    try:
        async for part in parts:
            if isinstance(part, Scan):
                yield _event("scan", part.facts)
            elif isinstance(part, str):
                yield _event("token", {"text": part})
            else:
                yield _event("report", part.report.model_dump(mode="json"))
    except Exception as error:
        yield _event("error", _problem_of(error).body())


def _problem_of(error: Exception) -> Problem:
    """What a client is told of an error in the middle of a stream."""
    if isinstance(error, Problem):
        return error
    logger.error("a stream failed: %s", where(error))
    return internal()


async def chunks(told: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    """The same as OpenAI's clients want it."""
    try:
        async for chunk in told:
            yield _data(chunk)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _data(_problem_of(error).body())


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\n".encode() + _data(value)


def _data(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()
