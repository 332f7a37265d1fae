"""S3 whose requests fail at random: nothing is lost, nothing is taken for a bad scan."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import small_scans as scans
from faulty_s3 import faulty

from mu2llm import cases, storage
from mu2llm.cases.ingest import group_table, plan, write_shard
from mu2llm.cases.shards import read_rows, read_summary
from mu2llm.cluster import session

COUNT = 24


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BACK_OFF_S", 0.005)
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    scans.write(tmp_path / "s3" / "bucket" / "raw", COUNT)
    with storage.embedded_s3(tmp_path / "s3"):
        yield "s3://bucket"


def plan_of(root):
    experiment = scans.experiment()
    table = cases.read_manifest(f"{root}/raw/manifest.jsonl", "jsonl", f"{root}/raw", experiment.data)
    return table, plan(table, experiment.data)


def write_all(groups, out):
    """Every shard in this process; the rows of all of them."""
    rows = {}
    for path, group in groups.items():
        (text,) = write_shard(group_table(path, group), out, scans.experiment().data)["summary"].to_pylist()
        summary = json.loads(text)
        assert not {"failed", "failures"} & summary.keys() and summary["rejected"] == []
        rows[path] = read_rows([f"{out}/{path}"], [summary["rows"]], ["id", "voxels"], np.arange(summary["rows"]))
    return rows


@pytest.mark.slow
def test_with_a_tenth_of_the_requests_failing_nothing_is_lost(bucket):
    _, groups = plan_of(bucket)
    calm = write_all(groups, f"{bucket}/calm")
    with faulty(os.environ["AWS_ENDPOINT_URL"], 0.1, ("GET", "HEAD", "PUT", "POST")) as done:
        table, again = plan_of(bucket)
        stormy = write_all(again, f"{bucket}/stormy")
    assert min(done["refused"], done["cut"], done["half"]) > 0
    assert len(table.cases) == COUNT and again == groups
    for path, rows in calm.items():
        assert rows["id"].tolist() == stormy[path]["id"].tolist()
        np.testing.assert_array_equal(rows["voxels"], stormy[path]["voxels"])
        first, second = (read_summary(f"{bucket}/{out}/{path}")["sha256"] for out in ("calm", "stormy"))
        assert first == second
    assert sum(len(rows["id"]) for rows in stormy.values()) == COUNT


@pytest.mark.slow
def test_a_storage_that_only_fails_ends_in_a_failure_and_a_rerun_goes_on(bucket, monkeypatch):
    _, groups = plan_of(bucket)
    (path, group), *_ = groups.items()
    monkeypatch.setattr(storage, "SDK_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with faulty(os.environ["AWS_ENDPOINT_URL"], 1.0):
        (text,) = write_shard(group_table(path, group), f"{bucket}/out", scans.experiment().data)["summary"].to_pylist()
    # with no request answered nothing can be written either: that is no scan's failure
    assert "storage failed 2 times" in json.loads(text)["failed"]
    assert storage.list_files(f"{bucket}/out") == []
    assert len(write_all({path: group}, f"{bucket}/out")[path]["id"]) == len(group)


def test_a_dicom_folder_on_s3_is_one_scan(bucket, shared, tmp_path):
    folder = shared / "data" / "ct" / "totalseg_dicom"
    storage.copy(str(folder), f"{bucket}/series")
    row = {**scans.row(0), "volume": "series"}
    storage.write_bytes(f"{bucket}/one.jsonl", json.dumps(row).encode())
    experiment = scans.experiment()
    table = cases.read_manifest(f"{bucket}/one.jsonl", "jsonl", bucket, experiment.data)
    (rows,) = write_all(plan(table, experiment.data), f"{bucket}/out").values()
    assert rows["id"].tolist() == ["case-000"]


@pytest.mark.slow
def test_the_whole_way_from_s3_to_batches_with_a_tenth_of_the_requests_failing(bucket, tmp_path):
    """In a process and a Ray of its own, whose workers know the server by the environment."""
    result = json.loads(
        subprocess.run(
            [sys.executable, __file__, bucket], env=os.environ, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )
    assert result["written"] == COUNT and result["rejected"] == {} and result["faults"] > 0
    _, groups = plan_of(bucket)
    train = [case.id for path, group in groups.items() if path.startswith("train") for case in group]
    assert result["streamed"] == train
    volumes = {case.volume for case in cases.Shards.open(result["lasting"]).cases("train")}
    assert all(os.path.exists(volume) for volume in volumes)


def ingest_and_stream(bucket):
    """What the process of the test above does."""
    experiment = scans.experiment()
    with faulty(os.environ["AWS_ENDPOINT_URL"], 0.1, ("GET", "HEAD", "PUT", "POST")) as done, session(cpus=4):
        table = cases.read_manifest(f"{bucket}/raw/manifest.jsonl", "jsonl", f"{bucket}/raw", experiment.data)
        result = cases.ingest(table, f"{bucket}/out", experiment)
        shards = cases.Shards.open(f"{bucket}/out")
        stream = cases.Stream(shards, "train", ["id", "voxels"], 4, None)
        streamed = [name for batch in stream for name in batch["id"]]
    faults = done["refused"] + done["cut"] + done["half"]
    lasting = storage.lasting(f"{bucket}/out")
    print(json.dumps({**result, "streamed": streamed, "faults": faults, "lasting": lasting}))


if __name__ == "__main__":
    ingest_and_stream(sys.argv[1])
