"""Streams in real networks: signs of life, and an end that is always told."""

import asyncio
import json

import httpx
import pytest
from test_parts import SCAN, WRITTEN, FakeStream, Handle, Streams, known

from mu2llm.serving import streams, web
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper
from mu2llm.serving.refusal import Refusal
from mu2llm.serving.service import Upload


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(streams, "BEAT_S", 0.02)
    monkeypatch.setattr(streams, "FIRST_S", 0.02)


class SlowReader:
    """A reader's handle that takes its time; `left` where it was told that nobody waits."""

    def __init__(self, result, seconds=0.2):
        self.result, self.seconds, self.left = result, seconds, False

    def __getattr__(self, method):
        return self

    def remote(self, _):
        async def read():
            try:
                await asyncio.sleep(self.seconds)
            except asyncio.CancelledError:
                self.left = True
                raise
            return self.result

        return asyncio.ensure_future(read())


def answer(tmp_path, reader, generator=None, body=None):
    async def go():
        service = known(tmp_path, generator or Streams(FakeStream(["A ", "nodule.", WRITTEN])), reader)
        app = web.application(service, Jobs(service), Doorkeeper(str(tmp_path), needed=False), loopback=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            if body:
                return await client.post("/v1/chat/completions", json=body)
            form = {"files": {"scan": ("a", b"x")}, "data": {"stream": "true"}}
            return await client.post("/v1/reports", **form)

    return asyncio.run(go())


def names(told):
    return [line.partition(": ")[2] for line in told.text.splitlines() if line.startswith("event: ")]


def test_a_stream_begins_before_the_scan_is_read_and_stays_alive(tmp_path):
    """No byte came until then, and proxies cut the connection."""
    told = answer(tmp_path, SlowReader(SCAN))
    assert told.status_code == 200 and told.headers["x-accel-buffering"] == "no"
    before = told.text.partition("event: ")[0]
    assert before.count(": still here") >= 2 and names(told) == ["scan", "token", "token", "report"]


def test_what_is_wrong_with_a_scan_comes_late_as_an_event_and_early_as_a_status(tmp_path):
    late = answer(tmp_path, SlowReader(Refusal("single_slice", "1")))
    assert late.status_code == 200 and names(late) == ["error"] and "single_slice" in late.text
    early = answer(tmp_path, Handle(Refusal("single_slice", "1")))
    assert early.status_code == 422 and early.json()["code"] == "single_slice"


def test_an_unexpected_error_is_an_event_too(tmp_path):
    """The stream ended without a word."""
    told = answer(tmp_path, Handle(SCAN), Streams(FakeStream(["A "])))
    assert names(told)[-1] == "error" and json.loads(told.text.rpartition("data: ")[2])["code"] == "internal"


def test_openais_clients_get_the_same(tmp_path):
    content = [{"type": "image_url", "image_url": {"url": "data:;base64,QUJD"}}]
    body = {"messages": [{"role": "user", "content": content}], "stream": True}
    told = answer(tmp_path, SlowReader(SCAN), body=body)
    assert told.text.count(": still here") >= 2 and told.text.endswith("data: [DONE]\n\n")
    assert '"A "' in told.text


def test_who_leaves_while_the_scan_is_read_is_read_for_no_further(tmp_path):
    reader = SlowReader(SCAN, seconds=60)

    async def go():
        service = known(tmp_path, None, reader)
        work = service.begin(Upload((b"x",)), web.ReportOptions())
        async with streams.read(service, work) as reading:
            told = streams.alive(streams.events(streams.parts(service, work, reading)))
        assert await anext(told) == streams.BEAT
        await told.aclose()
        await asyncio.wait([reading])

    asyncio.run(go())
    assert reader.left
