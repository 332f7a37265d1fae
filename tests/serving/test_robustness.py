"""What the service withstands: dying replicas, another model, a scorer that is down, more clients than it can serve."""

import contextlib
import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import ray
from small_service import GUARD_S, PLAIN, post, wait_for, wait_until_ready
from small_writer import FIRST, SECOND, write_checkpoint
from test_api import REFERENCE, ended

from mu2llm import tracking
from mu2llm.artefacts import open_checkpoint
from mu2llm.green import load_judge, write_answer
from mu2llm.model import load
from mu2llm.serving.running import deploy
from mu2llm.settings.green import JudgeConfig

pytestmark = pytest.mark.slow
BUSY, DOWN = (429, "busy"), (503, "scorer_down")  # refused at admission: to be sent again


class Load:
    """Clients that ask over and over while the block lasts. `answers` are (status, what `told` reads in it or the
    problem's code); `broken` counts what the ingress died over, which its proxy tells so or by a broken connection:
    then a client asks again."""

    def __init__(self, ask, told, clients=4):
        self.ask, self.told, self.clients = ask, told, clients
        self.answers, self.broken, self.over, self.pool = [], 0, threading.Event(), ThreadPoolExecutor(clients)

    def __enter__(self):
        self.running = [self.pool.submit(self.keep_asking) for _ in range(self.clients)]
        self.wait_for(self.clients)
        return self

    def keep_asking(self):
        while not self.over.is_set():
            try:
                answer = self.ask()
            except httpx.TransportError:
                answer = None
            if answer is None or (answer.status_code, answer.text) == (500, "Internal Server Error"):
                self.broken += 1
                continue
            told = answer.json() if "json" in answer.headers["content-type"] else {"code": answer.text}
            self.answers.append((answer.status_code, self.told(told) if answer.status_code == 200 else told["code"]))
            time.sleep(0.1)  # what is to come back needs the processor too

    def wait_for(self, more, told=None):
        """Until `more` further answers of status 200 (that tell this) have come."""
        start = len(self.answers)
        wait_for(
            lambda: len([a for a in self.answers[start:] if a[0] == 200 and told in (None, a[1])]) >= more,
            f"{more} answers {told or ''} of {Counter(self.answers[start:])}",
        )

    def __exit__(self, *_):
        self.over.set()
        for running in self.running:
            running.result()
        self.pool.shutdown()


def reports(url, scan, clients=4):
    def ask():
        return post(f"{url}/v1/reports", files={"scan": ("a.nii.gz", scan)})

    return Load(ask, lambda told: told["report"], clients)


PAIRS = {"pairs": [{"reference": REFERENCE, "candidate": FIRST}]}


def scores(url, clients=4):
    return Load(
        lambda: post(f"{url}/v1/green", json=PAIRS),
        lambda told: told["results"][0]["score"],
        clients,
    )


def replica(deployment):
    """The deployment's one replica, after those that it replaced have gone."""

    def names():
        named = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        return [name for name in named if name.startswith(f"SERVE_REPLICA::mu2llm#{deployment}#")]

    wait_for(lambda: len(names()) == 1, f"one replica of {deployment}")
    return ray.get_actor(names()[0], namespace="serve")


def kill(deployment):
    ray.kill(replica(deployment))


@pytest.mark.parametrize("deployment", ["VolumeReader", "ReportGenerator"])
def test_a_replica_dies_under_load(service, phantom, deployment):
    """Whoever was let in gets the report, and none is turned away: a replica is back before that is needed."""
    with reports(service, phantom) as load:
        kill(deployment)
        load.wait_for(8)
    assert set(load.answers) == {(200, FIRST)} and not load.broken


def test_the_scorer_dies_under_load(service):
    """Who asks while there is none hears so; who was let in gets the scores."""
    with scores(service) as load:
        kill("GreenScorer")
        load.wait_for(8)
    assert set(load.answers) <= {(200, 0.5), DOWN} and not load.broken, Counter(load.answers)


def test_the_ingress_dies_under_load_and_jobs_outlive_it(client, service, phantom):
    """Connections of that replica break, as those of any server that dies; clients ask again."""
    jobs = [client.post("/v1/jobs", files={"scan": ("a.nii.gz", phantom)}).json()["id"] for _ in range(3)]
    with reports(service, phantom) as load:
        kill("Ingress")
        load.wait_for(8)
    assert set(load.answers) == {(200, FIRST)}, Counter(load.answers)
    wait_until_ready(service)
    for job in jobs:
        told = ended(client, job)
        assert told["status"] == "done" and told["report"]["report"] == FIRST


def test_more_clients_than_it_can_serve(service, phantom, settings):
    """Who is over the limit hears so at once, and how long to wait; who was let in gets the report."""
    clients = 3 * settings.serving.max_queued_requests

    def ask(_):
        return post(f"{service}/v1/reports", files={"scan": ("a.nii.gz", phantom)})

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429} and counts[200] >= settings.serving.max_queued_requests / 2, counts
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["code"] == "busy"
        else:
            assert answer.json()["report"] == FIRST


def test_batch_jobs_judge_by_the_services_scorer(service):
    judge = load_judge(JudgeConfig(name="python:mu2llm.serving.judge:ServedJudge"))
    pairs = [(REFERENCE, FIRST), ("", FIRST)] * 40  # more than one call
    rules = load_judge(JudgeConfig())
    assert judge.identity == rules.identity and judge.judge(pairs) == rules.judge(pairs)


