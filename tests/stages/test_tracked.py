"""A stage's run in the tracking store: its lineage, and one run however often the stage is interrupted."""

import shutil

import pytest

from mu2llm import config, storage, tracking
from mu2llm.records import Checkpoint, Lineage
from mu2llm.stages import launch
from mu2llm.stages.job import Job


@pytest.fixture(autouse=True)
def store(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "runs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")


def test_a_stage_that_is_interrupted_goes_on_as_the_same_run_with_its_lineage(tmp_path):
    parent = str(tmp_path / "vision")
    made = Checkpoint(
        uri=parent, experiment={}, lineage=Lineage(stage="contrastive", spec_hash="123", run="vision-run")
    )
    storage.write_json(storage.join(parent, Checkpoint.FILE), made.model_dump(mode="json"))
    job = Job(
        stage="sft",
        experiment=config.load("tiny").model_dump(mode="json"),
        data="s3://b/shards",
        data_checksum="abc",
        out=str(tmp_path / "sft"),
        parent=parent,
        spec_hash="123",
        rows=8,
        judge="rules",
        git_commit="c0ffee",
    )
    first = launch._track(job)
    tracking.end_stage(first, {}, "KILLED")
    again = launch._track(job)
    tracking.end_stage(again, {"checkpoint": tracking.place(job.out)})
    assert first.key == again.key
    [run] = tracking.runs("sft")
    expected = {
        **{"data": "s3://b/shards", "data_checksum": "abc", "spec": "123", "judge": "rules", "commit": "c0ffee"},
        **{"parent": parent, "parent_run": "vision-run", "checkpoint": job.out},
    }
    assert run.tags.items() >= expected.items() and run.status == "FINISHED"
    assert run.parameters["sft.batch_size"] == str(job.settings.batch_size)
    assert [step.stage for step in tracking.lineage(job.out)] == ["sft", "contrastive"]
