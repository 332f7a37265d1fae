"""Ingest and streams, measured: `python tests/benchmarks/bench_ingest.py [--cases 1000]` prints the tables.

Ingest: cases a second against what one core decodes times the cores; peak memory at a tenth of the cases and at all of
them; the same from S3 with a tenth of the requests failing. Streams: the consumer's wait a step on small rows (cached
vision features), against Ray Data's own `read_parquet` with a local shuffle buffer.

Each line is measured in a process of its own, with a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mu2llm import cases, cluster, config, ct, storage
from mu2llm.cases.shards import Index, write_derived, write_file, write_index
from mu2llm.ct import phantom
from mu2llm.memory import PeakMemory
from mu2llm.records import Case

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cases"))

DISTINCT = 100  # phantoms; more cases are these again under other ids
ROWS, ROW_BYTES, BATCH, STEPS, STEP_S = 640, 48 * 1024, 32, 400, 0.02


def make_scans(folder: str) -> None:
    """Phantoms, once."""
    phantom.write(folder, DISTINCT, seed=0)


def write_manifest(folder: str, count: int) -> str:
    """A manifest of `count` cases over the phantoms."""
    lines = Path(folder, "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    path = Path(folder, f"manifest-{count}.jsonl")
    repeated = ({**rows[n % DISTINCT], "id": f"case-{n:05d}", "patient": f"patient-{n:05d}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in repeated))
    return path.name


def decode(folder: str) -> dict[str, Any]:
    """What one core decodes and preprocesses: the limit."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spec = config.load("demo").data.spec
    paths = sorted(Path(folder, "volumes").iterdir())
    ct.prepare(ct.read(paths[0]), spec)
    started = time.perf_counter()
    for path in paths:
        ct.prepare(ct.read(path), spec)
    return {"cases": len(paths), "seconds": time.perf_counter() - started}


def ingest(folder: str, manifest: str, out: str) -> dict[str, Any]:
    """Ingest with Ray started beforehand; `first_s` is when the first shard was there."""
    experiment = config.load("demo")
    first: list[float] = []
    with PeakMemory() as memory, cluster.session():
        table = cases.read_manifest(storage.join(folder, manifest), "jsonl", folder, experiment.data)
        started = time.perf_counter()
        result = cases.ingest(table, out, experiment, lambda *_: first.append(time.perf_counter() - started))
    return {**result, "first_s": first[0], "gib": memory.gib}


def ingest_s3(folder: str, manifest: str, out: str) -> dict[str, Any]:
    """The same from and to the embedded S3 server, through a proxy that lets a tenth of the requests fail."""
    from faulty_s3 import faulty

    root = Path(folder).parent
    Path(out).mkdir()  # the bucket
    with (
        storage.embedded_s3(root) as endpoint,
        faulty(endpoint, 0.1, ("GET", "HEAD", "PUT", "POST")) as done,
    ):
        result = ingest(f"s3://{Path(folder).name}", manifest, f"s3://{Path(out).name}")
        return {**result, "faults": sum(count for what, count in done.items() if what != "passed")}


