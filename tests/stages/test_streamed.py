"""What the stages' trainers log beside the loss, and what they keep in memory, without Ray."""

import pytest
import torch
from small_models import QUESTION, TEXTS, make, scans
from transformers import TrainingArguments

from mu2llm.model import add_lora
from mu2llm.settings.model import LoraSettings
from mu2llm.stages.sft import SftTrainer


def train(model, processor, folder, **arguments):
    """Two steps of SFT on two scans; the trainer's log."""
    batch = {**processor.encode([QUESTION] * 2, TEXTS), "volumes": scans(2), "case_ids": ["a", "b"]}
    settings = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "disable_tqdm": True, "per_device_train_batch_size": 2}
    trainer = SftTrainer(model=model, args=TrainingArguments(str(folder), **{**settings, **arguments}))
    trainer.batches = [dict(batch), dict(batch)]
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=4, dropout=0.0)])
def test_a_collapse_of_the_selection_is_seen_in_the_log(lora, tmp_path):
    entropies = []
    for collapsed in (False, True):
        model, processor = make(tokenizer={"normalise_scores": False})
        if collapsed:
            torch.nn.init.zeros_(model.model.mu2_tokenizer.selection.score.weight)
        model = add_lora(model, lora) if lora else model
        entries = train(model, processor, tmp_path, learning_rate=0.0)
        assert len(entries) == 2 and model.training
        entropies.append([entry["selection_entropy"] for entry in entries])
        assert all(-1 <= entry["selection_similarity"] <= 1 for entry in entries)
    spread, uniform = entropies
    assert max(spread) < 0.95 and min(uniform) > 0.999


def test_logging_changes_nothing_that_is_learned(tmp_path):
    learned = []
    for every in (1, 2):
        model, processor = make(
            tokenizer={"standardise": True}, vision={"standardise": True, "standardise_input": True}
        )
        assert len(train(model, processor, tmp_path, learning_rate=0.01, logging_steps=every)) == 2 // every
        learned.append(model.state_dict())
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2, alpha=4, dropout=0.0)])
def test_activations_are_recomputed_where_asked_for(lora, tmp_path):
    learned = []
    for recomputed in (False, True):
        model, processor = make()
        vision = model.model.vision
        torch.manual_seed(0)
        model = add_lora(model, lora) if lora else model
        train(model, processor, tmp_path, learning_rate=0.01, activation_checkpointing=recomputed)
        assert vision.tower.blocks[0].gradient_checkpointing == recomputed
        learned.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    moved = [float(p.abs().max()) for name, p in learned[0].items() if "lora_B" in name]  # which begins at 0
    assert bool(moved) == bool(lora) and all(size > 1e-4 for size in moved)
    torch.testing.assert_close(*learned)
