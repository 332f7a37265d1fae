"""One sentence → the findings that it mentions: asserted or denied, where, how large, changed since when."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from mu2llm.green.characters import plain
from mu2llm.green.headings import speaks_elsewhere
from mu2llm.green.lexicon import Change, Entry, lexicon
from mu2llm.green.scope import denied
from mu2llm.records import Side

Status = Literal["present", "uncertain", "absent"]

_CLAUSE = re.compile(r"\s*;\s*|,?\s+(?=(?:but|however|although|whereas|while)\b)")
_SIDES = re.compile(r"\b(?:(left)|(right)|(bilateral(?:ly)?|both|either))\b")
_SIZE = re.compile(
    r"(?<![\d.])((?:\d+(?:[.,]\d+)?\s*(?:mm|cm)?\s*(?:[x*]|by)\s*){0,2}\d+(?:[.,]\d+)?)\s*(mm|millimet\w+|cm|centimet\w+)\b"
)
_QUESTION = re.compile(r"[\w\s/-]{0,40}\?")
_HEADING = re.compile(r"\s*:\s*(?:no|none|not|nil|without|normal|unremarkable|negative|absent|clear)\b")
_PREDICATE = re.compile(r"\b(?:is|are|was|were|appears?|looks?) (?:\w+ly )?$")  # “the aorta is” dilated and the …
_JOINT = re.compile(r"^\s*(?:,|and|or|/|&|with|,\s*and|as well as|accompanied by|-)?\s*$")
_LINK = re.compile(r",|\band\b|\bor\b|(?<!compatible )(?<!consistent )\bwith\b|\bas well as\b|\baccompanied by\b")


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
    if speaks_elsewhere(sentence):
        return ()
    return tuple(mention for clause in _clauses(plain(sentence)) for mention in _in_clause(clause, sentence))


def _clauses(sentence: str) -> Iterator[str]:
    """Clauses of at most a hundred words: more than that is a list, or no language."""
    for clause in _CLAUSE.split(sentence):
        words = clause.split(" ")
        yield from (" ".join(words[i : i + 100]) for i in range(0, len(words), 100))


@lru_cache(maxsize=131072)
def states_normal(sentence: str) -> bool:
    """Whether a sentence says that something is as it should be."""
    return not speaks_elsewhere(sentence) and bool(lexicon().cues["normal"].search(plain(sentence)))


@lru_cache(maxsize=131072)
def states_change(sentence: str) -> bool:
    """Whether a sentence states a change, or none, since an earlier examination."""
    return not speaks_elsewhere(sentence) and _change(plain(sentence)) is not None


def _in_clause(clause: str, sentence: str) -> Iterator[Mention]:
    hits = _hits(clause)
    if not hits:
        return
    windows = [clause[start:end] for start, end in _bounds(clause, hits)]
    spans = denied(clause, [(hit.start, hit.end) for hit in hits])
    for index, hit in enumerate(hits):
        before, after = clause[: hit.start], clause[hit.end :]
        if any(lexicon().cues[cue].search(before) for cue in ("unstated", "past")):
            continue
        status: Status = "present"
        if _HEADING.match(after) or any(start < hit.end and hit.start < end for start, end in spans):
            status = "absent"
        elif _left_open(after):
            status = "uncertain"
        scope = tuple(dict.fromkeys((windows[index], *_listed_with(clause, hits, windows, index))))
        others = windows[:index] + windows[index + 1 :]
        for entry in _fitting(hit.entries, windows[index], clause, others):
            yield _mention(entry, status, scope, sentence)


def _hits(clause: str) -> list[_Hit]:
    """What the lexicon finds in a clause; of overlapping spans the longest, with all entries that match it."""
    found: dict[tuple[int, int], list[Entry]] = {}
    for entry in lexicon().entries:
        for term in entry.terms:
            if term.literal in clause and not (entry.unless and entry.unless.search(clause)):
                for match in term.pattern.finditer(clause):
                    if not (_PREDICATE.search(clause[: match.start()]) and " and " in match[0]):
                        found.setdefault(match.span(), []).append(entry)
    chosen: list[_Hit] = []
    for (start, end), entries in sorted(found.items(), key=lambda item: (item[0][0] - item[0][1], item[0][0])):
        rival = next((i for i, hit in enumerate(chosen) if hit.start < end and start < hit.end), None)
        if rival is None:
            chosen.append(_Hit(start, end, tuple(dict.fromkeys(entries))))
        else:
            longer = chosen[rival]
            named = {entry.name for entry in longer.entries}
            others = (entry for entry in entries if entry.name not in named)
            chosen[rival] = _Hit(longer.start, longer.end, (*longer.entries, *others))
    return sorted(chosen, key=lambda hit: hit.start)


def _bounds(clause: str, hits: list[_Hit]) -> list[tuple[int, int]]:
    """Where the words of each hit are: the text between two hits is divided at its last “and” or comma.

    Hits that follow each other as one term (“calcified atheroma plaques”) share their words.
    """
    starts = [0]
    for left, right in pairwise(hits):
        gap = clause[left.end : right.start]
        before_bracket = gap.partition("(")[0]  # what is in brackets is about what stands before
        links = list(_LINK.finditer(before_bracket))
        divide = left.end + (links[-1].start() if links else len(before_bracket))
        starts.append(divide if gap.strip(" -") else starts[-1])
    bounds: list[tuple[int, int]] = []
    end = len(clause)
    for index in reversed(range(len(hits))):
        bounds.append((starts[index], end))
        if index and starts[index] != starts[index - 1]:
            end = starts[index]
    return bounds[::-1]


def _listed_with(clause: str, hits: list[_Hit], windows: list[str], index: int) -> Iterator[str]:
    """The words of findings that are listed together with this one: “consolidation and atelectasis on the left”."""
    for step in (1, -1):
        other = index
        while 0 <= other + step < len(hits) and abs(other - index) < 10:
            first, second = sorted((other, other + step))
            if not _JOINT.match(clause[hits[first].end : hits[second].start]):
                break
            other += step
            yield windows[other]


def _fitting(entries: tuple[Entry, ...], window: str, clause: str, others: list[str]) -> list[Entry]:
    """The entries whose anatomy fits: named around the finding or, if none of them is, in the clause and not around
    another finding that it fits as well."""
    allowed = [entry for entry in entries if not (entry.outside and entry.outside.search(window))]
    near = [entry for entry in allowed if entry.within and entry.within.search(window)]
    far = [entry for entry in allowed if entry.within and entry.within.search(clause) and not _taken(entry, others)]
    return [entry for entry in allowed if not entry.within or entry in (near or far)]


def _taken(entry: Entry, windows: list[str]) -> bool:
    """Whether an entry is said by the words of another finding."""
    return any(
        entry.within and entry.within.search(window) and any(term.pattern.search(window) for term in entry.terms)
        for window in windows
    )


def _left_open(after: str) -> bool:
    """Whether what follows a finding makes it a mere possibility: “(atelectasis?)”, “cannot be excluded”."""
    return bool(_QUESTION.match(after) or lexicon().cues["doubt"].search(after))


def _mention(entry: Entry, status: Status, scope: tuple[str, ...], sentence: str) -> Mention:
    """`scope`: the words of the finding, then those of what is listed with it."""
    window = scope[0]
    return Mention(
        name=entry.name,
        status=status,
        side=next((side for text in scope if (side := _side(text))), None) if entry.sided else None,
        places=next((places for text in scope if (places := _places(entry, text))), frozenset()),
        size_mm=_size(window),
        severity=next((grade for grade, pattern in lexicon().severity.items() if pattern.search(window)), None),
        change=next((change for text in scope if (change := _change(text))), None),
        label=entry.label,
        sentence=sentence,
    )


def _change(text: str) -> Change | None:
    if not lexicon().cues["prior"].search(text):
        return None
    return next((change for change, pattern in lexicon().change.items() if pattern.search(text)), None)


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
