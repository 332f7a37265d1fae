"""Audits: does the model look at the scan, or does it write what reports usually say?

Always on. The scan is exchanged for another patient's and for an empty one, and one fixed report is scored as if it
were the model's answer to everything. All are compared on the same cases by a paired bootstrap, with findings and
the GREEN of the rules judge, whichever judge scores the reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.scoring import Texts, content, judged
from mu2llm.green import Judge
from mu2llm.records import Estimate, Judgement

MUCH = 0.1
"""A score that falls by less than this fraction of itself, when the scan is taken away, is called the same."""
TEMPLATE = 0.5
"""More than this fraction of the reports being one and the same text is a template."""


class Contrast(BaseModel):
    """A metric without the case's own scan, and how much higher it is with it (paired)."""

    without: Estimate
    gain: Estimate

    @property
    def same(self) -> bool:
        return self.gain.low <= 0 or self.gain.value < MUCH * (self.without.value + self.gain.value)


class Audit(BaseModel):
    """`contrasts`: variant (shuffled, zeroed, prior) → metric (finding_f1, green_rules) → contrast.

    `passed` is False for a model that does not look, or writes one template; `reasons` says why, `warnings` what
    else to know. Words are of the reports and of the references: 5th, 50th and 95th percentile.
    """

    passed: bool
    reasons: list[str]
    warnings: list[str]
    contrasts: dict[str, dict[str, Contrast]]
    distinct_reports: float
    most_frequent_report: str
    most_frequent_share: float
    overlooked: Estimate | None
    laterality: Estimate | None
    words: tuple[float, float, float]
    reference_words: tuple[float, float, float]
    cut_off: float
    invalid: dict[str, int]

    @property
    def red_line(self) -> str:
        """One line for every table; empty where all is well."""
        return "" if self.passed else f"does not look at the scan: {'; '.join(self.reasons)}"


def audit(
    own: Texts,
    variants: Mapping[str, Texts],
    judgements: Sequence[Judgement],
    finished: Sequence[bool],
    rules: Judge,
    resamples: int = 1000,
    seed: int = 0,
) -> Audit:
    """The audit of one run.

    `own` are its reports, `variants` those written without the case's own scan (shuffled, zeroed) and the fixed
    report (prior), each for all or some of the cases; `judgements` and `finished` are of `own`.
    """
    bootstrap = Bootstrap([case.patient for case in own.cases], resamples, seed)
    contrasts = {name: _contrasts(own, texts, rules, resamples, seed) for name, texts in variants.items()}
    texts = Counter(own.candidates)
    frequent, times = texts.most_common(1)[0]
    invalid = Counter(judgement.why for judgement in judgements if not judgement.valid)
    template = times / len(own) > max(TEMPLATE, 2 * _share_of_one(own.references))
    reasons = _reasons(contrasts)
    if template:
        reasons.append(f"one text is {times / len(own):.0%} of the reports")
    return Audit(
        passed=not reasons,
        reasons=reasons,
        warnings=_warnings(own, judgements, finished),
        contrasts=contrasts,
        distinct_reports=len(texts) / len(own),
        most_frequent_report=frequent,
        most_frequent_share=times / len(own),
        overlooked=bootstrap.mean(_overlooked(own)),
        laterality=bootstrap.estimate(content(own)["laterality"]),
        words=_words(own.candidates),
        reference_words=_words(own.references),
        cut_off=1 - sum(finished) / len(finished),
        invalid=dict(invalid),
    )


def prior_report(reports: Sequence[str], rules: Judge, seed: int = 0, sample: int = 48) -> str:
    """The training report that, given as the answer to every scan, scores best (GREEN by rules) on the others.

    Chosen among and judged by `sample` reports drawn by seed.
    """
    distinct = sorted(set(reports))
    chosen = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:sample]]
    pairs = [(reference, candidate) for candidate in chosen for reference in chosen]
    scores = np.array([judgement.score or 0.0 for judgement in rules.judge(pairs)]).reshape(len(chosen), len(chosen))
    return chosen[int((scores.sum(axis=1) - scores.diagonal()).argmax())]


def _contrasts(own: Texts, other: Texts, rules: Judge, resamples: int, seed: int) -> dict[str, Contrast]:
    """Metric → contrast on the cases that both have; a metric that is not defined on them is left out."""
    there = {case.id for case in other.cases}
    ids = [case.id for case in own.cases if case.id in there]
    ours, theirs = own.of(ids), other.of(ids)
    bootstrap = Bootstrap([case.patient for case in ours.cases], resamples, seed)
    statistics = {
        "finding_f1": (content(ours)["finding_f1"], content(theirs)["finding_f1"]),
        "green_rules": (judged(rules.judge(ours.pairs)), judged(rules.judge(theirs.pairs))),
    }
    contrasts = {}
    for name, (mine, foreign) in statistics.items():
        without, gain = bootstrap.estimate(foreign), bootstrap.difference(mine, foreign)
        if without and gain:
            contrasts[name] = Contrast(without=without, gain=gain)
    return contrasts


def _reasons(contrasts: Mapping[str, Mapping[str, Contrast]]) -> list[str]:
    described = {"shuffled": "with other patients' scans", "zeroed": "with empty scans", "prior": "as one fixed report"}
    reasons = []
    for variant, metrics in contrasts.items():
        # one fixed report finds nothing, which is no feat to beat: there GREEN decides
        decisive = ("green_rules", "finding_f1") if variant == "prior" else ("finding_f1", "green_rules")
        metric = next((name for name in decisive if name in metrics), None)
        if metric is None:
            reasons.append(f"not measurable {described[variant]}: no case has another patient's scan or a finding")
        elif metrics[metric].same:
            contrast = metrics[metric]
            reasons.append(
                f"{metric} {contrast.without.value + contrast.gain.value:.2f} is much the same {described[variant]} "
                f"({contrast.without.value:.2f}; gain {contrast.gain.low:+.2f} … {contrast.gain.high:+.2f})"
            )
    return reasons


def _warnings(own: Texts, judgements: Sequence[Judgement], finished: Sequence[bool]) -> list[str]:
    warnings = []
    invalid, silent = (Counter(j.why for j in judgements if j.why and j.valid is valid) for valid in (False, True))
    if invalid:
        why, times = invalid.most_common(1)[0]
        warnings.append(f"{invalid.total()} of {len(own)} judgements are invalid and not in the mean, {times}: {why}")
    if not all(finished):
        warnings.append(
            f"{len(finished) - sum(finished)} of {len(finished)} reports were cut off at the longest length"
        )
    if silent:
        why, times = silent.most_common(1)[0]
        warnings.append(f"{silent.total()} of {len(own)} reports say nothing and score 0, {times}: {why}")
    return warnings


def _overlooked(own: Texts) -> list[float | None]:
    """Of the cases with a finding: 1 where the report names none at all."""
    return [float(not found) if truth else None for truth, found in zip(own.truth, own.found, strict=True)]


def _share_of_one(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts)


def _words(texts: Sequence[str]) -> tuple[float, float, float]:
    low, middle, high = np.percentile([len(text.split()) for text in texts], [5, 50, 95])
    return float(low), float(middle), float(high)
