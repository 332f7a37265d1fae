"""Judged candidates → preference pairs, by rule; pure functions without Ray or model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mu2llm.records import Candidate, PreferencePair
from mu2llm.settings.stages import PreferencesConfig
from mu2llm.stages.rewards import Judged


def make_pairs(
    prompt: str, judged: Sequence[Judged], settings: PreferencesConfig
) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs of one case, best against worst and inwards, and why others were dropped.

    Invalid judgements take no part; a pair needs rewards that differ by at least `margin` (and above 0: no ties) and,
    where `max_length_ratio` is given, lengths that do not differ by more than it. No candidate is used twice.
    """
    dropped: Counter[str] = Counter()
    valid = [(item.reward, item) for item in judged if item.reward is not None]
    dropped["invalid_judgement"] += len(judged) - len(valid)
    # ties are ordered by index, so that the same judgements always give the same pairs
    ranked = [item for _, item in sorted(valid, key=lambda each: (-each[0], each[1].candidate.index))]
    if len(ranked) < 2:
        dropped["too_few_candidates"] += 1
        return [], dropped
    pairs: list[PreferencePair] = []
    for better, worse in zip(ranked, reversed(ranked), strict=False):
        if len(pairs) == settings.pairs_per_case or better.candidate.index == worse.candidate.index:
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
    difference = (better.reward or 0.0) - (worse.reward or 0.0)
    if difference <= 0:
        return "tie"
    if difference < settings.margin:
        return "margin"
    lengths = [max(1, len(item.candidate.text.split())) for item in (better, worse)]
    if settings.max_length_ratio and max(lengths) / min(lengths) > settings.max_length_ratio:
        return "length"
    return None


def _pair(prompt: str, better: Judged, worse: Judged) -> PreferencePair:
    origins = {better.candidate.origin, worse.candidate.origin}
    return PreferencePair(
        case_id=better.candidate.case_id,
        prompt=prompt,
        chosen=better.candidate.text,
        rejected=worse.candidate.text,
        chosen_score=better.judgement.score,
        rejected_score=worse.judgement.score,
        judge=better.judgement.judge,
        origin="corrupted" if "corrupted" in origins else better.candidate.origin,
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
