"""GREEN and length: a longer report names more, so a difference in score may be one in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mu2llm.evaluation.bootstrap import Statistic

Scores = Sequence[float | None]
"""One a case; None where the judge failed."""
Side = tuple[Scores, Sequence[str]]
"""Scores and reports of the same cases."""


def correlation(scores: Scores, reports: Sequence[str]) -> Statistic:
    """Pearson's r of score and log words, over the cases that have a score."""
    x, y, known = _words(reports), _known(scores), _there(scores)
    rows = np.stack([known, x, y, x * x, y * y, x * y], axis=1) * known[:, None]
    return Statistic(rows, _pearson, n=int(known.sum()))


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (n * xx - x * x) * (n * yy - y * y)
        return (n * xy - x * y) / np.sqrt(np.where(spread > 1e-9, spread, np.nan))


def at_matched_length(ours: Side, theirs: Side) -> Statistic:
    """The difference of scores where both reports of a case are as long: what is left when the difference is fitted by
    least squares on the logarithm of the ratio of words. The mean difference where no lengths differ."""
    known = _there(ours[0]) * _there(theirs[0])
    ratio = _words(ours[1]) - _words(theirs[1])
    difference = _known(ours[0]) - _known(theirs[0])
    rows = np.stack([known, ratio, difference, ratio * ratio, ratio * difference], axis=1) * known[:, None]
    return Statistic(rows, _intercept, n=int(known.sum()))


def _intercept(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = n * xx - x * x
        return np.where(spread > 1e-9, (xx * y - x * xy) / spread, y / n)


def _words(reports: Sequence[str]) -> np.ndarray:
    return np.log(np.array([max(1, len(report.split())) for report in reports], dtype=float))


def _there(scores: Scores) -> np.ndarray:
    return np.array([score is not None for score in scores], dtype=float)


def _known(scores: Scores) -> np.ndarray:
    return np.array([score or 0.0 for score in scores], dtype=float)
