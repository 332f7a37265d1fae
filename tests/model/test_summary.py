"""What `model summary` says is what the model is."""

import math

import pytest
import torch
from small_models import experiment, make, scans

from mu2llm import config
from mu2llm.model.summary import summarise


@pytest.fixture(scope="module")
def paper():
    preset = config.load("paper")
    return summarise(preset.model, preset.data.spec)


def test_shapes_of_the_paper_are_the_published_ones(paper):
    shapes = dict(paper.steps)
    assert shapes["volume"] == (1, 8, 3, 32, 256, 256)
    assert shapes["patches"][1] == 2048 and shapes["vision"][1] == 2049
    assert shapes["pooled"][1:3] == (8, 256)
    assert shapes["selected"][1] == 1024 and shapes["multi-scale"][1] == 1792
    assert shapes["visual tokens"] == (1, 256, 2048)


def test_parameters_of_the_paper_by_part(paper):
    parameters = paper.parameters
    assert parameters["language model"] == pytest.approx(1.2358e9, rel=1e-3)  # Llama-3.2-1B's own count
    # 12 blocks of 4·768² + 2·768·3072 weights, and what is around them
    assert parameters["vision"] == pytest.approx(12 * (4 * 768**2 + 2 * 768 * 3072), rel=0.06)


def test_counts_are_those_of_a_model_that_was_built():
    settings = experiment()
    made, _ = make()
    summary = summarise(settings.model, settings.data.spec)
    assert sum(summary.parameters.values()) == sum(p.numel() for p in made.parameters())
    assert dict(summary.steps)["visual tokens"] == tuple(made.encode_volumes(scans(1)).tokens.shape)


def test_flops_follow_the_shapes():
    """A linear map of n tokens is 2·n·in·out: a wider feed-forward costs just that much more."""

    def flops(mlp):
        settings = experiment(vision={"mlp_dim": mlp})
        return summarise(settings.model, settings.data.spec).flops["vision"]

    tokens, width = 2 * math.prod((2, 4, 4)), 24
    assert flops(64) - flops(32) == 2 * 2 * tokens * width * 32


def test_attention_is_counted():
    """QKᵀ and the weighted sum: 4·n²·width for each chunk and layer, more than the projections at this length."""
    settings = experiment(vision={"num_layers": 1})
    more = experiment(vision={"num_layers": 2})
    one, two = (summarise(s.model, s.data.spec).flops["vision"] for s in (settings, more))
    n, width, mlp = math.prod((2, 4, 4)), 24, 32
    assert two - one == 2 * (2 * n * (4 * width**2 + 2 * width * mlp) + 4 * n * n * width)


def test_summary_reads_as_text_and_as_json():
    settings = experiment()
    summary = summarise(settings.model, settings.data.spec)
    assert "visual tokens" in str(summary) and "GFLOP" in str(summary)
    values = summary.as_dict()
    assert values["bytes"]["weights"] == 2 * values["parameters"]["all"]
    assert values["bytes"]["activations"] > 0 and not torch.is_tensor(values["flops"]["all"])
