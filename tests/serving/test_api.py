"""GREEN, corrections, jobs, keys, metrics and whatever schemathesis thinks of, over HTTP."""

import asyncio
import json
import threading

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from small_service import PATIENT, PATIENT_ID, wait_for
from small_writer import FIRST
from test_reports import post, zipped

from mu2llm import private_apis
from mu2llm.errors import Failure
from mu2llm.serving import guard, pages, web
from mu2llm.serving.exchange import Status
from mu2llm.serving.jobs import Jobs
from mu2llm.serving.keys import Doorkeeper, make_key
from mu2llm.serving.problems import Problem
from mu2llm.serving.schemas import ReportOptions
from mu2llm.serving.service import Service, Upload
from mu2llm.settings.serving import ServingConfig
from mu2llm.stages.corrections import read_corrections

REFERENCE = "There is a large left pleural effusion. There is a right lung nodule of 12 mm."


@pytest.mark.slow
def test_green_names_errors_and_their_sentences(client):
    pairs = [{"reference": REFERENCE, "candidate": FIRST}, {"reference": "", "candidate": FIRST}]
    answer = client.post("/v1/green", json={"pairs": pairs})
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["results"]
    assert first["valid"] and first["score"] == 0.5 and first["matched"] == 1
    assert first["significant"] == [0, 1, 0, 0, 0, 0] and first["judge"].startswith("rules@")
    said = first["sentences"]
    assert any("nodule" in sentence for sentence in said["significant"]["b"])
    assert len(said["matched"]) == 1 and set(said["significant"]) == set("abcdef")
    assert not second["valid"] and second["score"] is None and second["why"]
    assert answer.json()["n_invalid"] == 1 and answer.json()["mean"] == 0.5


@pytest.mark.slow
def test_too_many_pairs(client):
    pairs = [{"reference": "a", "candidate": "b"}] * 257
    assert client.post("/v1/green", json={"pairs": pairs}).status_code == 413
    assert client.post("/v1/green", json={"pairs": []}).status_code == 422


@pytest.mark.slow
def test_a_correction_becomes_a_preference_that_can_be_read(client, phantom, places):
    made = post(client, phantom).json()
    # as it comes from Word, mail and web pages: ends of lines that JSON does not escape
    edited = made["report"].replace("large", "small").replace(" Impression", "\u2028Impression") + "\u0085"
    answer = client.post("/v1/corrections", json={"id": made["id"], "edited": edited})
    assert answer.status_code == 201 and answer.json()["pair"]
    stored = {each.id: each for each in read_corrections(str(places / "state" / "corrections"))}
    kept = stored[answer.json()["id"]]
    assert (kept.chosen, kept.rejected) == (edited, FIRST)
    assert kept.scan_sha256 == made["scan"]["sha256"] and kept.question == made["question"]
    assert open(kept.volume, "rb").read() == phantom  # noqa: SIM115
    again = client.post("/v1/corrections", json={"id": made["id"], "edited": edited})
    assert again.json()["id"] == kept.id
    assert len(read_corrections(str(places / "state" / "corrections"))) == len(stored)


@pytest.mark.slow
def test_corrections_that_belong_nowhere(client, phantom):
    made = post(client, phantom).json()

    def correct(**body):
        return client.post("/v1/corrections", json={"edited": "No finding.", **body})

    assert correct(id="0" * 32).status_code == 404
    assert correct(id="../../etc/passwd").status_code == 404
    assert correct().status_code == 422
    assert correct(id=made["id"], generated="Something else.").status_code == 409
    assert correct(id=made["id"], scan_sha256="0" * 64).status_code == 409
    assert correct(generated="A nodule.", scan_sha256="0" * 64).status_code == 201
    assert client.post("/v1/corrections", json={"id": made["id"], "edited": f"{FIRST}\n"}).json()["pair"] is False
    blank = client.post("/v1/corrections", json={"id": made["id"], "edited": " \n"})
    assert blank.status_code == 422 and "blank" in blank.json()["detail"]


def ended(client, job):
    """What is told of a job that is done or has failed."""
    told = {}

    def over():
        told.update(client.get(f"/v1/jobs/{job}").json())
        return told["status"] in ("done", "failed")

    wait_for(over, f"the end of job {job}")
    return told


