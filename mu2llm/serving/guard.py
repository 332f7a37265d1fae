"""What every request passes before the application sees it: Host and Origin, a body's size and pace, safe headers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mu2llm.serving.faults import where
from mu2llm.serving.problems import Problem, internal

logger = logging.getLogger("ray.serve")
TEXTS = ("/v1/green", "/v1/corrections", "/v1/decisions")  # whose bodies hold nothing but texts
MAX_TEXTS = 8 * 2**20
GRACE_S = 10.0  # for which a body may come as slowly as it likes
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}


BODY = "mu2llm.body"  # in the scope: the `admission.Body` that counts what comes


@dataclass(frozen=True)
class Uploads:
    """What is let through of a body: at most `most` bytes, within `seconds`, and after `GRACE_S` at `rate` bytes per
    second on the whole."""

    most: int
    seconds: float
    rate: float


class Arrival:
    """The body of one request on its way."""

    def __init__(self, scope: Scope, receive: Receive, uploads: Uploads) -> None:
        self.scope, self.uploads = scope, uploads
        self._receive = receive
        self._read, self._started, self._over = 0, 0.0, False

    async def receive(self) -> Message:
        """ASGI's receive; a Problem for what is too large or too slow, or has no room."""
        if self._over:  # what comes now is that the client has left, whenever that is
            return await self._receive()
        self._started = self._started or time.monotonic()
        try:
            async with asyncio.timeout(self._patience()):
                message = await self._receive()
        except TimeoutError:
            raise Problem(408, "slow_upload", "the body came too slowly; see serving.upload_seconds") from None
        size = len(message.get("body", b""))
        self._read += size
        self._over = not message.get("more_body")
        if self._read > self.uploads.most:
            raise _too_large(self.uploads.most)
        if BODY in self.scope:
            self.scope[BODY].grow(size)
        return message

    def _patience(self) -> float:
        """Seconds for which the next piece is waited for."""
        until = min(self.uploads.seconds, GRACE_S + self._read / self.uploads.rate)
        return self._started + until - time.monotonic()


class Guard:
    """ASGI middleware. `hosts` are the Host names that are answered; None answers to all (behind a proxy, with keys).

    On loopback, where there may be no keys, that keeps web pages of others from reading (DNS rebinding); a foreign
    Origin keeps them from writing. `origins` are those of a reverse proxy before the service. `answered` is told the
    route and status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        uploads: Uploads,
        hosts: tuple[str, ...] | None,
        origins: tuple[str, ...],
        answered: Callable[[str, int], None],
    ) -> None:
        self.app, self.uploads, self.hosts, self.answered = app, uploads, hosts, answered
        self.origins = tuple(origin.rstrip("/") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False
        most = min(self.uploads.most, MAX_TEXTS) if scope["path"] in TEXTS else self.uploads.most
        arrival = Arrival(scope, receive, replace(self.uploads, most=most))

        async def hardened(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.answered(getattr(scope.get("route"), "path", "other"), message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["method"], most)
            await self.app(scope, arrival.receive, hardened)
        except Problem as problem:
            told = problem
        except Exception as error:  # Starlette raises it again behind its answer, and its message may hold anything
            logger.error("a request failed: %s", where(error))
            told = internal()
        else:
            return
        if not started:
            await told.response()(scope, receive, hardened)

    def _check(self, headers: Headers, method: str, most: int) -> None:
        host = _name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise Problem(403, "host", "this address is not answered; see serving.hosts")
        origin = headers.get("origin")
        own = origin in self.origins or urlsplit(origin or "").netloc == headers.get("host")
        if origin and method not in ("GET", "HEAD", "OPTIONS") and not own:
            raise Problem(403, "origin", "requests from pages of other sites are refused; see serving.public_origins")
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise Problem(400, "bad_request", "Content-Length is not a number")
        if int(length) > most:
            raise _too_large(most)


def _too_large(most: int) -> Problem:
    return Problem(413, "too_large", f"the request has more than {most} bytes (serving.max_body_mb; texts {MAX_TEXTS})")


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
