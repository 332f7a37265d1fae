"""The judge that needs no model: findings by lexicon, compared one by one, as GREEN's six errors.

Per kind of finding the reference's and the candidate's mentions are paired so that most agree. A pair
- agrees and counts as matched, if side, place and severity do; what one of them leaves out (but the side)
  or differs by little in is listed as an insignificant (c) or (d);
- is one significant error (c) if side or place exclude each other, (d) if sizes differ by a factor of two
  or severities by two of three grades;
- agrees with one significant error, if the candidate leaves out the side (c), adds a comparison (e) or
  leaves one out (f).
What remains is false (a) or missing (b); a second mention of a finding that is matched already is neither.
Bilateral findings are two. Normal statements are not counted, but where the reference has no finding at
all, a candidate that says so and has none either is one match.

Adding a false finding or removing a matched one never raises the score: a matched pair carries at most one
significant error, and a wrong pair costs no more than the missing finding alone would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
from scipy.optimize import linear_sum_assignment

from mu2llm.green.findings import Reading, merge, read
from mu2llm.green.judge import Pair, unjudged
from mu2llm.green.lexicon import lexicon
from mu2llm.green.mentions import Mention
from mu2llm.green.parser import score
from mu2llm.records import Judgement

_SOURCES = (
    *("lexicon.yaml", "lexicon.py", "characters.py", "layout.py", "headings.py", "sentences.py"),
    *("scope.py", "mentions.py", "findings.py", "rules.py"),
)
_COMPARISON = "statement of change since an earlier examination"
_NO_FINDING = "no abnormal finding"
_GRADES = {1: "small", 2: "moderate", 3: "large"}


class RulesJudge:
    """GREEN's categories by lexicon, negation, side, place, size and change. Deterministic; thousands a second."""

    @property
    def identity(self) -> str:
        """Changes with every change of the rules."""
        return _identity()

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        return [_judge(reference, candidate) for reference, candidate in pairs]


@cache
def _identity() -> str:
    folder = files("mu2llm.green")
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()
    return f"rules@{digest[:12]}"


