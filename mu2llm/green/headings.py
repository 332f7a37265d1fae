"""The sections of a report, and which of them speak of this scan."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ELSEWHERE = "|".join(
    (
        r"(?:(?:relevant|pertinent|past|prior|brief|medical|surgical|family|social|patient|present|clinical)\s+){0,3}history",
        r"history\s+of\s+present\s+illness|hpi|pmh|anamnesis",
        r"clinical\s+(?:information|indications?|details|data|notes?|questions?|context|statement|presentation|diagnosis)",
        r"clinical|indications?(?:\s+for\s+\w+)?|(?:presenting|chief)\s+complaints?|symptoms",
        r"(?:clinical\s+)?reasons?(?:\s+for\s+(?:the\s+|this\s+)?(?:ct\s+)?"
        r"(?:exam|examination|study|scan|visit|referral|request|test|imaging|ct))?",
        r"(?:clinical\s+)?(?:request|referral)",
        r"comparisons?(?:\s+(?:study|studies|exams?|examinations?|made))?",
        r"(?:prior|previous)\s+(?:study|studies|exams?|examinations?|imaging|ct)",
        r"(?:ct\s+|imaging\s+|scan\s+)?(?:technique|protocol|procedure)s?|contrast|medications?",
    )
)
_HERE = "|".join(
    (
        r"(?:(?:ct|chest|imaging|other|additional|pertinent|significant|key|main|incidental|radiological)\s+){0,2}findings?",
        r"(?:(?:final|overall|ct)\s+)?impressions?|conclusions?|(?:full\s+|final\s+)?results?|(?:final\s+)?diagnos[ie]s",
        r"opinion|summary|assessment|interpretation|observations?|comments?|(?:ct\s+|radiology\s+|narrative\s+)?report",
        r"recommendations?|radiologist['’]?s\s+notes",
    )
)
_ORGAN = (
    r"(?:lungs?|airways?|pleura|pleural\s+spaces?|heart|pericardium|mediastinum|thorax|chest(?:\s+wall)?|abdomen|liver|"
    r"bones?|thyroid|lower\s+neck|vessels?|aorta|lymph\s+nodes?|upper\s+abdomen|soft\s+tissues?)(?:\s*(?:and|/|,|&)\s*\w+)*"
)
_FINDINGS = re.compile(r"finding|result|observation|report|notes", re.IGNORECASE)
_WORD = re.compile(r"clinical|reasons?|symptoms|request|referral|contrast|medications?|protocols?", re.IGNORECASE)
_MARKUP = r"[*_#\s]*"
_COLON = rf"{_MARKUP}:{_MARKUP}|[*_]*\s-\s+"
_BEGINS = r"(?<![^\n])|(?<=[.!?;:,\"”)\]]\s)"
_HEADING = re.compile(
    rf"(?:{_BEGINS}|(?P<inside>(?<=\s)))[#*_\s]*(?:(?P<elsewhere>{_ELSEWHERE})|(?P<here>{_HERE})|(?P<organ>{_ORGAN}))"
    rf"(?:{_COLON}|(?P<alone>[*_]*[^\S\n]*(?:\n|$)))",
    re.IGNORECASE,
)


def begins_section(line: str) -> bool:
    """Whether a line begins with the heading of a section and its colon."""
    match = _HEADING.match(line)
    return bool(match and match["alone"] is None and not match["organ"])


def is_heading(line: str) -> bool:
    """Whether a line is the heading of a section and nothing else."""
    match = _HEADING.fullmatch(line)
    return bool(match and _alone(match))


def parts_heading(before: str, after: str) -> bool:
    """Whether a line end stands within a heading: “CLINICAL”, “HISTORY: …”."""
    match = _HEADING.match(f"{before} {after}")
    return bool(match and match["alone"] is None and match.end() > len(before) + 2 and ":" not in before)


def speaks_elsewhere(sentence: str) -> bool:
    """Whether a sentence is a section that says nothing about this scan."""
    match = _HEADING.match(sentence)
    return bool(match and match["elsewhere"] and match["alone"] is None)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Text, unwrapped → (heading, body) of its sections; "" is the heading of all that speaks of this scan."""
    marks = list(_headings(text))
    starts = [0, *(mark.start() if mark["organ"] else mark.end() for mark in marks)]
    ends = [*(mark.start() for mark in marks), len(text)]
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        heading = " ".join((marks[index - 1]["elsewhere"] or "").split()) if index else ""
        body = text[start:end].strip()
        length = _length(body, marks[index:]) if heading else 0
        if heading:
            yield heading, body[:length]
        yield "", body[length:]


def _alone(match: re.Match[str]) -> bool:
    """Whether a heading is one without a colon: only what is no sentence's first word by chance."""
    return match["alone"] is not None and not match["organ"] and not _WORD.fullmatch(match["elsewhere"] or "")


def _headings(text: str) -> Iterator[re.Match[str]]:
    """Headings where a statement begins; elsewhere only what ends a section that does not speak of this scan."""
    elsewhere = False
    if not any(mark in text for mark in (":", "\n", " - ")):
        return
    for match in _HEADING.finditer(text):
        ends = elsewhere and not match["elsewhere"]
        if not ends and (match["inside"] is not None or match["organ"]):
            continue
        if match["alone"] is not None and (match["inside"] is not None or not _alone(match)):
            continue
        elsewhere = bool(match["elsewhere"])
        yield match


def _length(body: str, following: list[re.Match[str]]) -> int:
    """How far a section goes that does not speak of this scan.

    To the next heading; but where findings have no heading of their own, to an empty line, and where nothing
    more has one, at most to the end of a sentence.
    """
    speaking = next((mark for mark in following if not mark["elsewhere"]), None)
    if speaking and (speaking["organ"] or _FINDINGS.search(speaking["here"])):
        return len(body)
    end = re.search(r"\n\n", body) or (None if speaking else re.search(r"(?<=[.!?;])\s+|\n", body))
    return end.end() if end else len(body)
