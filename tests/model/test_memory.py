"""The memory model against torch's own tracker of a whole training step."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import BertModel

from mu2llm import config, weights
from mu2llm.model import build_contrastive
from mu2llm.model.memory import GIB, _contrastive, _language, _without_values, _write, inference_memory, training_memory
from mu2llm.model.text_pooling import HEADS


def tracked(experiment, stage):
    """Bytes at the peak of a step of AdamW, by torch's tracker on tensors without values."""
    settings = getattr(experiment, stage)
    with torch.device("meta"):
        model = _language(experiment, stage)
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
        _without_values(model)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimiser)
        forward, losses = type(model).forward, []

        def kept(*arguments, **keywords):
            output = forward(*arguments, **keywords)
            losses.append(output.loss)
            return output

        model.forward = kept.__get__(model)
        with tracker:
            for _ in range(2):  # the moments are there from the second step on
                _write(model, experiment, settings.batch_size, 2 if stage == "dpo" else 1, stage)
                losses.pop().backward()
                optimiser.step()
                optimiser.zero_grad()
                tracker.reset_mod_stats()
    return sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocabulary", [768, 32768])
def test_a_training_step_takes_what_the_memory_model_says(stage, precision, vocabulary):
    """Also where the head is computed in pieces, as with the larger vocabulary."""
    changes = [f"{stage}.precision={precision}", f"{stage}.freeze_vision=false", "model.vision.num_layers=2"]
    changes += [f"model.small.vocabulary={vocabulary}"]
    experiment = config.load("demo", changes)
    assert training_memory(experiment, stage).peak == pytest.approx(tracked(experiment, stage), rel=0.15)


def test_recomputation_lora_and_a_smaller_batch_take_less():
    def peak(*changes):
        batch = ["sft.batch_size=4", "sft.accumulation=1", "sft.gradient_checkpointing=false"]
        return training_memory(config.load("llama3-1b", [*batch, *changes]), "sft").peak

    whole = peak()
    assert peak("sft.gradient_checkpointing=true") < 0.8 * whole
    assert peak("sft.batch_size=2") < 0.8 * whole
    assert peak("model.lora=null") > whole


def test_the_scans_of_one_worker_count_not_those_of_all():
    one, two = (training_memory(config.load("tiny", [f"contrastive.workers={n}"]), "contrastive") for n in (1, 2))
    assert two.activations < one.activations
    assert two.gradients_stay and not one.gradients_stay


def test_a_text_encoder_that_is_trained_counts():
    without, with_one = (
        training_memory(
            config.load("tiny", ["model.text_encoder=small", f"contrastive.train_text_encoder={trained}"]),
            "contrastive",
        )
        for trained in (False, True)
    )
    of_texts = weights.text_encoder_config("small")
    encoder = sum(p.numel() for p in BertModel(of_texts).parameters())  # its pooler too, though nothing trains it
    narrower = 2 * HEADS * 128 * (384 - of_texts.hidden_size)  # the head's two maps of texts, its heads 128 wide
    assert with_one.moments - without.moments == pytest.approx(8 * (encoder - narrower), rel=1e-3)
    assert with_one.activations > without.activations


def test_writing_takes_the_weights_and_what_encoding_so_many_scans_holds():
    experiment = config.load("llama3-1b")
    few, many = inference_memory(experiment, 1, 1), inference_memory(experiment, 16, 16)
    assert few.weights == many.weights and many.activations == pytest.approx(16 * few.activations, rel=0.05)
    assert 5 < few.weights / GIB < 8 and "GiB" in str(few)
    rounded, texts = (inference_memory(experiment, 1, n, "bf16") for n in (1, 400))
    assert 0.5 < rounded.weights / few.weights < 0.7  # embeddings, and the head that is tied to them, stay as they are
    assert rounded.activations < 0.8 * few.activations
    assert texts.activations == pytest.approx(400 * 2 * 16 * 8 * 64 * 1280 * 2)  # keys and values of Llama's 16 layers


def test_the_contrastive_head_that_is_counted_is_the_one_that_is_trained():
    settings = config.load("tiny")
    counted = _contrastive(settings)
    trained = build_contrastive(settings.model, settings.data.spec, settings.contrastive, 384)
    sizes = ({name: x.shape for name, x in model.head.named_parameters()} for model in (counted, trained))
    assert next(sizes) == next(sizes)
