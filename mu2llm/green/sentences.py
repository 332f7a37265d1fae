"""A report → its sentences, as written.

A section that speaks of something else than this scan (history, technique, comparison …) is one sentence with
its heading, so that whoever reads it alone knows what it is.
"""

from __future__ import annotations

import re
from functools import lru_cache

from mu2llm.green.headings import sections
from mu2llm.green.layout import unwrapped

_ABBREVIATION = re.compile(r"\b(?:dr|approx|e\.g|i\.e|vs|cf|fig)\.$", re.IGNORECASE)
_BREAK = re.compile(
    r"(?<=[.!])[\"'”)\]]*\s+(?!(?<=\d\.\s)\d)"  # a full stop and a space, but not within a date or number
    r"|(?<=[?])\s+(?=[A-Z])"  # a doubt in brackets ends no sentence
    r"|(?<=[a-z)][.!])(?=[A-Z])"  # a full stop with the space forgotten
    r"|\s*\n\s*|\s*[\"“”•●▪]+\s*|(?:^|\s)·\s*"  # lines, bullets, stray quotes
    r"|(?<!:)(?:^|\s)[-–*]\s+(?=[A-Z])"  # and dashes, but not “effusion: -”
)
_NUMBER = re.compile(r"^(?:\(?\d{1,2}[.)]|[-–*•·])\s*(?=\D)")


@lru_cache(maxsize=65536)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a report, without bullets, numbering and the headings of what speaks of this scan."""
    found: list[str] = []
    for heading, body in sections(unwrapped(text.replace("\u200b", " "))):
        parts = _split(body)
        if heading and parts:
            found.append(f"{heading}: {' '.join(parts)}")
        else:
            found.extend(parts)
    return tuple(found)


def _split(text: str) -> list[str]:
    parts: list[str] = []
    for piece in _BREAK.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        elif piece:
            parts.append(piece)
    stripped = (_strip(part) for part in parts)
    return [part for part in stripped if re.search(r"[^\W\d_]", part)]


def _strip(part: str) -> str:
    part = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", part).split())
    return _NUMBER.sub("", part).strip()
