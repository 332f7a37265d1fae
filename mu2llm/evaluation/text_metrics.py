"""How similar two reports are as text: BLEU (sacrebleu), ROUGE (rouge_score), METEOR (nltk), BERTScore.

All between 0 and 1. Higher is more similar; none of them knows what matters (METHOD.md §4.2). The three packages take
a second of CPU to import, so each is imported where it scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache, partial
from typing import Any, Protocol

import numpy as np

from mu2llm.evaluation.bootstrap import Statistic

Pair = tuple[str, str]
"""(reference, candidate), as judges take it."""

ORDERS = (1, 2, 3, 4)
ROUGE = ("rouge_1", "rouge_2", "rouge_l")
TOGETHER = 128  # pairs whose token embeddings are in memory at a time


def text_metrics(pairs: Sequence[Pair]) -> dict[str, Statistic]:
    """bleu_1 … bleu_4 (of the corpus), rouge_1, rouge_2, rouge_l, meteor (means over the cases)."""
    return {**bleu(pairs), **rouge(pairs), "meteor": meteor(pairs)}


def bleu(pairs: Sequence[Pair]) -> dict[str, Statistic]:
    """Corpus BLEU of orders 1 to 4: sacrebleu's, with its default tokenizer and smoothing (see `bleu_signature`)."""
    rows = [_bleu_row(_grams(reference), _grams(candidate)) for reference, candidate in pairs]
    table = np.array(rows, dtype=float).reshape(-1, 10)
    return {f"bleu_{order}": Statistic(table, partial(_bleu, order)) for order in ORDERS}


@lru_cache(maxsize=4096)
def _grams(text: str) -> tuple[Counter[tuple[str, ...]], ...]:
    """How often each n-gram of sacrebleu's tokens occurs, by order: the floors score the same texts again and again."""
    words = _tokenizer()(text.rstrip()).split()
    return tuple(_counted(words, order) for order in ORDERS)


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _counted(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(order)), strict=False))


def _bleu_row(reference: Sequence[Counter[Any]], candidate: Sequence[Counter[Any]]) -> list[int]:
    """Matches and n-grams by order, and the lengths of candidate and reference."""
    matches = [(ours & theirs).total() for ours, theirs in zip(reference, candidate, strict=True)]
    totals = [grams.total() for grams in candidate]
    return [*matches, *totals, totals[0], reference[0].total()]


def _bleu(order: int, sums: np.ndarray) -> np.ndarray:
    """Sums (…, 10) of matches, n-grams and lengths → BLEU (…)."""
    from sacrebleu.metrics import BLEU

    scores = []
    for row in sums.reshape(-1, 10):
        *counts, candidate_length, reference_length = map(int, row)
        matches, totals = counts[:order], counts[4 : 4 + order]
        score = BLEU.compute_bleu(matches, totals, candidate_length, reference_length, max_ngram_order=order)
        scores.append(min(score.score / 100, 1.0))  # the exponential of a rounded logarithm may be above
    return np.array(scores).reshape(sums.shape[:-1])


def bleu_signature() -> str:
    """What makes two BLEU numbers comparable."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    scorer.corpus_score(["a"], [["a"]])  # the signature counts the references of the last corpus
    return str(scorer.get_signature())


class _Stems:
    """Porter stems, each word's found once: reports use few words, many times."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=65536)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """What rouge_score makes of a text."""
        from rouge_score.tokenize import tokenize

        return tokenize(text, self)


_stems = cache(_Stems)


@lru_cache(maxsize=4096)
def stemmed(text: str) -> tuple[str, ...]:
    """What rouge_score makes of a text: its words, stemmed."""
    return tuple(_stems().tokenize(text))


def rouge(pairs: Sequence[Pair]) -> dict[str, Statistic]:
    """ROUGE-1, -2 and -L as F-measure with stemming, as the published evaluation has it (METHOD.md §2.6).

    rouge_score's tokens and numbers; its table of the longest common subsequence takes 0.1 s a pair of CT reports.
    """
    scores = [_rouge(stemmed(reference), stemmed(candidate)) for reference, candidate in pairs]
    columns = zip(*scores, strict=True) if scores else ((), (), ())
    return {name: Statistic.mean(list(column)) for name, column in zip(ROUGE, columns, strict=True)}


def _rouge(reference: Sequence[str], candidate: Sequence[str]) -> tuple[float, float, float]:
    ones, twos = ((_counted(reference, order) & _counted(candidate, order)).total() for order in (1, 2))
    n, m = len(reference), len(candidate)
    return _f1(ones, n, m), _f1(twos, n - 1, m - 1), _f1(_common(reference, candidate), n, m)


def _f1(hits: int, n: int, m: int) -> float:
    return 2 * hits / (n + m) if hits else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyrö 2004, bit-parallel LCS)."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & whole
    return len(first) - row.bit_count()


class _NoWordNet:
    """Stands where nltk's METEOR asks for synonyms: there are none."""

    def synsets(self, word: str) -> list[Any]:
        return []


@cache
def synonyms() -> Any:
    """WordNet where its data is installed (`python -m nltk.downloader wordnet`), else a stand-in without entries."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoWordNet()
    return wordnet


def meteor_variant() -> str:
    """Which of METEOR's stages took part."""
    if isinstance(synonyms(), _NoWordNet):
        return "exact and stem; no synonyms, for WordNet is not installed (python -m nltk.downloader wordnet)"
    return "exact, stem and WordNet synonyms"


def meteor(pairs: Sequence[Pair]) -> Statistic:
    """nltk's METEOR of lower-cased tokens between spaces; `meteor_variant` says whether synonyms count."""
    from nltk.translate.meteor_score import single_meteor_score

    return Statistic.mean(
        [
            single_meteor_score(reference.split(), candidate.split(), stemmer=_stems(), wordnet=synonyms())
            for reference, candidate in pairs
        ]
    )


class TokenEncoder(Protocol):
    """Contextual embeddings of tokens."""

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text → (tokens, width), the first and the last of them the special ones."""
        ...


def bert_score(pairs: Sequence[Pair], encoder: TokenEncoder) -> list[float]:
    """BERTScore F1 (arXiv 1904.09675) of each pair, without idf and without baseline rescaling.

    As in the authors' package, special tokens may be matched but do not count themselves. Texts that come again
    within a few pairs are encoded once.
    """
    scores: list[float] = []
    for start in range(0, len(pairs), TOGETHER):
        some = pairs[start : start + TOGETHER]
        distinct = sorted({text for pair in some for text in pair})
        known = dict(zip(distinct, map(_normalised, encoder.tokens(distinct)), strict=True))
        scores += [_greedy_f1(known[reference], known[candidate]) for reference, candidate in some]
    return scores


def _normalised(tokens: np.ndarray) -> np.ndarray:
    return tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)


def _greedy_f1(reference: np.ndarray, candidate: np.ndarray) -> float:
    if len(reference) <= 2 or len(candidate) <= 2:  # an empty text is its special tokens
        return 0.0
    similarity = candidate @ reference.T
    precision = float(similarity.max(axis=1)[1:-1].mean())
    recall = float(similarity.max(axis=0)[1:-1].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
