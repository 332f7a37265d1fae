"""What a judge is, and what it is given: pairs of reports that can be read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mu2llm.records import Judgement

Pair = tuple[str, str]
"""(reference, candidate)"""

GREEN = "green"
"""The metric that a judge measures unless it says otherwise."""

# words that only one of them has, of the languages in which reports reach us
_FOREIGN = re.compile(
    r"\b(?:der|die|das|und|kein|keine|nicht|mit|ist|le|la|les|des|du|et|pas|sans|est|dans|el|los|las|una|sin|con|del|y|"
    r"il|della|nessun|nessuna|ve|bir|yok|izlenmedi|izlendi|saptanmadı|em|sem|não|uma|het|een|geen|niet|van|nie|jest)\b"
)
_ENGLISH = re.compile(r"\b(?:the|is|are|was|were|of|and|with|no|not|there|without|within|for|both|on|to|in)\b")


class Judge(Protocol):
    """Scores candidate reports against reference reports as GREEN does (METHOD.md §4.1).

    One that measures something else names it in an attribute `measures`.
    """

    @property
    def identity(self) -> str:
        """What two judgements must share to be comparable: name, weights or endpoint, prompt, decoding."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """(reference, candidate) pairs → one judgement each, in their order."""
        ...


def measures(judge: Judge) -> str:
    """The metric under which a judge's scores are told: its attribute `measures`, or GREEN."""
    return str(getattr(judge, "measures", GREEN))


def as_judged(judge: Judge, pairs: Sequence[Pair], chunk: int) -> Iterator[tuple[int, Judgement]]:
    """The number of each pair and its judgement, as they come: one by one of a judge with `each`, else by chunks."""
    each: Callable[[Sequence[Pair]], Iterator[tuple[int, Judgement]]] | None = getattr(judge, "each", None)
    if each:
        yield from each(pairs)
        return
    for start in range(0, len(pairs), chunk):
        yield from enumerate(judge.judge(pairs[start : start + chunk]), start)


def unreadable(pair: Pair) -> tuple[str, str] | None:
    """Which of a pair's reports no judge can say anything about ("reference" or "candidate"), and why; or None."""
    for role, text in zip(("reference", "candidate"), pair, strict=True):
        if why := _unreadable(text):
            return role, f"the {role} report is {why}"
    return None


def unjudged(pair: Pair, identity: str) -> Judgement | None:
    """The judgement of a pair that no judge need see, or None.

    A candidate that is empty or in no language is the model's failure: valid, 0.0. Such a reference is invalid.
    """
    found = unreadable(pair)
    if not found:
        return None
    failed = found[0] == "candidate"
    return Judgement(valid=failed, score=0.0 if failed else None, why=found[1], judge=identity)


def _unreadable(text: str) -> str | None:
    letters = re.findall(r"[^\W\d_]", unicodedata.normalize("NFKC", text))
    if not letters:
        return "empty"
    if sum(letter < "\u0250" for letter in letters) < 0.7 * len(letters):
        return "not in English"
    words = re.findall(r"[^\W\d_]+", text)
    shouted = text.isupper()
    told = [word.lower() for word in words if shouted or not (word.isupper() and len(word) > 1)]  # LA, LES: no articles
    foreign = [word for word in told if _FOREIGN.fullmatch(word)]
    english = [word for word in told if _ENGLISH.fullmatch(word)]
    telling = len(set(foreign)) > 1 or len(foreign) > 0.3 * len(told)
    return "not in English" if telling and len(foreign) > len(english) else None
