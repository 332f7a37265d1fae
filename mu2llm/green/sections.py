"""Two long reports → pairs of sections short enough for a judge's prompt, and their judgements → one.

The published way cuts both reports at 300 words. Here sentences are grouped by the part of the body that
they are about, so that what one report says of an organ meets what the other says of it, and no word is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from mu2llm.green.judge import Pair
from mu2llm.green.lexicon import lexicon
from mu2llm.green.parser import score
from mu2llm.green.sentences import sentences
from mu2llm.records import Judgement

LIMIT = 300
"""Words of either report that one prompt holds, as published."""
NOTHING_SAID = "Nothing is stated."
_Words = list[str]


def sections(pair: Pair, limit: int = LIMIT) -> list[Pair]:
    """A pair as it is if both reports are short enough, else pairs of sections of at most `limit` words each."""
    if all(len(report.split()) <= limit for report in pair):
        return [pair]
    by_region = [_by_region(report) for report in pair]
    regions = [region for region in ("", *lexicon().regions) if any(region in words for words in by_region)]
    parts = [part for region in regions for part in _parts([words.get(region, []) for words in by_region], limit)]
    packed: list[list[_Words]] = []
    for part in parts:
        if packed and all(len(old) + len(new) <= limit for old, new in zip(packed[-1], part, strict=True)):
            packed[-1] = [old + new for old, new in zip(packed[-1], part, strict=True)]
        else:
            packed.append(part)
    return [(_text(reference), _text(candidate)) for reference, candidate in packed]


def truncated(pair: Pair, limit: int) -> Pair:
    """The published way: the first `limit` words of each."""
    reference, candidate = (" ".join(report.split()[:limit]) for report in pair)
    return reference, candidate


def combine(judgements: Sequence[Judgement]) -> Judgement:
    """The judgements of a pair's sections → that of the pair: sums, or invalid if one of them is."""
    if len(judgements) == 1:
        return judgements[0]
    for number, judgement in enumerate(judgements, start=1):
        if not judgement.valid:
            return judgement.model_copy(update={"why": f"section {number} of {len(judgements)}: {judgement.why}"})
    significant, significant_sentences = _sum([(j.significant, j.significant_sentences) for j in judgements])
    insignificant, insignificant_sentences = _sum([(j.insignificant, j.insignificant_sentences) for j in judgements])
    matched = sum(judgement.matched for judgement in judgements)
    return judgements[0].model_copy(
        update={
            "score": score(matched, significant),
            "significant": significant,
            "insignificant": insignificant,
            "matched": matched,
            "significant_sentences": significant_sentences,
            "insignificant_sentences": insignificant_sentences,
            "matched_sentences": tuple(s for j in judgements for s in j.matched_sentences),
        }
    )


def _sum(
    parts: list[tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]],
) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    counts = tuple(sum(column) for column in zip(*(counts for counts, _ in parts), strict=True))
    said = [words or ((),) * len(counts) for _, words in parts]
    return counts, tuple(tuple(s for words in said for s in words[i]) for i in range(len(counts)))


def _by_region(report: str) -> dict[str, _Words]:
    """Words by part of the body; a sentence that names none goes with the one before."""
    words: dict[str, _Words] = {}
    region = ""
    for sentence in sentences(report) or (report,):
        lower = sentence.lower()
        region = next((name for name, pattern in lexicon().regions.items() if pattern.search(lower)), region)
        words.setdefault(region, []).extend((sentence if sentence[-1:] in ".!?" else f"{sentence}.").split())
    return words


def _parts(both: list[_Words], limit: int) -> list[list[_Words]]:
    """What two reports say of one region, divided evenly if it is too long."""
    number = max(1, *(-(-len(words) // limit) for words in both))
    size = [-(-len(words) // number) for words in both]
    return [[words[i * n : (i + 1) * n] for words, n in zip(both, size, strict=True)] for i in range(number)]


def _text(words: _Words) -> str:
    return " ".join(words) or NOTHING_SAID
