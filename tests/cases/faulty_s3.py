"""A proxy before an S3 server that lets requests fail: refused (503), cut off at once, or after half the answer."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


@contextlib.contextmanager
def faulty(
    endpoint: str, share: float, methods: tuple[str, ...] = ("GET", "HEAD"), seed: int = 0
) -> Iterator[Counter[str]]:
    """Puts the proxy before `endpoint` and its address into the environment; gives what was done to requests."""
    host = endpoint.removeprefix("http://")
    rng, lock, done = random.Random(seed), threading.Lock(), Counter()
    kinds = itertools.cycle(("refused", "cut", "half"))

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing on the console."""

        def answer(self) -> None:
            with lock:
                failing = self.command in methods and rng.random() < share
                fault = next(kinds) if failing else "passed"
                done[fault] += 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "refused":
                self.reply(503, {}, SLOW_DOWN)
            elif fault == "cut":
                self.close_connection = True
            else:
                self.forward(body, half=fault == "half")

        def forward(self, body: bytes, half: bool) -> None:
            server = http.client.HTTPConnection(host)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                server.putheader(name, value)
            server.endheaders(body or None)
            response = server.getresponse()
            content = response.read()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
            self.reply(response.status, kept, content[: len(content) // 2] if half else content, len(content))
            self.close_connection = self.close_connection or half
            server.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "date", "server"):
                    self.send_header(name, value)
            if self.command == "HEAD":
                length = int(headers.get("Content-Length", 0))
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):  # the client may have gone
                    self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield done
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
        server.shutdown()
        server.server_close()
