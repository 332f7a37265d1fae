"""The OpenAI-compatible endpoint, against a small server here."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from green_server import answered

from mu2llm.errors import Failure, UserError
from mu2llm.green import load_judge
from mu2llm.green.endpoint import EndpointWriter
from mu2llm.green.prompted import Unanswered
from mu2llm.settings.green import JudgeConfig

ANSWER = """[Clinically Significant Errors]:
None.

[Clinically Insignificant Errors]:
None.

[Matched Findings]:
1. Emphysema."""


class Server(ThreadingHTTPServer):
    """Answers with the statuses in `script`, then 200; counts, times and remembers requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[int] = []
        self.headers: dict[str, str] = {}
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self.body: bytes | None = None
        self.delay = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append({**request, "path": self.path, "key": self.headers.get("Authorization")})
            server.times.append(time.monotonic())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            status = server.script.pop(0) if server.script else 200
        time.sleep(server.delay)
        content = {"choices": [{"message": {"content": ANSWER}, "finish_reason": "stop"}]}
        body = server.body or json.dumps(content if status == 200 else {"error": "no"}).encode()
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def writer(server: Server, **options: object) -> EndpointWriter:
    return EndpointWriter("judge-7b", server.url, 256, first_wait_s=0.01, **options)


def test_a_judge_by_its_configuration(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = load_judge(JudgeConfig(name=f"openai:org/judge-7b@{server.url}"))
    judgement = judge.judge([("Emphysema.", "Emphysema.")])[0]
    assert (judgement.score, judgement.matched_sentences) == (1.0, ("Emphysema",))
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert (request["model"], request["temperature"]) == ("org/judge-7b", 0)
    assert "secret" not in judgement.judge and "org/judge-7b@127.0.0.1" in judgement.judge


def test_answers_keep_their_order_and_are_asked_at_once(server):
    server.delay = 0.05
    answers = answered(writer(server, concurrency=4), [str(i) for i in range(8)])
    assert answers == [ANSWER] * 8
    assert 2 <= server.most_busy <= 4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_passes_is_asked_again(server, status):
    server.script = [status, status]
    assert answered(writer(server), ["x"]) == [ANSWER]
    assert len(server.requests) == 3


def test_an_endpoint_that_asks_for_a_pause_gets_it(server):
    server.script, server.headers = [429], {"Retry-After": "0.3"}
    answered(writer(server), ["x"])
    assert server.times[1] - server.times[0] >= 0.3


def test_the_rate_is_kept(server):
    answered(writer(server, concurrency=4, requests_per_minute=1200), ["a", "b", "c", "d"])
    assert server.times[-1] - server.times[0] >= 0.1  # four requests, 50 ms apart, with room for a late first


def test_an_endpoint_that_stays_away_is_a_failure(server):
    server.script = [503] * 20
    with pytest.raises(Failure, match="status 503 after 6 attempts"):
        answered(writer(server), ["x"])
    with pytest.raises(Failure, match="ConnectError"):
        answered(EndpointWriter("m", "http://127.0.0.1:9/v1", 8, first_wait_s=0.001), ["x"])


@pytest.mark.parametrize(("status", "mend"), [(401, "key"), (403, "no right"), (404, "no such model")])
def test_the_users_mistake_is_said(server, status, mend):
    server.script = [status]
    with pytest.raises(UserError, match=mend):
        answered(writer(server), ["x"])
    assert len(server.requests) == 1


def test_a_prompt_that_is_refused_is_unanswered(server):
    server.script = [400]
    refused, second = answered(writer(server, concurrency=1), ["too long", "x"])
    assert isinstance(refused, Unanswered) and "400" in refused.why
    assert second == ANSWER


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[1]"]
)
def test_what_is_no_completion_is_unanswered(server, body):
    server.body = body
    assert isinstance(answered(writer(server), ["x"])[0], Unanswered)
