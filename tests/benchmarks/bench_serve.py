"""The service under load, on loopback: reports against one-by-one generation, what the Serve path costs, overload,
faults.

    python tests/benchmarks/bench_serve.py [--reports N] [--tokens N] [--checkpoint C] [--only load|faults]

Without a checkpoint, an untrained model of the demo's size writes `--tokens` tokens a report. Scans are phantoms, each
read, prepared and encoded anew every time (the cache of encodings is off), in both ways and on one torch thread.

Under faults 8 clients ask on and on: a row ends when `--reports` of them were answered with a report after the fault.
What broke or was refused is asked again. `jobs` were posted before the fault, and are done in the end or lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "serving"))

from small_service import free_port, wait_until_ready

from mu2llm import config
from mu2llm.artefacts import open_checkpoint, publish
from mu2llm.cluster import session
from mu2llm.ct import phantom
from mu2llm.engine.decoder import ContinuousDecoder, Prompt, write
from mu2llm.engine.sampling import Decoding
from mu2llm.model import build, load
from mu2llm.records import Checkpoint, Lineage
from mu2llm.serving.app import Settings
from mu2llm.serving.running import running
from mu2llm.settings.serving import ServingConfig

CLIENTS = (1, 8, 32)
SCANS = 8
QUEUE = 48
OVERLOAD_S = 10.0
PINGS = 300
CLIENTS_UNDER_FAULTS = 8
JOBS = 4
HUNG_S = 120.0  # without an answer
SLOW_UPLOADS = 10
ANNOUNCED = 2**30  # bytes of each slow upload
LEAVE = 100  # clients, ten at a time
ENDS = ("200", "429", "503", "broken", "hung")  # of a request


@dataclass(frozen=True)
class Measurement:
    """What is sent: `reports` a row, of `tokens` each."""

    scans: list[bytes]
    reports: int
    tokens: int


def untrained(folder: str) -> str:
    """A model of the demo's size whose text never ends by itself."""
    experiment = config.load("demo")
    texts = [phantom.make(1, index).report for index in range(40)]
    model, processor = build(experiment.model, experiment.data.spec, texts, seed=0)
    lineage = Lineage(stage="sft", spec_hash=experiment.data.spec.hash, identity="untrained")
    checkpoint = Checkpoint(uri=f"{folder}/untrained", experiment=experiment.model_dump(mode="json"), lineage=lineage)
    model.save_pretrained(f"{folder}/saved")
    processor.save_pretrained(f"{folder}/saved")
    publish(checkpoint, f"{folder}/saved")
    return checkpoint.uri


