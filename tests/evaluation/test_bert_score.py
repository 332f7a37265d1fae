"""BERTScore by actors is that of one process, and the driver loads no encoder for it."""

import random

import pytest

from mu2llm import config, weights
from mu2llm.errors import UserError
from mu2llm.evaluation import bert_score
from mu2llm.evaluation.bert_score import BertScore

TEXT = "there is a small nodule in the right upper lobe without effusion or consolidation seen"
WORDS = TEXT.split()


@pytest.fixture
def encoder(tmp_path):
    """The folder of an encoder that takes few tokens."""
    small = weights.text_encoder("small", [TEXT] * 4)
    most = small.model.config.max_position_embeddings
    small.model.save_pretrained(tmp_path / "encoder")
    small.tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder"), most


def report(seed, words):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.mark.slow
def test_by_actors_as_in_one_process(ray_cluster, encoder, monkeypatch):
    name, most = encoder
    pairs = [(report(i % 7, 5 + i % 5), report(i, 3 + i % 9)) for i in range(300)] + [("", report(1, 4))]
    pairs.append((report(2, 2 * most), report(3, 5)))
    settings = config.load("tiny").evaluation
    here, there = BertScore(name, settings), BertScore(name, settings)
    expected = here.scores(pairs)
    monkeypatch.setattr(bert_score, "MANY", len(pairs))
    assert there.scores(pairs) == pytest.approx(expected, abs=1e-6)
    assert there._here is None  # no encoder was loaded in this process
    assert there.description == here.description == f"{here.identity}; 1 texts were cut at {most} tokens"
    assert 0 < min(score for score in expected if score) < max(expected) <= 1


def test_an_encoder_that_is_not_there_is_told_before_anything_is_judged(tmp_path):
    with pytest.raises(UserError, match="text encoder"):
        BertScore(str(tmp_path / "none"), config.load("tiny").evaluation)