@dataclass(slots=True)
class _Tally:
    """Sentences by category a–f; the counts are their numbers."""

    matched: list[str] = field(default_factory=list)
    significant: dict[str, list[str]] = field(default_factory=lambda: {c: [] for c in "abcdef"})
    insignificant: dict[str, list[str]] = field(default_factory=lambda: {c: [] for c in "abcdef"})

    def judgement(self, why: str) -> Judgement:
        significant = tuple(len(s) for s in self.significant.values())
        return Judgement(
            valid=True,
            score=score(len(self.matched), significant),
            significant=significant,
            insignificant=tuple(len(s) for s in self.insignificant.values()),
            matched=len(self.matched),
            significant_sentences=tuple(tuple(s) for s in self.significant.values()),
            insignificant_sentences=tuple(tuple(s) for s in self.insignificant.values()),
            matched_sentences=tuple(self.matched),
            why=why,
            judge=_identity(),
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a reference's and a candidate's mention of the same kind of finding compare."""

    matched: bool
    error: str | None
    minor: tuple[str, ...]

    @property
    def weight(self) -> int:
        return 1000 * self.matched - (self.error is not None)


@lru_cache(maxsize=16384)
def _judge(reference: str, candidate: str) -> Judgement:
    ours, theirs = read(reference), read(candidate)
    if judgement := unjudged((reference, candidate), _identity()):
        return judgement
    if not ours.present and not ours.normal:
        why = "the reference report holds no finding and no normal statement that the rules know"
        return Judgement(valid=False, score=None, why=why, judge=_identity())
    tally = _Tally()
    ours_by_name, theirs_by_name = _by_name(ours), _by_name(theirs)
    for name in {**ours_by_name, **theirs_by_name}:
        _compare_kind(ours_by_name.get(name, []), theirs_by_name.get(name, []), tally)
    if not ours.present and not theirs.present and theirs.normal:
        tally.matched.append(_NO_FINDING)
    elif not ours.present and not theirs.normal and not theirs.present:
        tally.significant["b"].append(_NO_FINDING)
    if theirs.compares and not ours.compares:
        tally.significant["e"].append(_COMPARISON)
    elif ours.compares and not theirs.compares:
        tally.significant["f"].append(_COMPARISON)
    silent = not (theirs.present or theirs.normal or theirs.compares)
    return tally.judgement("the candidate report states nothing that the rules know" if silent else "")


def _by_name(reading: Reading) -> dict[str, list[Mention]]:
    """Mentions by kind; of a finding that has a side, a bilateral one is two."""
    kinds: dict[str, list[Mention]] = {}
    for mention in reading.present:
        kind = kinds.setdefault(mention.name, [])
        if lexicon().by_name[mention.name].sided and mention.side == "bilateral":
            merge(kind, replace(mention, side="right"))
            merge(kind, replace(mention, side="left"))
        else:
            merge(kind, mention)
    return kinds


def _compare_kind(ours: list[Mention], theirs: list[Mention], tally: _Tally) -> None:
    outcomes = [[_compare(a, b) for b in theirs] for a in ours]
    pairs = _assign(outcomes)
    for i, j in pairs:
        _note_pair(ours[i], theirs[j], outcomes[i][j], tally)
    paired_ours, paired_theirs = {i for i, _ in pairs}, {j for _, j in pairs}
    tally.significant["b"] += [_describe(a) for i, a in enumerate(ours) if i not in paired_ours]
    for j, b in enumerate(theirs):
        if j not in paired_theirs and not any(row[j].matched for row in outcomes):
            tally.significant["a"].append(_describe(b))


def _assign(outcomes: list[list[_Outcome]]) -> list[tuple[int, int]]:
    """The pairing with the most matches and, among those, the fewest errors."""
    if not outcomes or not outcomes[0]:
        return []
    if len(outcomes) == 1 and len(outcomes[0]) == 1:
        return [(0, 0)]
    weights = np.array([[outcome.weight for outcome in row] for row in outcomes])
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _note_pair(ours: Mention, theirs: Mention, outcome: _Outcome, tally: _Tally) -> None:
    both = f"{_describe(theirs)} instead of {_describe(ours)}"
    if outcome.matched:
        tally.matched.append(_describe(ours))
    if outcome.error:
        tally.significant[outcome.error].append(both)
    for category in outcome.minor:
        tally.insignificant[category].append(both)


def _compare(ours: Mention, theirs: Mention) -> _Outcome:
    wrong, partly, minor = None, [], []
    for category, grade in (
        *_compare_position(ours, theirs),
        *_compare_extent(ours, theirs),
        *_compare_change(ours, theirs),
    ):
        if grade == "wrong":
            wrong = wrong or category
        elif grade == "partly":
            partly.append(category)
        else:
            minor.append(category)
    if wrong:
        return _Outcome(False, wrong, ())
    return _Outcome(True, partly[0] if partly else None, tuple(sorted({*minor, *partly[1:]})))


def _compare_position(ours: Mention, theirs: Mention) -> Iterator[tuple[str, str]]:
    if lexicon().by_name[ours.name].sided and ours.side != theirs.side:
        yield "c", "wrong" if ours.side and theirs.side else "partly" if ours.side else "minor"
    if ours.places != theirs.places:
        yield "c", "minor" if ours.places & theirs.places or not ours.places or not theirs.places else "wrong"


def _compare_extent(ours: Mention, theirs: Mention) -> Iterator[tuple[str, str]]:
    if ours.size_mm and theirs.size_mm:
        ratio = max(ours.size_mm, theirs.size_mm) / min(ours.size_mm, theirs.size_mm)
        if ratio > 1.25:
            yield "d", "wrong" if ratio >= 2 else "minor"
    elif ours.severity and theirs.severity:
        if ours.severity != theirs.severity:
            yield "d", "wrong" if abs(ours.severity - theirs.severity) == 2 else "minor"
    elif (ours.size_mm or ours.severity) and not (theirs.size_mm or theirs.severity):
        yield "d", "minor"


def _compare_change(ours: Mention, theirs: Mention) -> Iterator[tuple[str, str]]:
    if ours.change != theirs.change:
        yield ("e" if theirs.change else "f"), "partly"


def _describe(mention: Mention) -> str:
    size = f"{mention.size_mm:g} mm" if mention.size_mm else _GRADES.get(mention.severity or 0, "")
    places = " and ".join(sorted(mention.places))
    words = (mention.change or "", size, mention.side or "", places, mention.name)
    return " ".join(word for word in words if word)
