"""Whose a draft is and what becomes of it; over HTTP, without Ray."""

import asyncio
import dataclasses
import json

import httpx
import pytest
from pydantic import ValidationError
from test_parts import MODEL, SCAN, WRITTEN, Handle, known
from typer.testing import CliRunner

from mu2llm.cli import app as cli
from mu2llm.errors import Failure, UserError
from mu2llm.serving import audit, web
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper, make_key
from mu2llm.settings.serving import ServingConfig
from mu2llm.stages.corrections import correction_pairs, read_corrections

TEXT, EDITED = WRITTEN.text, "No nodule."
HEADER = "X-Forwarded-User"


class Client:
    """Of a service without Ray, with one key of every scope; each request is one run of the event loop."""

    def __init__(self, state, scan=SCAN, **settings):
        key = make_key(str(state), "ward", ("read", "score", "correct"))
        self.key, self.headers = key.split("_")[1], {"authorization": f"Bearer {key}"}
        settings = {"trusted_proxies": (self.key,), **settings} if "subject_header" in settings else settings
        spec = {"name": "least", "hash": scan.spec_hash}
        written = dataclasses.replace(WRITTEN, checkpoint="s3://b/c", model=MODEL, spec=spec)
        self.service = known(state, Handle(written), Handle(scan), ServingConfig(state=str(state), **settings))
        self.jobs = Jobs(self.service)
        door = Doorkeeper(str(state), needed=True)
        self.app = web.application(self.service, self.jobs, door, loopback=False)

    async def asked(self, method, path, **what):
        headers = {**self.headers, **what.pop("headers", {})}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://service") as client:
            return await client.request(method, path, headers=headers, **what)

    def __call__(self, method, path, **what):
        return asyncio.run(self.asked(method, path, **what))

    def report(self, **what):
        return self("POST", "/v1/reports", files={"scan": b"x"}, **what).json()["id"]


def test_every_step_of_a_draft_has_a_principal_and_an_entry_without_content(tmp_path):
    client = Client(tmp_path, subject_header=HEADER)

    def by(name):
        return {"headers": {HEADER: name}}

    draft = client.report(**by("reader"))
    first = client("GET", f"/v1/drafts/{draft}", **by("anna")).json()
    assert (first["state"], first["report"], first["made_by"]) == ("generated", TEXT, f"{client.key}/reader")
    assert first["edited"] is first["changed"] is None
    assert [each["name"] for each in first["findings"]] == ["lung nodule"]
    assert first["model"] == MODEL and first["scan"]["sha256"] == first["scan_sha256"] == "0" * 64
    edit = client("POST", "/v1/corrections", json={"id": draft, "edited": EDITED}, **by("anna"))
    assert edit.status_code == 201 and edit.json()["pair"]
    assert client("GET", f"/v1/drafts/{draft}", **by("anna")).json()["state"] == "edited"
    last = client("POST", "/v1/decisions", json={"id": draft, "decision": "accepted"}, **by("Jörg".encode("latin-1")))
    assert last.status_code == 200, last.text
    told = last.json()
    assert (told["state"], told["edited"], told["changed_by"]) == ("accepted", EDITED, f"{client.key}/Jörg")
    entries = audit.entries(str(tmp_path))
    assert [each.action for each in entries] == ["generated", "edited", "accepted"]
    assert [each.principal.partition("/")[2] for each in entries] == ["reader", "anna", "Jörg"]
    assert [each.text_sha256 for each in entries] == [audit.sha256_of(text) for text in (TEXT, EDITED, EDITED)]
    assert {(each.about, each.scan_sha256, each.checkpoint) for each in entries} == {(draft, "0" * 64, "s3://b/c")}
    assert not [path for path in (tmp_path / "audit").rglob("*.json") if "odule" in path.read_text()]
    (kept,) = read_corrections(str(tmp_path / "corrections"))
    assert (kept.chosen, kept.principal, kept.accepted) == (EDITED, f"{client.key}/anna", False)


def test_the_audit_log_is_read_by_a_command(tmp_path):
    client = Client(tmp_path)
    draft = client.report()
    (entry,) = audit.entries(str(tmp_path))
    said = CliRunner().invoke(cli, ["audit", "--state", str(tmp_path), "--json"])
    assert json.loads(said.stdout) == [entry.model_dump()]
    line = CliRunner().invoke(cli, ["audit", "--state", str(tmp_path), "--day", entry.time[:10]]).stdout
    assert line.split() == [entry.time, client.key, "generated", draft, "s3://b/c", "0" * 64, audit.sha256_of(TEXT)]
    assert CliRunner().invoke(cli, ["audit", "--state", str(tmp_path), "--day", "2001-01-01"]).stdout == ""


@pytest.mark.parametrize(("given", "says"), [([], "has no audit log"), (["--day", "28.11."], "is no day")])
def test_a_place_without_a_log_and_a_day_that_is_none_are_refused(tmp_path, given, says):
    """A mistyped place looked like one where nobody had done anything."""
    told = CliRunner().invoke(cli, ["audit", "--state", str(tmp_path), *given])
    assert isinstance(told.exception, UserError) and says in str(told.exception)


