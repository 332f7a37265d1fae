"""The published implementation's numbers (../shared/golden), through the converter's own key map."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mu2llm.model import convert

TOKENIZERS = ["mu2tokenizer_rpe_dts_dmtp", "mu2tokenizer_rpe_topk", "mu2tokenizer_rope_dts_dmtp"]


@pytest.fixture
def golden(shared):
    def read(name):
        arguments = json.loads((shared / "golden" / "configs.json").read_text())[name]
        arguments.pop("seed")
        tensors = load_file(shared / "golden" / f"{name}.safetensors")
        weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
        return weights, arguments, tensors

    return read


def close(given, expected):
    assert given.shape == expected.shape
    assert (given - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_agrees_with_the_published_numbers_at_every_step(golden, name):
    weights, arguments, known = golden(name)
    module = convert.load_reference_tokenizer(weights, **arguments)
    with torch.no_grad():
        significance = module.tokenizer.significance(known["input.visual"].double())
        selected = module.tokenizer.select(significance)
        multiscale, _, _ = module.tokenizer.pooling(selected.tokens, selected.valid)
        close(significance, known["output.significance"])
        close(selected.tokens, known["output.selected"])
        close(multiscale, known["output.multiscale"])
        close(module(known["input.visual"], known["input.text"]), known["output.tokens"])


def test_vision_and_projector_agree_with_the_published_numbers(golden):
    weights, arguments, known = golden("vision_projector")
    module = convert.load_reference_vision(weights, **arguments)
    with torch.no_grad():
        vision, projected = module(known["input.volume"])
    close(vision, known["output.vision"])
    close(projected, known["output.projected"])
