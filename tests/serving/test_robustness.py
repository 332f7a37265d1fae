"""What the service withstands: dying replicas, another model, a scorer that is down, more clients than it can serve."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray
from small_service import wait_until_ready
from small_writer import FIRST, SECOND, write_checkpoint
from test_api import REFERENCE, wait_for

from mu2llm import tracking
from mu2llm.config import JudgeConfig
from mu2llm.records import Checkpoint
from mu2llm.serving.running import deploy

pytestmark = pytest.mark.slow
REFUSED = (429, 503)  # not accepted: to be sent again


class Load:
    """Clients that post the scan over and over while the block lasts; `answers` are (status, report)."""

    def __init__(self, url, scan, clients=4):
        self.url, self.scan, self.over = url, scan, threading.Event()
        self.answers, self.pool = [], ThreadPoolExecutor(clients)
        self.clients = clients

    def __enter__(self):
        self.running = [self.pool.submit(self.post) for _ in range(self.clients)]
        self.wait_for(self.clients)
        return self

    def post(self):
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.over.is_set():
                answer = client.post("/v1/reports", files={"scan": ("a.nii.gz", self.scan)})
                told = answer.json() if answer.headers["content-type"].startswith("application/json") else {}
                self.answers.append((answer.status_code, told.get("report", answer.text)))
                if answer.status_code in REFUSED:
                    time.sleep(0.2)

    def wait_for(self, more, status=200, text=None, seconds=90):
        """Until `more` further answers of a status (and text) have come."""
        start, deadline = len(self.answers), time.monotonic() + seconds
        while time.monotonic() < deadline:
            new = [a for a in self.answers[start:] if a[0] == status and text in (None, a[1])]
            if len(new) >= more:
                return
            time.sleep(0.05)
        raise TimeoutError(Counter(status for status, _ in self.answers[start:]))

    def __exit__(self, *_):
        self.over.set()
        for running in self.running:
            running.result(120)
        self.pool.shutdown()


def kill(deployment):
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    (name,) = [name for name in names if name.startswith(f"SERVE_REPLICA::mu2llm#{deployment}#")]
    ray.kill(ray.get_actor(name, namespace="serve"))


@pytest.mark.parametrize("deployment", ["VolumeReader", "ReportGenerator"])
def test_a_replica_dies_under_load(service, phantom, deployment):
    with Load(service, phantom) as load:
        kill(deployment)
        load.wait_for(8)
    assert {status for status, _ in load.answers} <= {200, *REFUSED}, load.answers
    assert all(report == FIRST for status, report in load.answers if status == 200)


def test_the_scorer_dies(client, service):
    kill("GreenScorer")
    body = {"pairs": [{"reference": REFERENCE, "candidate": FIRST}]}
    deadline, answer = time.monotonic() + 60, client.post("/v1/green", json=body)
    while answer.status_code == 503 and time.monotonic() < deadline:
        answer = client.post("/v1/green", json=body)
    assert answer.status_code == 200 and answer.json()["results"][0]["score"] == 0.5


def test_the_ingress_dies_and_jobs_outlive_it(client, service, phantom):
    """Connections of that replica break, as those of any server that dies; clients ask again."""
    jobs = [client.post("/v1/jobs", files={"scan": ("a.nii.gz", phantom)}).json()["id"] for _ in range(3)]
    kill("Ingress")
    time.sleep(1)
    wait_until_ready(service)
    for job in jobs:
        told = wait_for(client, job, 90)
        assert told["status"] == "done" and told["report"]["report"] == FIRST


def test_another_model_takes_over_without_a_pause(service, phantom, settings, tmp_path_factory):
    """The second one even prepares its scans otherwise."""
    folder = tmp_path_factory.mktemp("second")
    second = write_checkpoint(str(folder / "second"), SECOND, fit="isotropic")
    try:
        with Load(service, phantom) as load:
            deploy(settings.model_copy(update={"checkpoint": second}))
            load.wait_for(4, text=SECOND)
        assert {status for status, _ in load.answers} == {200}
        assert {report for _, report in load.answers} == {FIRST, SECOND}
    finally:
        deploy(settings)
        wait_for_text(service, phantom, FIRST)


def test_what_is_promoted_takes_over(service, phantom, settings, checkpoint, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking)
    second = write_checkpoint(str(tmp_path_factory.mktemp("promoted") / "second"), SECOND)
    tracking.register(Checkpoint.open(second), alias="champion")
    try:
        with Load(service, phantom, clients=2) as load:
            deploy(settings.model_copy(update={"checkpoint": "registry://mu2llm@champion"}))
            load.wait_for(2, text=SECOND)
            tracking.register(Checkpoint.open(checkpoint), alias="champion")
            load.wait_for(2, text=FIRST)
        assert {status for status, _ in load.answers} == {200}
    finally:
        deploy(settings)
        wait_for_text(service, phantom, FIRST)


def test_reports_go_on_while_the_scorer_is_down(client, phantom, settings):
    down = JudgeConfig(name="hf:/there/is/no/judge")
    body = {"pairs": [{"reference": REFERENCE, "candidate": FIRST}]}
    try:
        deploy(settings.model_copy(update={"judge": down}))
        deadline, answer = time.monotonic() + 60, client.post("/v1/green", json=body)
        while answer.status_code == 200 and time.monotonic() < deadline:
            answer = client.post("/v1/green", json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "scorer_down")
        assert int(answer.headers["retry-after"]) > 0
        assert client.post("/v1/reports", files={"scan": ("a.nii.gz", phantom)}).status_code == 200
    finally:
        deploy(settings)
        deadline = time.monotonic() + 60
        while client.post("/v1/green", json=body).status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.5)


def wait_for_text(url, scan, text, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if httpx.post(f"{url}/v1/reports", files={"scan": ("a.nii.gz", scan)}, timeout=60).json()["report"] == text:
            return
        time.sleep(0.3)
    raise TimeoutError(f"never wrote {text!r}")


def test_more_clients_than_it_can_serve(service, phantom, settings):
    """Who is over the limit hears so at once, and how long to wait; who was let in gets the report."""
    clients = 3 * settings.serving.max_queued_requests

    def post(_):
        with httpx.Client(base_url=service, timeout=120) as client:
            started = time.monotonic()
            answer = client.post("/v1/reports", files={"scan": ("a.nii.gz", phantom)})
            return answer, time.monotonic() - started

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(post, range(clients)))
    counts = Counter(answer.status_code for answer, _ in answers)
    assert set(counts) == {200, 429} and counts[200] >= settings.serving.max_queued_requests / 2, counts
    for answer, _ in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["code"] == "busy"
        else:
            assert answer.json()["report"] == FIRST
