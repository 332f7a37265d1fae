"""A report → its sentences, as written."""

from __future__ import annotations

import re
from functools import lru_cache

_ABBREVIATION = re.compile(r"\b(?:dr|approx|e\.g|i\.e|vs|cf|fig)\.$", re.IGNORECASE)
_HEADING = re.compile(
    r"^(?:findings?|impressions?|conclusions?|results?|full results?|comparison(?: study)?|technique|history|"
    r"radiologist['’]?s notes)\s*:\s*",
    re.IGNORECASE,
)
_BREAK = re.compile(
    r"(?<=[.!])[\"'”)\]]*\s+(?!(?<=\d\.\s)\d)"  # a full stop and a space, but not within a date or number
    r"|(?<=[?])\s+(?=[A-Z])"  # a doubt in brackets ends no sentence
    r"|(?<=[a-z)][.!])(?=[A-Z])"  # a full stop with the space forgotten
    r"|\s*[\r\n]+\s*|\s*[\"“”•●▪]+\s*|(?:^|\s)[-–*]\s+(?=[A-Z])"  # lines, bullets, stray quotes
)
_NUMBER = re.compile(r"^(?:\(?\d{1,2}[.)]|[-–*•])\s*(?=\D)")


@lru_cache(maxsize=65536)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a report, without bullets, numbering and section headings."""
    parts: list[str] = []
    for piece in _BREAK.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        elif piece:
            parts.append(piece)
    cleaned = (_strip(part) for part in parts)
    return tuple(part for part in cleaned if re.search(r"[^\W\d_]", part))


def _strip(part: str) -> str:
    part = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", part).split())
    return _HEADING.sub("", _NUMBER.sub("", _HEADING.sub("", part))).strip()
