"""A training step of each stage without Ray: what is logged beside the loss, kept in memory, waited for."""

import datasets
import numpy as np
import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, make, scans
from synchronisations import Synchronisations
from transformers import TrainerCallback, TrainingArguments
from trl import DPOConfig

from mu2llm import config
from mu2llm.model import Mu2Model, add_lora, build_contrastive
from mu2llm.records import PreferencePair
from mu2llm.settings.model import LoraSettings
from mu2llm.stages import contrastive, dpo, sft
from mu2llm.stages.steps import ContrastiveTrainer, NotFinite, SftTrainer
from mu2llm.stages.texts import TextBank


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


PLAIN = {
    **{"use_cpu": True, "report_to": [], "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True},
    **{"learning_rate": 1e-3, "logging_nan_inf_filter": False},
}


class Counted(TrainerCallback):
    """Counts what waits for the device between the first step and the last."""

    def __init__(self):
        self.waits = Synchronisations("cpu")

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            self.waits.__enter__()
        if state.global_step == state.max_steps - 1:
            self.waits.__exit__(None, None, None)


def of_the_stream(count=2):
    """Rows as the stream gives them; of the second scan one chunk is empty."""
    mask = np.ones((count, 2), bool)
    mask[1, 1] = False
    return {
        **{"id": [f"case {i}" for i in range(count)], "item": np.arange(count), "row": np.arange(count)},
        **{"voxels": scans(count).numpy(), "chunk_mask": mask, "report": TEXTS[:count], "questions": ["[]"] * count},
    }


def contrast(folder, steps, **arguments):
    settings = experiment()
    texts = TextBank(Words(), "sentence", TEXTS, 0)
    model = build_contrastive(settings.model, settings.data.spec, settings.contrastive, texts.width)
    given = TrainingArguments(str(folder), max_steps=steps, logging_steps=steps, **PLAIN, **arguments)
    trainer = ContrastiveTrainer(model=model, args=given)
    trainer.batches = [contrastive.collate(of_the_stream(), texts) for _ in range(steps)]
    return trainer


class Words:
    """A text encoder whose embeddings are random, by the text."""

    max_tokens = 64
    tokenizer = staticmethod(lambda text, **_: {"input_ids": list(text.encode())})

    def embed(self, texts):
        return np.stack([np.random.default_rng(list(text.encode())).normal(size=16) for text in texts])


def supervise(folder, steps, **arguments):
    model, processor = make()
    given = TrainingArguments(str(folder), max_steps=steps, logging_steps=steps, **PLAIN, **arguments)
    trainer = SftTrainer(model=model, args=given)
    asking = sft.Instructions(QUESTION, 1, 0, None)
    trainer.batches = [sft.collate(of_the_stream(), "voxels", processor, None, asking) for _ in range(steps)]
    return trainer


def prefer(folder, steps, **arguments):
    model, processor = make()
    values = {"prompt": QUESTION, "chosen_score": 1.0, "rejected_score": 0.0, "judge": "rules"}
    pairs = [PreferencePair(case_id=str(i), chosen=TEXTS[i], rejected=TEXTS[1 - i], **values) for i in range(2)]
    examples = dpo.Examples(pairs, np.zeros((2, 2), np.float32), processor)
    settings = config.load("tiny").dpo
    trainer = dpo.Mu2DPOTrainer(
        model=model,
        args=DPOConfig(
            str(folder), max_steps=steps, logging_steps=steps, **PLAIN, **dpo.loss_arguments(settings), **arguments
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "", "chosen": "", "rejected": ""}]),
        data_collator=examples.collator,
        processing_class=processor.tokenizer,
    )
    trainer.batches = [examples.collate(of_the_stream(), "voxels") for _ in range(steps)]
    return trainer


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (contrast, 1),  # which texts are distinct
        (supervise, 1),  # where the answers are
        (prefer, 3),  # trl picks the logits of chosen and of rejected; transformers looks for packed sequences
    ],
)
def test_a_step_waits_for_nothing(make, most, tmp_path, monkeypatch):
    monkeypatch.setattr(Mu2Model, "_looks_at", lambda *_: False)  # as on a GPU
    trainer, counted = make(tmp_path, 6), Counted()
    trainer.add_callback(counted)
    trainer.train()
    assert counted.waits.count <= 4 * most, counted.waits.causes


def test_numbers_of_dpo_are_fetched_when_they_are_logged(tmp_path):
    """The means over the steps are what trl gives that fetches each."""
    fetched = prefer(tmp_path, 4)
    fetched.train()
    each = prefer(tmp_path, 4, logging_first_step=True)
    each.args.logging_steps = each.state.logging_steps = 1
    each.train()
    (whole,) = [entry for entry in fetched.state.log_history if "loss" in entry]
    singly = [entry for entry in each.state.log_history if "loss" in entry]
    assert len(singly) == 4
    for name in ("rewards/margins", "kl", "entropy", "logps/chosen", "lengths/chosen", "rewards/accuracies"):
        assert whole[name] == pytest.approx(np.mean([entry[name] for entry in singly]), abs=1e-5)
    assert singly[-1]["rewards/margins"] != singly[0]["rewards/margins"]
    assert whole["num_tokens"] == singly[-1]["num_tokens"] > 0


def test_the_first_loss_that_is_not_finite_is_named_however_late_it_is_seen(tmp_path):
    trainer = contrast(tmp_path, 5)
    for number, batch in enumerate(trainer.batches):
        batch["case_ids"] = [f"{number}a", f"{number}b"]
    trainer.batches[2]["text_embeddings"] = trainer.batches[2]["text_embeddings"] * float("inf")
    with pytest.raises(NotFinite, match=r"the loss is nan on cases 2a, 2b$"):
        trainer.train()
    assert trainer.state.global_step == 5  # where the loss is logged


def test_padding_on_the_right_needs_no_mask():
    model, processor = make()
    batch = {**processor.encode([QUESTION] * 2, TEXTS), "volumes": scans(2)}
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        masked, plain = model(**batch), model(**batch, right_padded=True)
    torch.testing.assert_close(plain.loss, masked.loss)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(plain.logits[real], masked.logits[real])


def test_only_the_chunks_that_hold_something_are_encoded(tmp_path):
    """Whether their number is told or counted."""
    model, _ = make(vision={"standardise_input": True})
    batch = sft.scan_inputs(of_the_stream(), "voxels")
    seen = []
    model.model.vision.tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.no_grad():
        told = model.encode_vision(**batch)
        counted = model.encode_vision(batch["volumes"], batch["chunk_mask"])
        whole = model.encode_vision(batch["volumes"])
    assert batch["full_chunks"] == 3 and seen == [3, 3, 4]
    assert torch.equal(told, counted) and bool((told[1, 1] == 0).all())
    torch.testing.assert_close(told[batch["chunk_mask"]], whole[batch["chunk_mask"]])
