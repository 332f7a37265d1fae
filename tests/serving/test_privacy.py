"""Nothing of what a client sends may be read where the service is looked after: marked values through every failing
path, and then all that it tells but its answers' own content."""

import asyncio
import logging

import httpx
import pytest
from ray.util.metrics import Metric
from test_parts import SCAN, WRITTEN, Handle, known

from mu2llm.errors import Failure
from mu2llm.serving import web
from mu2llm.serving.generator import ReportGenerator
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper
from mu2llm.serving.scorer import GreenScorer
from mu2llm.serving.service import Upload
from mu2llm.settings.serving import ServingConfig

MARK = "Zweistein"
CHAT = {"messages": [{"role": "user", "content": [{"type": "text", "text": MARK}]}]}
WITH_SCAN = {"type": "image_url", "image_url": {"url": "data:;base64,QUJD"}}
QUESTION = {"messages": [{"role": "user", "content": [{"type": "text", "text": MARK}, WITH_SCAN]}]}


class Breaks:
    """A handle whose calls fail by an error that tells what it was given."""

    def __init__(self, error=RuntimeError):
        self.error = error

    def __getattr__(self, method):
        return self

    def options(self, **_):
        return self

    def remote(self, *_):
        raise self.error(f"{MARK} has a nodule")


class BreaksLater(Breaks):
    """The same in the middle of a stream."""

    def remote(self, *_):
        return self

    async def __anext__(self):
        raise self.error(f"{MARK} has a nodule")

    def cancel(self):
        pass


@pytest.fixture
def labels(monkeypatch):
    """What the labels of the numbers say that are counted meanwhile."""
    told = []
    monkeypatch.setattr(Metric, "_record", lambda metric, value, tags=None: told.append(f"{metric.info} {tags}"))
    return told


def told_by(capfd, caplog, labels, answers):
    """All that an operator, or a client who did something wrong, gets to see."""
    records = [each for each in caplog.records if each.name != "httpx"]  # which is the client
    logs = "".join(capfd.readouterr()) + "".join(each.getMessage() + str(each.__dict__) for each in records)
    return logs + "".join(labels) + "".join(each.text + str(each.headers) for each in answers)


def scan(name=f"{MARK}.nii.gz", data=b"x"):
    return {"files": {"scan": (name, data)}}


REQUESTS = [
    ("POST", "/v1/reports", {**scan(), "data": {"question": MARK, "region": MARK}}),
    ("POST", "/v1/reports", {**scan(), "data": {"question": MARK, "stream": "true"}}),
    ("POST", "/v1/reports", {**scan(), "data": {"temperature": MARK}}),
    ("POST", "/v1/reports", {**scan(), "data": {MARK: "1"}}),
    ("POST", "/v1/reports", {**scan(), "data": {"accept": MARK}}),
    ("POST", "/v1/reports", {**scan(), "headers": {"accept": f"image/{MARK}"}}),
    ("POST", "/v1/reports", {"files": {MARK: (MARK, MARK)}}),
    ("POST", "/v1/reports", {"json": {"uri": f"s3://bucket/{MARK}"}}),
    ("POST", "/v1/reports", {"json": {"uri": f"file:///etc/{MARK}", "stop": [MARK] * 9}}),
    ("POST", "/v1/reports", {"content": MARK.encode(), "headers": {"content-type": "application/json"}}),
    ("POST", "/v1/reports", {"content": MARK.encode(), "headers": {"content-type": MARK}}),
    ("POST", "/v1/reports", {"content": MARK, "headers": {"content-type": f"multipart/form-data; boundary={MARK}"}}),
    ("POST", "/v1/jobs", {**scan(), "data": {"question": MARK, "max_new_tokens": MARK}}),
    ("POST", "/v1/chat/completions", {"json": CHAT}),
    ("POST", "/v1/chat/completions", {"json": QUESTION}),
    ("POST", "/v1/chat/completions", {"json": {**QUESTION, "stream": True}}),
    ("POST", "/v1/chat/completions", {"json": {**QUESTION, "stop": MARK, "n": MARK}}),
    ("POST", "/v1/chat/completions", {"json": {"messages": [{"role": MARK}]}}),
    ("POST", "/v1/green", {"json": {"pairs": [{"reference": MARK, "candidate": MARK}]}}),
    ("POST", "/v1/green", {"json": {"pairs": [{MARK: MARK}], MARK: 1}}),
    ("POST", "/v1/corrections", {"json": {"edited": MARK, "id": MARK}}),
    ("POST", "/v1/corrections", {"json": {"edited": MARK, "generated": MARK, "scan_sha256": MARK}}),
    ("POST", "/v1/decisions", {"json": {"id": MARK, "decision": "accepted"}}),
    ("POST", "/v1/decisions", {"json": {"id": "0" * 32, "decision": MARK}}),
    ("GET", f"/v1/drafts/{MARK}", {}),
    ("DELETE", f"/v1/drafts/{MARK}", {}),
    ("POST", "/v1/scans", {**scan(), "data": {MARK: MARK}}),
    ("POST", "/v1/reports", {"json": {"scan": MARK, "question": MARK}}),
    ("DELETE", f"/v1/scans/{MARK}", {}),
    ("GET", f"/v1/jobs/{MARK}", {}),
    ("GET", f"/v1/samples/{MARK}", {}),
    ("GET", f"/v1/{MARK}?{MARK}={MARK}", {"headers": {"cookie": MARK, "referer": MARK}}),
    ("PUT", f"/v1/reports?{MARK}", {"headers": {"authorization": f"Bearer {MARK}"}}),
    ("POST", "/v1/reports", {**scan(), "headers": {"origin": f"https://{MARK}.example"}}),
    ("POST", "/v1/reports", {**scan(), "headers": {"content-length": MARK}}),
]


