"""The service under load, on loopback: reports against one-by-one generation, what the Serve path costs, overload.

    python tests/benchmarks/bench_serve.py [--reports N] [--tokens N] [--checkpoint C]

Without a checkpoint, an untrained model of the demo's size writes `--tokens` tokens a report. Scans are phantoms, each
read, prepared and encoded anew every time (the cache of encodings is off), in both ways and on one torch thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
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


def one_by_one(checkpoint: str, scans: list[bytes], reports: int, tokens: int) -> list[float]:
    """Seconds of each report, made one after the other in this process."""
    torch.set_num_threads(1)
    model, processor = load(checkpoint)
    question = open_checkpoint(checkpoint).experiment["evaluation"]["question"]
    seconds = []
    for number in range(reports):
        started = time.perf_counter()
        prepared = processor.prepare([scans[number % len(scans)]])
        with torch.inference_mode():
            features = model.encode_vision(prepared["volumes"], prepared["chunk_mask"])
        write(
            ContinuousDecoder(model, processor),
            features,
            prepared["chunk_mask"],
            [Prompt(question, "a", Decoding(tokens))],
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


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(table: Table, name: str, seconds: list[float], whole: float, baseline: float | None) -> float:
    rate = len(seconds) / whole
    cells = [name, str(len(seconds)), f"{statistics.median(seconds):.2f}", f"{percentile(seconds, 0.99):.2f}"]
    table.add_row(*cells, f"{rate:.2f}", f"{rate / baseline:.1f}×" if baseline else "")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=96, help="reports in each row")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a report")
    parser.add_argument("--checkpoint")
    options = parser.parse_args()
    scans = [phantom.make(5, index).nifti() for index in range(SCANS)]
    console, table = Console(), Table("", "reports", "p50 s", "p99 s", "reports/s", "against one by one")
    with tempfile.TemporaryDirectory() as folder, session():
        checkpoint = options.checkpoint or untrained(folder)
        alone = one_by_one(checkpoint, scans, max(8, options.reports // 4), options.tokens)
        baseline = row(table, "one by one", alone, sum(alone), None)
        serving = ServingConfig(
            state=f"{folder}/state", cached_scans=0, max_queued_requests=QUEUE, authentication="off"
        )
        settings = Settings(checkpoint=checkpoint, tracking="sqlite://", loopback=True, serving=serving)
        with running(settings, "127.0.0.1", free_port()) as url:
            wait_until_ready(url)
            closed_loop(url, scans, 8, options.tokens, 8)
            rates = [
                row(table, f"{n} clients", *closed_loop(url, scans, options.reports, options.tokens, n), baseline)
                for n in CLIENTS
            ]
            idle = pings(url)
            answers = overload(url, scans, options.tokens, 2 * max(rates))
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


if __name__ == "__main__":
    main()
