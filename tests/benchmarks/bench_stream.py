"""Scans a second that a worker gets of its stream: `python tests/benchmarks/bench_stream.py [--rows 64]`.

Rows of the paper's size, voxels (48 MiB) and cached features (3 MiB), shuffled, in a folder and in the embedded S3
server; so many workers on this node at once, each with its share of the global batch, which it throws away. The CPU of
a scan is that of all processes, Ray and the S3 server included. Beside it what an H100 takes by the FLOPs counted on
the model (`mu2llm capacity`): contrast and SFT from voxels, and SFT on the features of a frozen vision.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import cloudpickle

from mu2llm import cluster, config, storage
from mu2llm.cases import Stream
from mu2llm.cases.shards import Index, Shards, write_derived, write_file, write_index
from mu2llm.cluster.capacity import GPUS, UTILISATION, summary_of
from mu2llm.records import Case

FILE_ROWS = {"voxels": 16, "features": 64}
BATCH = {"voxels": 4, "features": 16}  # a worker
FEATURES = (8, 256, 768)
SECONDS = 30  # after the first batch, at most


def write_table(uri: str, column: str, count: int) -> None:
    """Rows of one column of tensors; of voxels two thirds are air, as in a scan."""
    experiment = config.load("paper")
    items = [Case(id=f"{n:05d}", patient=str(n), volume="", report="r" * 1400, split="train") for n in range(count)]
    parent = write_index(f"{uri}-cases", Index.of(experiment.data.spec, {"train": []}), items)
    shape, dtype = (experiment.data.spec.shape, "uint8") if column == "voxels" else (FEATURES, "float16")
    rng = np.random.default_rng(0)
    body = rng.integers(0, 255, shape, np.uint8) if dtype == "uint8" else rng.normal(size=shape).astype(dtype)
    if dtype == "uint8":
        body[..., : 2 * shape[-2] // 3, :] = 0
    files = [
        write_file(uri, f"train/{first:05d}.parquet", _rows(items[first : first + FILE_ROWS[column]], column, body))
        for first in range(0, count, FILE_ROWS[column])
    ]
    write_derived(uri, {"train": files}, parent)


def _rows(items: list[Case], column: str, body: np.ndarray) -> Iterator[dict[str, Any]]:
    for case in items:
        yield {"id": [case.id], "report": [case.report], "chunk_mask": np.ones((1, 8), bool), column: body[None]}


@ray.remote(num_cpus=0)
class Worker:
    """Takes its batches as fast as they come."""

    def __init__(self, uri: str, column: str, rank: int, world: int) -> None:
        shards = Shards.open(uri)
        columns = ["id", "report", "chunk_mask", column]
        batch, rows = world * BATCH[column], 1_000_000
        self.stream = Stream(shards, "train", columns, batch, seed=0, rank=rank, world=world, rows=rows)

    def take(self) -> tuple[float, int, float]:
        """Seconds to the first batch; rows and seconds after it."""
        asked, batches = time.perf_counter(), iter(self.stream)
        next(batches)
        first, started, rows = time.perf_counter() - asked, time.perf_counter(), 0
        while time.perf_counter() < started + SECONDS:
            rows += len(next(batches)["id"])
        return first, rows, time.perf_counter() - started


def measured(uri: str, column: str, world: int) -> str:
    workers = [Worker.remote(uri, column, rank, world) for rank in range(world)]  # type: ignore[attr-defined]
    ray.get([each.__ray_ready__.remote() for each in workers])
    before = cpu_seconds()
    taken = ray.get([each.take.remote() for each in workers])
    cpu = cpu_seconds() - before
    for each in workers:
        ray.kill(each)
    rates = [rows / seconds for _, rows, seconds in taken]
    all_rows = sum(rows for _, rows, _ in taken) + world * BATCH[column]
    return (
        f"{max(first for first, *_ in taken):>9.1f}{min(rates):>11.2f}{sum(rates):>9.2f}{1e3 * cpu / all_rows:>14.1f}"
    )


def cpu_seconds() -> float:
    """Of all processes below this one: Ray, its tasks, the workers, the S3 server."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def wanted() -> dict[str, float]:
    """Scans a second that an H100 takes at the paper's size, by FLOPs; a backward pass costs two forwards."""
    flops, gpu = summary_of(config.load("paper")).flops, GPUS[-1]
    vision, whole = flops["vision"], sum(flops.values())
    asked = {"contrast": 3 * vision, "SFT": 3 * whole, "SFT, frozen vision, cached": 3 * (whole - vision)}
    return {name: UTILISATION * gpu.tflops * 1e12 / each for name, each in asked.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    print("\nan H100 takes scans/s:", ", ".join(f"{name} {rate:.0f}" for name, rate in wanted().items()))
    with tempfile.TemporaryDirectory() as name, storage.embedded_s3(Path(name, "root")), cluster.session():
        for column in ("voxels", "features"):
            write_table(f"{name}/root/bench/{column}", column, given.rows)
        print(f"\n{given.rows} rows, {os.cpu_count()} cores")
        print(f"{'':<20}{'workers':>8}{'first s':>9}{'a worker/s':>11}{'node/s':>9}{'ms CPU a scan':>14}")
        for column in ("voxels", "features"):
            for where, root in (("folder", f"{name}/root"), ("S3", "s3:/")):
                for world in given.workers:
                    line = measured(f"{root}/bench/{column}", column, world)
                    print(f"{f'{column}, {where}':<20}{world:>8}{line}", flush=True)


if __name__ == "__main__":
    main()