def make_features(folder: str) -> None:
    """A table of small rows, like cached vision features."""
    rng = np.random.default_rng(0)
    spec = config.load("demo").data.spec
    items = [Case(id=f"case-{n}", patient=str(n), volume="", report="r" * 500, split="train") for n in range(ROWS)]
    parent = write_index(f"{folder}/parent", Index.of(spec, {"train": []}), items)
    rows = rng.integers(0, 255, (ROWS, ROW_BYTES // 2)).astype(np.float16)
    batches = (
        {
            "id": [c.id for c in items[a : a + BATCH]],
            "report": [c.report for c in items[a : a + BATCH]],
            "x": rows[a : a + BATCH],
        }
        for a in range(0, ROWS, BATCH)
    )
    write_derived(
        f"{folder}/features", {"train": [write_file(f"{folder}/features", "train/0.parquet", batches)]}, parent
    )


def stream(folder: str) -> dict[str, Any]:
    """Waits of a consumer that takes STEP_S a step, over many epochs of one execution."""
    with cluster.session():
        shards = cases.Shards.open(f"{folder}/features")
        return _waits(iter(cases.Stream(shards, "train", ["id", "report", "x"], BATCH, seed=0, rows=STEPS * BATCH)))


def stream_baseline(folder: str) -> dict[str, Any]:
    """Ray Data's own way: a Parquet dataset with a shuffle buffer, begun anew each epoch."""
    import ray.data

    with cluster.session():
        dataset = ray.data.read_parquet(f"{folder}/features/train")

        def epochs() -> Any:
            for epoch in range(STEPS * BATCH // ROWS):
                for batch in dataset.iter_batches(
                    batch_size=BATCH, local_shuffle_buffer_size=ROWS // 2, local_shuffle_seed=epoch
                ):
                    yield {"x": np.stack([np.frombuffer(row, np.float16) for row in batch["x"]])}

        return _waits(epochs())


def _waits(batches: Any) -> dict[str, Any]:
    waits, started = [], time.perf_counter()
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - asked)
        time.sleep(STEP_S)
    rest = sorted(waits[1:])
    return {
        "first_s": waits[0],
        "mean_ms": 1e3 * statistics.fmean(rest),
        "p99_ms": 1e3 * rest[int(0.99 * len(rest))],
        "steps_per_s": len(waits) / (time.perf_counter() - started),
    }


def apart(part: str, *arguments: str) -> dict[str, Any]:
    """Runs a function of this file in a process of its own."""
    command = [sys.executable, __file__, "--part", part, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report_ingest(folder: str, count: int) -> None:
    make_scans(f"{folder}/scans")
    cores = os.cpu_count() or 1
    one = apart("decode", f"{folder}/scans")
    limit = cores * one["cases"] / one["seconds"]
    print(f"\none core decodes {limit / cores:.0f} cases/s; {cores} cores: limit {limit:.0f} cases/s\n")
    print(f"{'ingest':<24}{'cases':>7}{'lost':>6}{'s':>8}{'first':>8}{'cases/s':>9}{'of limit':>10}{'peak GiB':>10}")
    few = max(1, count // 10)
    for name, part, cases_ in (
        ("local", "ingest", few),
        ("local", "ingest", count),
        ("S3, 10 % fail", "ingest_s3", few),
    ):
        manifest = write_manifest(f"{folder}/scans", cases_)
        got = apart(part, f"{folder}/scans", manifest, f"{folder}/{part}-{cases_}")
        rate = got["written"] / got["seconds"]
        print(
            f"{name:<24}{got['cases']:>7}{got['cases'] - got['written']:>6}{got['seconds']:>8.1f}{got['first_s']:>8.1f}"
            f"{rate:>9.0f}{rate / limit:>10.0%}{got['gib']:>10.2f}"
            + (f"  ({got['faults']} faults)" if "faults" in got else "")
        )


def report_stream(folder: str) -> None:
    make_features(folder)
    print(f"\nwaits a step, batches of {BATCH} rows of {ROW_BYTES >> 10} KiB, {STEP_S * 1e3:.0f} ms of work a step")
    print(f"{'stream':<24}{'first s':>9}{'mean ms':>9}{'p99 ms':>9}{'steps/s':>9}")
    for name, part in (("mu2llm.cases.Stream", "stream"), ("read_parquet, shuffled", "stream_baseline")):
        got = apart(part, folder)
        print(f"{name:<24}{got['first_s']:>9.2f}{got['mean_ms']:>9.2f}{got['p99_ms']:>9.1f}{got['steps_per_s']:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        parts = {each.__name__: each for each in (decode, ingest, ingest_s3, stream, stream_baseline)}
        print(json.dumps(parts[given.part](*given.arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report_stream(folder)
        report_ingest(folder, given.cases)


if __name__ == "__main__":
    main()