def one_by_one(checkpoint: str, asked: Measurement) -> list[float]:
    """Seconds of a quarter of the reports, made one after the other in this process."""
    torch.set_num_threads(1)
    model, processor = load(checkpoint)
    question = open_checkpoint(checkpoint).experiment["evaluation"]["question"]
    seconds = []
    for number in range(max(8, asked.reports // 4)):
        started = time.perf_counter()
        prepared = processor.prepare([asked.scans[number % len(asked.scans)]])
        with torch.inference_mode():
            features = model.encode_vision(prepared["volumes"], prepared["chunk_mask"])
        write(
            ContinuousDecoder(model, processor),
            features,
            prepared["chunk_mask"],
            [Prompt(question, "a", Decoding(asked.tokens))],
        )
        seconds.append(time.perf_counter() - started)
    return seconds


def post(client: httpx.Client, scan: bytes, tokens: int) -> tuple[int, float]:
    """Status and seconds of one request."""
    started = time.perf_counter()
    answer = client.post("/v1/reports", files={"scan": ("a.nii.gz", scan)}, data={"max_new_tokens": tokens})
    return answer.status_code, time.perf_counter() - started


def closed_loop(url: str, scans: list[bytes], reports: int, tokens: int, clients: int) -> tuple[list[float], float]:
    """`clients` that each ask again when they are answered: seconds of each report, and of all."""
    numbers, lock = iter(range(reports)), threading.Lock()
    seconds: list[float] = []

    def client() -> None:
        with httpx.Client(base_url=url, timeout=300) as made:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                status, took = post(made, scans[number % len(scans)], tokens)
                if status != 200:
                    raise RuntimeError(f"status {status} with {clients} clients")
                seconds.append(took)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for each in [pool.submit(client) for _ in range(clients)]:
            each.result()
    return seconds, time.perf_counter() - started


def overload(url: str, scans: list[bytes], tokens: int, rate: float) -> list[tuple[int, float]]:
    """Requests at a rate, whether they are answered or not: status and seconds of each."""
    number = int(rate * OVERLOAD_S)
    limits = httpx.Limits(max_connections=500)
    with httpx.Client(base_url=url, timeout=300, limits=limits) as client, ThreadPoolExecutor(200) as pool:
        started, futures = time.perf_counter(), []
        for index in range(number):
            time.sleep(max(0.0, started + index / rate - time.perf_counter()))
            futures.append(pool.submit(post, client, scans[index % len(scans)], tokens))
        return [future.result() for future in futures]


def pings(url: str) -> list[float]:
    """Seconds of requests that do nothing, through the whole path."""
    seconds = []
    with httpx.Client(base_url=url) as client:
        for _ in range(PINGS):
            started = time.perf_counter()
            client.get("/healthz").raise_for_status()
            seconds.append(time.perf_counter() - started)
    return seconds


# ---- under faults


def outcome(client: httpx.Client, scan: bytes, tokens: int) -> tuple[str, float]:
    """How one request ended, and after how many seconds."""
    started = time.perf_counter()
    try:
        answer = client.post("/v1/reports", files={"scan": ("a.nii.gz", scan)}, data={"max_new_tokens": tokens})
        told = str(answer.status_code)
        if answer.status_code in (429, 503) and "retry-after" not in answer.headers:
            told += " without Retry-After"
        if answer.status_code == 500 and "json" not in answer.headers.get("content-type", ""):
            told = "broken"  # Ray's proxy tells so that the ingress died
    except httpx.TimeoutException:
        told = "hung"
    except httpx.TransportError:
        told = "broken"
    return told, time.perf_counter() - started


class Load:
    """Clients that ask over and over while the block lasts; `ended` is how and after how long each request ended."""

    def __init__(self, url: str, scans: list[bytes], tokens: int) -> None:
        self.url, self.scans, self.tokens = url, scans, tokens
        self.ended: list[tuple[str, float]] = []
        self.over = threading.Event()
        self.clients = [threading.Thread(target=self._ask, args=[n]) for n in range(CLIENTS_UNDER_FAULTS)]

    def __enter__(self) -> Load:
        for each in self.clients:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for each in self.clients:
            each.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=HUNG_S) as client:
            while not self.over.is_set():
                told, seconds = outcome(client, self.scans[number % len(self.scans)], self.tokens)
                self.ended.append((told, seconds))
                if told != "200":
                    time.sleep(0.5)

    def wait_for(self, more: int) -> None:
        """Until so many further reports have come."""
        wanted = self.reports + more
        deadline = time.monotonic() + 10 * HUNG_S
        while self.reports < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.reports} of {wanted} reports came: {Counter(told for told, _ in self.ended)}"
                )
            time.sleep(0.05)

    @property
    def reports(self) -> int:
        return sum(told == "200" for told, _ in self.ended)


@contextlib.contextmanager
def killed(deployment: str) -> Iterator[Counter[str]]:
    """One replica of it dies."""
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    name = next(name for name in names if name.startswith(f"SERVE_REPLICA::mu2llm#{deployment}#"))
    ray.kill(ray.get_actor(name, namespace="serve"))
    yield Counter()


