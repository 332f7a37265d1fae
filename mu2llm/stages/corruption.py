"""Known errors put into a reference report: for cases whose sampled candidates are too alike to make pairs."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from mu2llm.green import findings, sentences
from mu2llm.records import Candidate, Case

OPPOSITE = {"left": "right", "right": "left"}
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def corrupt(case: Case, others: list[str], first_index: int, seed: int) -> list[Candidate]:
    """The reference with a side swapped, with a finding dropped, and with another case's finding invented.

    Which of the three there are depends on what the reference says: nothing is swapped or dropped in a report
    without findings. `others` are the reports that findings are taken from.
    """
    rng = random.Random(f"{seed}/{case.id}")
    parts = sentences(case.report)
    positive = [i for i, sentence in enumerate(parts) if findings(sentence)]
    made = {
        "swapped_side": _swap_side(parts, positive, rng),
        "dropped_finding": _drop(parts, positive, rng),
        "invented_finding": _invent(parts, case, others, rng),
    }
    texts = [(name, text) for name, text in made.items() if text is not None]
    return [
        Candidate(case_id=case.id, index=first_index + i, text=text, origin="corrupted", seed=seed, corruption=name)
        for i, (name, text) in enumerate(texts)
    ]


def _swap_side(parts: Sequence[str], positive: list[int], rng: random.Random) -> str | None:
    sided = [i for i in positive if SIDES.search(parts[i])]
    if not sided:
        return None
    # the same finding may stand in findings and impression: a report that contradicts itself is no test of sides
    name = findings(parts[rng.choice(sided)])[0].name
    same = [i for i in sided if any(finding.name == name for finding in findings(parts[i]))]
    return _join([_swapped(text) if i in same else text for i, text in enumerate(parts)])


def _swapped(sentence: str) -> str:
    def opposite(match: re.Match[str]) -> str:
        side = OPPOSITE[match.group().lower()]
        return side.capitalize() if match.group()[0].isupper() else side

    return SIDES.sub(opposite, sentence)


def _drop(parts: Sequence[str], positive: list[int], rng: random.Random) -> str | None:
    if not positive:
        return None
    name = findings(parts[rng.choice(positive)])[0].name
    kept = [text for i, text in enumerate(parts) if not (i in positive and findings(text)[0].name == name)]
    return _join(kept) if kept else None


def _invent(parts: Sequence[str], case: Case, others: list[str], rng: random.Random) -> str | None:
    present = {finding.name for finding in findings(case.report)}
    for report in rng.sample(others, min(len(others), 32)):
        for sentence in sentences(report):
            new = findings(sentence)
            if new and all(finding.name not in present for finding in new):
                place = rng.randrange(len(parts) + 1)
                return _join([*parts[:place], sentence, *parts[place:]])
    return None


def _join(parts: Sequence[str]) -> str:
    return " ".join(part if part.endswith((".", "!", "?", ":")) else f"{part}." for part in parts)
