"""Bootstrap intervals: cases are drawn again with replacement, whole patients at a time.

A metric of a corpus is a function of sums over its cases (counts for F1, n-gram matches for BLEU, value and 1 for
a mean), so all resamples are one matrix product: (resamples, n) draws @ (n, k) rows. What several seeds wrote for the
same cases is resampled crosswise, for seeds often differ more than patients do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
        if not index:
            return np.zeros((self.resamples, 0))
        rng = np.random.default_rng(self.seed)
        times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=self.resamples)
        return times[:, [index[patient] for patient in self.patients]].astype(np.float64)

    def estimate(self, statistic: Statistic) -> Estimate | None:
        """The metric with its 95 % percentile interval; None where it is not defined."""
        return self._interval([self._sums(statistic)], lambda sums: statistic.metric(sums[0]), statistic.n)

    def difference(self, ours: Statistic, theirs: Statistic) -> Estimate | None:
        """ours − theirs, paired: on the same cases (of means, those that have both values), drawn the same."""
        return self.difference_over_seeds([ours], [theirs])

    def over_seeds(self, seeds: Sequence[Statistic]) -> Estimate | None:
        """The metric of all seeds' reports on the same cases, with an interval over seeds and patients."""
        if not seeds:
            return None
        return self._interval([self._crossed(seeds)], lambda sums: seeds[0].metric(sums[0]), seeds[0].n)

    def difference_over_seeds(self, ours: Sequence[Statistic], theirs: Sequence[Statistic]) -> Estimate | None:
        """ours − theirs, paired by seed and by case, with an interval over seeds and patients."""
        if not ours:
            return None
        pairs = [_both(*pair) for pair in zip(ours, theirs, strict=True)]
        first, second, n = [each[0] for each in pairs], [each[1] for each in pairs], pairs[0][2]
        metric = ours[0].metric
        sides = [self._crossed(first), self._crossed(second)]
        return self._interval(sides, lambda sums: metric(sums[0]) - metric(sums[1]), n)

    def _crossed(self, seeds: Sequence[Statistic]) -> _Sums:
        """Seeds and patients drawn apart, each with replacement, and all that a drawn seed wrote for drawn patients.

        Of S seeds S − 1 are drawn, without which so few would seem more alike than they are (Rao and Wu 1988).
        """
        for statistic in seeds:
            self._check(statistic)
        number = len(seeds)
        rng = np.random.default_rng([self.seed, 1])
        times = rng.multinomial(max(1, number - 1), np.full(number, 1 / number), size=self.resamples)
        drawn = sum(times[:, [i]] * (self.draws @ each.rows) for i, each in enumerate(seeds))
        return _Sums(np.sum([each.rows.sum(axis=0) for each in seeds], axis=0), np.asarray(drawn))

    def mean(self, values: Values) -> Estimate | None:
        """The mean over the cases that have a value."""
        return self.estimate(Statistic.mean(values))

    def _sums(self, statistic: Statistic) -> _Sums:
        self._check(statistic)
        return _Sums(statistic.rows.sum(axis=0), self.draws @ statistic.rows)

    def _check(self, statistic: Statistic) -> None:
        if len(statistic.rows) != len(self.patients):
            raise ValueError(f"a statistic of {len(statistic.rows)} cases, expected {len(self.patients)}")

    def _interval(
        self, sums: list[_Sums], metric: Callable[[list[np.ndarray]], np.ndarray], n: int | None
    ) -> Estimate | None:
        if not self.patients:
            return None
        value = float(metric([each.all for each in sums]))
        if not np.isfinite(value):
            return None
        resampled = np.asarray(metric([each.drawn for each in sums]))
        low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
        return Estimate(value=value, low=float(low), high=float(high), n=len(self.patients) if n is None else n)


class _Sums(NamedTuple):
    """Of all cases (k,), and of each resample (resamples, k)."""

    all: np.ndarray
    drawn: np.ndarray


def _both(ours: Statistic, theirs: Statistic) -> tuple[Statistic, Statistic, int | None]:
    """Of means, the cases that have both values, and how many these are; other metrics as they are."""
    if ours.metric is not ratio:
        return ours, theirs, None
    both = (ours.rows[:, 1] > 0) & (theirs.rows[:, 1] > 0)
    first, second = (Statistic(each.rows * both[:, None]) for each in (ours, theirs))
    return first, second, int(both.sum())


def estimates(statistics: Mapping[str, Statistic], bootstrap: Bootstrap) -> dict[str, Estimate | None]:
    """Name → estimate, of all."""
    return {name: bootstrap.estimate(statistic) for name, statistic in statistics.items()}