@contextlib.contextmanager
def slow_uploads(url: str) -> Iterator[Counter[str]]:
    """Clients that announce a large body and send five bytes of it; what each was told."""
    place = urlsplit(url)
    head = (
        f"POST /v1/reports HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: {ANNOUNCED}\r\n\r\n--x\r\n"
    )
    with contextlib.ExitStack() as held:
        sockets = []
        for _ in range(SLOW_UPLOADS):
            sockets.append(held.enter_context(socket.create_connection((place.hostname, place.port))))
            sockets[-1].sendall(head.encode())
        told: Counter[str] = Counter()
        yield told
        for each in sockets:
            each.settimeout(HUNG_S)
            with contextlib.suppress(TimeoutError):
                told[each.recv(1024).decode().partition(" ")[2][:3] or "broken"] += 1
        told["hung"] = SLOW_UPLOADS - told.total()


@contextlib.contextmanager
def clients_that_leave(url: str, scans: list[bytes]) -> Iterator[Counter[str]]:
    """Each begins a stream and is gone with its first bytes; what each was told at first."""

    def leave(number: int) -> str:
        form = {"files": {"scan": ("a.nii.gz", scans[number % len(scans)])}, "data": {"stream": "true"}}
        with (
            httpx.Client(base_url=url, timeout=HUNG_S) as client,
            client.stream("POST", "/v1/reports", **form) as answer,
        ):
            next(answer.iter_bytes(), b"")
            return str(answer.status_code)

    with ThreadPoolExecutor(10) as pool:
        yield Counter(pool.map(leave, range(LEAVE)))


Fault = Callable[[], contextlib.AbstractContextManager[Counter[str]]]


def under(fault: Fault, load: Load, reports: int) -> list[str]:
    """The cells of a row: how requests ended from the moment of the fault on, seconds, jobs that were done."""
    with httpx.Client(base_url=load.url, timeout=HUNG_S) as client, load:
        load.wait_for(CLIENTS_UNDER_FAULTS)
        files = {"scan": ("a.nii.gz", load.scans[0])}
        posted = [client.post("/v1/jobs", files=files).raise_for_status().json()["id"] for _ in range(JOBS)]
        before = len(load.ended)
        with fault() as own:
            load.wait_for(reports)
    wait_until_ready(load.url)
    with httpx.Client(base_url=load.url, timeout=HUNG_S) as client:
        done = sum(finished(client, job) for job in posted)
    ended = load.ended[before:]
    counts = Counter(told for told, _ in ended)
    others = listed(Counter({told: n for told, n in counts.items() if told not in ENDS}))
    seconds = [took for told, took in ended if told == "200"]
    times = [f"{statistics.median(seconds):.2f}", f"{percentile(seconds, 0.99):.2f}"]
    return [*(str(counts[each]) for each in ENDS), others, *times, f"{done} of {JOBS}", listed(own)]


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} × {told}" for told, number in counts.items() if number)


def finished(client: httpx.Client, job: str) -> bool:
    """Whether a job comes to its report."""
    deadline = time.monotonic() + HUNG_S
    while time.monotonic() < deadline:
        told = client.get(f"/v1/jobs/{job}").raise_for_status().json()
        if told["status"] in ("done", "failed"):
            return bool(told["status"] == "done")
        time.sleep(0.2)
    return False


def faults(url: str, asked: Measurement) -> Table:
    """Of 8 clients, one row a fault."""
    table = Table("", *ENDS, "others", "p50 s", "p99 s", "jobs done", "the fault's own clients")
    rows: dict[str, Fault] = {
        "no fault": lambda: contextlib.nullcontext(Counter()),
        "a reader killed": lambda: killed("VolumeReader"),
        "a generator killed": lambda: killed("ReportGenerator"),
        "the ingress killed": lambda: killed("Ingress"),
        f"{SLOW_UPLOADS} slow uploads": lambda: slow_uploads(url),
        f"{LEAVE} clients that leave": lambda: clients_that_leave(url, asked.scans),
    }
    for name, fault in rows.items():
        table.add_row(name, *under(fault, Load(url, asked.scans, asked.tokens), asked.reports))
    return table


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(table: Table, name: str, seconds: list[float], whole: float, baseline: float | None) -> float:
    rate = len(seconds) / whole
    cells = [name, str(len(seconds)), f"{statistics.median(seconds):.2f}", f"{percentile(seconds, 0.99):.2f}"]
    table.add_row(*cells, f"{rate:.2f}", f"{rate / baseline:.1f}×" if baseline else "")
    return rate