@pytest.mark.slow
def test_jobs(client, phantom, dicom, places):
    answer = client.post("/v1/jobs", files={"scan": ("a.nii.gz", phantom)})
    assert answer.status_code == 202 and answer.json()["status"] == "queued"
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    bad = client.post("/v1/jobs", files={"scan": ("a.dcm", dicom[0])}).json()
    done, failed = ended(client, answer.json()["id"]), ended(client, bad["id"])
    assert done["status"] == "done" and done["report"]["report"] == FIRST and done["attempts"] == 1
    assert failed["status"] == "failed" and failed["problem"]["code"] == "single_slice"
    assert client.get("/v1/jobs/" + "0" * 32).status_code == 404
    uploads = places / "state" / "uploads"
    wait_for(lambda: not any(path.is_file() for path in uploads.rglob("*")), "the deletion of what was uploaded")


@pytest.mark.slow
def test_metrics_count_what_happened(client, phantom, dicom):
    post(client, phantom)
    post(client, dicom[0])
    client.post("/v1/green", json={"pairs": [{"reference": REFERENCE, "candidate": FIRST}]})
    wanted = {
        *(("rejections_total", "single_slice"), ("requests_total", "/v1/reports")),
        *(("step_seconds_count", step) for step in ("read", "queue", "encode", "write")),
        *((f"{name}_count", None) for name in ("batch_size", "green_score", "tokens_per_second")),
        *((name, None) for name in ("tokens_total", "generator_queue", "reports_in_progress", "ready")),
    }
    seen = {}

    def told():
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for each in family.samples:
                of = next((each.labels[name] for name in ("reason", "path", "step") if name in each.labels), None)
                seen[each.name.removeprefix("ray_mu2llm_"), of] = each
        return wanted <= set(seen)

    wait_for(told, "what Ray's exporter had not yet")
    assert seen["ready", None].value == 1
    for each in wanted:
        labels = seen[each].labels
        assert labels["deployment"] == "Ingress" and labels["application"] == "mu2llm" and labels["replica"]


@pytest.mark.slow
def test_nothing_of_the_patient_is_told_or_kept(client, dicom, places):
    answers = [post(client, zipped(dicom), name="series.zip"), post(client, dicom[0], name=f"{PATIENT}.dcm")]
    answers.append(client.post("/v1/reports", json={"uri": f"s3://x/{PATIENT}.nii.gz"}))
    told = "".join(answer.text + str(answer.headers) for answer in answers) + client.get("/metrics").text
    for path in (places / "state").rglob("*.json*"):
        told += path.read_text()
    assert PATIENT not in told and PATIENT_ID not in told


