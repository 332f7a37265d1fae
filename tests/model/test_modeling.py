"""The whole model as a transformers model: forward, generation, saving, serving several sequences a scan."""

import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, make, scans, unreached
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from mu2llm.errors import UserError
from mu2llm.model import (
    Mu2ForConditionalGeneration,
    Mu2Model,
    Mu2Processor,
    VisualTokens,
    configuration,
    load,
    load_vision,
)
from mu2llm.model.summary import text_config


@pytest.fixture(scope="module")
def made():
    return make()


def batch(processor, count=2):
    return processor.encode([QUESTION] * count, TEXTS[:count])


def test_loss_is_on_the_answer_alone_and_gradients_reach_every_parameter():
    model, processor = make()
    model.double().train()
    inputs = batch(processor)
    assert set(inputs["labels"][0].tolist()) - {-100} == set(
        processor.tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    ) | {processor.tokenizer.eos_token_id}
    model(**inputs, volumes=scans(2)).loss.backward()
    effectless = {"aggregation.key.bias"}
    assert {name.removeprefix("model.mu2_tokenizer.") for name in unreached(model)} == effectless


def test_the_scan_decides_what_is_written(made):
    model, processor = made
    inputs = batch(processor)
    one, other = (model(**inputs, volumes=scans(2, seed=s)).logits for s in (1, 2))
    assert (one - other).abs().max() > 1e-3


def test_features_and_visual_tokens_stand_for_the_volumes(made):
    model, processor = made
    inputs, volumes = batch(processor), scans(2)
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    expected = model(**inputs, volumes=volumes).logits
    features = model.encode_vision(volumes)
    assert features.shape == (2, 2, 4, 24)
    tokens = model.encode_volumes(vision_features=features, **asked)
    assert isinstance(tokens, VisualTokens) and tokens.tokens.shape == (2, 4, 32)
    for given in ({"vision_features": features}, {"visual_tokens": tokens}, {"visual_tokens": tokens.tokens}):
        torch.testing.assert_close(model(**inputs, **given).logits, expected)


def test_integer_voxels_stand_for_0_to_1(made):
    model, _ = made
    volumes = scans(2)
    torch.testing.assert_close(model.encode_vision(volumes), model.encode_vision(volumes.float() / 255))


def test_a_batch_gives_what_its_scans_give_alone(made):
    model, processor = made
    volumes, mask = scans(2), torch.tensor([[True, True], [True, False]])
    questions = ["Is there a pleural effusion?", QUESTION]
    together = model(**processor.encode(questions, TEXTS), volumes=volumes, chunk_mask=mask).logits
    for i, (question, answer) in enumerate(zip(questions, TEXTS, strict=True)):
        inputs = processor.encode([question], [answer])
        alone = model(**inputs, volumes=volumes[i : i + 1], chunk_mask=mask[i : i + 1]).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-4, rtol=1e-3)


def test_what_is_in_a_padded_chunk_changes_nothing(made):
    model, processor = made
    mask, volumes = torch.tensor([[True, False]] * 2), scans(2)
    other = volumes.clone()
    other[:, 1] = 255
    inputs = batch(processor)
    torch.testing.assert_close(
        model(**inputs, volumes=volumes, chunk_mask=mask).logits,
        model(**inputs, volumes=other, chunk_mask=mask).logits,
    )
    shorter = model(**inputs, volumes=volumes[:, :1]).logits
    torch.testing.assert_close(model(**inputs, volumes=volumes, chunk_mask=mask).logits, shorter, atol=1e-5, rtol=1e-4)


def test_left_and_right_padding_give_the_same_answer(made):
    model, processor = made
    volumes, questions = scans(2), ["Effusion?", QUESTION]
    losses = [
        model(**processor.encode(questions, TEXTS, padding_side=side), volumes=volumes).loss
        for side in ("left", "right")
    ]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def test_one_encoding_serves_several_sequences_as_neighbours_or_tiled(made, monkeypatch):
    model, processor = made
    volumes, inputs = scans(2), processor.encode([QUESTION] * 4, [TEXTS[0], TEXTS[1]] * 2)
    asked = {name: inputs.pop(name)[:2] for name in ("question_ids", "question_mask")}
    encoded = []
    forward = model.model.vision.forward
    monkeypatch.setattr(model.model.vision, "forward", lambda v, m=None: (encoded.append(len(v)), forward(v, m))[1])
    for tile, order in ((False, [0, 0, 1, 1]), (True, [0, 1, 0, 1])):
        encoded.clear()
        given = model(**inputs, **asked, volumes=volumes, tile_scans=tile).logits
        assert encoded == [2]
        repeated = {name: value[order] for name, value in asked.items()}
        torch.testing.assert_close(given, model(**inputs, **repeated, volumes=volumes[order]).logits)


