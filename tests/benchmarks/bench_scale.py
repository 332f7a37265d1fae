"""The way of CT-RATE at its own count with tiny voxels: `python tests/benchmarks/bench_scale.py [--cases 500 5000]`.

A CT-RATE-shaped data set (two reconstructions a scan, reports of its length, its tables) in a bucket of the embedded S3
server, or in a folder (`--local`): ingest, ingest again, one epoch of voxels, the cache of features, one epoch of
those, prefer, evaluate, leaderboard, clean. Of each what the driver takes (seconds of CPU, memory at its peak), the
seconds to the first batch or shard, and the requests to storage a case, which a proxy before the server counts.

The model is a stub where it writes: it draws a report by the case's id. It encodes by the smallest of towers. The
judge is the rules. Each line is measured in a driver of its own, on one Ray for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle

from mu2llm import cases, cleaning, cluster, config, storage, tracking
from mu2llm.cases import Shards, Stream
from mu2llm.config import Experiment
from mu2llm.engine import generate
from mu2llm.engine.decoder import Text
from mu2llm.engine.features import cached_features, encode_scans
from mu2llm.engine.predictions import Prediction, Request
from mu2llm.engine.writer import Writer
from mu2llm.evaluation import leaderboard
from mu2llm.evaluation.evaluate import evaluate
from mu2llm.stages.preferences import prefer

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "cases"), str(TESTS / "engine")]

import ct_rate_shaped  # noqa: E402

BATCH = 32


class Stub(Writer):
    """Writes a report that the case's id and the sample's number decide."""

    def __init__(self, request: Request, patients: dict[str, str]) -> None:
        self.request, self.patients = request, patients

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        predictions: list[Prediction] = []
        for task in self._tasks(batch):
            name = batch["id"][task.case]
            keys = [f"{name} {task.variant} {sample}" for sample in range(self.request.decoding.samples)]
            drawn = [" ".join(ct_rate_shaped.report(key)) for key in keys]
            for run in self.request.checkpoints:
                predictions += self._predictions(run, task, [Text(each, 200, True) for each in drawn], batch)
        table = Prediction.table(predictions)
        return table.append_column("first", pa.array([int(batch["first"][0])] * len(table), pa.int64()))


def experiment() -> Experiment:
    from small_runs import least

    plain = least().model_dump(mode="json", exclude_defaults=True)
    plain["data"]["reconstructions"] = "all"
    plain["preferences"] = {"candidates": 4, "margin": 0.01}
    plain["evaluation"]["regions"] = False
    return config.validate(plain)


# ---- what is measured; each gives when the first of it was there, if there is such a moment


def ingest(root: str) -> float:
    started, first = time.perf_counter(), []
    settings = experiment()
    table = cases.read_manifest(f"{root}/tables", "ct-rate", f"{root}/dataset", settings.data)
    cases.ingest(table, f"{root}/shards", settings, lambda *_: first.append(time.perf_counter() - started))
    return first[0]


def ingest_again(root: str) -> float:
    return ingest(root)


def stream_voxels(root: str) -> float:
    return _epoch(f"{root}/shards", "voxels")


def encode(root: str) -> float:
    started, first = time.perf_counter(), []
    shards = Shards.open(f"{root}/shards")
    told = lambda *_: first.append(time.perf_counter() - started)  # noqa: E731
    encode_scans(f"{root}/sft", shards, experiment().evaluation, told)
    return first[0]


def stream_features(root: str) -> float:
    uri = cached_features([f"{root}/sft"], Shards.open(f"{root}/shards"))
    assert uri
    return _epoch(uri, "features")


def _epoch(uri: str, scan: str) -> float:
    started, first = time.perf_counter(), 0.0
    for batch in Stream(Shards.open(uri), "train", ["id", "report", "chunk_mask", scan], BATCH, seed=0):
        first = first or time.perf_counter() - started
        assert len(batch["id"])
    return first


def preferences(root: str) -> None:
    prefer(f"{root}/sft", f"{root}/shards", f"{root}/pairs", experiment())


def evaluation(root: str) -> None:
    evaluate(f"{root}/sft", f"{root}/shards", f"{root}/evaluation", experiment())


def board(root: str) -> None:
    assert leaderboard.markdown(leaderboard.tracked(tracking.tags("evaluate")))


def clean(root: str) -> None:
    cleaning.find(root, 0)


PARTS: dict[str, Callable[[str], float | None]] = {
    each.__name__: each
    for each in (ingest, ingest_again, stream_voxels, encode, stream_features, preferences, evaluation, board, clean)
}


def measured(part: str, root: str, address: str) -> dict[str, Any]:
    """One part in this process; `before_mib` is the memory of the process before it begins."""
    for module in (sys.modules[__name__], ct_rate_shaped):
        cloudpickle.register_pickle_by_value(module)
    generate.Writer = Stub  # type: ignore[misc]
    with cluster.session(address):
        before, cpu, started = _peak_mib(), time.process_time(), time.perf_counter()
        first = PARTS[part](root)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"first": first, "seconds": seconds, "cpu": cpu, "before_mib": before, "mib": _peak_mib()}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(part: str, root: str, address: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", part, root, address]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def bucket(folder: Path, local: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """The URI of the data set, and a counter of requests, which stays empty for a folder."""
    from faulty_s3 import faulty

    if local:
        yield str(folder / "scale"), {}
        return
    with storage.embedded_s3(folder) as endpoint, faulty(endpoint, 0) as done:
        yield "s3://scale", done


def report_scale(count: int, local: bool) -> None:
    from small_runs import write_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "root")
        ct_rate_shaped.write_data(folder / "scale", count)
        write_checkpoint(str(folder / "scale/sft"), 0, experiment=experiment())
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{name}/mu2llm.db"
        where = "a folder" if local else "the embedded S3 server"
        print(f"\n{count} volumes in {where}")
        print(f"{'':<18}{'first s':>9}{'s':>9}{'driver s':>10}{'ms a case':>11}{'MiB':>7}{'of it':>7}{'requests':>10}")
        with bucket(folder, local) as (root, done), cluster.session():
            address = ray.get_runtime_context().gcs_address
            for part in PARTS:
                before = sum(done.values())
                got = apart(part, root, address)
                first = "" if got["first"] is None else f"{got['first']:.1f}"
                requests = "" if local else f"{(sum(done.values()) - before) / count:.2f}"
                print(
                    f"{part:<18}{first:>9}{got['seconds']:>9.1f}{got['cpu']:>10.1f}{1e3 * got['cpu'] / count:>11.2f}"
                    f"{got['mib']:>7.0f}{got['mib'] - got['before_mib']:>7.0f}{requests:>10}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", default=[500, 5000])
    parser.add_argument(
        "--local", action="store_true", help="in a folder instead of the S3 server; no requests counted"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measured(given.part, *given.arguments)))
        return
    for count in given.cases:
        report_scale(count, given.local)


if __name__ == "__main__":
    main()
