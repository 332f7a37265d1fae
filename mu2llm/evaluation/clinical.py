"""Whether a report says what is there: findings against the truth, the 18 CT-RATE labels, CRG (METHOD.md §4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mu2llm.evaluation.bootstrap import Statistic
from mu2llm.records import Finding

Metric = Callable[[np.ndarray], np.ndarray]
RATES = {"precision": (1.0, 1.0, 0.0), "recall": (1.0, 0.0, 1.0), "f1": (1.0, 0.5, 0.5)}
"""Each rate is TP / (TP·a + FP·b + FN·c)."""


@dataclass(frozen=True)
class Tally:
    """What was found right, falsely and not at all: `counts` (cases, names, 3) of TP, FP, FN."""

    names: tuple[str, ...]
    counts: np.ndarray

    def statistic(self, metric: Metric) -> Statistic:
        """A metric of the sums (…, names, 3) as a statistic of the cases."""
        flat = self.counts.reshape(len(self.counts), 3 * len(self.names))
        return Statistic(flat, partial(_unflatten, metric, len(self.names)))

    def macro(self, rate: str) -> Statistic:
        """The mean of a rate over the names that the truth has (in each resample)."""
        return self.statistic(partial(_macro, rate))

    def micro(self, rate: str) -> Statistic:
        """A rate of all names together."""
        return self.statistic(partial(_micro, rate))

    def by_name(self, rate: str) -> dict[str, Statistic]:
        """A rate of each name."""
        return {
            name: Statistic(self.counts[:, i], partial(_rate, rate), n=int(self.counts[:, i, [0, 2]].any(axis=1).sum()))
            for i, name in enumerate(self.names)
        }


def _unflatten(metric: Metric, names: int, sums: np.ndarray) -> np.ndarray:
    return metric(sums.reshape(*sums.shape[:-1], names, 3))


def _rate(rate: str, sums: np.ndarray) -> np.ndarray:
    """Sums (…, 3) → rate (…); 0 where there is something to find and nothing found, NaN where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = sums[..., 0] / (sums @ np.array(RATES[rate]))
    return np.where(sums.any(axis=-1), np.nan_to_num(value), np.nan)


def _macro(rate: str, sums: np.ndarray) -> np.ndarray:
    there = sums[..., 0] + sums[..., 2] > 0
    total = np.where(there, _rate(rate, sums), 0.0).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return total / there.sum(axis=-1)


def _micro(rate: str, sums: np.ndarray) -> np.ndarray:
    return _rate(rate, sums.sum(axis=-2))


def tally_findings(
    truth: Sequence[Sequence[Finding]], found: Sequence[Sequence[Finding]], strict: bool = True
) -> Tally:
    """Findings of the truth against those read in the reports, over the kinds of finding that the truth has.

    `strict`: finding and side must be right, for the kinds that ever have a side in the truth; a bilateral finding
    is one on either side. What is found twice in a case counts once.
    """
    names = tuple(sorted({finding.name for findings in truth for finding in findings}))
    sided = {finding.name for findings in truth for finding in findings if finding.side} if strict else set()
    counts = np.zeros((len(truth), len(names), 3))
    for case, (true, read) in enumerate(zip(truth, found, strict=True)):
        expected, stated = _keys(true, sided), _keys(read, sided)
        for i, name in enumerate(names):
            ours, theirs = ({side for kind, side in keys if kind == name} for keys in (expected, stated))
            counts[case, i] = len(ours & theirs), len(theirs - ours), len(ours - theirs)
    return Tally(names, counts)


def _keys(findings: Sequence[Finding], sided: set[str]) -> set[tuple[str, str | None]]:
    keys: set[tuple[str, str | None]] = set()
    for finding in findings:
        if finding.name not in sided:
            keys.add((finding.name, None))
        elif finding.side == "bilateral":
            keys |= {(finding.name, "left"), (finding.name, "right")}
        else:
            keys.add((finding.name, finding.side))
    return keys


def tally_labels(truth: Sequence[Mapping[str, int]], found: Sequence[Mapping[str, int]], names: Sequence[str]) -> Tally:
    """Labels 0/1 of the references against those of the reports; a label that a case does not have is 0."""
    true, stated = (
        np.array([[bool(case.get(name, 0)) for name in names] for case in cases], dtype=bool).reshape(-1, len(names))
        for cases in (truth, found)
    )
    return Tally(tuple(names), np.stack([true & stated, ~true & stated, true & ~stated], axis=-1).astype(float))


def finding_metrics(truth: Sequence[Sequence[Finding]], found: Sequence[Sequence[Finding]]) -> dict[str, Statistic]:
    """finding_f1, finding_precision, finding_recall (strict, macro) and finding_f1_any_side."""
    strict = tally_findings(truth, found)
    any_side = tally_findings(truth, found, strict=False)
    return {
        "finding_f1": strict.macro("f1"),
        "finding_f1_any_side": any_side.macro("f1"),
        "finding_precision": strict.macro("precision"),
        "finding_recall": strict.macro("recall"),
    }


def label_metrics(tally: Tally) -> dict[str, Statistic]:
    """Clinical efficacy: ce_{macro,micro}_{precision,recall,f1}; and crg."""
    rates = {f"ce_macro_{rate}": tally.macro(rate) for rate in RATES}
    rates |= {f"ce_micro_{rate}": tally.micro(rate) for rate in RATES}
    return {**rates, "crg": crg(tally)}


def crg(tally: Tally) -> Statistic:
    """The CRG score (arXiv 2505.17167): 1 where every label is right, 1/3 where none is ever found.

    X labels of all cases, A of them positive: r = (X − A) / 2A, U = (X − A) / 2, s = r·TP − r·FN − FP,
    CRG = U / (2U − s). Undefined where all or none are positive.
    """
    labels = np.full((len(tally.counts), 1), len(tally.names))
    return Statistic(np.concatenate([tally.counts.sum(axis=1), labels], axis=1), _crg)


def _crg(sums: np.ndarray) -> np.ndarray:
    true_positive, false_positive, false_negative, labels = np.moveaxis(sums, -1, 0)
    positive = true_positive + false_negative
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = (labels - positive) / (2 * positive)
        best = (labels - positive) / 2
        score = weight * true_positive - weight * false_negative - false_positive
        return best / (2 * best - score)
