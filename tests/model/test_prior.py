"""The diagnostic prior: a contrastive head's probabilities as further visual tokens, saved, adapted and taken along."""

import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, scans, scatter

from mu2llm import artefacts, weights
from mu2llm.errors import UserError
from mu2llm.model import Mu2Processor, add_lora, add_prior, build, build_contrastive, load, merge_lora
from mu2llm.model.building import load_contrastive, save_text_encoder
from mu2llm.records import Checkpoint, Lineage
from mu2llm.settings.model import LoraSettings

FINDINGS = ["left pleural effusion", "liver lesion", "right lung nodule"]


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    """A contrastive checkpoint with random weights, its encoder and whitening kept."""
    folder, settings = tmp_path_factory.mktemp("contrastive"), experiment(text_encoder="small")
    encoder = weights.text_encoder("small", TEXTS)
    width = 5
    model = scatter(build_contrastive(settings.model, settings.data.spec, settings.contrastive, width))
    centre, axes = torch.randn(encoder.width), torch.randn(encoder.width, width)
    model.keep_whitening(centre, axes)
    model.head.temperature.fill_(1.7)
    model.save_pretrained(folder)
    save_text_encoder(encoder, str(folder), False, "small")
    lineage = Lineage(stage="contrastive", spec_hash=settings.data.spec.hash, identity="c-0")
    described = Checkpoint(uri=str(folder), experiment=settings.model_dump(mode="json"), lineage=lineage)
    artefacts.describe(described)
    return str(folder)


def made(contrasted, **model):
    settings = experiment(text_encoder="small", **model)
    whole, processor = build(settings.model, settings.data.spec, TEXTS * 4)
    scatter(whole)
    add_prior(whole, processor, contrasted, FINDINGS)
    return whole.eval(), processor


def batch(processor, answers=None):
    return {
        "volumes": scans(2),
        "chunk_mask": torch.tensor([[True, True], [True, False]]),
        **processor.encode([QUESTION] * 2, answers),
    }


def test_probabilities_are_those_of_the_contrastive_stage(contrasted):
    model, _ = made(contrasted)
    trained, encoder = load_contrastive(contrasted)
    mask = torch.tensor([[True, True], [True, False]])
    features = trained.encode_vision(scans(2), mask)
    expected = trained.zero_shot(None, mask, trained.whiten(encoder.embed(FINDINGS)), features)
    torch.testing.assert_close(model.model.prior.probabilities(features, mask), expected.T)


@pytest.mark.parametrize("tokenizer", [{}, {"width": 24, "output_scale": "embedding_rms"}])
def test_each_finding_is_a_visual_token_behind_the_queries(contrasted, tokenizer):
    model, processor = made(contrasted, tokenizer=tokenizer)
    inputs = batch(processor)
    assert processor.queries == model.config.visual_tokens == 4 + len(FINDINGS)
    assert (inputs["input_ids"] == model.config.volume_token_id).sum(1).tolist() == [7, 7]
    tokens = model(**inputs).visual_tokens
    assert tokens.shape == (2, 7, 32)
    with torch.no_grad():
        model.model.prior.directions[1] += 1
    moved = (model(**inputs).visual_tokens - tokens).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 5 + [True, False]


def test_tokens_tell_the_language_model_and_only_directions_and_bases_learn(contrasted):
    model, processor = made(contrasted)
    model.double().train()(**{**batch(processor, TEXTS), "volumes": scans(2)}).loss.backward()
    prior = model.model.prior
    assert {name for name, _ in prior.named_parameters()} == {"directions", "bases"}
    assert all(p.grad.abs().amax(1).min() > 1e-9 for p in prior.parameters())


def test_the_alignment_is_held_against_the_queries_alone(contrasted):
    model, processor = made(contrasted)
    seen = []

    class Head(torch.nn.Module):
        def forward(self, texts, tokens, targets):
            seen.append(tokens.shape)
            return tokens.sum()

    model.alignment = Head()
    model(**batch(processor, TEXTS), text_embeddings=torch.zeros(1, 4), targets=torch.zeros(1, 2))
    assert seen == [(2, 4, 32)]


def test_one_scan_may_serve_several_questions(contrasted):
    model, processor = made(contrasted)
    inputs = processor.encode([QUESTION, "Is there a nodule?"])
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    tokens = model.encode_volumes(scans(1), torch.ones(1, 2, dtype=torch.bool), **asked).tokens
    torch.testing.assert_close(tokens[0, 4:], tokens[1, 4:])


