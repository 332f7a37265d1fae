"""Several series of an examination: which one a chunk is of, and that nothing else tells them apart."""

import pytest
import torch
from small_models import QUESTION, TEXTS, experiment, scatter, text, tokenizer, unreached, visual

from mu2llm import config, ct
from mu2llm.ct import phantom
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForConditionalGeneration, Mu2TokenizerConfig, build
from mu2llm.model.configuration import Mu2ContrastiveConfig
from mu2llm.model.initialisation import initialise
from mu2llm.model.memory import training_memory
from mu2llm.model.text_pooling import TextConditionedPooling

ATTENTION = ("absolute", "relative_1d", "relative_3d", "rotary_1d", "rotary_3d")


def of_two(**changes):
    """The least experiment, with two series of two chunks."""
    values = experiment().model_dump(mode="json")
    values["data"]["spec"] |= {"series": 2, **changes}
    return config.validate(values)


def turned(x):
    """(B, 2·chunks, …): the second series before the first."""
    return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


@pytest.mark.parametrize("attention", ATTENTION)
def test_only_the_embedding_tells_series_apart(attention):
    """Places and distances are the same in each, so that without it their order says nothing."""
    module = tokenizer(series=2, chunks=6, attention=attention, max_positions=12).double()
    seen, asked = visual(chunks=6).double(), text().double()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    given, other = (module(each, asked, m).tokens for each, m in ((seen, mask), (turned(seen), turned(mask))))
    assert (given - other).abs().max() > 1e-3
    torch.nn.init.zeros_(module.series.each)
    given, other = (module(each, asked, m).tokens for each, m in ((seen, mask), (turned(seen), turned(mask))))
    torch.testing.assert_close(given, other)


def test_a_missing_series_changes_nothing_and_the_first_is_as_alone():
    module, alone = tokenizer(series=2, chunks=6).double(), tokenizer(chunks=3).double()
    torch.nn.init.zeros_(module.series.each)
    alone.load_state_dict({n: p for n, p in module.state_dict().items() if n != "series.each"})
    seen, asked = visual(chunks=6).double(), text().double()
    mask = torch.tensor([[True] * 3 + [False] * 3] * 2)
    expected = alone(seen[:, :3], asked, mask[:, :3]).tokens
    torch.testing.assert_close(module(seen, asked, mask).tokens, expected)


def test_the_gradient_reaches_the_embedding_which_starts_as_nothing():
    module = tokenizer(series=2, chunks=6).double()
    module.series.apply(initialise)
    assert module.series.each.shape == (2, 24) and not module.series.each.any()
    module(visual(chunks=6).double(), text().double()).tokens.square().sum().backward()
    assert not any(name.startswith("series") for name in unreached(module))
    assert (module.series.each.grad.norm(dim=1) > 1e-6).all()


def test_keys_of_the_contrastive_head_know_their_place_within_a_series():
    sizes = {"hidden_size": 16, "text_width": 12, "head_width": 8, "num_heads": 2, "grid": (2, 1, 3)}
    head = scatter(TextConditionedPooling(Mu2ContrastiveConfig(**sizes, chunks=4, series=2)).apply(initialise)).double()
    assert [len(places) for places in head.places] == [4, 1, 3] and head.chunks.shape == (2, 16)
    features, texts, mask = torch.randn(2, 4, 6, 16).double(), torch.randn(5, 12).double(), torch.ones(2, 24).bool()
    given, other = (head(texts, head.scan(each), mask) for each in (features, turned(features)))
    assert (given - other).abs().max() > 1e-3
    torch.nn.init.zeros_(head.series.each)
    given, other = (head(texts, head.scan(each), mask) for each in (features, turned(features)))
    torch.testing.assert_close(given, other)


def test_a_model_of_two_series_is_saved_and_reads_one_or_both(tmp_path):
    settings = of_two()
    model, processor = build(settings.model, settings.data.spec, TEXTS * 4)
    scatter(model).eval().save_pretrained(tmp_path / "saved")
    loaded = Mu2ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.tokenizer.series == 2 and loaded.config.tokenizer.chunks == 4
    scans = [ct.CTVolume(made.hu, made.affine) for made in (phantom.make(0, 0), phantom.make(1, 1))]
    inputs = processor.prepare([scans, scans[::-1], scans[0]])
    assert inputs["volumes"].shape == (3, 4, 1, 4, 16, 16)
    assert inputs["chunk_mask"].tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]
    asked = {name: each.expand(3, -1) for name, each in processor.encode([QUESTION]).items() if "question" in name}
    with torch.no_grad():
        seen, again = (each.encode_volumes(**inputs, **asked, return_selection=True) for each in (model, loaded))
    assert torch.equal(seen.tokens, again.tokens) and seen.selection.shape[2] == 4
    assert not seen.selection[2, :, 2:].any() and seen.selection[0, :, 2:].any()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (seen.tokens[one] - seen.tokens[other]).abs().max() > 1e-4
    first = ct.whole(inputs["volumes"][0].numpy(), settings.data.spec)
    assert torch.equal(torch.from_numpy(first), torch.cat(list(inputs["volumes"][0, :2]), dim=1))
    with pytest.raises(UserError, match=r"3 series of an examination; spec least \(.*, 2 series\) reads 2"):
        processor.prepare([[*scans, scans[0]]])


def test_one_series_says_nothing_new_in_configurations_and_specs():
    model, _ = build(experiment().model, experiment().data.spec, TEXTS * 4)
    assert model.model.mu2_tokenizer.series is None and not any("series" in name for name in model.state_dict())
    assert "series" not in Mu2TokenizerConfig(hidden_size=24).to_dict()
    assert "series" not in Mu2ContrastiveConfig().to_dict() and "series" not in Mu2ContrastiveConfig().head
    assert Mu2ContrastiveConfig(**Mu2ContrastiveConfig(series=2).head).series == 2
    assert "series" not in experiment().data.spec.model_dump()
    assert of_two().data.spec.hash != experiment().data.spec.hash == of_two(series=1).data.spec.hash
    tower = config.load("demo", ["model.vision.tower=merlin", "data.spec.series=3"]).data.spec
    assert (tower.name, tower.series, tower.shape[0]) == ("merlin", 3, 3)


def test_the_memory_model_counts_all_series():
    one, two = (training_memory(each, "contrastive").activations for each in (experiment(), of_two()))
    assert 1.6 * one < two < 2.1 * one