def load_table(url: str, alone: list[float], asked: Measurement, console: Console) -> None:
    """Seconds and reports/s of 1, 8 and 32 clients, of requests that do nothing, and what overload is told."""
    table = Table("", "reports", "p50 s", "p99 s", "reports/s", "against one by one")
    baseline = row(table, "one by one", alone, sum(alone), None)
    rates = [
        row(table, f"{n} clients", *closed_loop(url, asked.scans, asked.reports, asked.tokens, n), baseline)
        for n in CLIENTS
    ]
    idle = pings(url)
    answers = overload(url, asked.scans, asked.tokens, 2 * max(rates))
    console.print(table)
    console.print(
        f"a request that does nothing: p50 {1000 * statistics.median(idle):.1f} ms, p99 "
        f"{1000 * percentile(idle, 0.99):.1f} ms"
    )
    counts = Counter(status for status, _ in answers)
    refused = [took for status, took in answers if status == 429]
    told = "" if not refused else f"; a 429 comes after p50 {1000 * statistics.median(refused):.0f} ms"
    told += "" if not refused else f", p99 {1000 * percentile(refused, 0.99):.0f} ms"
    console.print(f"at twice the capacity ({2 * max(rates):.1f} requests/s): {dict(counts)}{told}")


# ---- where the time goes

PARTS = {
    "VolumeReader": "reader",
    "serving.child": "decoding of scans (the readers' children)",
    "ReportGenerator": "generator",
    "Ingress": "ingress",
    "GreenScorer": "scorer",
    "Proxy": "Ray's proxy",
    "ServeController": "Ray's controller",
    "raylet": "Ray's own processes",
    "gcs_server": "Ray's own processes",
    "ray": "Ray's own processes",
}


def cpu_seconds() -> Counter[str]:
    """Of this process (the clients) and of all below it, by what they are for."""
    total: Counter[str] = Counter()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            own = process.pid == os.getpid()
            part = "clients" if own else next((part for word, part in PARTS.items() if word in words), "others")
            total[part] += sum(process.cpu_times()[:2])
    return total


def cpu_table(url: str, asked: Measurement) -> Table:
    """Milliseconds of CPU a report with 8 clients, by process."""
    before = cpu_seconds()
    seconds, whole = closed_loop(url, asked.scans, asked.reports, asked.tokens, 8)
    spent = cpu_seconds()
    table = Table(f"8 clients, {len(seconds)} reports, {len(seconds) / whole:.1f} a second", "ms of CPU a report")
    for part in sorted(spent, key=lambda part: before[part] - spent[part]):
        table.add_row(part, f"{1000 * (spent[part] - before[part]) / len(seconds):.1f}")
    table.add_row("all", f"{1000 * (spent.total() - before.total()) / len(seconds):.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=96, help="reports in each row")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a report")
    parser.add_argument("--checkpoint")
    parser.add_argument("--only", choices=("load", "cpu", "faults"), help="one of the tables")
    options = parser.parse_args()
    scans, console = [phantom.make(5, index).nifti() for index in range(SCANS)], Console(width=150)
    asked = Measurement(scans, options.reports, options.tokens)
    with tempfile.TemporaryDirectory() as folder, session():
        checkpoint = options.checkpoint or untrained(folder)
        alone = one_by_one(checkpoint, asked) if options.only in (None, "load") else []
        serving = ServingConfig(
            state=f"{folder}/state", cached_scans=0, max_queued_requests=QUEUE, authentication="off"
        )
        settings = Settings(checkpoint=checkpoint, tracking="sqlite://", loopback=True, serving=serving)
        with running(settings, "127.0.0.1", free_port()) as url:
            wait_until_ready(url)
            closed_loop(url, scans, 8, options.tokens, 8)
            if options.only in (None, "load"):
                load_table(url, alone, asked, console)
            if options.only in (None, "cpu"):
                console.print(cpu_table(url, asked))
            if options.only in (None, "faults"):
                console.print(faults(url, asked))


if __name__ == "__main__":
    main()