def test_a_saved_model_has_its_prior_with_and_without_lora(contrasted, tmp_path):
    model, processor = made(contrasted)
    inputs = batch(processor)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    again, reader = load(str(tmp_path / "plain"))
    assert isinstance(reader, Mu2Processor) and reader.queries == 7 and again.config.findings == FINDINGS
    torch.testing.assert_close(again(**inputs).logits, expected)
    adapted = add_lora(model, LoraSettings(r=2))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and "prior" in name}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"directions", "bases"}
    torch.testing.assert_close(merge_lora(adapted)(**inputs).logits, expected)


def test_another_language_model_takes_the_prior_with_the_tokenizer(contrasted, tmp_path):
    model, processor = made(contrasted)
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    other = {"tokenizer": {"width": 32, "weights": str(tmp_path / "first"), "prior": 3}, "small": {"hidden_size": 48}}
    settings = experiment(**other)
    taken, reader = build(settings.model, settings.data.spec, TEXTS * 4)
    assert taken.config.findings == FINDINGS and reader.queries == 7
    ours, theirs = taken.model.prior.state_dict(), model.model.prior.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert taken(**batch(reader)).visual_tokens.shape == (2, 7, 48)


def test_what_a_prior_cannot_be_made_of_is_refused(contrasted):
    with pytest.raises(UserError, match="vision is 24 wide, 32 here"):
        made(contrasted, vision={"hidden_size": 32})
    with pytest.raises(UserError, match="no diagnostic prior"):
        experiment(face="reference", tokenizer={"prior": 3})


def named(contrasted, names, **model):
    settings = experiment(text_encoder="small", tokenizer={"prior": 3, "prior_names": names}, **model)
    whole, processor = build(settings.model, settings.data.spec, TEXTS * 4)
    scatter(whole)
    add_prior(whole, processor, contrasted, FINDINGS, names)
    return whole.eval(), processor


def told(model, processor, probabilities, monkeypatch):
    """What the words say where the head gives these probabilities."""
    monkeypatch.setattr(model.model.prior, "probabilities", lambda *_: torch.tensor(probabilities))
    return [processor.tokenizer.decode(ids) for ids in model.model.prior.names(None)]


def test_likely_findings_are_told_by_name_the_likeliest_first(contrasted, monkeypatch):
    model, processor = named(contrasted, 40)
    effusion, lesion, nodule = (f" {name}," for name in FINDINGS)
    first, second, third = told(model, processor, [[0.6, 0.4, 0.9], [0.2, 0.5, 0.1], [0.8, 0.7, 0.51]], monkeypatch)
    assert first.rstrip("\n") == nodule + effusion and set(second) == {"\n"}
    assert third.rstrip("\n") == effusion + lesion + nodule


def test_names_that_find_no_room_are_left_out_whole(contrasted, monkeypatch):
    _, processor = named(contrasted, 40)
    sizes = [
        len(ids)
        for ids in processor.tokenizer([f" {each}," for each in FINDINGS], add_special_tokens=False)["input_ids"]
    ]
    model, processor = named(contrasted, sizes[2] + sizes[1] - 1)
    (text,) = told(model, processor, [[0.1, 0.8, 0.9]], monkeypatch)
    assert text.rstrip("\n") == f" {FINDINGS[2]},"


def test_names_are_the_language_models_words_behind_the_queries(contrasted, tmp_path):
    model, processor = named(contrasted, 12)
    inputs = batch(processor)
    assert processor.queries == model.config.visual_tokens == 4 + 12
    outputs = model(**inputs)
    mask = inputs["chunk_mask"]
    ids = model.model.prior.names(model.encode_vision(inputs["volumes"], mask), mask)
    torch.testing.assert_close(outputs.visual_tokens[:, 4:], model.get_input_embeddings()(ids))
    assert not list(model.model.prior.parameters())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    torch.testing.assert_close(again(**inputs).logits, outputs.logits)
    torch.testing.assert_close(merge_lora(add_lora(model, LoraSettings(r=2)))(**inputs).logits, outputs.logits)


def test_another_language_model_is_told_in_its_own_words(contrasted, tmp_path):
    model, processor = named(contrasted, 12)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other = {"width": 32, "weights": str(tmp_path), "prior": 3, "prior_names": 12}
    settings = experiment(tokenizer=other, small={"hidden_size": 48, "vocabulary": 280})
    taken, reader = build(settings.model, settings.data.spec, TEXTS * 4)
    assert taken.config.finding_ids != model.config.finding_ids
    assert reader.tokenizer.decode(taken.config.finding_ids[0]) == f" {FINDINGS[0]},"
    assert taken(**batch(reader)).visual_tokens.shape == (2, 16, 48)


def test_names_without_a_prior_are_refused():
    with pytest.raises(UserError, match=r"set tokenizer\.prior"):
        experiment(tokenizer={"prior_names": 8})
