"""What training waits for, measured: `python tests/benchmarks/bench_stages.py [--cases 96] [--steps 120]`.

The three stages at preset demo's sizes on Ray Train, shards and checkpoints in the embedded S3 server, a checkpoint
every `--save` steps: the share of the time after warm-up in which a worker waits for data, and for checkpoints to be
handed over; beside it the same with uploads that training waits for. DPO's pairs are references against corrupted
ones; what is made once before it trains (features, the reference's log-probabilities) is not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ray import cloudpickle

from mu2llm import cluster, config, storage
from mu2llm.cases import ingest, read_manifest
from mu2llm.ct import phantom
from mu2llm.stages import contrastive, dpo, preferences, sft

WARM_UP = 0.2  # share of the steps that are not counted
BUCKET = "s3://bench"


class Synchronous:
    """A stage's loop in which every checkpoint is uploaded before the next step."""

    def __init__(self, loop: Callable[..., None]) -> None:
        self.loop = loop

    def __call__(self, job: Any, resume: Any) -> None:
        import ray.train

        report = ray.train.report
        mode = ray.train.CheckpointUploadMode.SYNC
        ray.train.report = lambda metrics, **more: report(
            metrics, **({**more, "checkpoint_upload_mode": mode} if "checkpoint" in more else more)
        )
        self.loop(job, resume)


def measured(name: str, run: Callable[[Callable[[dict[str, float]], None]], Any]) -> None:
    """Runs a stage and prints its row: the differences between the last report and the first after warm-up."""
    told: list[dict[str, float]] = []
    run(lambda numbers: told.append(numbers) if "data_wait_share" in numbers else None)
    first = next(numbers for numbers in told if numbers["step"] >= WARM_UP * numbers["total"])
    last = told[-1]
    seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]

    def share(key: str) -> float:
        return (last[key] * last["seconds"] - first[key] * first["seconds"]) / seconds

    waits = f"{share('data_wait_share'):13.1%} {share('upload_wait_share'):17.1%}"
    print(f"{name:44s} {steps:6.0f} {seconds / steps:9.3f} {waits}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save", type=int, default=20)
    given = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory() as folder, storage.embedded_s3(f"{folder}/s3"), cluster.session():
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mu2llm.db"
        storage.resolve(BUCKET)[0].create_dir("bench")
        common = [f"{stage}.{key}" for stage in ("contrastive", "sft", "dpo") for key in (
            f"max_steps={given.steps}", f"save_steps={given.save}", "log_steps=4")]  # fmt: skip
        experiment = config.load("demo", common)
        scans, shards = f"{BUCKET}/scans", f"{BUCKET}/shards"
        manifest = phantom.write(scans, given.cases, seed=0)
        ingest(read_manifest(manifest, "jsonl", scans, experiment.data), shards, experiment)
        print(f"{given.cases} phantoms, a checkpoint every {given.save} steps, {os.cpu_count()} cores")
        print(f"{'':44s} {'steps':>6s} {'s a step':>9s} {'waits for data':>13s} {'waits for uploads':>17s}")
        trained, init = contrastive.loop, f"{BUCKET}/contrastive"
        measured("contrastive", lambda told: contrastive.run(shards, init, experiment, None, told))
        contrastive.loop = Synchronous(trained)  # type: ignore[assignment]
        measured(
            "contrastive, training waits for uploads",
            lambda told: contrastive.run(shards, f"{BUCKET}/contrastive-sync", experiment, None, told),
        )
        measured("sft, cached features", lambda told: sft.run(shards, f"{BUCKET}/sft", experiment, init, told))
        voxels = config.load("demo", [*common, "sft.cache_vision=false", "sft.max_steps=40"])
        measured("sft, from voxels", lambda told: sft.run(shards, f"{BUCKET}/sft-voxels", voxels, init, told))
        corrupted = ["preferences.negatives=corrupted", "preferences.candidates=2", "preferences.max_new_tokens=8"]
        pairs = f"{BUCKET}/pairs"
        preferences.prefer(f"{BUCKET}/sft", shards, pairs, config.load("demo", corrupted))
        measured("dpo, cached features", lambda told: dpo.run(pairs, f"{BUCKET}/dpo", experiment, None, told))
        voxels = config.load("demo", [*common, "dpo.freeze_vision=false", "dpo.max_steps=40"])
        measured("dpo, from voxels", lambda told: dpo.run(pairs, f"{BUCKET}/dpo-voxels", voxels, None, told))


if __name__ == "__main__":
    main()
