"""Batch generation, measured: `python tests/benchmarks/bench_generate.py [--cases 32] [--samples 8]` prints the table.

The published way against ours, with the same untrained model of preset demo, in one process, in the same run:
one case and one sample at a time, the scan encoded anew for each (METHOD.md §2.5), against batches in which each
scan is encoded once; and the audits' three variants in three passes against one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

from small_runs import case, write_checkpoint, write_shards

from mu2llm import config
from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows
from mu2llm.engine.generate import ring, runs
from mu2llm.engine.predictions import VARIANTS, Request
from mu2llm.engine.reading import CaseReader
from mu2llm.engine.sampling import Decoding
from mu2llm.engine.writer import Writer
from mu2llm.model import load
from mu2llm.settings.inference import InferenceConfig

QUESTION = "Write the radiology report of this CT scan."


def one_by_one(request: Request, shards: Shards) -> int:
    """`generate` a case and a sample at a time, from voxels; gives the number of reports."""
    model, processor = load(next(iter(request.checkpoints.values())))
    count, decoding = shards.count("test"), request.decoding
    rows = read_rows(shards.files("test"), shards.rows("test"), ["voxels", "chunk_mask"], np.arange(count))
    inputs = processor.encode([request.question])
    for voxels, mask in zip(rows["voxels"], rows["chunk_mask"], strict=True):
        scan = {"volumes": torch.tensor(voxels)[None], "chunk_mask": torch.tensor(mask)[None]}
        for _ in range(decoding.samples):
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
            model.generate(**scan, **inputs, **sampling, max_new_tokens=decoding.max_new_tokens)
    return count * decoding.samples


def batched(request: Request, shards: Shards) -> int:
    """What a reader and an actor do, without Ray between them."""
    cases = shards.cases("test")
    order = ring([each.patient for each in cases], 0)
    reader = CaseReader.of(shards, request.split, order)
    writer = Writer(request, {each.id: each.patient for each in cases})
    batches = runs(range(len(cases)), request.inference.batch_size)
    return sum(writer(reader({"first": np.array([first]), "end": np.array([end])})).num_rows for first, end in batches)


def passes(request: Request, shards: Shards) -> int:
    """One pass a variant."""
    return sum(batched(replace(request, variants=(variant,)), shards) for variant in request.variants)


def measured(name: str, work: Callable[[Request, Shards], int], request: Request, shards: Shards) -> tuple[str, float]:
    started = time.perf_counter()
    reports = work(request, shards)
    seconds = time.perf_counter() - started
    print(f"{name:58s} {reports:6d} {seconds:8.1f} {reports / seconds:10.1f}", flush=True)
    return name, reports / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    given = parser.parse_args()
    settings = config.load("demo")
    with tempfile.TemporaryDirectory() as folder:
        cases = [case(i) for i in range(given.cases)]
        shards = write_shards(f"{folder}/shards", cases, experiment=settings)
        checkpoint = write_checkpoint(f"{folder}/sft", 0, experiment=settings)
        threads = torch.get_num_threads()
        sampled = Decoding(given.tokens, given.samples, temperature=1.0, top_p=0.9)
        plain = Request(
            {"sft": checkpoint},
            shards.uri,
            "test",
            QUESTION,
            sampled,
            inference=InferenceConfig(batch_size=16, cpus_per_actor=threads),
        )
        print(f"{given.cases} cases, {given.tokens} tokens at most, {threads} threads")
        print(f"{'':58s} {'reports':>6s} {'seconds':>8s} {'reports/s':>10s}")
        _, slow = measured(f"{given.samples} samples, one case and sample at a time", one_by_one, plain, shards)
        _, fast = measured(f"{given.samples} samples, batches of 16 cases, scans encoded once", batched, plain, shards)
        print(f"{'':40s} {fast / slow:.1f} times as fast")
        audits = replace(plain, decoding=Decoding(given.tokens), variants=VARIANTS)
        _, slow = measured("as is, shuffled, zeroed: three passes", passes, audits, shards)
        _, fast = measured("as is, shuffled, zeroed: one pass", batched, audits, shards)
        print(f"{'':40s} {fast / slow:.1f} times as fast")


if __name__ == "__main__":
    main()
