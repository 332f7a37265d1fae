"""Texts → statistics: what each metric of one run needs of each case, before any interval is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mu2llm import green
from mu2llm.evaluation import clinical
from mu2llm.evaluation.bootstrap import Statistic
from mu2llm.evaluation.clinical import Tally
from mu2llm.green import Judge
from mu2llm.records import Case, Finding, Judgement

CUT_OFF = "the candidate report was cut off at the longest length"

if TYPE_CHECKING:
    from mu2llm.evaluation.bert_score import BertScore


@dataclass(frozen=True)
class Texts:
    """The reports of one run, in one variant, beside the references of their cases."""

    cases: tuple[Case, ...]
    references: tuple[str, ...]
    candidates: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.references, self.candidates, strict=True))

    def of(self, ids: Sequence[str]) -> Texts:
        """The same of some of the cases, in the order of `ids`."""
        place = {case.id: i for i, case in enumerate(self.cases)}
        rows = [place[name] for name in ids]
        return Texts(
            tuple(self.cases[i] for i in rows),
            tuple(self.references[i] for i in rows),
            tuple(self.candidates[i] for i in rows),
        )

    @cached_property
    def truth(self) -> list[Sequence[Finding]]:
        """The case's findings where they are known, else those read in the reference."""
        return [
            case.findings if case.findings is not None else green.findings(reference)
            for case, reference in zip(self.cases, self.references, strict=True)
        ]

    @cached_property
    def found(self) -> list[Sequence[Finding]]:
        """The findings read in the candidates."""
        return [green.findings(text) for text in self.candidates]

    @cached_property
    def true_labels(self) -> list[dict[str, int]]:
        """The 18 labels: the data set's where a case has them, else those read in the reference."""
        return [
            case.labels if case.labels is not None else green.labels(reference)
            for case, reference in zip(self.cases, self.references, strict=True)
        ]

    @cached_property
    def labels(self) -> Tally:
        """The labels read in the candidates against the true ones."""
        found = [green.labels(text) for text in self.candidates]
        return clinical.tally_labels(self.true_labels, found, green.LABELS)


def content(texts: Texts) -> dict[str, Statistic]:
    """What the reports say: finding_*, ce_*, crg, laterality."""
    return {
        **clinical.finding_metrics(texts.truth, texts.found),
        **clinical.label_metrics(texts.labels),
        "laterality": laterality(texts.truth, texts.found),
    }


def embedded(runs: Mapping[str, Texts], encoder: BertScore) -> dict[str, Statistic]:
    """bert_score of every run on the same cases; a reference is encoded once for all of them."""
    by_case = [pair for pairs in zip(*(texts.pairs for texts in runs.values()), strict=True) for pair in pairs]
    scores = encoder.scores(by_case)
    return {run: Statistic.mean(scores[i :: len(runs)]) for i, run in enumerate(runs)}


def judge_finished(judge: Judge, pairs: Sequence[tuple[str, str]], finished: Sequence[bool]) -> list[Judgement]:
    """Judgements of pairs; a report that was cut off is not asked about, it scores 0."""
    cut = Judgement(valid=True, score=0.0, why=CUT_OFF, judge=judge.identity)
    whole = iter(judge.judge([pair for pair, done in zip(pairs, finished, strict=True) if done]))
    return [next(whole) if done else cut for done in finished]


def judged(judgements: Sequence[Judgement]) -> Statistic:
    """The mean GREEN over the valid judgements."""
    return Statistic.mean([judgement.score if judgement.valid else None for judgement in judgements])


def laterality(truth: Sequence[Sequence[Finding]], found: Sequence[Sequence[Finding]]) -> Statistic:
    """Of the findings with a side that both name, and give a side, the fraction whose sides agree."""
    rows = np.zeros((len(truth), 2))
    for i, (true, read) in enumerate(zip(truth, found, strict=True)):
        ours, theirs = _sides(true), _sides(read)
        both = ours.keys() & theirs.keys()
        rows[i] = sum(ours[name] == theirs[name] for name in both), len(both)
    return Statistic(rows, n=int((rows[:, 1] > 0).sum()))


def _sides(findings: Sequence[Finding]) -> dict[str, set[str]]:
    sides: dict[str, set[str]] = {}
    for finding in findings:
        if finding.side:
            both = {"left", "right"} if finding.side == "bilateral" else {finding.side}
            sides.setdefault(finding.name, set()).update(both)
    return sides
