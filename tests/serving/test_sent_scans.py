"""A scan is sent once and named by its id; over HTTP, without Ray."""

import asyncio
import io
import os
import time
import zipfile

import pytest
from test_drafts import Client
from test_parts import Handle

from mu2llm import storage
from mu2llm.serving import audit
from mu2llm.serving.decoder import Reading
from mu2llm.serving.problems import Problem
from mu2llm.serving.scans import Scans
from mu2llm.serving.schemas import ReportOptions
from mu2llm.serving.service import Upload

PARTS = [("scan", ("1.dcm", b"one")), ("scan", ("2.dcm", b"three"))]


@pytest.fixture
def read(monkeypatch):
    """What readers were asked to read."""
    asked = []
    remote = Handle.remote

    def told(self, *what):
        asked.extend(each.source for each in what if isinstance(each, Reading))
        return remote(self, *what)

    monkeypatch.setattr(Handle, "remote", told)
    return asked


def send(client, **what):
    answer = client("POST", "/v1/scans", files=PARTS, **what)
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/scans/{answer.json()['id']}"
    return answer.json()


def test_reports_questions_and_chat_name_a_scan_that_was_sent_once(tmp_path, read):
    client = Client(tmp_path)
    sent = send(client)
    assert sent["size"] == 8 and read == []
    for asked in ({}, {"question": "Is there a nodule?"}):
        answer = client("POST", "/v1/reports", json={"scan": sent["id"], **asked})
        assert answer.status_code == 200 and answer.json()["report"] == "A nodule."
    url = {"type": "image_url", "image_url": {"url": f"scan:{sent['id']}"}}
    said = client("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": [url]}]})
    assert said.json()["choices"][0]["message"]["content"] == "A nodule."
    assert read == [[b"one", b"three"]] * 3
    assert [each.action for each in audit.entries(str(tmp_path))] == ["scan", *["generated"] * 3]


def test_a_scan_comes_back_as_it_was_sent(tmp_path):
    client = Client(tmp_path)
    several = client("GET", f"/v1/scans/{send(client)['id']}")
    assert several.headers["cache-control"] == "no-store"
    with zipfile.ZipFile(io.BytesIO(several.content)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [b"one", b"three"]
    alone = client("POST", "/v1/scans", files={"scan": b"one"}).json()["id"]
    assert client("GET", f"/v1/scans/{alone}").content == b"one"
    assert not client.service.bodies.held


def test_a_job_keeps_the_scan_that_it_names(tmp_path):
    client = Client(tmp_path)
    sent = send(client)
    assert client("POST", "/v1/jobs", json={"scan": sent["id"]}).status_code == 202
    assert client("DELETE", f"/v1/scans/{sent['id']}").status_code == 204
    (job,) = client.service.store.open_jobs()
    assert client.service.store.upload(job) == [b"one", b"three"]


def test_who_sent_it_alone_may_name_it_and_for_its_time_alone(tmp_path):
    header = "X-Forwarded-User"
    client = Client(tmp_path, subject_header=header)
    anna, bert = {"headers": {header: "anna"}}, {"headers": {header: "bert"}}
    sent = send(client, **anna)["id"]

    def status(name, identity=sent):
        return client("POST", "/v1/reports", json={"scan": identity}, **name).status_code

    assert (status(anna), status(bert), status(anna, "0" * 32), status(anna, "../keys")) == (200, 404, 404, 404)
    assert [client(method, f"/v1/scans/{sent}", **bert).status_code for method in ("GET", "DELETE")] == [404, 404]
    client.service.scans = Scans(str(tmp_path), 1e-9, 64)
    brief = send(client, **anna)["id"]
    assert (status(anna, brief), status(anna)) == (404, 200)
    assert client("DELETE", f"/v1/scans/{sent}", **anna).status_code == 204 and status(anna) == 404


def test_what_is_over_is_deleted_with_what_never_became_whole(tmp_path, monkeypatch):
    scans, write = Scans(str(tmp_path), 60, 64), storage.write_bytes

    def breaks(uri, data):
        if uri.endswith("scan.json"):
            raise OSError("no space")
        write(uri, data)

    old = scans.add([b"old"], "")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", breaks)
        with pytest.raises(OSError, match="no space"):
            scans.add([b"half"], "")
    assert scans.forget_old() == 0
    for path in (tmp_path / "scans").rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    new = scans.add([b"new"], "")
    assert scans.forget_old() == 2
    assert [path.read_bytes() for path in (tmp_path / "scans").rglob("00*")] == [b"new"]
    assert scans.read(new) == (b"new",)
    with pytest.raises(Problem, match="send it to /v1/scans again"):
        scans.read(old)


def test_no_more_are_kept_than_may(tmp_path):
    client = Client(tmp_path, max_scans=1)
    first = send(client)["id"]
    assert client("POST", "/v1/scans", files=PARTS).status_code == 429
    assert client("DELETE", f"/v1/scans/{first}").status_code == 204
    send(client)


def test_a_scan_that_is_named_takes_as_much_room_as_one_that_comes(tmp_path):
    client = Client(tmp_path, max_body_mb=1)
    sent = client("POST", "/v1/scans", files={"scan": bytes(900_000)}).json()["id"]

    async def go():
        with client.service.bodies.holding(0, "another") as body:
            body.grow(2**20)
            with client.service.bodies.holding(0, client.key) as own:
                own.grow(2**18)
                return await client.asked("POST", "/v1/reports", json={"scan": sent})

    assert asyncio.run(go()).status_code == 429
    assert not client.service.bodies.held


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"json": {"uri": "s3://b/x"}}, 415),
        ({"files": {"other": b"x"}}, 422),
        ({"files": {"scan": b"x"}, "data": {"question": "?"}}, 422),
    ],
)
def test_what_is_no_scan_is_not_kept(tmp_path, what, status):
    client = Client(tmp_path)
    assert client("POST", "/v1/scans", **what).status_code == status
    assert not (tmp_path / "scans").exists() and not (tmp_path / audit.FOLDER).exists()


def test_one_scan_is_named_one_way(tmp_path):
    client = Client(tmp_path)
    for body in ({}, {"uri": "s3://b/x", "scan": "0" * 32}, {"study": "https://a/studies/1", "scan": "0" * 32}):
        answer = client("POST", "/v1/reports", json=body)
        assert answer.status_code == 422 and "one of the three" in answer.json()["detail"]


def test_a_scan_cannot_be_named_past_its_owner(tmp_path):
    """What a route did not resolve is no URI that is allowed."""
    client = Client(tmp_path)
    with pytest.raises(Problem) as told:
        client.service.begin(Upload(uri=f"scan:{send(client)['id']}"), ReportOptions())
    assert told.value.status in (403, 422)
