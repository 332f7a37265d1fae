"""What every request passes before the application sees it: Host and Origin, size of the body, safe headers."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mu2llm.serving.problems import Problem

TEXTS = ("/v1/green", "/v1/corrections")  # whose bodies hold nothing but texts
MAX_TEXTS = 8 * 2**20
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


class Guard:
    """ASGI middleware. `hosts` are the Host names that are answered; None answers to all (behind a proxy, with keys).

    On loopback, where there may be no keys, that keeps web pages of others from reading (DNS rebinding); a foreign
    Origin keeps them from writing. `answered` is told the route and status of each answer.
    """

    def __init__(
        self, app: ASGIApp, max_body: int, hosts: tuple[str, ...] | None, answered: Callable[[str, int], None]
    ) -> None:
        self.app, self.max_body, self.hosts, self.answered = app, max_body, hosts, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, read = False, 0
        most = min(self.max_body, MAX_TEXTS) if scope["path"] in TEXTS else self.max_body

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _too_large(most)
            return message

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
            await self.app(scope, counted, hardened)
        except Problem as problem:
            if started:
                raise
            await problem.response()(scope, receive, hardened)

    def _check(self, headers: Headers, method: str, most: int) -> None:
        host = _name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise Problem(403, "host", "this address is not answered; see serving.hosts")
        origin = headers.get("origin")
        if origin and method not in ("GET", "HEAD", "OPTIONS") and urlsplit(origin).netloc != headers.get("host"):
            raise Problem(403, "origin", "requests from pages of other sites are refused")
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