def test_a_draft_accepted_as_it_is_is_kept_beside_the_corrections(tmp_path):
    client = Client(tmp_path)
    draft = client.report()
    assert client("POST", "/v1/decisions", json={"id": draft, "decision": "accepted"}).json()["state"] == "accepted"
    (kept,) = read_corrections(str(tmp_path / "corrections"))
    assert kept.accepted and kept.chosen == kept.rejected == TEXT and kept.principal == client.key
    pairs, unused = correction_pairs([kept], {kept.id: "case"})
    assert not pairs and unused == {"report_accepted_as_it_is": 1}


def test_a_correction_can_be_taken_back(tmp_path):
    """What was accepted then was the correction, not the text that the reader saw."""
    client = Client(tmp_path)
    draft = client.report()
    answers = [client("POST", "/v1/corrections", json={"id": draft, "edited": text}).json() for text in (EDITED, TEXT)]
    assert [each["pair"] for each in answers] == [True, False]
    assert client("POST", "/v1/decisions", json={"id": draft, "decision": "accepted"}).json()["edited"] == TEXT
    assert audit.entries(str(tmp_path))[-1].text_sha256 == audit.sha256_of(TEXT)


@pytest.mark.parametrize(("first", "other"), [("accepted", "rejected"), ("rejected", "accepted")])
def test_what_is_decided_stays_so(tmp_path, first, other):
    client = Client(tmp_path)
    draft = client.report()
    for _ in range(2):  # said again, it is no other decision
        assert client("POST", "/v1/decisions", json={"id": draft, "decision": first}).json()["state"] == first
    again = client("POST", "/v1/decisions", json={"id": draft, "decision": other})
    edit = client("POST", "/v1/corrections", json={"id": draft, "edited": EDITED})
    assert [answer.status_code for answer in (again, edit)] == [409, 409] and again.json()["code"] == "decided"
    assert [each.action for each in audit.entries(str(tmp_path))] == ["generated", first]
    assert client("POST", "/v1/decisions", json={"id": "0" * 32, "decision": first}).status_code == 404


def test_of_two_that_decide_at_once_one_does(tmp_path):
    client = Client(tmp_path)
    draft = client.report()

    async def go():
        bodies = [{"id": draft, "decision": end} for end in ("accepted", "rejected")]
        asked = [client.asked("POST", "/v1/decisions", json=body) for body in bodies]
        return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert sorted(asyncio.run(go())) == [200, 409]


def test_a_subject_is_believed_of_a_trusted_proxy_alone(tmp_path):
    client = Client(tmp_path, subject_header=HEADER, trusted_proxies=("0" * 8,))
    refused = client("GET", "/v1/models", headers={HEADER: "anna"})
    assert (refused.status_code, refused.json()["code"]) == (403, "subject")
    assert client("GET", "/v1/models").status_code == 200
    assert Client(tmp_path)("GET", "/v1/models", headers={HEADER: "anna"}).status_code == 200  # it is no header of ours
    proxy = Client(tmp_path, subject_header=HEADER)
    for name in (None, " ", "x" * 201, "a\tb"):
        answer = proxy("GET", "/v1/models", headers={HEADER: name} if name else {})
        assert (answer.status_code, answer.json()["code"]) == (400, "subject"), name
    with pytest.raises(ValidationError, match=r"serving\.subject_header"):
        ServingConfig(trusted_proxies=("0" * 8,))


def test_a_jobs_report_is_of_who_asked_for_it(tmp_path):
    client = Client(tmp_path)

    async def go():
        job = (await client.asked("POST", "/v1/jobs", files={"scan": b"x"})).json()["id"]
        await client.jobs._run(client.service.store.open_jobs()[0])
        return job, (await client.jobs.get(job)).report.id

    job, draft = asyncio.run(go())
    assert [(each.action, each.principal, each.about) for each in audit.entries(str(tmp_path))] == [
        ("job", client.key, job),
        ("generated", client.key, draft),
    ]


def test_nothing_is_stored_that_the_audit_log_has_not(tmp_path, monkeypatch):
    client = Client(tmp_path)
    draft = client.report()

    def fails(*_):
        raise Failure("no space")

    monkeypatch.setattr(audit, "append", fails)
    for path, body in (
        ("/v1/corrections", {"id": draft, "edited": EDITED}),
        ("/v1/decisions", {"id": draft, "decision": "accepted"}),
    ):
        assert client("POST", path, json=body).status_code == 503
    assert client("POST", "/v1/jobs", files={"scan": b"x"}).status_code == 503
    assert client("GET", f"/v1/drafts/{draft}").json()["state"] == "generated"
    assert not (tmp_path / "corrections").exists() and client.service.store.open_ids() == []


def test_a_report_of_before_there_were_states_is_a_draft(tmp_path):
    client = Client(tmp_path)
    draft = client.report()
    file = tmp_path / "reports" / f"{draft}.json"
    new = ("made_by", "state", "edited", "changed", "changed_by", "model", "scan")
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in new})
    )
    assert client("GET", f"/v1/drafts/{draft}").json()["state"] == "generated"
    assert client("POST", "/v1/corrections", json={"id": draft, "edited": EDITED}).json()["pair"]
