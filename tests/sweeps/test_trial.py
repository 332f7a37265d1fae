"""What a trial reports when it goes wrong; what it trains is in test_sweeps.py."""

import pytest
import torch

from mu2llm.errors import Failure, UserError
from mu2llm.stages.job import Watch
from mu2llm.sweeps import trial
from mu2llm.sweeps.trial import Plan, Point


@pytest.fixture
def plan(least, tmp_path):
    return Plan(stage="sft", experiment=least().model_dump(mode="json"), out=str(tmp_path), watch=Watch(), identity="0")


POINT = Point(params={"model.tokenizer.top_k": 8}, seed=3, data="shards", init="contrastive")


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
        raise error

    monkeypatch.setattr(trial, "_train", breaks)
    told = []
    trial.run(plan, POINT, told.append)
    assert told[-1]["status"] == status
    assert "\n" not in told[-1]["why"]


def test_values_that_the_configuration_refuses_are_infeasible(plan):
    told = []
    trial.run(plan, POINT.model_copy(update={"params": {"sft.learning_rate": -1}}), told.append)
    assert told == [{"status": "infeasible", "why": told[0]["why"]}]
    assert "learning_rate" in told[0]["why"]


def test_a_trial_is_told_apart_by_all_that_decides_it(plan):
    ids = {
        plan.id_of(POINT),
        plan.id_of(POINT.model_copy(update={"seed": 4})),
        plan.id_of(POINT.model_copy(update={"params": {"model.tokenizer.top_k": 4}})),
        plan.id_of(POINT.model_copy(update={"init": "another"})),
        plan.model_copy(update={"watch": Watch(times=2)}).id_of(POINT),
    }
    assert len(ids) == 5
    assert plan.id_of(POINT.model_copy(update={"keep": True})) in ids


def test_measurements_are_spread_over_the_steps_and_end_with_the_last():
    assert Watch(times=4).steps(10) == [2, 5, 8, 10]
    assert Watch(times=4).steps(2) == [1, 2]
    assert Watch().steps(7) == [7]
