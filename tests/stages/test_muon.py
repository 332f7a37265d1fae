"""Muon for matrices and AdamW for the rest: which is whose, one step of each, and a saved state that goes on."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.stages.muon import MuonAndAdamW, matrices


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
        self.lora_A = nn.Linear(6, 2)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.words(ids))
        return self.head(self.frozen(x) + x) + self.lora_A(x).sum()


def made() -> tuple[Model, MuonAndAdamW]:
    torch.manual_seed(0)
    model = Model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    adamw = AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01)
    return model, MuonAndAdamW.of(adamw, model, 0.02)


def step(model: Model, optimiser: MuonAndAdamW, seed: int) -> None:
    optimiser.zero_grad()
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimiser.step()


def test_inner_matrices_are_muons_and_all_else_adamws() -> None:
    model, optimiser = made()
    assert [id(p) for p in matrices(model)] == [id(model.inner[0].weight), id(model.inner[2].weight)]
    by_muon = [p for group in optimiser.muon.param_groups for p in group["params"]]
    assert [id(p) for p in by_muon] == [id(p) for p in matrices(model)]
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.1, 0.1, 0.0]
    assert [group["lr"] for group in optimiser.param_groups] == [0.02, 0.01, 0.01]
    every = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == sum(1 for _ in model.parameters())


def test_a_step_is_torchs_own_of_each() -> None:
    model, optimiser = made()
    alone = copy.deepcopy(model)
    step(model, optimiser, 0)
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(alone(ids).flatten(0, 1), ids.flatten()).backward()
    Muon(matrices(alone), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    AdamW([alone.words.weight, alone.head.weight], lr=0.01, weight_decay=0.1).step()
    AdamW([alone.inner[0].bias, alone.head.bias], lr=0.01, weight_decay=0.0).step()
    for part in ("words.weight", "head.weight", "head.bias", "inner.0.bias", "inner.0.weight", "inner.2.weight"):
        torch.testing.assert_close(model.get_parameter(part), alone.get_parameter(part))


def test_a_saved_state_goes_on_as_if_never_stopped() -> None:
    model, optimiser = made()
    schedule = LambdaLR(optimiser, lambda done: 1 / (1 + done))
    for seed in range(2):
        step(model, optimiser, seed)
        schedule.step()
    file = io.BytesIO()
    torch.save({"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}, file)
    again, other = made()
    again.load_state_dict(model.state_dict())
    schedule_again = LambdaLR(other, lambda done: 1 / (1 + done))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["optimiser"])
    schedule_again.load_state_dict(saved["schedule"])
    for model_, optimiser_, schedule_ in ((model, optimiser, schedule), (again, other, schedule_again)):
        step(model_, optimiser_, 7)
        schedule_.step()
        step(model_, optimiser_, 8)
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.02 / 4, 0.01 / 4, 0.01 / 4])
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(UserError, match="whole matrices"):
        config.load("tiny", ["sft.muon=0.01", "sft.fsdp=full_shard", "sft.workers=2"])
