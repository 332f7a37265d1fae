"""Text metrics: published known answers, the libraries themselves, and odd texts."""

import json

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from mu2llm.evaluation import text_metrics as tm
from mu2llm.evaluation.bootstrap import Bootstrap

REFERENCES = [
    "Large left pleural effusion. The liver is normal.",
    "No pneumothorax. Small nodule in the right upper lobe.",
    "Normal examination of chest and abdomen.",
]
CANDIDATES = [
    "Small left pleural effusion. The liver is normal.",
    "No pneumothorax. The heart is normal.",
    "Normal examination of chest and abdomen.",
]
PAIRS = list(zip(REFERENCES, CANDIDATES, strict=True))


def value(statistic):
    estimate = Bootstrap(range(len(statistic.rows)), resamples=100).estimate(statistic)
    return None if estimate is None else estimate.value


def test_bleu_of_the_corpus_is_sacrebleus():
    scores = tm.bleu(PAIRS)
    for order in tm.ORDERS:
        expected = sacrebleu.BLEU(max_ngram_order=order).corpus_score(CANDIDATES, [REFERENCES]).score / 100
        assert value(scores[f"bleu_{order}"]) == pytest.approx(expected, abs=1e-9)
    assert "tok:13a" in tm.bleu_signature()


def test_bleu_interval_is_of_the_corpus_score():
    estimate = Bootstrap(range(3), resamples=200, seed=3).estimate(tm.bleu(PAIRS)["bleu_1"])
    assert 0 < estimate.low < estimate.value < estimate.high <= 1
    assert estimate.n == 3


def test_known_rouge():
    # rouge_score's own tests: one word of three, F = 0.5; two of three as a subsequence, F = 0.8
    assert value(tm.rouge([("testing one two", "testing")])["rouge_1"]) == pytest.approx(0.5)
    assert value(tm.rouge([("testing one two", "testing two")])["rouge_l"]) == pytest.approx(0.8)
    assert value(tm.rouge([("two nodules", "two nodule")])["rouge_2"]) == pytest.approx(1.0)  # stemmed


WORDS = st.lists(st.sampled_from(["left", "lung", "nodules", "nodule", "is", "normal", "3", "mm"]), max_size=30)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reference=WORDS, candidate=WORDS)
def test_rouge_is_the_packages(reference, candidate):
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    pair = " ".join(reference), " ".join(candidate)
    expected = RougeScorer(list(names.values()), use_stemmer=True).score(*pair)
    for ours, statistic in tm.rouge([pair]).items():
        assert value(statistic) == pytest.approx(expected[names[ours]].fmeasure), ours


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reference=WORDS, candidate=WORDS)
def test_counts_of_bleu_are_sacrebleus(reference, candidate):
    reference, candidate = " ".join(reference), " ".join(candidate)
    score = sacrebleu.BLEU(effective_order=True).sentence_score(candidate, [reference])
    expected = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    assert tm.bleu([(reference, candidate)])["bleu_4"].rows[0].tolist() == expected


def test_meteor_without_wordnet_counts_exact_words_and_stems(monkeypatch):
    monkeypatch.setattr(tm, "synonyms", lambda: tm._NoWordNet())
    assert "WordNet is not installed" in tm.meteor_variant()
    assert value(tm.meteor([("this is a cat", "non matching hypothesis")])) == 0.0
    # one chunk of m matches scores 1 − 0.5/m³
    assert value(tm.meteor([("small nodules", "small nodule")])) == pytest.approx(1 - 0.5 / 2**3)
    assert value(tm.meteor([("large nodule", "big nodule")])) < 0.6


def published(shared, name):
    entries = json.loads((shared / "data" / "metrics" / "metrics_reference.json").read_text())
    return [entry for entry in entries if entry["metric"].startswith(name)]


def test_published_rouge(shared):
    entries = published(shared, "rouge_score")
    assert entries
    for entry in entries:
        name = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}[entry["metric"].split()[1]]
        pairs = list(zip(entry["refs"], entry["hyps"], strict=True))
        assert value(tm.rouge(pairs)[name]) == pytest.approx(entry["published"][2])


def test_bleu_of_the_published_corpora(shared):
    """Their first references alone, for a case has one, under our defaults: sacrebleu's number for these."""
    entries = [e for e in published(shared, "sacrebleu.corpus_bleu") if len(e["refs"][0]) == len(e["hyps"])]
    assert entries
    for entry in entries:
        pairs = list(zip(entry["refs"][0], entry["hyps"], strict=True))
        expected = sacrebleu.corpus_bleu(entry["hyps"], [entry["refs"][0]]).score / 100
        assert value(tm.bleu(pairs)["bleu_4"]) == pytest.approx(expected, abs=1e-9)


def test_published_meteor(shared):
    if "not installed" in tm.meteor_variant():
        pytest.skip("the published METEOR values need WordNet")
    for entry in published(shared, "nltk meteor"):
        if len(entry["refs"]) == 1:
            pair = (" ".join(entry["refs"][0]), " ".join(entry["hyps"][0]))
            assert value(tm.meteor([pair])) == pytest.approx(entry["published"], abs=1e-4)


class Letters:
    """An encoder whose tokens are words, each with a vector of its own; special tokens at both ends."""

    def tokens(self, texts):
        rng = {}
        out = []
        for text in texts:
            words = ["<s>", *text.split(), "</s>"]
            out.append(
                np.stack([rng.setdefault(w, np.random.default_rng(abs(_hash(w))).normal(size=8)) for w in words])
            )
        return out


def _hash(word):
    return int.from_bytes(word.encode()[:8].ljust(8, b"\0"), "big")


@pytest.mark.slow
def test_bert_score_is_the_packages():
    utils = pytest.importorskip("bert_score.utils")
    import torch

    for reference, candidate in PAIRS:
        [ours] = tm.bert_score([(reference, candidate)], Letters())
        ref, hyp = (torch.tensor(t)[None] for t in Letters().tokens([reference, candidate]))
        weights = [torch.ones(1, t.shape[1], dtype=t.dtype) for t in (ref, hyp)]
        for weight in weights:
            weight[:, [0, -1]] = 0
        masks = [torch.ones(1, t.shape[1]) for t in (ref, hyp)]
        _, _, f1 = utils.greedy_cos_idf(ref.clone(), masks[0], weights[0], hyp.clone(), masks[1], weights[1])
        assert ours == pytest.approx(float(f1), abs=1e-6)


def test_bert_score_knows_equal_and_empty():
    pairs = [("same words", "same words"), ("some words", "")] * 100
    assert tm.bert_score(pairs, Letters()) == pytest.approx([1.0, 0.0] * 100)


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(reference=TEXT, candidate=TEXT)
def test_any_text_scores_between_0_and_1(reference, candidate):
    for name, statistic in tm.text_metrics([(reference, candidate)]).items():
        score = value(statistic)
        assert 0 <= score <= 1 + 1e-9, name
