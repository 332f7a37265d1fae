"""Each defect of the published code (METHOD.md §2.8) that a field mends: the property holds, and fails without it."""

import pytest
import torch
from small_models import QUESTION, make, scans, text, tokenizer, unreached, visual

from mu2llm.errors import UserError
from mu2llm.model import Mu2VisionConfig
from mu2llm.model.attention import RelativeBias1d, RelativeBias3d
from mu2llm.model.initialisation import initialise
from mu2llm.model.mu2_tokenizer import entropy, similarity
from mu2llm.model.vision import pool_patches
from mu2llm.settings.model import _REFERENCE_FACE, ModelConfig


def differs(a, b):
    return bool((a - b).abs().max() > 1e-3)


@pytest.mark.parametrize("mended", [True, False])
def test_1_attention_is_over_the_tokens_and_not_over_the_batch(mended):
    module = tokenizer(attention="absolute", batch_first=mended, positions=False)
    together = module(visual(3), text(3)).tokens[:1]
    alone = module(visual(3)[:1], text(3)[:1]).tokens
    assert differs(together, alone) == (not mended)


@pytest.mark.parametrize("mended", [True, False])
def test_5_the_question_is_read_whole(mended):
    """Published: the visual tokens overwrite positions 1…n, where no BOS is, so the first question token is lost."""
    model, processor = make(placeholder_aligned=mended)
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    inputs = processor.encode([QUESTION])
    first = int((inputs["input_ids"][0] != model.config.volume_token_id).nonzero()[0])
    other = inputs["input_ids"].clone()
    other[0, first] = other[0, first + 1]
    tokens = model.encode_volumes(scans(1), question_ids=inputs["question_ids"]).tokens
    logits = [model(ids, visual_tokens=tokens).logits[:, first + 1 :] for ids in (inputs["input_ids"], other)]
    assert differs(*logits) == mended


@pytest.mark.parametrize("mended", [True, False])
def test_6_the_projector_averages_patches_that_are_neighbours(mended):
    vision = Mu2VisionConfig(chunk_shape=(8, 16, 16), patch_size=(1, 4, 4), true_grid=mended)
    place = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in vision.grid), indexing="ij"), -1).flatten(0, 2)
    means = pool_patches(place[None], vision)[0]
    squares = pool_patches(place[None].square(), vision)[0]
    spread = (squares - means.square()).sqrt()  # of the places that went into one cell
    assert bool((spread <= 0.5).all()) == mended


def test_7_a_3d_bias_depends_on_nothing_but_the_offset_in_3d_and_a_1d_bias_does():
    grid, heads = (2, 2, 3), 2
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).flatten(0, 2)
    offset = place[None] - place[:, None]
    same = (offset[:, :, None, None] == offset[None, None]).all(-1)
    for module, mended in ((RelativeBias3d(grid, heads), True), (RelativeBias1d(12, heads), False)):
        torch.nn.init.normal_(module.table)
        bias = module(12)[0, 0]
        equal = bias[:, :, None, None] == bias[None, None]
        assert bool((equal == same).all()) == mended


def test_7_a_sequence_longer_than_the_table_is_refused_by_number():
    with pytest.raises(UserError, match=r"reach over 8 tokens, the sequence has 12.*max_positions"):
        tokenizer(attention="relative_1d", max_positions=8)(visual(), text())


@pytest.mark.parametrize("mended", [True, False])
def test_7_tokens_know_where_they_are(mended):
    """With no attention and the same patch everywhere, only the place can tell tokens apart."""
    module = tokenizer(num_layers=0, positions=mended, residual=False)
    same = visual()[:, :1, :1].expand(-1, 3, 12, -1)
    significant = module.significance(same)
    assert differs(significant[:, 0], significant[:, 1]) == mended
    assert differs(significant[:, :, 0], significant[:, :, 1]) == mended


@pytest.mark.parametrize("mended", [True, False])
def test_8_a_layer_adds_to_its_input_and_does_not_replace_it(mended):
    module = tokenizer(residual=mended, positions=False)
    for layer in module.layers:
        for attention in (layer.spatial, layer.temporal):
            attention.output.weight.data.zero_()
    change = differs(module.significance(visual(seed=1)), module.significance(visual(seed=2)))
    assert change == mended


@pytest.mark.parametrize("mended", [True, False])
def test_9_the_selection_does_not_begin_as_one_mean(mended):
    selection = tokenizer(normalise_scores=mended, top_k=16, hidden_size=96).selection.apply(initialise)
    tokens = torch.randn(2, 36, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    selected = selection(tokens, return_weights=True)
    assert bool(similarity(selected.tokens) < 0.5 and entropy(selected.weights, 36) < 0.8) == mended


@pytest.mark.parametrize("mended", [True, False])
def test_9_hard_picks_teach_their_scores(mended):
    module = tokenizer(selection="top_k", straight_through=mended).double()
    module(visual().double(), text().double()).tokens.square().mean().backward()
    assert ("selection.score.weight" not in unreached(module)) == mended


def test_9_the_picked_tokens_are_the_same_either_way():
    picked = [tokenizer(selection="top_k", straight_through=way)(visual(), text()).tokens for way in (True, False)]
    torch.testing.assert_close(*picked)


@pytest.mark.parametrize("mended", [True, False])
def test_10_padding_takes_no_part(mended):
    module = tokenizer(mask_padding=mended)
    mask = torch.tensor([[True, True, False]])
    one, other = visual(1), visual(1)
    other[:, 2] = visual(1, seed=9)[:, 2]
    assert differs(module(one, text(1), mask).tokens, module(other, text(1), mask).tokens) == (not mended)
    mask = torch.tensor([[True, True, True, False]])
    question, padded = text(1), text(1)
    padded[:, 3] = text(1, seed=9)[:, 3]
    tokens = [module(visual(1), words, None, mask).tokens for words in (question, padded)]
    assert differs(*tokens) == (not mended)


def test_the_reference_face_sets_every_mend_back_and_leaves_what_is_set_by_hand():
    face = ModelConfig.model_validate({"face": "reference", "tokenizer": {"residual": True}})
    assert not face.vision.true_grid and not face.placeholder_aligned and face.tokenizer.attention == "relative_1d"
    undone = {name: getattr(face.tokenizer, name) for name in _REFERENCE_FACE["tokenizer"]}
    assert undone.pop("attention") == "relative_1d" and undone.pop("gate") == "mean" and undone.pop("residual")
    assert not any(undone.values())
