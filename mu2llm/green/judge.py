"""What a judge is, and what it is given: pairs of reports that can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from mu2llm.records import Judgement

Pair = tuple[str, str]
"""(reference, candidate)"""

# words that only one of them has, of the languages in which reports reach us
_FOREIGN = re.compile(
    r"\b(?:der|die|das|und|kein|keine|nicht|mit|ist|le|la|les|des|du|et|pas|sans|est|dans|el|los|las|una|sin|con|del|y|"
    r"il|della|nessun|nessuna|ve|bir|yok|izlenmedi|izlendi|saptanmadı|em|sem|não|uma|het|een|geen|niet|van|nie|jest)\b"
)
_ENGLISH = re.compile(r"\b(?:the|is|are|was|were|of|and|with|no|not|there|without|within|for|both|on|to|in)\b")


class Judge(Protocol):
    """Scores candidate reports against reference reports as GREEN does (METHOD.md §4.1)."""

    @property
    def identity(self) -> str:
        """What two judgements must share to be comparable: name, weights or endpoint, prompt, decoding."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """(reference, candidate) pairs → one judgement each, in their order."""
        ...


def unreadable(pair: Pair) -> str | None:
    """Why no judge can say anything about a pair of reports, or None if one can."""
    for role, text in zip(("reference", "candidate"), pair, strict=True):
        letters = re.findall(r"[^\W\d_]", text)
        if not letters:
            return f"the {role} report is empty"
        latin, lower = sum(letter < "\u0250" for letter in letters), text.lower()
        if latin < 0.7 * len(letters) or len(_FOREIGN.findall(lower)) > len(_ENGLISH.findall(lower)):
            return f"the {role} report is not in English"
    return None
