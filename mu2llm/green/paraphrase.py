"""Harmless rewording: the same findings in other words that the rules know. A judge should not mind."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mu2llm.green.judge import Judge, Pair
from mu2llm.green.mentions import mentions, states_normal
from mu2llm.green.sentences import sentences
from mu2llm.records import Judgement

WORDS = (
    ("observed|detected|identified|noted", "seen"),
    ("seen|found", "identified"),
    ("unremarkable", "normal"),
    ("normal|natural", "unremarkable"),
    ("there is a", "a"),
    ("pleural effusions?", "pleural fluid"),
    ("nodules", "nodular lesions"),
    ("nodule", "nodular lesion"),
    ("cardiomegaly", "enlarged heart"),
    ("emphysematous changes?", "emphysema"),
    ("consolidations?", "consolidative area"),
    ("atelectasis", "atelectatic change"),
    ("hiatal hernia", "hiatus hernia"),
    ("lymphadenopath(?:y|ies)", "enlarged lymph nodes"),
    ("ground[- ]glass opacit(?:y|ies)", "ground-glass density"),
    ("large", "extensive"),
    ("small", "minimal"),
    ("on the left side", "on the left"),
    ("on the right side", "on the right"),
)
"""What stands in a report, and what may stand there instead; of two that undo each other one is used."""
_WORDS = [(re.compile(rf"\b(?:{old})\b", re.IGNORECASE), new) for old, new in WORDS]


def reworded(report: str) -> str:
    """The report in other words; a sentence in which the rules then read anything else stays as it is."""
    for sentence in sentences(report):
        other = _reworded(sentence)
        if other != sentence:
            report = report.replace(sentence, other)
    return report


def judge_reworded(judge: Judge, references: Sequence[str]) -> list[Judgement]:
    """What a judge makes of references against themselves in other words: about 1, if it reads what is meant."""
    return judge.judge(rewording(references))


def rewording(references: Sequence[str]) -> list[Pair]:
    """Each reference, and itself in other words."""
    return [(reference, reworded(reference)) for reference in references]


def _reworded(sentence: str) -> str:
    changed: list[str] = []
    for old, new in _WORDS:
        if any(old.search(each) for each in changed):
            continue  # a word that was put there is not exchanged again
        other = old.sub(lambda found, new=new: new.capitalize() if found[0][0].isupper() else new, sentence)  # type: ignore[misc]
        if other != sentence and _read(other) == _read(sentence):
            sentence = other
            changed.append(new)
    return sentence


def _read(sentence: str) -> tuple[object, ...]:
    found = tuple((m.name, m.status, m.side, m.places, m.size_mm, m.severity, m.change) for m in mentions(sentence))
    return (*found, states_normal(sentence))
