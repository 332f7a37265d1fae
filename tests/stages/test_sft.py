"""SFT's parts without workers: LoRA with all that is trained beside it, frozen vision, what is asked."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mu2llm import config
from mu2llm.ct import augment_batch
from mu2llm.errors import UserError
from mu2llm.model import add_lora, build, load, load_lora, merge_lora
from mu2llm.records import Checkpoint, Lineage
from mu2llm.stages import sft
from mu2llm.stages.job import Job
from mu2llm.stages.worker import Batches

REPORTS = ["There is a large left pleural effusion.", "There is a cyst in the right kidney.", "No finding."]


def experiment(*overrides):
    return config.load("tiny", ["model.lora.r=4", "model.text_encoder=small", *overrides])


def batch(processor, settings):
    scans = torch.randint(0, 256, (2, *settings.data.spec.shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    mask = torch.ones(2, settings.data.spec.chunks, dtype=torch.bool)
    return {"volumes": scans, "chunk_mask": mask, **processor.encode(["Write the report."] * 2, REPORTS[:2])}


def with_lora(settings, thawing=False):
    """As the stage makes it: (plain model, the model with adapters, processor)."""
    model, processor = build(settings.model, settings.data.spec, REPORTS, seed=0)
    if not thawing:
        model.freeze_vision()
    sft.align(model, settings, REPORTS)
    return model, add_lora(model, settings.model.lora, ["alignment"]), processor


def test_an_intermediate_checkpoint_with_lora_holds_all_that_is_trained(tmp_path):
    settings = experiment()
    _, model, processor = with_lora(settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {kind for kind in ("lora", "projector", "mu2_tokenizer", "alignment") if any(kind in n for n in trained)}
    assert kinds == {"lora", "projector", "mu2_tokenizer", "alignment"}
    assert not any("vision" in name for name in trained)
    inputs = batch(processor, settings)
    model.train()(**inputs).loss.backward()
    with torch.no_grad():
        for p in trained.values():
            p += 0.05 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    model.eval().save_pretrained(tmp_path / "between")
    again, _ = build(settings.model, settings.data.spec, REPORTS, seed=0)
    sft.align(again, settings, REPORTS)
    restored = load_lora(again, str(tmp_path / "between")).eval()
    with torch.no_grad():
        expected = model(**inputs)
        torch.testing.assert_close(restored(**inputs).logits, expected.logits)
        heads = [merge_lora(each).alignment.look.weight for each in (restored, model)]
    torch.testing.assert_close(*heads)
    sft.save(model, processor, str(tmp_path / "plain"))
    plain, _ = load(str(tmp_path / "plain"))
    assert plain.alignment is None
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_vision_is_passed_over_until_it_thaws(lora):
    settings = experiment()
    whole, model, processor = with_lora(settings, thawing=True)
    if not lora:
        whole, processor = build(settings.model, settings.data.spec, REPORTS, seed=0)
        model = whole
    vision = [p for name, p in model.named_parameters() if "vision" in name and p.requires_grad]
    optimiser = torch.optim.AdamW(vision, lr=0.1)
    before = [p.detach().clone() for p in vision]
    thaw, state, control = sft.UnfreezeVision(whole.model.vision, step=1), TrainerState(), TrainerControl()
    thaw.on_train_begin(None, state, control)
    for step in range(2):
        state.global_step = step
        thaw.on_step_begin(None, state, control)
        model.train()(**batch(processor, settings)).loss.backward()
        optimiser.step()
        moved = any(not torch.equal(p, old) for p, old in zip(vision, before, strict=True))
        assert moved == (step == 1)


@pytest.mark.parametrize("lora", [True, False])
def test_the_language_model_has_no_part_in_the_first_steps(lora, tmp_path):
    settings = experiment()
    whole, model, processor = with_lora(settings)
    if not lora:
        whole, processor = build(settings.model, settings.data.spec, REPORTS, seed=0)
        sft.align(whole, settings, REPORTS)
        model = whole
    given = batch(processor, settings) | {"case_ids": ["a", "b"]}
    given |= {"text_embeddings": 0.1 * torch.randn(3, whole.alignment.look.in_features), "targets": torch.eye(3)[:, :2]}
    lookups = []
    whole.lm_head.register_forward_hook(lambda *_: lookups.append(trainer.state.global_step))
    arguments = {"max_steps": 4, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "learning_rate": 0.0001}
    trainer = sft.SftTrainer(model=model, args=TrainingArguments(str(tmp_path), **arguments))
    trainer.batches, trainer.alignment, trainer.alone = [dict(given) for _ in range(4)], 2.0, 2
    language = [p for name, p in model.named_parameters() if "language_model.layers" in name and p.requires_grad]
    before = [p.detach().clone() for p in language]
    changed = []
    trainer.add_callback(Changes(language, before, changed))
    trainer.train()
    assert lookups == [2, 3] and changed == [False, False, True, True]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0] < losses[2]  # from then on with that of the text


class Changes(TrainerCallback):
    def __init__(self, parameters, before, seen):
        self.parameters, self.before, self.seen = parameters, before, seen

    def on_step_end(self, *_, **__):
        self.seen.append(any(not torch.equal(*each) for each in zip(self.parameters, self.before, strict=True)))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="thaw_vision needs freeze_vision"):
        config.load("tiny", ["sft.freeze_vision=false", "sft.thaw_vision=0.5"])
    with pytest.raises(UserError, match="alignment_first needs alignment"):
        config.load("tiny", ["sft.alignment=0", "sft.alignment_first=0.5"])
    with pytest.raises(UserError, match="augment changes voxels, and cache_vision reads features"):
        config.load("tiny", ["sft.augment=true"])
    with pytest.raises(UserError, match="1 loss_weights for 2 losses"):
        config.load("tiny", ["dpo.loss=sigmoid+sft", "dpo.loss_weights=[1]"])
    with pytest.raises(UserError, match=r"dpo\.beta: Input should be greater than 0, given -0\.1"):
        config.load("tiny", ["dpo.beta=-0.1"])


def from_checkpoint(folder, dtype):
    """The model that training starts with, from a checkpoint in that dtype of one and the same bf16 values."""
    settings = config.load("tiny", ["sft.alignment=0", "model.text_encoder=small"])
    model, processor = build(settings.model, settings.data.spec, REPORTS, seed=0)
    model.bfloat16().to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    values = {"experiment": settings.model_dump(mode="json"), "spec_hash": settings.data.spec.hash}
    described = Checkpoint(
        uri=str(folder), lineage=Lineage(stage="sft", spec_hash=values["spec_hash"]), experiment=values["experiment"]
    )
    (folder / Checkpoint.FILE).write_text(described.model_dump_json())
    job = Job(stage="sft", data="", data_checksum="", out="", parent=str(folder), rows=1, **values)
    return sft.start(job, REPORTS)


def test_training_from_a_bf16_checkpoint_learns_what_it_does_from_fp32(tmp_path):
    """The paper's learning rate is below bf16's steps: weights and running statistics in bf16 would stand still."""
    losses, moved = [], []
    for dtype in (torch.float32, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        model, processor = from_checkpoint(tmp_path / str(dtype), dtype)
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
        before = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}
        given = batch(processor, config.load("tiny")) | {"case_ids": ["a", "b"]}
        arguments = {"max_steps": 10, "logging_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
        arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "learning_rate": 4e-6, "bf16": True}
        trainer = sft.SftTrainer(model=model, args=TrainingArguments(str(tmp_path), **arguments))
        trainer.batches = [dict(given) for _ in range(10)]
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        after = model.state_dict()
        moved.append({name: float((after[name] - t).abs().sum()) for name, t in before.items()})
    assert losses[1] == pytest.approx(losses[0], rel=0.001)
    for part in ("language_model", "mu2_tokenizer", "mu2_tokenizer.standardise", "vision.anatomy.mean"):
        exact, rough = (sum(n for name, n in each.items() if part in name) for each in moved)
        assert exact > 0 and rough == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("augment", [True, False])
def test_voxels_are_augmented_where_it_is_asked_for_and_not_otherwise(augment):
    rows = {"voxels": np.full((2, 1, 1, 4, 64, 64), 90, np.uint8), "row": np.array([6, 7])}
    batches = Batches.__new__(Batches)
    batches.stream, batches.seed, batches.augment, batches.collate = [rows], 3, augment, lambda rows: rows
    (seen,) = batches
    expected = augment_batch(rows["voxels"], rows["row"], 3) if augment else rows["voxels"]
    np.testing.assert_array_equal(seen["voxels"], expected)
    assert (expected != 90).any() == augment and (rows["voxels"] == 90).all()
