"""Bootstrap intervals: cases are drawn again with replacement, whole patients at a time.

A metric of a corpus is a function of sums over its cases (counts for F1, n-gram matches for BLEU, value and 1 for
a mean), so all resamples are one matrix product: (resamples, n) draws @ (n, k) rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mu2llm.records import Estimate

Values = Sequence[float | None] | np.ndarray
"""One number a case (n,); NaN or None where a case has none."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over second: a mean of values kept as (value, 1), a rate kept as (hits, tries)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Statistic:
    """A metric before its interval: `rows` (n, k) of the cases, and what their sums (…, k) make (…), NaN undefined.

    `n` is the number of cases that count, where that is not all of them.
    """

    rows: np.ndarray
    metric: Callable[[np.ndarray], np.ndarray] = ratio
    n: int | None = None

    @classmethod
    def mean(cls, values: Values) -> Statistic:
        """The mean of one value a case."""
        array = np.asarray(values, dtype=float)
        known = ~np.isnan(array)
        return cls(np.stack([np.where(known, array, 0.0), known], axis=1), n=int(known.sum()))

    def where(self, chosen: np.ndarray) -> Statistic:
        """The same of some of the cases, chosen by a mask (n,)."""
        known = self.rows[chosen, 1].sum() if self.n is not None and self.metric is ratio else None
        return Statistic(self.rows[chosen], self.metric, None if known is None else int(known))


class Bootstrap:
    """Draws of one set of cases; every estimate uses the same draws, so differences are paired."""

    def __init__(self, patients: Sequence[Hashable], resamples: int = 1000, seed: int = 0) -> None:
        self.patients, self.resamples, self.seed = list(patients), resamples, seed

    @cached_property
    def draws(self) -> np.ndarray:
        """(resamples, n): how often each case is drawn."""
        index = {patient: i for i, patient in enumerate(dict.fromkeys(self.patients))}
        rng = np.random.default_rng(self.seed)
        times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=self.resamples)
        return times[:, [index[patient] for patient in self.patients]].astype(np.float64)

    def estimate(self, statistic: Statistic) -> Estimate | None:
        """The metric with its 95 % percentile interval; None where it is not defined."""
        return self._interval([statistic], lambda sums: statistic.metric(sums[0]), statistic.n)

    def difference(self, ours: Statistic, theirs: Statistic) -> Estimate | None:
        """ours − theirs, paired: on the same cases (of means, those that have both values), drawn the same."""
        n = None
        if ours.metric is ratio:
            both = (ours.rows[:, 1] > 0) & (theirs.rows[:, 1] > 0)
            ours, theirs = (Statistic(each.rows * both[:, None]) for each in (ours, theirs))
            n = int(both.sum())
        return self._interval([ours, theirs], lambda sums: ours.metric(sums[0]) - theirs.metric(sums[1]), n)

    def mean(self, values: Values) -> Estimate | None:
        """The mean over the cases that have a value."""
        return self.estimate(Statistic.mean(values))

    def _interval(
        self, statistics: list[Statistic], metric: Callable[[list[np.ndarray]], np.ndarray], n: int | None
    ) -> Estimate | None:
        for statistic in statistics:
            if len(statistic.rows) != len(self.patients):
                raise ValueError(f"a statistic of {len(statistic.rows)} cases, expected {len(self.patients)}")
        if not self.patients:
            return None
        value = float(metric([each.rows.sum(axis=0) for each in statistics]))
        if not np.isfinite(value):
            return None
        resampled = np.asarray(metric([self.draws @ each.rows for each in statistics]))
        low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
        return Estimate(value=value, low=float(low), high=float(high), n=len(self.patients) if n is None else n)


def estimates(statistics: Mapping[str, Statistic], bootstrap: Bootstrap) -> dict[str, Estimate | None]:
    """Name → estimate, of all."""
    return {name: bootstrap.estimate(statistic) for name, statistic in statistics.items()}
