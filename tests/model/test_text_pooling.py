"""The head of the contrastive stage: each of its heads attends by itself, and their scores add up."""

import pytest
import torch

from mu2llm.model.configuration import Mu2Config, Mu2ContrastiveConfig
from mu2llm.model.initialisation import initialise
from mu2llm.model.text_pooling import TextConditionedPooling

WIDTH = 8


def pooling(heads, grid=()):
    torch.manual_seed(heads)
    config = Mu2ContrastiveConfig(
        **{"hidden_size": 16, "text_width": 12, "chunks": 2, "head_width": WIDTH, "num_heads": heads, "grid": grid}
    )
    return TextConditionedPooling(config).apply(initialise).double()


@pytest.mark.parametrize("heads", [1, 3])
def test_the_score_is_the_sum_of_heads_that_attend_by_themselves(heads):
    several = pooling(heads)
    texts, features = torch.randn(5, 12).double(), torch.randn(2, 2, 7, 16).double()
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, 7:] = False
    alone = pooling(1)
    alone.norm.load_state_dict(several.norm.state_dict())
    alone.chunks.data.copy_(several.chunks)
    total = 0
    for head in range(heads):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        for name in ("look", "mean", "key", "value"):
            getattr(alone, name).weight.data.copy_(getattr(several, name).weight[part])
        total = total + alone(texts, alone.scan(features), mask)
    torch.testing.assert_close(several(texts, several.scan(features), mask), total)


def test_a_key_knows_its_place_along_each_axis_of_the_whole_scan():
    """Two chunks of 2 × 1 × 3 tokens that are all alike: a text that looks for the fourth depth and the last column
    finds the very last token, and what it says of it."""
    head = pooling(1, grid=(2, 1, 3))
    text, features = torch.randn(1, 12).double(), torch.randn(1, 2, 6, 16).double()
    look = head.look(text)[0].detach()
    z, y, x = head.places
    z.data[3], y.data[0], x.data[2] = 100 * look, -7 * look, 100 * look
    every = torch.ones(1, 12, dtype=torch.bool)
    value = head.value(head.scan(features))[0, -1]
    torch.testing.assert_close(head(text, head.scan(features), every)[0, 0], value @ head.mean(text)[0])


def test_fewer_chunks_are_the_first():
    head = pooling(2, grid=(2, 1, 3))
    for places in head.places:
        torch.nn.init.normal_(places)
    texts, features, mask = torch.randn(4, 12).double(), torch.randn(3, 2, 6, 16).double(), torch.ones(3, 12).bool()
    mask[:, 6:] = False
    alone = head(texts, head.scan(features[:, :1]), mask[:, :6])
    torch.testing.assert_close(alone, head(texts, head.scan(features), mask))


def test_an_older_checkpoint_has_one_head_without_places():
    older = Mu2ContrastiveConfig.from_dict({"hidden_size": 16})
    assert older.num_heads == 1 and not TextConditionedPooling(older).places
    sizes = {"findings": ["left pneumothorax"], "finding_text_width": 12, "finding_head_width": 24}
    vision = {"hidden_size": 16, "chunk_shape": [8, 16, 16], "patch_size": [4, 8, 8], "chunks": 2}
    config = Mu2Config.from_dict({"vision_config": vision, **sizes})
    assert config.finding_head == {"text_width": 12, "head_width": 24, "hidden_size": 16, "chunks": 2}
    assert Mu2Config.from_dict(config.to_dict()).finding_head == config.finding_head
