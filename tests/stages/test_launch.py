"""Placing, launching and resuming a stage: the bookkeeping, without Ray."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import saved
import torch
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from transformers import TrainerState

from mu2llm import artefacts, config, private_apis, storage, tracking
from mu2llm.errors import UserError
from mu2llm.records import Checkpoint, Lineage
from mu2llm.stages import launch, placement, trainer
from mu2llm.stages.job import FINISHED_FILE, Job, Watch, check_parent, check_tokenizer
from mu2llm.stages.launch import KEPT_SNAPSHOT_FILE, SNAPSHOT_FILE
from mu2llm.stages.placement import workers_that_fit
from mu2llm.stages.worker import (
    INTERMEDIATE_FILE,
    WARNINGS,
    InProcessWorker,
    Resume,
    Warnings,
    current_worker,
    work,
)


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


def test_what_workers_warn_of_is_told_by_the_driver_once(tmp_path, caplog):
    stage, numbers, path = job(tmp_path), [], tmp_path / "progress.jsonl"
    warned = Warnings()
    with warned.collected():
        logging.getLogger("mu2llm.stages.sft").warning("%d reports were cut", 3)
        logging.getLogger("mu2llm.stages.sft").info("not told")
        logging.getLogger("another").warning("not ours")
    caplog.clear()
    reporter = launch._Reporter(str(path), SimpleNamespace(log=lambda *_, **__: None, key="key"), stage)
    with launch._relay(path, 8, numbers.append):
        texts = warned.take()
        reporter.after_report(None, [{"step": 1, WARNINGS: texts}, {WARNINGS: [*texts, "of rank 1"]}], None)
    assert [record.getMessage() for record in caplog.records] == ["3 reports were cut", "of rank 1"]
    assert numbers == [{"step": 1, "total": 8}]
    assert not warned.take()


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
        trainer._Reports(stage, before, SimpleNamespace(prompt_hash="")).on_save(arguments, state, control=None)
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


def cluster(monkeypatch, *nodes, groups=(), limits=None, scales_itself=False):
    """A cluster of such nodes, which can grow by `groups` of (resources, most nodes)."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": each} for each in nodes])
    grown = [NodeGroupConfig(resources=resources, max_count=most) for resources, most in groups]
    given = ClusterConfig(node_group_configs=grown, max_resources=limits or {}) if grown else None
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: given)
    monkeypatch.setattr(private_apis, "scales_itself", lambda: scales_itself)


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


def test_a_cluster_that_grows_to_what_it_does_not_tell_is_asked_and_waited_for(monkeypatch, tmp_path, caplog):
    cluster(monkeypatch, {"memory": 2e9}, scales_itself=True)
    placement.check(job(tmp_path, "sft.workers=4", "sft.cpus_per_worker=4"))
    assert "4 workers of 4 CPU wait until the cluster has grown: its nodes hold 0 now" in caplog.text


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
        (["contrastive.workers=2", "contrastive.fsdp=full_shard"], {"stage": "contrastive"}, "unset contrastive.fsdp"),
        (["model.tokenizer.temperature_mode=learned"], {}, "temperature_mode"),
        ([], {"watch": Watch()}, "sweeps have rank 0 write reports"),
    ],
)
def test_sharding_is_refused_where_it_cannot_be(monkeypatch, tmp_path, overrides, changes, says):
    cluster(monkeypatch, {"CPU": 4.0})
    sharded = ["sft.fsdp=full_shard", "sft.workers=2"]
    placement.check(job(tmp_path, *sharded))
    with pytest.raises(UserError, match=says):
        placement.check(job(tmp_path, *sharded, *overrides).model_copy(update=changes))


def inputs(*overrides, stage="sft", **changes):
    """What decides such a job."""
    made = Job(
        **{"stage": stage, "experiment": config.load("tiny", list(overrides)).model_dump(mode="json"), "data": ""},
        **{"data_checksum": "scans", "out": "", "spec_hash": "", "rows": 8, **changes},
    )
    return made.identity.inputs


def test_how_work_is_done_decides_nothing():
    same = ["sft.log_steps=7", "sft.workers=2", "sft.keep_checkpoints=3", "sft.validation.steps=4"]
    assert (
        inputs(*same) == inputs("name=other", "dpo.beta=0.3", "evaluation.pages=3", "judge.concurrency=1") == inputs()
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sft.learning_rate=0.5", "sft.learning_rate"),
        ("model.tokenizer.top_k=4", "model.tokenizer.top_k"),
        ("seed=3", "seed"),
        ("data.fraction=0.5", "data.fraction"),
        ("data.shuffle_rows=4", "data.shuffle_rows"),
        ("evaluation.question=What is there?", "evaluation.question"),
    ],
)
def test_what_changes_the_result_decides_it(override, key):
    changed, before = inputs(override), inputs()
    assert {name for name in {**changed, **before} if changed.get(name) != before.get(name)} == {key}


