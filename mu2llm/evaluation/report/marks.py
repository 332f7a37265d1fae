"""What the page marks in texts: sentences that are right, wrong or missed, and words that differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mu2llm import green
from mu2llm.records import ERROR_CATEGORIES, Finding, Judgement

SHORT = {"a": "false", "b": "missed", "c": "place", "d": "severity", "e": "comparison made up", "f": "change omitted"}
"""GREEN's categories in a word."""
Mark = Literal["right", "wrong", "missed", "plain"]


@dataclass(frozen=True)
class Sentence:
    text: str
    mark: Mark


@dataclass(frozen=True)
class Piece:
    """Words that both texts have, or only the old (`del`) or the new (`ins`) one."""

    text: str
    kind: Literal["same", "del", "ins"]


def mark(text: str, truth: Sequence[Finding], absent: Mark) -> list[Sentence]:
    """The sentences of a report: `right` where all findings that they state are among `truth`, `absent` where not,
    `plain` where they state none. For a candidate `absent` is wrong, for a reference it is missed."""
    known = {(finding.name, side) for finding in truth for side in _sides(finding)}
    names = {finding.name for finding in truth}
    marked = []
    for sentence in green.sentences(text):
        stated = green.findings(sentence)
        fits = all(
            finding.name in names if finding.side is None else {(finding.name, s) for s in _sides(finding)} <= known
            for finding in stated
        )
        marked.append(Sentence(sentence, "plain" if not stated else "right" if fits else absent))
    return marked


def _sides(finding: Finding) -> tuple[str | None, ...]:
    """Left and right for both; a finding named without its side goes with either, and with none."""
    if finding.side in (None, "bilateral"):
        return ("left", "right", None) if finding.side is None else ("left", "right")
    return (finding.side,)


def changes(old: str, new: str) -> list[Piece]:
    """What a word-by-word comparison of two texts finds."""
    before, after = re.findall(r"\s*\S+", old), re.findall(r"\s*\S+", new)
    plain = [word.strip() for word in before], [word.strip() for word in after]
    pieces: list[Piece] = []
    for operation, a, b, c, d in difflib.SequenceMatcher(None, *plain, autojunk=False).get_opcodes():
        if operation == "equal":
            pieces.append(Piece("".join(after[c:d]), "same"))
            continue
        if b > a:
            pieces.append(Piece("".join(before[a:b]), "del"))
        if d > c:
            pieces.append(Piece("".join(after[c:d]), "ins"))
    return pieces


@dataclass(frozen=True)
class Verdict:
    """One line of a judgement: what it is, the category of an error, and the sentence."""

    kind: Literal["matched", "significant", "insignificant"]
    category: str
    text: str


def verdicts(judgement: Judgement) -> list[Verdict]:
    """A judgement sentence by sentence: what matched, then significant, then insignificant errors."""
    lines = [Verdict("matched", "", sentence) for sentence in judgement.matched_sentences]
    for category, sentences in zip(ERROR_CATEGORIES, judgement.significant_sentences, strict=False):
        lines += [Verdict("significant", category, sentence) for sentence in sentences]
    for category, sentences in zip(ERROR_CATEGORIES, judgement.insignificant_sentences, strict=False):
        lines += [Verdict("insignificant", category, sentence) for sentence in sentences]
    return lines
