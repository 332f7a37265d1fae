"""Streams inside Ray Train workers that hold every CPU of the cluster."""

import json

import numpy as np
import pytest
import ray
import ray.train
import small_scans as scans
from ray.train.torch import TorchTrainer

from mu2llm import cases
from mu2llm.cases.stream import Order

COUNT, BATCH, ROWS = 12, 4, 24


@pytest.mark.slow
def test_two_workers_that_hold_all_cpus_share_the_global_batches(ray_cluster, tmp_path):
    def loop(config):
        context = ray.train.get_context()
        stream = cases.Stream(
            cases.Shards.open(config["shards"]),
            "train",
            ["id", "x"],
            BATCH,
            seed=3,
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            rows=ROWS,
        )
        items = [batch["item"].tolist() for batch in stream]
        with open(f"{config['out']}/{context.get_world_rank()}.json", "w") as file:
            json.dump(items, file)

    items = [scans.case(number) for number in range(COUNT)]
    parent = scans.finished(str(tmp_path / "parent"), items)
    rows = {"id": [case.id for case in items], "x": np.arange(COUNT * 4, dtype=np.float32).reshape(COUNT, 4)}
    shards = scans.derived(str(tmp_path / "features"), parent, [rows])
    cpus = ray.cluster_resources()["CPU"]
    TorchTrainer(
        loop,
        train_loop_config={"shards": shards.uri, "out": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": cpus / 2}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "runs"), name="run"),
    ).fit()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    joined = [item for pair in zip(first, second, strict=True) for part in pair for item in part]
    assert joined == Order(COUNT, 3).items(np.arange(ROWS)).tolist()
