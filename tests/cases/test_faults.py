"""S3 whose requests fail at random: nothing is lost, nothing is taken for a bad scan."""

import json
import os

import numpy as np
import pytest
import small_scans as scans
from faulty_s3 import faulty

from mu2llm import cases, storage
from mu2llm.cases.ingest import group_table, plan, write_shard
from mu2llm.cases.shards import read_rows, read_summary

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
        (text,) = write_shard(group_table(path, group), out, scans.SPEC, ())["summary"].to_pylist()
        summary = json.loads(text)
        assert "failed" not in summary and summary["rejected"] == []
        rows[path] = read_rows([f"{out}/{path}"], [summary["rows"]], ["id", "voxels"], np.arange(summary["rows"]))
    return rows


def test_with_a_tenth_of_the_requests_failing_nothing_is_lost(bucket):
    _, groups = plan_of(bucket)
    calm = write_all(groups, f"{bucket}/calm")
    with faulty(os.environ["AWS_ENDPOINT_URL"], 0.1, ("GET", "HEAD", "PUT", "POST")) as done:
        table, again = plan_of(bucket)
        stormy = write_all(again, f"{bucket}/stormy")
    assert done["refused"] + done["cut"] + done["half"] > 10
    assert len(table.cases) == COUNT and again == groups
    for path, rows in calm.items():
        assert rows["id"].tolist() == stormy[path]["id"].tolist()
        np.testing.assert_array_equal(rows["voxels"], stormy[path]["voxels"])
        first, second = (read_summary(f"{bucket}/{out}/{path}")["sha256"] for out in ("calm", "stormy"))
        assert first == second
    assert sum(len(rows["id"]) for rows in stormy.values()) == COUNT


def test_a_storage_that_only_fails_ends_in_a_failure_and_a_rerun_goes_on(bucket, monkeypatch):
    _, groups = plan_of(bucket)
    (path, group), *_ = groups.items()
    monkeypatch.setattr(storage, "SDK_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with faulty(os.environ["AWS_ENDPOINT_URL"], 1.0):
        (text,) = write_shard(group_table(path, group), f"{bucket}/out", scans.SPEC, ())["summary"].to_pylist()
    assert "storage failed 2 times" in json.loads(text)["failed"]
    assert storage.list_files(f"{bucket}/out") == []
    assert len(write_all({path: group}, f"{bucket}/out")[path]["id"]) == len(group)


def test_a_dicom_folder_on_s3_is_one_scan(bucket, shared, tmp_path):
    folder = shared / "data" / "ct" / "totalseg_dicom"
    storage.copy_folder(str(folder), f"{bucket}/series")
    row = {**scans.row(0), "volume": "series"}
    storage.write_bytes(f"{bucket}/one.jsonl", json.dumps(row).encode())
    experiment = scans.experiment()
    table = cases.read_manifest(f"{bucket}/one.jsonl", "jsonl", bucket, experiment.data)
    (rows,) = write_all(plan(table, experiment.data), f"{bucket}/out").values()
    assert rows["id"].tolist() == ["case-000"]