def test_several_questions_of_a_scan_share_its_features(made):
    model, processor = made
    questions = ["Is there an effusion?", "Is the liver normal?", QUESTION, "Any nodule?"]
    inputs = processor.encode(questions, ["yes"] * 4)
    given = model(**inputs, volumes=scans(2)).logits
    torch.testing.assert_close(given, model(**inputs, volumes=scans(2).repeat_interleave(2, 0)).logits)


def test_generation_with_the_cache_is_the_argmax_of_the_full_forward(made):
    model, processor = made
    questions, volumes = [QUESTION, "Effusion?"], scans(2)
    inputs = processor.encode(questions)
    asked = {name: inputs.pop(name) for name in ("question_ids", "question_mask")}
    tokens = model.encode_volumes(volumes, **asked)
    written = model.generate(**inputs, visual_tokens=tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    banned = torch.zeros(model.config.text_config.vocab_size)
    banned[processor.tokenizer.eos_token_id] = float("-inf")
    for _ in range(6):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, mask, places, visual_tokens=tokens).logits[:, -1] + banned
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert torch.equal(written, ids)


def test_samples_of_a_scan_need_one_encoding(made, monkeypatch):
    model, processor = made
    encoded = []
    forward = model.model.vision.forward
    monkeypatch.setattr(model.model.vision, "forward", lambda v, m=None: (encoded.append(len(v)), forward(v, m))[1])
    torch.manual_seed(0)
    written = model.generate(
        **processor.encode([QUESTION] * 2), volumes=scans(2), do_sample=True, num_return_sequences=3, max_new_tokens=5
    )
    assert written.shape[0] == 6 and encoded == [2]
    assert len({tuple(row.tolist()) for row in written[:3]}) > 1


def test_saved_and_loaded_through_every_door(made, tmp_path):
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    inputs, volumes = batch(processor), scans(2)
    expected = model(**inputs, volumes=volumes).logits
    doors = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM)
    for door in (Mu2ForConditionalGeneration, *doors):
        loaded = door.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, Mu2ForConditionalGeneration)
        torch.testing.assert_close(loaded(**inputs, volumes=volumes).logits, expected)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, Mu2Model)
    hidden = base(**{name: t for name, t in inputs.items() if name != "labels"}, volumes=volumes).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected)
    for read in (AutoProcessor.from_pretrained(tmp_path), load(str(tmp_path))[1]):
        assert isinstance(read, Mu2Processor) and read.spec == processor.spec
        assert all(torch.equal(value, inputs[name]) for name, value in batch(read).items())


def test_running_statistics_are_in_the_checkpoint_and_frozen_with_the_vision(tmp_path):
    model, processor = make(vision={"stem": "conv", "standardise": True, "standardise_input": True})
    model.train()
    model.freeze_vision()
    before = {name: b.clone() for name, b in model.model.vision.named_buffers()}
    model.train()(**batch(processor), volumes=scans(2)).loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in model.model.vision.named_buffers())
    assert all(p.grad is None for p in model.model.vision.parameters())
    assert model.model.projector.standardise.updates == 1
    model.save_pretrained(tmp_path)
    read = Mu2ForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(b, dict(read.named_buffers())[name]) for name, b in model.named_buffers())


def test_the_vision_of_another_checkpoint_is_taken_over_whole_or_not_at_all(made, tmp_path):
    source, _ = made
    source.save_pretrained(tmp_path / "same")
    target, _ = make(seed=5)
    load_vision(target, str(tmp_path / "same"))
    torch.testing.assert_close(target.encode_vision(scans(2)), source.encode_vision(scans(2)))
    wider, _ = make(vision={"hidden_size": 32})
    with pytest.raises(UserError, match="does not fit"):
        load_vision(wider, str(tmp_path / "same"))
    with pytest.raises(UserError, match="no \\*\\.safetensors"):
        load_vision(wider, str(tmp_path))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, processor = make()
    inputs, gradients = batch(processor), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert model.model.mu2_tokenizer.layers[0].gradient_checkpointing
            assert model.model.vision.tower.blocks[0].gradient_checkpointing
        model.zero_grad()
        model.train()(**inputs, volumes=scans(2), use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for given, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_says_nearly_the_same(made):
    _, processor = made
    model, _ = make()
    inputs = batch(processor)
    exact = model(**inputs, volumes=scans(2)).logits
    rough = model.bfloat16()(**inputs, volumes=scans(2)).logits.float()
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).min() > 0.98