@pytest.mark.parametrize(
    ("reader", "generator", "error"),
    [
        (Breaks(), None, RuntimeError),
        (Handle(SCAN), Breaks(), ValueError),
        (Handle(SCAN), BreaksLater(), KeyError),
        (Breaks(Failure), Breaks(Failure), Failure),
    ],
)
def test_no_failing_request_tells_what_it_held(tmp_path, capfd, caplog, labels, monkeypatch, reader, generator, error):
    """An exception's message went through Starlette, which raises it again, into Serve's log."""
    caplog.set_level(logging.DEBUG)

    def breaks(*_):
        raise error(f"{MARK} was not stored")

    async def go():
        service = known(tmp_path, generator, reader)
        service.scorer.handle = Breaks()
        monkeypatch.setattr(service.store, "save_correction", breaks)
        monkeypatch.setattr(service.store, "add_job", breaks)
        door = Doorkeeper(str(tmp_path), needed=False)
        app = web.application(service, Jobs(service), door, loopback=False)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            return [await client.request(method, path, **what) for method, path, what in REQUESTS]

    answers = asyncio.run(go())
    assert {answer.status_code for answer in answers} >= {400, 403, 404, 405, 406, 415, 422} and labels
    for answer in answers:
        assert answer.status_code >= 400 or "event: error" in answer.text or '"error"' in answer.text, answer.text
    assert MARK not in told_by(capfd, caplog, labels, answers)


def test_a_job_that_breaks_tells_nothing(tmp_path, capfd, caplog, labels):
    """Its exception was never retrieved, of which asyncio told all."""
    caplog.set_level(logging.DEBUG)

    async def go():
        service = known(tmp_path, Breaks())
        jobs = Jobs(service)
        added = await jobs.add(Upload((b"x",)), web.ReportOptions(question=MARK))
        await jobs._begin()
        while jobs._running:
            await asyncio.sleep(0.01)
        return (await jobs.get(added.id)).model_dump_json()

    job = asyncio.run(go())
    assert '"failed"' in job and '"internal"' in job
    assert MARK not in job + told_by(capfd, caplog, labels, [])


def test_whatever_breaks_in_a_replica_leaves_it_as_a_refusal(tmp_path, capfd, caplog, monkeypatch):
    """Serve logs what a replica raises, and Ray shows it in its dashboard."""
    caplog.set_level(logging.DEBUG)

    def breaks(*_):
        raise KeyError(f"{MARK} has a nodule")

    async def go():
        scorer = GreenScorer({}, 3)
        monkeypatch.setattr(scorer, "_loaded", breaks)
        generator = ReportGenerator(ServingConfig().model_dump(), None, True)
        generator.loaded = Breaks()
        generator.loaded.spec = type("Spec", (), {"hash": SCAN.spec_hash})
        monkeypatch.setattr(generator.loaded, "decoding", breaks, raising=False)
        request = type("Request", (), {"scan": SCAN})
        return await scorer.score([(MARK, MARK)]), await generator.write(request), await scorer.identity()

    ends = asyncio.run(go())
    assert [each.reason for each in ends] == ["down", "broken", "down"]
    assert MARK not in repr(ends) + "".join(capfd.readouterr()) + caplog.text


def test_a_report_that_is_given_is_logged_by_nobody(tmp_path, capfd, caplog, labels):
    """Though storage fails meanwhile."""
    caplog.set_level(logging.DEBUG)

    async def go():
        service = known(tmp_path / "none", Handle(WRITTEN))
        (tmp_path / "none").write_text("no folder")
        return await service.report(service.begin(Upload((b"x",)), web.ReportOptions(question=MARK)))

    made = asyncio.run(go())
    assert made.report.report == WRITTEN.text and "could not be saved" in caplog.text
    assert WRITTEN.text not in told_by(capfd, caplog, labels, [])
