"""Learning rates by what is trained."""

import pytest
import torch
from small_models import QUESTION, TEXTS, make, scans
from transformers import TrainingArguments

from mu2llm import config
from mu2llm.model import add_lora
from mu2llm.settings.model import LoraSettings
from mu2llm.settings.stages import LearningRates
from mu2llm.stages import groups
from mu2llm.stages.sft import SftTrainer

RATES = {"fresh": 1e-3, "lora": 1e-4, "vision": 1e-5}


def trained(folder, rates, lora=None):
    """Two steps of SFT on two scans: the trainer."""
    model, processor = make(tokenizer={"width": 20, "output_scale": "embedding_rms"})
    model = add_lora(model, lora) if lora else model
    batch = {**processor.encode([QUESTION] * 2, TEXTS), "volumes": scans(2), "case_ids": ["a", "b"]}
    settings = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    trainer = SftTrainer(model=model, args=TrainingArguments(str(folder), learning_rate=2e-5, **settings))
    trainer.batches, trainer.rates = [dict(batch), dict(batch)], rates
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=4, dropout=0.0)])
def test_each_group_has_its_rate_and_tells_it(lora, tmp_path):
    trainer = trained(tmp_path, RATES, lora)
    model, optimiser = trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    found = {name: rates.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert not rates
    expected = {"fresh": 1e-3, "places": 1e-3, "lora": 1e-4, "vision": 1e-5, "language_model": 2e-5}
    for name, rate in found.items():
        assert rate == expected[groups.group_of(name)], name
    kinds = {groups.group_of(name) for name in found}
    assert kinds == {"fresh", "places", "vision", "lora" if lora else "language_model"}
    assert {name.partition("bridge.")[2] for name, rate in found.items() if "bridge" in name and rate == 1e-3}
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        told = {name.partition("/")[2]: rate for name, rate in entry.items() if name.startswith("learning_rate/")}
        assert told == {kind: expected[kind] for kind in kinds}


def test_the_rates_are_what_is_learned_by(tmp_path):
    still = trained(tmp_path, {"fresh": 1e-3, "vision": 1e-20, "language_model": 1e-20})
    moved = dict.fromkeys(groups.GROUPS, 0.0)
    for name, p in still.model.named_parameters():
        before = dict(make(tokenizer={"width": 20, "output_scale": "embedding_rms"})[0].named_parameters())[name]
        moved[groups.group_of(name)] = max(moved[groups.group_of(name)], float((p - before).detach().abs().max()))
    assert moved["fresh"] > 1e-4 and moved["vision"] < 1e-10 and moved["language_model"] < 1e-10


def test_without_rates_the_groups_are_the_trainers_own(tmp_path):
    trainer = trained(tmp_path, {})
    assert len(trainer.optimizer.param_groups) == 2
    assert not any("/" in name for entry in trainer.state.log_history for name in entry if "learning_rate" in name)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("module.model.mu2_tokenizer.bridge.text.weight", "fresh"),
        ("base_model.model.model.vision.modules_to_save.default.tower.norm.weight", "vision"),
        ("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight", "lora"),
        ("model.language_model.embed_tokens.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("vision.tower.blocks.0.norm1.weight", "vision"),
        ("head.look.weight", "fresh"),
        ("head.places.0", "places"),
        ("text_encoder.encoder.layer.0.weight", "language_model"),
        ("alignment.key.weight", "fresh"),
    ],
)
def test_what_is_in_which_group(name, group):
    assert groups.group_of(name) == group and group in LearningRates.model_fields


@pytest.mark.parametrize(
    ("rates", "places"), [({"fresh": 1e-3}, 1e-3), ({"fresh": 1e-3, "places": 5e-3}, 5e-3), ({"vision": 1e-5}, 1e-4)]
)
def test_places_learn_as_what_is_fresh_does_unless_they_have_a_rate(rates, places):
    named = {name: torch.nn.Parameter(torch.ones(2)) for name in ("head.look.weight", "head.places.0")}
    optimiser = torch.optim.AdamW(named.values(), lr=1e-4)
    groups.split(optimiser, named.items(), rates)
    assert {each["group"]: each["lr"] for each in optimiser.param_groups} == {
        "fresh": rates.get("fresh", 1e-4),
        "places": places,
    }


def test_what_no_step_has_reached_is_forgotten():
    """As torch loads a sharded optimiser's state: of what had none it makes zeros that count a step."""
    reached, unreached = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimiser = torch.optim.AdamW([reached, unreached])
    reached.grad, unreached.grad = torch.ones(2), torch.zeros(2)
    optimiser.step()
    groups.forget_unreached(optimiser)
    assert set(optimiser.state) == {reached}


def test_every_stage_has_them():
    stages = ("contrastive", "sft", "dpo")
    given = [f"{stage}.learning_rates={{fresh: 0.001, places: null}}" for stage in stages]
    settings = config.load("tiny", given)
    for stage in (settings.contrastive, settings.sft, settings.dpo):
        assert stage.learning_rates == LearningRates(fresh=0.001)