def test_scans_and_the_weights_it_starts_from_decide_a_stage():
    assert inputs(data_checksum="more scans") != inputs() != inputs(parent_weights="trained again")


def test_the_language_model_decides_nothing_of_the_contrastive_stage():
    assert inputs("model.tokenizer.top_k=4", "model.lora={}", stage="contrastive") == inputs(stage="contrastive")
    assert inputs("model.vision.hidden_size=64", stage="contrastive") != inputs(stage="contrastive")


def test_validation_decides_where_the_best_checkpoint_is_published():
    best = ["sft.validation.publish=best", "sft.validation.steps=4"]
    assert inputs(*best) != inputs(*best, "sft.validation.cases=9") != inputs()
    assert inputs(*best) == inputs(*best, "sft.validation.reports=2")


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "runs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setattr(launch, "check", lambda stage: None)


def trained(folder, rate, *settings, fresh=False, interrupted=False):
    """SFT with a learning rate in this process; it learns nothing but the rate."""
    stage = job(folder, "sft.workers=0", f"sft.learning_rate={rate}", *settings).model_copy(update={"fresh": fresh})

    def loop(told, resume):
        storage.write_bytes(storage.join(told.state, "half"), b"a day of work")
        if interrupted:
            raise KeyboardInterrupt
        saved.weights(folder / "local", rate)
        weights = artefacts.upload(str(folder / "local"), told.out)
        state = TrainerState(global_step=1, log_history=[])
        described = trainer.description(told, {"step": 1, "seconds": 1, "cases_seen": 8}, 0, state, {}, "")
        described = artefacts.weighed(described, weights)
        storage.write_json(storage.join(told.state, FINISHED_FILE), described.model_dump(mode="json"))

    return launch.run(stage, loop)


def test_an_interrupted_run_of_another_configuration_is_kept(tmp_path, store):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, 0.1, interrupted=True)
    with pytest.raises(
        UserError, match=r"out\.state holds an interrupted sft .* sft\.learning_rate is 0\.1 there, 0\.2"
    ):
        trained(tmp_path, 0.2)
    assert (tmp_path / "out.state" / "half").read_bytes() == b"a day of work"
    assert trained(tmp_path, 0.1).training.steps == 1
    assert not (tmp_path / "out.state").exists()


def test_a_finished_run_of_another_configuration_is_kept_until_it_is_asked_for_afresh(tmp_path, store):
    first = trained(tmp_path, 0.1)
    assert first.lineage.weights and first.lineage.inputs["sft.learning_rate"] == 0.1
    with pytest.raises(UserError, match=r"holds a sft checkpoint .* sft\.learning_rate is 0\.1 there, 0\.2 here"):
        trained(tmp_path, 0.2)
    assert trained(tmp_path, 0.1) == first
    second = trained(tmp_path, 0.2, fresh=True)
    assert artefacts.open_checkpoint(first.uri).lineage == second.lineage
    assert second.lineage.weights != first.lineage.weights


def test_fresh_removes_nothing_before_the_gpu_is_seen_to_hold_the_stage(tmp_path, store, monkeypatch):
    first = trained(tmp_path, 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="the worker sees no GPU"):
        trained(tmp_path, 0.2, "sft.gpus_per_worker=1", fresh=True)
    assert artefacts.open_checkpoint(first.uri) == first and not (tmp_path / "out.state").exists()


