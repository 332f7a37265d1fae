"""Judged candidates → preference pairs, by rule; pure functions without Ray or model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mu2llm.records import Candidate, Judgement, PreferencePair
from mu2llm.settings.stages import PreferencesConfig

Judged = tuple[Candidate, Judgement]


def make_pairs(
    prompt: str, judged: Sequence[Judged], settings: PreferencesConfig
) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs of one case, best against worst and inwards, and why others were dropped.

    Invalid judgements take no part; a pair needs a difference of at least `margin` (and above 0: no ties) and,
    where `max_length_ratio` is given, lengths that do not differ by more than it. No candidate is used twice.
    """
    dropped: Counter[str] = Counter()
    valid = [(candidate, judgement) for candidate, judgement in judged if judgement.valid]
    dropped["invalid_judgement"] += len(judged) - len(valid)
    # ties in score are ordered by index, so that the same judgements always give the same pairs
    ranked = sorted(valid, key=lambda item: (-(item[1].score or 0.0), item[0].index))
    if len(ranked) < 2:
        dropped["too_few_candidates"] += 1
        return [], dropped
    pairs: list[PreferencePair] = []
    for better, worse in zip(ranked, reversed(ranked), strict=False):
        if len(pairs) == settings.pairs_per_case or better[0].index == worse[0].index:
            break
        reason = _unfit(better, worse, settings)
        if reason:
            dropped[reason] += 1
            if reason in ("tie", "margin"):  # further in, the differences only get smaller
                break
        else:
            pairs.append(_pair(prompt, better, worse))
    return pairs, dropped


def _unfit(better: Judged, worse: Judged, settings: PreferencesConfig) -> str | None:
    difference = (better[1].score or 0.0) - (worse[1].score or 0.0)
    if difference <= 0:
        return "tie"
    if difference < settings.margin:
        return "margin"
    lengths = [max(1, len(item[0].text.split())) for item in (better, worse)]
    if settings.max_length_ratio and max(lengths) / min(lengths) > settings.max_length_ratio:
        return "length"
    return None


def _pair(prompt: str, better: Judged, worse: Judged) -> PreferencePair:
    origins = {better[0].origin, worse[0].origin}
    return PreferencePair(
        case_id=better[0].case_id,
        prompt=prompt,
        chosen=better[0].text,
        rejected=worse[0].text,
        chosen_score=better[1].score,
        rejected_score=worse[1].score,
        judge=better[1].judge,
        origin="corrupted" if "corrupted" in origins else "sampled",
    )


def screen(candidates: Sequence[Candidate], min_words: int) -> tuple[list[Candidate], Counter[str]]:
    """Drops candidates that are too short or repeat an earlier one word for word."""
    kept: list[Candidate] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    for candidate in candidates:
        text = " ".join(candidate.text.split())
        if len(text.split()) < min_words:
            dropped["too_short"] += 1
        elif text in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(text)
            kept.append(candidate)
    return kept, dropped
