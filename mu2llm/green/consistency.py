"""Whether the two parts of one report agree: what the impression asserts, the findings must say, and the reverse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mu2llm.green.lexicon import lexicon
from mu2llm.green.mentions import Mention, mentions
from mu2llm.green.sentences import sentences

_BEGINS = r"(?:^|(?<=\n)|(?<=[.!?;:,\"”)\]]\s))[#*_\s]*"
_ENDS = r"(?:[*_\s]*:[*_\s]*|[*_]*[^\S\n]*\n)"
_CONCLUDES = r"(?:(?:final|overall|ct)\s+)?impressions?|conclusions?|opinion|summary|(?:final\s+)?diagnos[ie]s"
_IMPRESSION = re.compile(rf"{_BEGINS}(?:{_CONCLUDES}){_ENDS}", re.IGNORECASE)
_FINDINGS = re.compile(rf"{_BEGINS}findings?{_ENDS}", re.IGNORECASE)
_STRAY = re.compile(r"(?<=[.!?])\s*[\"“•·]\s*(?=\S)")  # what parts CT-RATE's texts that have no headings

NEAR = 1.25
"""Sizes are the same up to this ratio, as for the rules judge: an impression rounds."""
UNSAID = "the findings do not say so"
SHOWN_BY = {
    "pneumonia": {"consolidation", "lung opacity", "crazy paving", "inflammation", "septal thickening"},
    "inflammation": {"consolidation", "lung opacity", "bronchial wall thickening", "peribronchial thickening"},
    "lung opacity": {"consolidation", "pneumonia", "crazy paving", "mosaic attenuation"},
    "consolidation": {"pneumonia", "lung opacity"},
    "pulmonary fibrosis": {"fibrotic sequela", "septal thickening", "bronchiectasis"},
    "fibrotic sequela": {"pulmonary fibrosis", "atelectasis", "pleural thickening"},
    "lung mass": {"lung nodule"},
    "lung nodule": {"lung mass"},
    "metastasis": {"lung nodule", "liver lesion", "lung mass", "bone metastasis", "adrenal lesion", "lymphadenopathy"},
    "bone metastasis": {"metastasis", "vertebral sclerosis"},
    "liver cyst": {"liver lesion"},
    "liver lesion": {"liver cyst"},
    "renal cyst": {"renal lesion"},
    "renal lesion": {"renal cyst"},
}
"""What an impression concludes → what the findings may describe it by."""


def parts(report: str) -> tuple[str, str]:
    """(findings, impression) of a report, without these headings; the impression is empty where it has none."""
    heading = _IMPRESSION.search(report) or _STRAY.search(report)
    if not heading:
        return _FINDINGS.sub(" ", report).strip(), ""
    before, after = report[: heading.start()], report[heading.end() :]
    body = _FINDINGS.search(after)  # behind the impression
    impression, behind = (after[: body.start()], after[body.end() :]) if body else (after, "")
    return _FINDINGS.sub(" ", f"{before} {behind}").strip(), impression.strip()


@dataclass(frozen=True, slots=True)
class Agreement:
    """What differs between the parts of a report, in words.

    `unsupported` is asserted by the impression and not by the findings, `omitted` the reverse; `contradicted` is what
    one part asserts and the other denies, or gives another side or size. A contradiction of what the impression asserts
    is among `unsupported` too.
    """

    unsupported: tuple[str, ...]
    omitted: tuple[str, ...]
    contradicted: tuple[str, ...]


def agreement(report: str) -> Agreement | None:
    """The parts of a report held against each other, by the lexicon; None where either part is missing."""
    findings, impression = (_mentions(part) for part in parts(report))
    if findings is None or impression is None:
        return None
    concluded = [(each, _wrong(each, findings)) for each in _asserted(impression)]
    omitted = [each for each in _asserted(findings) if not _named(each.name, impression)]
    return Agreement(
        unsupported=_distinct(f"{_words(each)}: {why}" for each, why in concluded if why),
        omitted=_distinct(_words(each) for each in omitted),
        contradicted=_distinct(
            [f"{_words(each)}: {why}" for each, why in concluded if why not in ("", UNSAID)]
            + [f"{_words(each)}: the impression denies it" for each in omitted if _denied(each, impression)]
        ),
    )


def _mentions(part: str) -> list[Mention] | None:
    """None where a part says nothing."""
    said = [mention for sentence in sentences(part) for mention in mentions(sentence)]
    return said if re.search(r"[^\W\d_]", part) else None


def _asserted(said: Sequence[Mention]) -> Iterator[Mention]:
    return (mention for mention in said if mention.status == "present")


def _wrong(concluded: Mention, findings: Sequence[Mention]) -> str:
    """Why the findings do not bear a mention of the impression; "" where they do."""
    if not _named(concluded.name, findings):
        return "the findings deny it" if _denied(concluded, findings) else UNSAID
    same = [each for each in findings if each.name == concluded.name and each.status != "absent"]
    if lexicon().by_name[concluded.name].sided and (sides := _sides(concluded)):
        there = [_sides(each) for each in same]
        if there and all(there) and not sides <= set().union(*there):
            return f"{' and '.join(sorted(set().union(*there)))} in the findings"
    sizes = [each.size_mm for each in same if each.size_mm]
    if concluded.size_mm and sizes and not any(_near(concluded.size_mm, size) for size in sizes):
        return f"{', '.join(f'{size:g} mm' for size in sizes)} in the findings"
    return ""


def _named(name: str, said: Sequence[Mention]) -> bool:
    """Whether a finding, or what it is concluded from, is stated or left open."""
    label = lexicon().by_name[name].label
    return any(
        each.status != "absent"
        and (each.name == name or each.name in SHOWN_BY.get(name, ()) or (label and each.label == label))
        for each in said
    )


def _denied(asserted: Mention, said: Sequence[Mention]) -> bool:
    """Whether it is denied, and not of the other side alone."""
    sides = _sides(asserted)
    same = [each for each in said if each.name == asserted.name and each.status == "absent"]
    return any(not sides or not (other := _sides(each)) or bool(sides & other) for each in same)


def _sides(mention: Mention) -> frozenset[str]:
    both = frozenset(("left", "right"))
    return both if mention.side == "bilateral" else frozenset((mention.side,) if mention.side else ())


def _near(ours: float, theirs: float) -> bool:
    return max(ours, theirs) <= NEAR * min(ours, theirs)


def _words(mention: Mention) -> str:
    size = f"{mention.size_mm:g} mm" if mention.size_mm else ""
    return " ".join(word for word in (size, mention.side or "", mention.name) if word)


def _distinct(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lines))
