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

from mu2llm.evaluation import consistency
from mu2llm.evaluation.bootstrap import Bootstrap
from mu2llm.evaluation.consistency import Consistency
from mu2llm.evaluation.scoring import Texts, content, judged
from mu2llm.green import Judge
from mu2llm.records import Estimate, Judgement

COVERED = 0.95
"""A mean over a smaller fraction of the cases is no score of the split."""
MUCH = 0.1
"""A score that falls by less than this fraction of itself, when the scan is taken away, is called the same."""
TABLE = "table"
"""The training reports nearest to what a model's reports name, in their place."""
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
    """`contrasts`: variant (shuffled, zeroed, prior, table) → metric (finding_f1, green_rules) → contrast.

    `passed` is False for a model that does not look, or writes one template (`reasons` says why), and where its scores
    cannot stand (`shortfalls`): too few cases in a mean, or no better than without a model. `warnings` is what else to
    know. `failed` reports score 0 (empty, cut off, unreadable), on `invalid` ones the judge failed: reason → number.
    Words are of the reports and of the references: 5th, 50th and 95th percentile; so is how far findings and impression
    agree (None in audits that are older).
    """

    passed: bool
    reasons: list[str]
    shortfalls: list[str] = []
    warnings: list[str]
    contrasts: dict[str, dict[str, Contrast]]
    distinct_reports: float
    most_frequent_report: str
    most_frequent_share: float
    overlooked: Estimate | None
    laterality: Estimate | None
    words: tuple[float, float, float]
    reference_words: tuple[float, float, float]
    consistency: Consistency | None = None
    reference_consistency: Consistency | None = None
    cut_off: float
    failed: dict[str, int] = {}
    invalid: dict[str, int]

    @property
    def red_line(self) -> str:
        """One line for every table; empty where all is well."""
        blind = [f"does not look at the scan: {'; '.join(self.reasons)}"] if self.reasons else []
        return "; ".join([*blind, *self.shortfalls])


def audit(
    own: Texts,
    variants: Mapping[str, Texts],
    judgements: Sequence[Judgement],
    finished: Sequence[bool],
    rules: Judge,
    shortfalls: Sequence[str] = (),
    warnings: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> Audit:
    """The audit of one run.

    `own` are its reports, `variants` those written without the case's own scan (shuffled, zeroed), the fixed report
    (prior) and what a table has for the findings that its reports name (table), each for all or some of the cases;
    `judgements` and `finished` are of `own`. `shortfalls` and `warnings` are added to what is found here.
    """
    bootstrap = Bootstrap([case.patient for case in own.cases], resamples, seed)
    contrasts = {name: _contrasts(own, texts, rules, resamples, seed) for name, texts in variants.items()}
    texts = Counter(own.candidates)
    frequent, times = texts.most_common(1)[0]
    invalid = Counter(judgement.why for judgement in judgements if not judgement.valid)
    failed = Counter(judgement.why for judgement in judgements if judgement.failed)
    short = [*shortfalls, *_uncovered(invalid, len(own))]
    ids = [case.id for case in own.cases]
    agrees, agreed = (consistency.consistency(ids, each, bootstrap) for each in (own.candidates, own.references))
    template = times / len(own) > max(TEMPLATE, 2 * _share_of_one(own.references))
    reasons = _reasons(contrasts)
    if template:
        reasons.append(f"one text is {times / len(own):.0%} of the reports")
    return Audit(
        passed=not reasons and not short,
        reasons=reasons,
        shortfalls=short,
        warnings=[
            *_warnings(len(own), failed, invalid, finished),
            *consistency.describe(agrees, agreed),
            *_of_the_table(contrasts),
            *warnings,
        ],
        contrasts=contrasts,
        distinct_reports=len(texts) / len(own),
        most_frequent_report=frequent,
        most_frequent_share=times / len(own),
        overlooked=bootstrap.mean(_overlooked(own)),
        laterality=bootstrap.estimate(content(own)["laterality"]),
        words=_words(own.candidates),
        reference_words=_words(own.references),
        consistency=agrees,
        reference_consistency=agreed,
        cut_off=1 - sum(finished) / len(finished),
        failed=dict(failed),
        invalid=dict(invalid),
    )


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
        if variant == TABLE:
            continue  # as good as a table, a report may still be of the scan
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


def _of_the_table(contrasts: Mapping[str, Mapping[str, Contrast]]) -> list[str]:
    contrast = contrasts.get(TABLE, {}).get("green_rules")
    if contrast is None or not contrast.same:
        return []
    gain = f"gain {contrast.gain.low:+.2f} … {contrast.gain.high:+.2f}"
    much = "little" if contrast.gain.low > 0 else "nothing"
    return [
        f"its wording adds {much} to a table of training reports for the findings that it names: GREEN by rules {gain}"
    ]


def _uncovered(invalid: Counter[str], cases: int) -> list[str]:
    valid = cases - invalid.total()
    if valid >= COVERED * cases:
        return []
    why, times = invalid.most_common(1)[0]
    return [f"GREEN is a mean over {valid} of {cases} cases only: the judge failed on the others, {times}: {why}"]


def _warnings(cases: int, failed: Counter[str], invalid: Counter[str], finished: Sequence[bool]) -> list[str]:
    warnings = []
    if invalid:
        why, times = invalid.most_common(1)[0]
        warnings.append(f"{invalid.total()} of {cases} judgements are invalid and not in the mean, {times}: {why}")
    if not all(finished):
        warnings.append(
            f"{len(finished) - sum(finished)} of {len(finished)} reports were cut off at the longest length"
        )
    if failed:
        why, times = failed.most_common(1)[0]
        warnings.append(f"{failed.total()} of {cases} reports cannot be judged and score 0, {times}: {why}")
    return warnings


def _overlooked(own: Texts) -> list[float | None]:
    """Of the cases with a finding: 1 where the report names none at all."""
    return [float(not found) if truth else None for truth, found in zip(own.truth, own.found, strict=True)]


def _share_of_one(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts)


def _words(texts: Sequence[str]) -> tuple[float, float, float]:
    low, middle, high = np.percentile([len(text.split()) for text in texts], [5, 50, 95])
    return float(low), float(middle), float(high)
