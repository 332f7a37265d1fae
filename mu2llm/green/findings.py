"""A report → its findings, and the 18 CT-RATE labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from mu2llm.green.lexicon import LABELS, lexicon
from mu2llm.green.mentions import Mention, mentions, states_change, states_normal
from mu2llm.green.sentences import sentences
from mu2llm.records import Finding


def findings(text: str) -> list[Finding]:
    """The findings that a report states as present or possible, each once, with side, place and longest diameter."""
    return [
        Finding(name=m.name, side=m.side, place=", ".join(sorted(m.places)) or None, size_mm=m.size_mm)
        for m in read(text).present
    ]


def labels(text: str) -> dict[str, int]:
    """The 18 CT-RATE labels of a report: name → 0 or 1."""
    found = read(text).labels
    return {label: int(label in found) for label in LABELS}


@dataclass(frozen=True, slots=True)
class Reading:
    """What the rules read in a report: present findings, each once; the labels they mean; whether it also says
    that anything is normal or as before; whether it states a change of nothing in particular."""

    present: tuple[Mention, ...]
    labels: frozenset[str]
    normal: bool
    compares: bool


@lru_cache(maxsize=16384)
def read(text: str) -> Reading:
    """A report as the rules read it; what is stated twice (body and impression) is one finding."""
    merged: list[Mention] = []
    labels: set[str] = set()
    normal = changed = False
    for sentence in sentences(text):
        found = mentions(sentence)
        present = [mention for mention in found if mention.status == "present"]
        for mention in present:
            merge(merged, mention)
        labels.update(mention.label for mention in present if mention.label)
        normal = normal or len(present) < len(found) or states_normal(sentence)
        changed = changed or (not present and states_change(sentence))
    normal = normal or changed
    return Reading(tuple(merged), frozenset(labels), normal, changed)


def merge(merged: list[Mention], new: Mention) -> None:
    """Adds a mention to a list, or its details to the mention of the same finding that is there."""
    sided = lexicon().by_name[new.name].sided
    for index, old in enumerate(merged):
        if old.name == new.name and _compatible(old, new, sided):
            merged[index] = replace(
                old,
                status=min(old.status, new.status),
                side=old.side or new.side,
                places=old.places or new.places,
                size_mm=old.size_mm or new.size_mm,
                severity=old.severity or new.severity,
                change=old.change or new.change,
            )
            return
    merged.append(new)


def _compatible(old: Mention, new: Mention, sided: bool) -> bool:
    sides = not sided or old.side is None or new.side is None or old.side == new.side
    return sides and (not old.places or not new.places or bool(old.places & new.places))