def test_on_a_cluster_a_worker_is_asked(monkeypatch):
    """What `--fresh` asks before it removes anything is what the training's workers ask when they start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**20))
    large = job(Path("/nowhere"), "sft.gpus_per_worker=1")
    assert "the device has 0.0 GiB" in launch._why_not(large.model_dump())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**36))
    assert launch._why_not(large.model_dump()) == ""


def test_fresh_removes_no_folder_that_no_stage_made(tmp_path, store):
    """`--out runs --fresh` removed all of runs/."""
    theirs = tmp_path / "out" / "a" / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years")
    with pytest.raises(UserError, match=r"out holds no checkpoint, and --fresh removes nothing else"):
        trained(tmp_path, 0.1, fresh=True)
    assert theirs.read_text() == "years"
    shutil.rmtree(tmp_path / "out")
    assert trained(tmp_path, 0.1, fresh=True).training.steps == 1


def test_an_older_parent_has_the_gate_that_there_was_then():
    """A configuration without the key is not the same as one with its new default."""
    experiment = config.load("tiny")
    values = experiment.model_dump(mode="json")
    del values["model"]["tokenizer"]["gate"]
    lineage = Lineage(stage="sft", spec_hash=experiment.data.spec.hash)
    older = Checkpoint(uri="older", experiment=values, lineage=lineage)
    with pytest.raises(UserError, match=r"model\.tokenizer\.gate is mean there, mlp here"):
        check_parent(older, experiment)
    check_parent(older, config.load("tiny", ["model.tokenizer.gate=mean"]))


def test_an_older_parent_is_as_wide_as_its_language_model():
    values = config.load("tiny").model_dump(mode="json")
    for name in ("width", "output_scale", "weights"):
        del values["model"]["tokenizer"][name]
    older = checkpoint_of(values)
    check_parent(older, config.load("tiny"))
    for change, says in (("width=8", "width is None there, 8"), ("output_scale=embedding_rms", "output_scale is none")):
        with pytest.raises(UserError, match=rf"model\.tokenizer\.{says}"):
            check_parent(older, config.load("tiny", [f"model.tokenizer.{change}"]))


def checkpoint_of(values, uri="older"):
    spec = config.validate(values).data.spec
    return Checkpoint(uri=uri, experiment=values, lineage=Lineage(stage="sft", spec_hash=spec.hash))


def test_vision_and_tokenizer_come_from_a_checkpoint_of_any_language_model():
    given = checkpoint_of(config.load("tiny").model_dump(mode="json"))
    other = ["model.small.hidden_size=64", "model.tokenizer.width=32", "model.tokenizer.output_scale=embedding_rms"]
    check_tokenizer(given, None, config.load("tiny", other))
    with pytest.raises(UserError, match=r"model\.tokenizer\.queries is 4 there, 8 here"):
        check_tokenizer(given, None, config.load("tiny", [*other, "model.tokenizer.queries=8"]))
    with pytest.raises(UserError, match=r"--init parent and .*weights=older both bring a vision"):
        check_tokenizer(given, given.model_copy(update={"uri": "parent"}), config.load("tiny", other))
    with pytest.raises(UserError, match="older expects spec"):
        check_tokenizer(given, None, config.load("tiny", [*other, "data.spec.chunks=2"]))


def test_new_settings_decide_nothing_at_their_defaults(tmp_path):
    """So that what was trained before they were there is still what it was."""
    names = job(tmp_path).identity.inputs
    assert not any(word in name for name in names for word in ("width", "output_scale", "learning_rates", "weights"))
    changed = job(tmp_path, "model.tokenizer.width=8", "sft.learning_rates.fresh=0.1").identity.inputs
    assert changed["model.tokenizer.width"] == 8 and changed["sft.learning_rates.fresh"] == 0.1


def test_another_version_of_the_rules_is_another_training_on_what_they_read(tmp_path, monkeypatch):
    aligned, plain = job(tmp_path, "sft.alignment=1"), job(tmp_path, "sft.alignment=0")
    before = aligned.identity, plain.identity
    monkeypatch.setattr("mu2llm.stages.job.rules_identity", lambda: "rules@other")
    assert aligned.identity != before[0] and plain.identity == before[1]


@pytest.mark.parametrize("setting", ["model.vision.weights", "model.tokenizer.weights"])
def test_weights_that_a_setting_names_count_by_what_they_are(setting, tmp_path):
    for name, data in (("a", b"1"), ("moved", b"1"), ("other", b"2")):
        (tmp_path / f"{name}.bin").write_bytes(data)
    a, moved, other = (job(tmp_path, f"{setting}={tmp_path}/{name}.bin").identity for name in ("a", "moved", "other"))
    assert a == moved != other


def test_a_gpu_that_is_asked_for_and_not_there_stops_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    work({"job": job(tmp_path, "sft.gpus_per_worker=1").model_dump(), "loop": lambda *_: pytest.fail("it trained")})
    stopped = storage.read_json(storage.join(job(tmp_path).state, "stopped.json"))
    assert stopped["mistake"] and "sees no GPU" in stopped["why"]


def test_an_alias_does_not_go_over_to_what_takes_its_checkpoints_place(tmp_path, store):
    first = trained(tmp_path, 0.1)
    version = tracking.register(first, alias="champion")
    assert tracking.locate("registry://mu2llm@champion") == first.uri
    trained(tmp_path, 0.2, fresh=True)
    assert tracking.aliases() == {}
    tracking.set_alias("champion", version)  # as where the place was taken by other means
    for name in ("registry://mu2llm@champion", f"registry://mu2llm/{version}"):
        with pytest.raises(UserError, match="was registered with weights"):
            tracking.locate(name)
