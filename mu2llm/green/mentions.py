"""One sentence → the findings that it mentions: asserted or denied, where, how large, changed since when.

Negation and uncertainty have a scope, as in NegEx (Chapman et al. 2001): a cue before a finding reaches
forward to the end of its clause or to a predicate, a cue behind it reaches back to the one before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from mu2llm.green.lexicon import Change, Entry, lexicon
from mu2llm.records import Side

Status = Literal["present", "uncertain", "absent"]

_CLAUSE = re.compile(r"\s*;\s*|,?\s+(?=(?:but|however|although|whereas|while)\b)")
_SIDES = re.compile(r"\b(?:(left)|(right)|(bilateral(?:ly)?|both|either))\b")
_SIZE = re.compile(
    r"(?<![\d.])((?:\d+(?:[.,]\d+)?\s*(?:mm|cm)?\s*[x×*]\s*){0,2}\d+(?:[.,]\d+)?)\s*(mm|millimet\w+|cm|centimet\w+)\b"
)
_QUESTION = re.compile(r"[\w\s/-]{0,40}\?")
_RELATIVE = re.compile(r", which (?:is|are|was|were|has|have)\b[^,;]*,")
_JOINT = re.compile(r"^\s*(?:,|and|or|/|&|with|,\s*and|as well as|accompanied by|-)?\s*$")
_LINK = re.compile(r",|\band\b|\bor\b|\bwith\b|\bas well as\b|\baccompanied by\b")


@dataclass(frozen=True, slots=True)
class Mention:
    """A finding as one sentence states it. `severity` is 1 (mild) to 3 (severe)."""

    name: str
    status: Status
    side: Side | None
    places: frozenset[str]
    size_mm: float | None
    severity: int | None
    change: Change | None
    label: str | None
    sentence: str


@dataclass(frozen=True, slots=True)
class _Hit:
    start: int
    end: int
    entries: tuple[Entry, ...]


@lru_cache(maxsize=131072)
def mentions(sentence: str) -> tuple[Mention, ...]:
    """The findings that a sentence mentions, in its order."""
    return tuple(mention for clause in _CLAUSE.split(sentence.lower()) for mention in _in_clause(clause, sentence))


@lru_cache(maxsize=131072)
def states_normal(sentence: str) -> bool:
    """Whether a sentence says that something is as it should be."""
    return bool(lexicon().cues["normal"].search(sentence.lower()))


@lru_cache(maxsize=131072)
def states_change(sentence: str) -> bool:
    """Whether a sentence states a change, or none, since an earlier examination."""
    lower = sentence.lower()
    return bool(lexicon().cues["prior"].search(lower)) and any(
        pattern.search(lower) for _, pattern in lexicon().change.items()
    )


def _in_clause(clause: str, sentence: str) -> Iterator[Mention]:
    hits = _hits(clause)
    if not hits:
        return
    windows = _windows(clause, hits)
    denied = _denied(clause)
    for index, (hit, (start, end)) in enumerate(zip(hits, windows, strict=True)):
        before = clause[: hit.start]
        if lexicon().cues["unstated"].search(before) or lexicon().cues["past"].search(before):
            continue
        window = clause[start:end]
        for entry in hit.entries:
            if not _fits(entry, window, clause):
                continue
            status: Status = "absent" if any(a < hit.end and hit.start < b for a, b in denied) else "present"
            if status == "present" and _left_open(clause[hit.end :]):
                status = "uncertain"
            yield _mention(entry, status, clause, hits, windows, index, sentence)


def _hits(clause: str) -> list[_Hit]:
    """What the lexicon finds in a clause; of overlapping spans the longest, with all entries that match it."""
    found: dict[tuple[int, int], list[Entry]] = {}
    for entry in lexicon().entries:
        if entry.unless and entry.unless.search(clause):
            continue
        for term in entry.terms:
            if term.literal in clause:
                for match in term.pattern.finditer(clause):
                    entries = found.setdefault(match.span(), [])
                    if entry not in entries:
                        entries.append(entry)
    chosen: list[_Hit] = []
    for (start, end), entries in sorted(found.items(), key=lambda item: (item[0][0] - item[0][1], item[0][0])):
        names = {entry.name for entry in entries}
        overlapping = [hit for hit in chosen if hit.start < end and start < hit.end]
        fresh = [e for e in entries if all(e.name not in {x.name for x in h.entries} for h in overlapping)]
        if not overlapping:
            chosen.append(_Hit(start, end, tuple(entries)))
        elif fresh and names:
            first = overlapping[0]
            chosen[chosen.index(first)] = _Hit(first.start, first.end, (*first.entries, *fresh))
    return sorted(chosen, key=lambda hit: hit.start)


def _windows(clause: str, hits: list[_Hit]) -> list[tuple[int, int]]:
    """The words that belong to each hit: the text between two hits is divided at its last “and” or comma."""
    bounds = [0]
    for left, right in pairwise(hits):
        gap = clause[left.end : right.start].partition("(")[0]  # what is in brackets is about what stands before
        links = list(_LINK.finditer(gap))
        bounds.append(left.end + (links[-1].start() if links else len(gap)))
    bounds.append(len(clause))
    return list(pairwise(bounds))


def _fits(entry: Entry, window: str, clause: str) -> bool:
    if entry.outside and entry.outside.search(window):
        return False
    return not entry.within or bool(entry.within.search(window) or entry.within.search(clause))


def _denied(clause: str) -> list[tuple[int, int]]:
    """The spans of a clause within which a finding is denied."""
    asserts = [(m.start(), m.end()) for m in lexicon().cues["assert"].finditer(_RELATIVE.sub(_blank, clause))]
    ends = [m.start() for m in lexicon().cues["scope_end"].finditer(clause)]
    spans = []
    for cue in lexicon().cues["deny_before"].finditer(clause):
        stops = [a for a, _ in asserts if a > cue.end()] + [e for e in ends if e > cue.end()]
        spans.append((cue.start(), min(stops, default=len(clause))))
    for cue in lexicon().cues["deny_after"].finditer(clause):
        starts = [b for _, b in asserts if b <= cue.start()] + [e for e in ends if e <= cue.start()]
        spans.append((max(starts, default=0), cue.start()))
    return spans


def _left_open(after: str) -> bool:
    """Whether what follows a finding makes it a mere possibility: “(atelectasis?)”, “cannot be excluded”."""
    return bool(_QUESTION.match(after) or lexicon().cues["doubt"].search(after))


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def _mention(
    entry: Entry,
    status: Status,
    clause: str,
    hits: list[_Hit],
    windows: list[tuple[int, int]],
    index: int,
    sentence: str,
) -> Mention:
    window = clause[windows[index][0] : windows[index][1]]
    wider = [window, *_joined(clause, hits, windows, index)]
    return Mention(
        name=entry.name,
        status=status,
        side=next((side for text in wider if (side := _side(text))), None) if entry.sided else None,
        places=next((places for text in wider if (places := _places(entry, text))), frozenset()),
        size_mm=_size(window),
        severity=next((grade for grade, pattern in lexicon().severity.items() if pattern.search(window)), None),
        change=next((change for change, pattern in lexicon().change.items() if pattern.search(clause)), None)
        if lexicon().cues["prior"].search(clause)
        else None,
        label=entry.label,
        sentence=sentence,
    )


def _joined(clause: str, hits: list[_Hit], windows: list[tuple[int, int]], index: int) -> Iterator[str]:
    """The words of findings that are listed together with this one: “consolidation and atelectasis on the left”."""
    for step in (1, -1):
        other = index
        while 0 <= other + step < len(hits):
            first, second = sorted((other, other + step))
            if not _JOINT.match(clause[hits[first].end : hits[second].start]):
                break
            other += step
            yield clause[windows[other][0] : windows[other][1]]


def _side(text: str) -> Side | None:
    found = {index for match in _SIDES.finditer(text) for index in (1, 2, 3) if match[index]}
    if 3 in found or {1, 2} <= found:
        return "bilateral"
    return "left" if 1 in found else "right" if 2 in found else None


def _places(entry: Entry, text: str) -> frozenset[str]:
    return frozenset(
        name.format(match[0].upper()) if "{" in name else name
        for name, pattern in entry.places
        for match in pattern.finditer(text)
    )


def _size(text: str) -> float | None:
    sizes = [
        float(number.replace(",", ".")) * (10 if match[2].startswith("c") else 1)
        for match in _SIZE.finditer(text)
        for number in re.findall(r"\d+(?:[.,]\d+)?", match[1])
    ]
    return max(sizes, default=None)
