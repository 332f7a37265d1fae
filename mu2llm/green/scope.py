"""How far a cue reaches: which parts of a clause are denied.

As in NegEx (Chapman et al. 2001) and ConText (Harkema et al. 2009): a cue before a finding reaches forward, one
behind it back, to what ends its scope. What is denied may be a change (“no increase of”, “has not resolved”):
that says that the finding is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from mu2llm.green.lexicon import lexicon

Span = tuple[int, int]

_RELATIVE = re.compile(r", which (?:is|are|was|were|has|have)\b[^,;]*,")
_LIST = re.compile(r"\b(?:or|nor)\b|\band/or\b")
_OPENS = re.compile(r"(?:of|for|following|these|any|and|or)$")
_COLON = re.compile(r"\s*:(?!\d)|\s-\s")
_COMMA = re.compile(r",(?!\d)")
_PRESENT = re.compile(r"(?<!not )\bpresent\W*$|\+\W*$")
_IS_PRESENT = re.compile(r"(?:is|are|was|were) (?:\w+ly )?present\b")
_BESIDE = re.compile(r"\b(?:and|or|nor)\b|/")
_VERB = re.compile(r"\b(?:is|are|was|were|has|have)\b")
_SIGN = re.compile(r"\s*(?::\s*|\(|\[)?-\s*(?:\)|\])?(?=\s*(?:$|[,;./|]|[a-z][a-z -]*:))")


def denied(clause: str, hits: list[Span]) -> list[Span]:
    """The spans of a clause (plain, lower case) within which a finding is denied; `hits` are where findings are."""
    cues = lexicon().cues
    main = _RELATIVE.sub(_blank, clause)
    asserts = [match.span() for match in cues["assert"].finditer(main)]
    ends = [match.start() for match in cues["scope_end"].finditer(main)]
    stops = [*(start for start, _ in asserts), *ends]
    spans = []
    for start, end in _before(clause, hits):
        stop = min((place for place in stops if place > end), default=len(clause))
        spans.append((start, min([stop, *_new_statements(clause, end, stop, hits)])))
    starts = [*(end for _, end in asserts), *ends]
    for start, _ in _after(clause):
        begin = max((place for place in starts if place <= start), default=0)
        spans.append((max([begin, *_own_subject(clause, begin, start, hits)]), start))
    return spans + [(start, end) for start, end in hits if _SIGN.match(clause, end)]


def _before(clause: str, hits: list[Span]) -> Iterator[Span]:
    """Cues that reach forward."""
    cues = lexicon().cues
    for cue in cues["deny_before"].finditer(clause):
        change = cues["change_denied"].match(clause, cue.start())
        if not change or any(start <= change.end() < end and start > cue.start() for start, end in hits):
            yield cue.span()
    for cue in cues["resolved_before"].finditer(clause):
        if not _undone(clause, cue):
            yield cue.span()


def _after(clause: str) -> Iterator[Span]:
    """Cues that reach back."""
    cues = lexicon().cues
    yield from (cue.span() for cue in cues["deny_after"].finditer(clause))
    for cue in cues["resolved_after"].finditer(clause):
        if not _undone(clause, cue):
            yield cue.span()


def _undone(clause: str, cue: re.Match[str]) -> bool:
    """Whether a resolution is denied or incomplete."""
    words = clause[: cue.start()].rpartition(",")[2].split()[-4:]
    return bool(lexicon().cues["unresolved"].search(" ".join([*words, cue[0]])))


def _new_statements(clause: str, start: int, stop: int, hits: list[Span]) -> Iterator[int]:
    """Where between a denial and the end of its scope something else is stated.

    Behind a colon or dash after what was denied; behind a comma, where a new noun phrase begins (“no nodule, large
    hernia”) that is not of a list with “or”, or where what stands there is said to be present.
    """
    for mark in _COLON.finditer(clause, start, stop):
        said = clause[start : mark.start()].strip()
        if said and not _OPENS.search(said):
            yield mark.start()
    commas = [match.start() for match in _COMMA.finditer(clause, start, stop)]
    for comma, end in pairwise([*commas, stop]):
        item = clause[comma + 1 : end]
        present = _PRESENT.search(item) or (end == stop and _IS_PRESENT.match(clause, stop))
        opens = lexicon().cues["new_statement"].match(item.lstrip())
        if (present and not _BESIDE.search(item)) or (opens and not _LIST.search(clause, comma, stop)):
            yield comma


def _own_subject(clause: str, begin: int, start: int, hits: list[Span]) -> Iterator[int]:
    """The “and” or comma behind which a predicate at `start` has its own subject: “nodules in both lungs, effusion is
    absent”.

    It reaches back over a comma where what stands there is a bare list item.
    """
    for both in re.finditer(r" and ", clause[:start]):
        if both.start() > begin and _VERB.search(clause, begin, both.start()):
            yield both.start()
    item_end = start
    for comma in reversed([match.start() for match in _COMMA.finditer(clause, begin, start)]):
        item = clause[comma + 1 : item_end]
        if not any(comma < first < item_end for first, _ in hits):
            continue  # an aside
        previous = clause[max(begin, clause.rfind(",", begin, comma) + 1) : comma].strip()
        opens = lexicon().cues["new_statement"].match(previous)
        if item_end == start and (_LIST.search(item) or (_BESIDE.search(item) and not opens)):
            return  # a list: “A, B and C were not seen”
        if opens or lexicon().cues["complete"].search(previous):
            yield comma
            return


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])