def test_whole_on_the_meta_device():
    settings = experiment()
    config = configuration(settings.model, settings.data.spec, text_config(settings.model))
    with torch.device("meta"):
        model = Mu2ForConditionalGeneration(config)
        tokens = model.encode_volumes(torch.zeros(3, *settings.data.spec.shape), return_selection=True)
        assert tokens.tokens.shape == (3, 4, 32) and tokens.selection.shape == (3, 4, 2, 2, 4, 4)
        masked = model.encode_volumes(torch.zeros(3, *settings.data.spec.shape), torch.ones(3, 2, dtype=torch.bool))
        assert masked.tokens.shape == (3, 4, 32)
        ids = torch.zeros(3, 20, dtype=torch.long)
        logits = model(ids, torch.ones_like(ids), visual_tokens=tokens).logits
    assert logits.shape == (3, 20, 320) and logits.is_meta


def test_the_saliency_map_is_over_the_patches(made):
    model, _ = made
    mask = torch.tensor([[True, True], [True, False]])
    out = model.encode_volumes(scans(2), mask, return_selection=True)
    assert out.selection.shape == (2, 4, 2, 2, 4, 4)
    torch.testing.assert_close(out.selection.sum((2, 3, 4, 5)), torch.ones(2, 4))
    assert out.selection[1, :, 1].abs().max() == 0


def test_the_saliency_map_comes_with_the_logits_on_request(made):
    model, processor = made
    inputs, volumes = batch(processor), scans(2)
    asked = {name: inputs[name] for name in ("question_ids", "question_mask")}
    out = model(**inputs, volumes=volumes, return_selection=True)
    expected = model.encode_volumes(volumes, **asked, return_selection=True)
    torch.testing.assert_close(out.selection, expected.selection)
    torch.testing.assert_close(model(**inputs, visual_tokens=expected, return_selection=True).selection, out.selection)
    assert model(**inputs, volumes=volumes).selection is None
    with pytest.raises(UserError, match="return_selection needs a scan"):
        model(**inputs, visual_tokens=expected.tokens, return_selection=True)


def test_metrics_of_the_selection_move_nothing(made):
    model, _ = make(tokenizer={"standardise": True}, vision={"standardise": True})
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    metrics = model.selection_metrics(volumes=scans(3), chunk_mask=torch.ones(3, 2, dtype=torch.bool))
    assert model.training and all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    alone = model.eval().encode_volumes(scans(3)[:1], return_selection=True)
    assert metrics == pytest.approx(
        {"selection_entropy": float(alone.entropy), "selection_similarity": float(alone.similarity)}
    )


def test_a_frozen_language_model_leaves_the_rest_to_train():
    model, processor = make()
    model.freeze_language_model()
    model.train()(**batch(processor), volumes=scans(2)).loss.backward()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"vision", "projector", "mu2_tokenizer"}


def test_trains_without_a_chunk_mask_too():
    model, processor = make(vision={"stem": "conv", "standardise": True, "standardise_input": True})
    losses = [
        model.train()(**batch(processor), volumes=scans(2), chunk_mask=mask).loss
        for mask in (None, torch.ones(2, 2, dtype=torch.bool))
    ]
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"volumes": scans(2)[:, :, :, :2]}, r"shape \(2, 2, 1, 2, 16, 16\).*up to 2 chunks, 1, 4, 16, 16"),
        ({"volumes": scans(2, chunks=3)}, r"\(2, 3, 1, 4, 16, 16\)"),
        ({"volumes": scans(2), "chunk_mask": torch.zeros(2, 2, dtype=torch.bool)}, "without any chunk"),
        ({"volumes": scans(3)}, "3 scans cannot serve 2"),
        ({"visual_tokens": torch.zeros(2, 5, 32)}, r"\[4\] volume placeholders, the scan has 5"),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(made, broken, said):
    model, processor = made
    with pytest.raises(UserError, match=said):
        model(**batch(processor), **broken)