# ---- other models and judges


@pytest.fixture(scope="module")
def change(service, settings, phantom):
    """Deploys other settings; when this module is done, those that all tests share."""
    yield lambda **changed: deploy(settings.model_copy(update=changed))
    deploy(settings)
    wait_for(lambda: write(service, phantom).get("report") == FIRST)
    wait_for(lambda: judged_by(service).startswith("rules@"))


def write(url, scan, **asked):
    """What is answered; nothing where Ray's proxy answers itself, as while an ingress is replaced."""
    answer = post(f"{url}/v1/reports", files={"scan": ("a.nii.gz", scan)}, data=asked)
    return answer.json() if "json" in answer.headers["content-type"] else {}


def judged_by(url):
    """The identity of the judge that scores now; why there is none."""
    told = post(f"{url}/v1/green", json=PAIRS).json()
    return told["results"][0]["judge"] if "results" in told else told["code"]


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A checkpoint that writes another report, of scans that it even prepares otherwise."""
    return write_checkpoint(str(tmp_path_factory.mktemp("second") / "second"), SECOND, fit="isotropic")


@pytest.fixture
def promote(settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking)
    return lambda uri: tracking.register(open_checkpoint(uri), alias="champion")


def test_another_model_and_what_is_promoted_take_over_without_a_pause(
    service, phantom, change, promote, checkpoint, second
):
    promote(second)
    with reports(service, phantom) as load:
        change(checkpoint="registry://mu2llm@champion")
        load.wait_for(4, told=SECOND)
        promote(checkpoint)
        load.wait_for(4, told=FIRST)
    assert set(load.answers) == {(200, FIRST), (200, SECOND)} and not load.broken


def test_a_client_that_leaves_is_written_for_no_further(service, phantom, change, promote, checkpoint, tmp_path):
    """While another, who asked for as much at the same time, is still written for."""
    promote(write_endless(checkpoint, str(tmp_path / "endless")))
    change(checkpoint="registry://mu2llm@champion")
    wait_for(lambda: len(write(service, phantom, max_new_tokens=250)["report"]) > len(FIRST) + 20)
    writer = replica("ReportGenerator")
    with endless(service, phantom) as staying:
        with endless(service, phantom) as leaving:
            for lines in (staying, leaving):
                assert "event: token" in lines
            wait_for(lambda: at_work(writer) == 2, "the work on both")
        wait_for(lambda: at_work(writer) == 1, "the end of the work on one")
        assert next(line for line in staying if line.startswith("event: ")) == "event: token"
    wait_for(lambda: at_work(writer) == 0, "the end of all work")


@contextlib.contextmanager
def endless(url, scan):
    """The lines of a report that takes long to write; the client leaves with the block."""
    asked = {"files": {"scan": ("a.nii.gz", scan)}, "data": {"stream": "true", "max_new_tokens": str(ENDLESS)}}
    with httpx.stream("POST", f"{url}/v1/reports", **asked, verify=PLAIN, timeout=GUARD_S) as answer:
        yield answer.iter_lines()


ENDLESS = 4096  # tokens: the most that a request may ask for


def write_endless(checkpoint, uri):
    """The same checkpoint with an end of text that is never the likeliest token, and room for a long one."""
    shutil.copytree(checkpoint, uri)
    model, processor = load(uri)
    rows, end = model.get_output_embeddings().weight.data, processor.tokenizer.eos_token_id
    rows[end] = 0.99 * rows[processor.tokenizer.encode("The")[0]]
    model.save_pretrained(uri)
    processor.max_text_tokens = 2 * ENDLESS
    processor.save_pretrained(uri)
    return uri


def at_work(replica):
    """Calls that it is at, without those that only look at it."""
    return min(ray.get(replica.get_num_ongoing_requests.remote()) for _ in range(5))


def test_reports_go_on_while_the_scorer_is_down(client, service, phantom, change):
    change(judge=JudgeConfig(name="hf:/there/is/no/judge"))
    wait_for(lambda: judged_by(service) == "scorer_down")
    answer = client.post("/v1/green", json=PAIRS)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert client.post("/v1/reports", files={"scan": ("a.nii.gz", phantom)}).status_code == 200


def test_more_pairs_than_the_scorer_takes_on(service, settings, change, slow_judge):
    """It was said to be down when it was busy."""
    change(judge=JudgeConfig(name=f"openai:slow@{slow_judge}"))
    wait_for(lambda: judged_by(service).startswith("openai:slow"))
    most = settings.serving.scorer.max_ongoing_requests
    with ThreadPoolExecutor(most + 8) as pool:
        asked = [pool.submit(post, f"{service}/v1/green", json=PAIRS) for _ in range(most + 8)]
        answers = [each.result() for each in asked]
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429} and counts[200] >= most / 2, counts
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["code"] == "busy" and int(refused.headers["retry-after"]) >= 1


@pytest.fixture
def slow_judge():
    """The URL of a language model behind OpenAI's API that takes its time and finds nothing wrong."""
    text = write_answer(load_judge(JudgeConfig()).judge([(FIRST, FIRST)])[0])
    answer = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(0.05)
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()