@pytest.mark.slow
def test_errors_are_problems_without_traces(client):
    answers = [
        client.post("/v1/green", content=b"{", headers={"content-type": "application/json"}),
        client.post("/v1/green", json={"pairs": "x", "secret": "value"}),
        client.get("/v1/nothing/here"),
        client.put("/v1/green", json={}),
        client.post("/v1/reports", files={"other": b"x"}),
        client.post("/v1/reports", content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"}),
        client.post("/v1/reports", content=b"", headers={"content-type": "multipart/form-data"}),
        client.post("/v1/reports", files={"scan": ("a", b"")}),
        client.post("/v1/reports", files={"scan": ("a\r\nX-Evil: 1", b"abc")}),
        client.post("/v1/reports", json={"uri": "file:///etc/passwd"}),
        client.post("/v1/reports", json={"uri": "s3://bucket/x", "temperature": -1}),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        told = answer.json()
        assert told["status"] == answer.status_code and told["code"] and told["detail"]
        assert "Traceback" not in answer.text and ".py" not in answer.text and "x-evil" not in answer.headers
    assert [answer.status_code for answer in answers[:4]] == [400, 422, 404, 405]


@pytest.mark.slow
def test_no_request_that_fits_the_description_breaks_it(service):
    schema = schemathesis.openapi.from_url(f"{service}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case):
            answer = case.call(timeout=60)
            assert answer.status_code < 500, f"{case.method} {case.path}: {answer.text}"
            if answer.status_code >= 400:
                assert "application/problem+json" in str(answer.headers["content-type"])

        check()


def test_keys_open_what_their_scopes_say(tmp_path):
    keys = {scope: make_key(str(tmp_path), scope, (scope,)) for scope in ("read", "score", "correct")}
    service = Service(None, None, None, ServingConfig(state=str(tmp_path)))
    app = web.application(service, Jobs(service), Doorkeeper(str(tmp_path), needed=True), loopback=False)

    async def ask(method, path, key=None, **more):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            return (await client.request(method, path, headers=headers, **more)).status_code

    def status(*arguments, **more):
        return asyncio.run(ask(*arguments, **more))

    assert status("GET", "/v1/models") == 401
    assert status("GET", "/v1/models", keys["read"]) == 200
    assert status("GET", "/v1/models", keys["score"]) == 403
    assert status("GET", "/v1/models?given=" + keys["read"]) == 401
    assert status("GET", "/metrics") == 401
    for path, body, wrong in (
        ("/v1/green", {"pairs": []}, "read"),
        ("/v1/corrections", {"edited": "x"}, "read"),
        ("/v1/decisions", {"id": "x", "decision": "accepted"}, "read"),
        ("/v1/reports", {"uri": "s3://b/x"}, "score"),
        ("/v1/jobs", {"uri": "s3://b/x"}, "score"),
        ("/v1/chat/completions", {"messages": []}, "correct"),
    ):
        assert status("POST", path, json=body) == 401
        assert status("POST", path, keys[wrong], json=body) == 403
    for path in ("/healthz", "/docs", "/openapi.json", "/"):
        assert status("GET", path) == 200
    assert status("GET", "/readyz") == 503
    assert status("POST", "/v1/reports", keys["read"], json={"uri": "s3://b/x"}) == 503
    assert json.loads((tmp_path / "keys.json").read_text())["keys"][0]["sha256"] != keys["read"]


def test_what_never_changes_may_be_kept_and_what_is_told_may_not(tmp_path, monkeypatch):
    """Nothing might be kept, hashed names and all."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<html></html>")
    (tmp_path / "assets" / "index-BDl19Pyr.js").write_text("1")
    monkeypatch.setattr(pages, "VIEWER", tmp_path)
    _, app, key = small(tmp_path)

    async def kept(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            return (await client.get(path, headers=key)).headers["cache-control"]

    assert "immutable" in asyncio.run(kept("/assets/index-BDl19Pyr.js"))
    assert asyncio.run(kept("/")) == "no-cache"
    assert asyncio.run(kept("/v1/models")) == "no-store"


@pytest.mark.slow
def test_the_http_options_of_a_running_serve_are_known(service):
    assert private_apis.running_http_options().port == int(service.rpartition(":")[2])


ROUTES = (
    *("/v1/reports", "/v1/jobs", "/v1/scans", "/v1/chat/completions", "/v1/green", "/v1/corrections"),
    "/v1/decisions",
)


def small(tmp_path, **values):
    """A service without Ray, ready and with keys; the application, a key of every scope."""
    key = make_key(str(tmp_path), "all", ("read", "score", "correct"))
    service = Service(None, None, None, ServingConfig(state=str(tmp_path), **values))
    service.status = Status(True)
    door = Doorkeeper(str(tmp_path), needed=True)
    return service, web.application(service, Jobs(service), door, loopback=False), {"authorization": f"Bearer {key}"}


def unread(app, path, headers):
    """The status of an answer that was given before the body was asked for."""
    told = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        told.append(message)

    asyncio.run(app(scope_of(path, {"content-type": "application/json", **headers}), receive, send))
    return told[0]["status"]


def scope_of(path, headers):
    """Of a POST, as ASGI tells it."""
    return {
        **{"type": "http", "method": "POST", "path": path, "query_string": b"", "root_path": "", "http_version": "1.1"},
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_is_not_read_before_the_key_is_known(tmp_path, path):
    _, app, _ = small(tmp_path)
    assert unread(app, path, {"content-length": "1000"}) == 401
    assert unread(app, path, {"content-length": "1000", "authorization": "Bearer mu2_x_y"}) == 401


@pytest.mark.parametrize("path", ROUTES[:3])
def test_a_body_is_not_read_before_its_request_is_let_in(tmp_path, path):
    service, app, key = small(tmp_path, max_queued_requests=4, max_body_mb=1)
    with service.bodies.holding(0) as body:
        body.grow(2 * 2**20)
        assert unread(app, path, {"content-length": "10", **key}) == 429
        # in pieces: how much will come is not known
        assert unread(app, path, {"transfer-encoding": "chunked", **key}) == 429


def test_no_more_uploads_of_jobs_are_read_than_may_wait(tmp_path, phantom):
    service, app, key = small(tmp_path, max_queued_requests=1)

    async def go():
        jobs = Jobs(service)
        async with jobs.admitted(10):
            with pytest.raises(Problem) as told:
                async with jobs.admitted(10):
                    pass
            await jobs.add(Upload((b"scan",)), ReportOptions(stream=True))
        return told.value

    assert asyncio.run(go()).status == 429
    assert unread(app, "/v1/jobs", {"content-length": "10", **key}) == 429
    (waiting,) = service.store.open_jobs()
    assert waiting.options.stream is False


def test_storage_that_fails_is_no_fault_of_ours(tmp_path, monkeypatch):
    """It was a 500."""
    service, app, key = small(tmp_path)

    def fails():
        raise Failure("s3://mu2llm/serve: storage failed 5 times")

    monkeypatch.setattr(service.store, "open_ids", fails)
    assert unread(app, "/v1/jobs", {"content-length": "10", **key}) == 503


def test_what_has_come_is_what_counts(tmp_path):
    service, _, _ = small(tmp_path, max_body_mb=1)
    with service.admitted(2**20) as body, service.admitted(2**20), service.admitted(2**20):
        body.grow(5)
        with service.bodies.holding(2 * 2**20 - 5) as other, pytest.raises(Problem):
            other.grow(2 * 2**20 - 4)
        body.grow(2**20 - 5)
        body.arrived(10)
        assert service.bodies.held.total() == 10
    assert not service.bodies.held and not service.bodies.arriving


def test_one_key_leaves_room_to_the_others(tmp_path):
    service, _, _ = small(tmp_path, max_body_mb=1, max_queued_requests=4)
    with service.bodies.holding(2**20, "a") as one, service.bodies.holding(1, "a"):
        for holding in (service.bodies.holding(1, "a"), service.bodies.holding(2**20 + 1, "b")):
            with pytest.raises(Problem) as told, holding:
                pass
            assert told.value.status == 429
        one.grow(2**20)
        with pytest.raises(Problem):
            one.grow(1)
        with service.bodies.holding(2**20, "b") as other:
            other.grow(2**20)


def test_slow_uploads_lock_out_nobody(tmp_path, monkeypatch):
    """Two clients that announced a large scan and sent five bytes held all room; a text was a 429."""
    monkeypatch.setattr(guard, "GRACE_S", 2.0)
    service, app, key = small(tmp_path, max_body_mb=1)

    async def slow():
        sent = iter([{"type": "http.request", "body": b"12345", "more_body": True}])
        told = []

        async def receive():
            return next(sent, None) or await asyncio.Event().wait()

        async def send(message):
            told.append(message)

        headers = {"content-type": "application/json", "content-length": str(2**19), **key}
        await app(scope_of("/v1/chat/completions", headers), receive, send)
        return told[0]["status"]

    async def go():
        uploads = [asyncio.create_task(slow()) for _ in range(4)]
        while service.bodies.held.total() < 20:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            correction = await client.post("/v1/corrections", headers=key, json={"edited": "x", "id": "0" * 32})
            report = await client.post("/v1/reports", headers=key, json={"uri": "s3://b/x"})
        return correction.status_code, report.status_code, await asyncio.gather(*uploads)

    assert asyncio.run(go()) == (404, 403, [408] * 4)
    assert not service.bodies.held


def test_bodies_are_parsed_beside_the_event_loop(tmp_path, monkeypatch):
    _, app, key = small(tmp_path)
    parsed_in = []

    def parse(body):
        parsed_in.append(threading.current_thread())
        raise Problem(422, "no_scan", "none")

    monkeypatch.setattr(web.chat, "parse", parse)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            return await client.post("/v1/chat/completions", headers=key, json={})

    assert asyncio.run(ask()).status_code == 422
    assert parsed_in and parsed_in[0] is not threading.main_thread()


def test_the_description_names_every_body(tmp_path):
    _, app, _ = small(tmp_path)
    told = app.app.openapi()
    for path in ROUTES:
        content = told["paths"][path]["post"]["requestBody"]["content"]
        schema = next(iter(content.values()))["schema"]
        name = schema["$ref"].rpartition("/")[2] if "$ref" in schema else ""
        assert (told["components"]["schemas"][name] if name else schema)["properties"]
        assert told["paths"][path]["post"]["security"] == [{"API key": []}]
    assert "PairIn" in told["components"]["schemas"]
