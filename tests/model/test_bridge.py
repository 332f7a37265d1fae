"""A μ²Tokenizer of a width of its own before a language model of another, and tokens as large as its words."""

import logging

import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, make, scans

from mu2llm import config
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, add_lora, build
from mu2llm.model.convert import reference_tokenizer_config
from mu2llm.model.summary import summarise
from mu2llm.settings.model import LoraSettings

OTHER = {"hidden_size": 48, "num_layers": 1, "num_heads": 2, "mlp_dim": 64, "vocabulary": 320}


def test_by_default_nothing_is_between_them():
    model, _ = make()
    assert model.model.mu2_tokenizer.bridge is None
    same, _ = make(tokenizer={"width": 32})
    assert same.state_dict().keys() == model.state_dict().keys()
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


@pytest.mark.parametrize("text_conditioned", [True, False])
def test_a_width_of_its_own_is_mapped_to_the_language_models(text_conditioned, tmp_path):
    model, processor = make(tokenizer={"width": 20, "text_conditioned": text_conditioned})
    reader = model.model.mu2_tokenizer
    assert reader.queries.shape[-1] == 20 and model.model.projector.layers[-1].out_features == 20
    assert (reader.bridge.text is not None) == text_conditioned
    inputs = processor.encode([QUESTION] * 2, TEXTS)
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    visual = model.encode_volumes(scans(2), **asked, return_selection=True)
    assert visual.tokens.shape == (2, 4, 32) and visual.selection.sum((2, 3, 4, 5)).allclose(torch.ones(2, 4))
    other = model.encode_volumes(scans(2), **{**asked, "question_ids": asked["question_ids"].flip(1)})
    assert torch.equal(other.tokens, visual.tokens) != text_conditioned
    model.double().train()(**inputs, volumes=scans(2)).loss.backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    assert all(p.grad.abs().max() > 1e-9 * largest for p in reader.bridge.parameters())
    model.float().eval().save_pretrained(tmp_path)
    read = Mu2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(read(**inputs, volumes=scans(2)).logits, model(**inputs, volumes=scans(2)).logits)


def test_lora_trains_the_maps_in_full():
    model, _ = make(tokenizer={"width": 20, "output_scale": "embedding_rms"})
    adapted = add_lora(model, LoraSettings(r=2))
    trained = {name.rpartition("bridge.")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {"text.weight", "tokens.weight", "norm.gain"} <= trained


def test_the_summary_counts_it():
    settings = experiment(tokenizer={"width": 20})
    summary, (model, _) = summarise(settings.model, settings.data.spec), make(tokenizer={"width": 20})
    reader = sum(p.numel() for p in model.model.mu2_tokenizer.parameters())
    assert summary.parameters["tokenizer"] == reader
    assert dict(summary.steps)["projected"][-1] == 20 and dict(summary.steps)["visual tokens"] == (1, 4, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [None, 20])
def test_scaled_tokens_are_as_large_as_words(width, dtype, tmp_path):
    model, processor = make(tokenizer={"width": width, "output_scale": "embedding_rms", "standardise": True})
    words = model.get_input_embeddings().weight.detach()
    scale = model.model.mu2_tokenizer.bridge.norm
    with torch.no_grad():
        scale.gain.fill_(1)
    assert float(scale.rms) == pytest.approx(float(words.square().mean().sqrt()), rel=1e-5)
    plain = make(tokenizer={"width": width, "standardise": True})[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        tokens = model.encode_volumes(scans(2)).tokens
        assert float(plain.encode_volumes(scans(2)).tokens.float().square().mean().sqrt()) > 5 * float(scale.rms)
    rms = tokens.float().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, scale.rms.expand_as(rms), rtol=0.01, atol=0)
    inputs = processor.encode([QUESTION] * 2, TEXTS)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.train()(**inputs, volumes=scans(2)).loss.backward()
    assert float(scale.gain.grad.abs()) > 0
    model.save_pretrained(tmp_path)
    read = Mu2ForConditionalGeneration.from_pretrained(tmp_path)
    assert read.model.mu2_tokenizer.bridge.norm.rms == scale.rms


def test_a_language_model_starts_with_the_trained_vision_and_tokenizer_of_another(tmp_path, caplog):
    trained, _ = make(seed=1, tokenizer={"output_scale": "embedding_rms"})
    processor = make(seed=1)[1]
    trained.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = experiment(
        small=OTHER, tokenizer={"width": 32, "output_scale": "embedding_rms", "weights": str(tmp_path)}
    )
    with caplog.at_level(logging.INFO):
        model, _ = build(settings.model, settings.data.spec, TEXTS * 4, seed=0)
    ours, theirs = model.model.state_dict(), trained.model.state_dict()
    bridge = "mu2_tokenizer.bridge."
    taken = [name for name in theirs if not name.startswith(("language_model.", bridge))]
    assert any(name.startswith("projector.") for name in taken)
    assert all(torch.equal(ours[name], theirs[name]) for name in taken)
    assert ours[f"{bridge}norm.rms"] != theirs[f"{bridge}norm.rms"] and f"{bridge}tokens.weight" in ours
    (said,) = (record.message for record in caplog.records if "tensors of vision" in record.message)
    assert f"{len(taken)} tensors" in said and f"{bridge}tokens.weight" in said and "of its language model" in said
    assert model.encode_volumes(scans(1)).tokens.shape == (1, 4, 48)


@pytest.mark.parametrize(
    ("changes", "names"), [({"width": 24}, "such as"), ({"width": 32, "queries": 5}, "mu2_tokenizer.*expected")]
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes, names, tmp_path):
    trained, processor = make()
    trained.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = experiment(small=OTHER, tokenizer={**changes, "weights": str(tmp_path)})
    with pytest.raises(UserError, match=f"do not fit this model's settings.*{names}"):
        build(settings.model, settings.data.spec, TEXTS * 4)


def test_the_published_tokenizer_has_no_width_of_its_own():
    for change in ("model.tokenizer.width=64", "model.tokenizer.output_scale=embedding_rms"):
        with pytest.raises(UserError, match="as wide as its language model and scales nothing"):
            config.load("demo", ["model.face=reference", change])
    sizes = {"embed_size": 8, "hidden_size": 8, "num_heads": 2, "num_layers": 1, "top_k": 2, "num_3d_query_token": 2}
    published = reference_tokenizer_config(**sizes)
    assert published.language_size is None and published.output_scale == "none"


def test_two_visions_are_refused():
    with pytest.raises(UserError, match=r"unset vision\.weights"):
        config.load("demo", ["model.tokenizer.weights=a", "model.vision.weights=b"])
