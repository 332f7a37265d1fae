"""What a trial reports and where it lies; what it trains is in test_sweeps.py."""

import pytest
import torch

from mu2llm import storage, tracking
from mu2llm.errors import Failure, UserError
from mu2llm.stages.job import Watch
from mu2llm.sweeps import trial
from mu2llm.sweeps.trial import Plan, Point


@pytest.fixture
def plan(least, tmp_path):
    values = {"experiment": least().model_dump(mode="json"), "out": str(tmp_path), "watch": Watch(times=2)}
    return Plan(
        kind="tokenizer", stage="sft", data="shards", init="contrastive", shards="shards", checksum="0", **values
    )


POINT = Point(params={"model.tokenizer.top_k": 8}, seed=3)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "infeasible"),
        (MemoryError(), "infeasible"),
        (Failure("sft failed: torch.OutOfMemoryError: CUDA out of memory"), "infeasible"),
        (UserError("3 heads do not divide 32"), "infeasible"),
        (Failure("sft stopped: the loss is nan on cases a, b"), "failed"),
        (ValueError("a bug\nin two lines"), "failed"),
    ],
)
def test_what_goes_wrong_is_recorded_and_not_raised(plan, monkeypatch, error, status):
    def breaks(*_):
        storage.write_bytes(f"{plan.checkpoint(POINT)}.state/half", b"half")
        raise error

    monkeypatch.setattr(trial, "train", breaks)
    told = []
    trial.run(plan, POINT, told.append)
    assert told[-1]["status"] == status
    assert "\n" not in told[-1]["why"]
    assert not storage.list_files(plan.place(POINT))


def test_values_that_the_configuration_refuses_are_infeasible(plan):
    told = []
    trial.run(plan, POINT.model_copy(update={"params": {"sft.learning_rate": -1}}), told.append)
    assert told == [{"status": "infeasible", "why": told[0]["why"]}]
    assert "learning_rate" in told[0]["why"]


def test_measurements_are_reported_as_they_come_and_the_last_says_so(plan, monkeypatch):
    def trains(plan, point, progress):
        progress({"loss": 2.0, "step": 1, "total": 4, "seconds": 7.0})
        progress({"validation/green": 0.2, "validation/green_low": 0.1, "step": 2, "total": 4})
        progress({"validation/green": 0.3, "step": 4, "total": 4, "seconds": 9.0})
        return {"validation/green": 0.3, "step": 4}

    monkeypatch.setattr(trial, "train", trains)
    told = []
    trial.run(plan, POINT, told.append)
    assert [(each["green"], each["step"], each["ended"]) for each in told] == [(0.2, 2, False), (0.3, 4, True)]
    assert [each["training_seconds"] for each in told] == [7.0, 9.0]
    assert trial.measurement(told[0]) == {
        **{"green": 0.2, "green_low": 0.1, "step": 2.0, "training_seconds": 7.0, "seconds": told[0]["seconds"]}
    }


def test_a_training_that_had_ended_before_its_driver_did_is_reported_once(plan, monkeypatch):
    monkeypatch.setattr(trial, "train", lambda *_: {"validation/green": 0.3, "step": 4, "seconds": 2.0})
    told = []
    trial.run(plan, POINT, told.append)
    assert [(each["green"], each["ended"]) for each in told] == [(0.3, True)]


def test_a_trial_is_told_apart_by_all_that_decides_it(plan, least):
    ids = {
        plan.id_of(POINT),
        plan.id_of(POINT.model_copy(update={"seed": 4})),
        plan.id_of(POINT.model_copy(update={"params": {"model.tokenizer.top_k": 4}})),
        plan.id_of(POINT.model_copy(update={"init": "another"})),
        plan.model_copy(update={"watch": Watch(times=3)}).id_of(POINT),
        plan.model_copy(update={"checksum": "1"}).id_of(POINT),
        plan.model_copy(update={"experiment": least("sft.learning_rate=0.1").model_dump(mode="json")}).id_of(POINT),
    }
    assert len(ids) == 7
    assert plan.id_of(POINT.model_copy(update={"keep": True})) in ids


def test_places_do_not_decide_a_trial_and_what_it_left_moves_with_the_sweep(plan):
    point = POINT.model_copy(update={"init": "sft/trials/a/checkpoint", "data": "s3://bucket/pairs"})
    elsewhere = {"out": "/moved", "data": "/moved/shards", "init": "/moved/contrastive", "shards": "/moved/shards"}
    moved = plan.model_copy(update=elsewhere)
    assert moved.id_of(point) == plan.id_of(point)
    assert moved.place(point) == f"/moved/trials/{plan.id_of(point)}"
    assert moved.inputs(point) == ("s3://bucket/pairs", "/moved/sft/trials/a/checkpoint")
    assert moved.inputs(POINT) == ("/moved/shards", "/moved/contrastive")


def test_a_trial_is_the_stage_with_its_values_on_its_workers(plan, least):
    of_workers = plan.model_copy(
        update={"experiment": least("sweep.workers_per_trial=4", "sweep.gpus_per_trial=2").model_dump(mode="json")}
    )
    given = of_workers.resolved(POINT)
    assert (given.model.tokenizer.top_k, given.seed) == (8, 3)
    assert (given.sft.workers, given.sft.gpus_per_worker, given.sft.max_failures) == (4, 0.5, given.sweep.max_failures)
    alone = plan.resolved(POINT).sft
    assert (alone.workers, alone.max_failures) == (0, 0)


def test_measurements_are_spread_over_the_steps_and_end_with_the_last():
    assert Watch(times=4).steps(10) == [2, 5, 8, 10]
    assert Watch(times=4).steps(2) == [1, 2]
    assert Watch().steps(7) == [7]


def test_what_decides_no_result_names_no_other_trial(plan, least):
    """A log interval began a sweep anew."""

    def id_of(*changes):
        return plan.model_copy(update={"experiment": least(*changes).model_dump(mode="json")}).id_of(POINT)

    assert id_of("sft.log_steps=7", "serving.max_batch_size=3", "sweep.max_concurrent=1") == id_of()
    assert id_of("sft.learning_rate=0.5") != id_of()


def test_a_trial_has_the_gpus_of_its_stage_unless_the_sweep_says_otherwise(plan, least):
    """Trials of presets for GPUs ran on CPUs without a word."""
    for changes, gpus in ((["sft.gpus_per_worker=1"], 1), (["sft.gpus_per_worker=1", "sweep.gpus_per_trial=0"], 0)):
        sets = ["sweep.workers_per_trial=2", *changes]
        of_gpus = plan.model_copy(update={"experiment": least(*sets).model_dump(mode="json")})
        assert of_gpus.resolved(POINT).sft.gpus_per_worker == gpus
        assert of_gpus.base.sweep.gpus_of(of_gpus.base.sft) == 2 * gpus


@pytest.mark.parametrize("name", ["plain", "a%20b #1", "what? now"])
def test_trials_write_into_the_sweeps_own_store_whatever_its_folder_is_called(name, plan, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Plan(**plan.model_dump(exclude={"store"})).store == tracking.store()
