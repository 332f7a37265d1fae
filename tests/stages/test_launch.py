"""The runner's own bookkeeping, without Ray."""

import json
from types import SimpleNamespace

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from transformers import TrainerState

from mu2llm import config, storage, tracking
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint
from mu2llm.stages import launch, placement, trainer
from mu2llm.stages.job import Job, Watch
from mu2llm.stages.launch import KEPT_SNAPSHOT_FILE, SNAPSHOT_FILE
from mu2llm.stages.placement import workers_that_fit
from mu2llm.stages.worker import INTERMEDIATE_FILE, InProcessWorker, Resume, current_worker


def job(folder, *overrides):
    experiment = config.load("tiny", list(overrides)).model_dump(mode="json")
    return Job(
        **{"stage": "sft", "experiment": experiment, "data": "", "data_checksum": "", "out": str(folder / "out")},
        **{"spec_hash": "", "rows": 8},
    )


def test_a_list_of_checkpoints_that_was_half_written_is_put_back(tmp_path, caplog):
    stage = job(tmp_path)
    snapshot = storage.join(stage.state, SNAPSHOT_FILE)
    launch._mend_snapshot(stage)  # nothing there yet
    whole = json.dumps({"checkpoint_results": ["a"]}).encode()
    storage.write_bytes(snapshot, whole)
    launch._keep_snapshot(stage)
    storage.write_bytes(snapshot, whole[:9])
    launch._keep_snapshot(stage)  # a half is not kept
    launch._mend_snapshot(stage)
    assert storage.read_bytes(snapshot) == whole
    assert not caplog.records
    storage.delete(storage.join(stage.state, KEPT_SNAPSHOT_FILE))
    storage.write_bytes(snapshot, b"")
    launch._mend_snapshot(stage)
    assert not storage.exists(snapshot)
    assert "starts anew" in caplog.text


class Saving(InProcessWorker):
    """Where a worker stands that keeps the intermediate checkpoint it reports."""

    folder = None

    def report(self, metrics, folder=None, validate=None):
        self.folder = str(folder)

    def checkpoint(self):
        return self.folder


def test_every_intermediate_checkpoint_says_what_it_is_and_a_resume_goes_by_it(tmp_path):
    stage = job(tmp_path).model_copy(
        update={"data": "s3://b/shards", "data_checksum": "abc", "parent": "s3://b/vision", "git_commit": "c0ffee"}
    )
    before = Resume(step=2, seconds=100, cases_seen=8)
    state = TrainerState(global_step=5, is_world_process_zero=True, log_history=[{"loss": 0.5, "step": 5}])
    saving = Saving(told=print)
    token = current_worker.set(saving)
    try:
        arguments = SimpleNamespace(output_dir=str(tmp_path))
        trainer._Reports(stage, before, stream=None).on_save(arguments, state, control=None)
        resume = Resume.point()
    finally:
        current_worker.reset(token)
    rows = stage.settings.batch_size * stage.settings.accumulation
    assert (resume.step, resume.cases_seen) == (5, 8 + 3 * rows) and resume.seconds >= 100
    described = Checkpoint(uri=saving.folder, **storage.read_json(storage.join(saving.folder, INTERMEDIATE_FILE)))
    assert described.experiment == stage.experiment
    assert described.lineage.model_dump(include={"data", "data_checksum", "parent", "git_commit", "versions"}) == {
        **{"data": "s3://b/shards", "data_checksum": "abc", "parent": "s3://b/vision", "git_commit": "c0ffee"},
        "versions": tracking.versions(),
    }
    assert described.training.history == [{"loss": 0.5, "step": 5.0}]


def cluster(monkeypatch, *nodes, groups=(), limits=None):
    """A cluster of such nodes, which can grow by `groups` of (resources, most nodes)."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": each} for each in nodes])
    grown = [NodeGroupConfig(resources=resources, max_count=most) for resources, most in groups]
    given = ClusterConfig(node_group_configs=grown, max_resources=limits or {}) if grown else None
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: given)


@pytest.mark.parametrize(
    ("need", "fit"), [({"CPU": 8}, 0), ({"CPU": 3}, 8), ({"CPU": 0.5}, 64), ({"CPU": 1, "GPU": 1}, 0)]
)
def test_a_worker_fits_a_node_not_a_sum_of_nodes(monkeypatch, need, fit):
    cluster(monkeypatch, *[{"CPU": 4.0}] * 8)
    assert workers_that_fit(need) == fit


@pytest.mark.parametrize(
    ("groups", "limits", "fit"),
    [
        ([({"CPU": 8}, 3)], None, 3),
        ([({"CPU": 8, "GPU": 2}, 3), ({"CPU": 17}, 1)], None, 5),
        ([({"CPU": 8}, 30)], {"CPU": 20}, 2),
        ([({"CPU": 2}, 30)], None, 0),
    ],
)
def test_a_cluster_that_scales_itself_holds_what_it_can_grow_to(monkeypatch, groups, limits, fit):
    cluster(monkeypatch, {"CPU": 4.0}, groups=groups, limits=limits)
    assert workers_that_fit({"CPU": 8}) == fit


def test_workers_without_limit_where_a_group_has_none(monkeypatch):
    cluster(monkeypatch, {"CPU": 4.0}, groups=[({"CPU": 8}, -1)])
    assert workers_that_fit({"CPU": 8}) > 10**9


def test_workers_that_no_node_holds_are_refused_though_the_sum_would_do(monkeypatch, tmp_path):
    cluster(monkeypatch, *[{"CPU": 4.0}] * 8)
    wide = job(tmp_path, "sft.workers=4", "sft.cpus_per_worker=8")
    with pytest.raises(UserError, match=r"4 workers of 8 CPU: the cluster's nodes hold 0 of these"):
        placement.check(wide)
    placement.check(job(tmp_path, "sft.workers=4", "sft.cpus_per_worker=4"))


@pytest.mark.parametrize(
    ("overrides", "changes", "says"),
    [
        (["sft.workers=1"], {}, "there may be 1: ask for 2 or more"),
        (["sft.workers=[1,2]"], {}, "there may be 1"),
        (["sft.alignment=2"], {}, "sft.alignment"),
        (["contrastive.workers=2", "contrastive.fsdp=full_shard"], {"stage": "contrastive"}, "unset contrastive.fsdp"),
        (["model.tokenizer.temperature_mode=learned"], {}, "temperature_mode"),
        ([], {"watch": Watch()}, "sweeps have rank 0 write reports"),
    ],
)
def test_sharding_is_refused_where_it_cannot_be(monkeypatch, tmp_path, overrides, changes, says):
    cluster(monkeypatch, {"CPU": 4.0})
    sharded = ["sft.fsdp=full_shard", "sft.workers=2", "sft.alignment=0"]
    placement.check(job(tmp_path, *sharded))
    with pytest.raises(UserError, match=says):
        placement.check(job(tmp_path, *sharded, *overrides).model_copy(update=changes))
