"""Rewards of a case's candidates, by name and composed (`preferences.reward`); pure functions without Ray or model.

GREEN alone rewards length (published for CheXalign and RadAgent): a sum can hold it against other things.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from statistics import fmean, pstdev
from typing import NamedTuple

from mu2llm.green import findings, labels
from mu2llm.records import Candidate, Judgement

_HEADINGS = re.compile(r"(?i)\b(findings|impression)\s*:")


class Judged(NamedTuple):
    """A candidate with its judgement and reward; None where the judge failed."""

    candidate: Candidate
    judgement: Judgement
    reward: float | None


def rewarded(terms: dict[str, float], reference: str, judged: Sequence[tuple[Candidate, Judgement]]) -> list[Judged]:
    """The candidates of one case with their rewards by `terms`, weight by name.

    One term alone counts as it is, times its weight. Of several each is first made z-scores over the case's candidates,
    as they have no common unit; one that is the same for all of them adds nothing.
    """
    valid = [(candidate, judgement) for candidate, judgement in judged if judgement.valid]
    columns = {name: [_measure(name, reference, *each) for each in valid] for name, weight in terms.items() if weight}
    if len(columns) > 1:
        columns = {name: _standardised(values) for name, values in columns.items()}
    sums = iter([sum(terms[name] * values[row] for name, values in columns.items()) for row in range(len(valid))])
    return [Judged(*each, next(sums) if each[1].valid else None) for each in judged]


def _standardised(values: Sequence[float]) -> list[float]:
    if not values:
        return []
    middle, spread = fmean(values), pstdev(values)
    return [(value - middle) / spread if spread > 1e-9 else 0.0 for value in values]


def _measure(name: str, reference: str, candidate: Candidate, judgement: Judgement) -> float:
    if name == "green":
        return judgement.score or 0.0
    return _OF_TEXTS[name](reference, candidate.text)


def f1(true: Set[object], stated: Set[object]) -> float:
    """Of two sets; 1 where both are empty."""
    return 2 * len(true & stated) / (len(true) + len(stated)) if true or stated else 1.0


def _found(text: str) -> set[tuple[str, str | None]]:
    return {(finding.name, finding.side) for finding in findings(text)}


def _labelled(text: str) -> set[str]:
    return {name for name, value in labels(text).items() if value}


def _well_formed(text: str) -> float:
    headings = [match[1].lower() for match in _HEADINGS.finditer(text)]
    parts = _HEADINGS.split(text)[2::2]
    return float(headings == ["findings", "impression"] and all(part.strip() for part in parts))


_OF_TEXTS: dict[str, Callable[[str, str], float]] = {
    "findings": lambda reference, text: f1(_found(reference), _found(text)),
    "labels": lambda reference, text: f1(_labelled(reference), _labelled(text)),
    "length": lambda reference, text: float(len(text.split())),
    "format": lambda reference, text: _well_formed(text),
}
