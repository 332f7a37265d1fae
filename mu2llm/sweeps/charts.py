"""Charts of sweeps and ablations as inline SVG, in the colours of the evaluation's pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mu2llm.evaluation.report.charts import FAINT, INK, RUNS, STYLE, as_svg
from mu2llm.records import Estimate
from mu2llm.sweeps.results import TITLES, Row, plain
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.trial import DIRECTIONS, Trial

BEST, OTHER = RUNS[1], RUNS[0]


@contextmanager
def _figure(height: float, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        yield figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0, handlelength=1)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def intervals(estimates: Mapping[str, Estimate | None], title: str, published: Mapping[str, float | None]) -> Figure:
    """Values with their 95 % intervals, from top to bottom, beside the paper's where it has them."""
    with _figure(0.9 + 0.27 * len(estimates)) as (figure, (axes,)):
        for row, (name, estimate) in enumerate(estimates.items()):
            if estimate:
                axes.plot([estimate.low, estimate.high], [row, row], color=OTHER, linewidth=1.6)
                axes.plot([estimate.value], [row], color=BEST, marker="o", markersize=5)
            if (paper := published.get(name)) is not None:
                axes.plot([paper], [row], color=RUNS[2], marker="D", markersize=5, linestyle="")
        axes.set_yticks(range(len(estimates)), list(estimates))
        axes.set_ylim(len(estimates) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel(f"{title}, 95 % interval" + (" (◆ in the paper, on AMOS-MM)" if published else ""))
        return figure


def ranking(rows: Sequence[Row], name: str) -> Figure:
    """The points that came to their end, best first, at most twenty."""
    best = [row for row in rows if row.status == "done"][:20]
    named = [", ".join(f"{_short(key)} {plain(value)}" for key, value in row.params.items()) for row in best]
    return intervals({each: row.estimate(name) for each, row in zip(named, best, strict=True)}, TITLES[name], {})


def history(trials: Sequence[Trial], name: str) -> str:
    """Every trial's value in the order in which they ended, and the best so far of those that came to their end."""
    known = [(trial.number + 1, value, trial.status) for trial in trials if (value := trial.value(name)) is not None]
    with _figure(2.6) as (figure, (axes,)):
        for status, alpha in (("done", 1.0), ("stopped", 0.35)):
            own = [(number, value) for number, value, how in known if how == status]
            axes.scatter([n for n, _ in own], [v for _, v in own], color=OTHER, alpha=alpha, s=24, label=status)
        done = [(number, value) for number, value, how in known if how == "done"]
        if done:
            best = (np.maximum if DIRECTIONS[name] == "max" else np.minimum).accumulate([value for _, value in done])
            places = [number for number, _ in done]
            axes.step(places, best, where="post", color=BEST, linewidth=1.6, label="best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial")
        axes.set_ylabel(TITLES[name])
        _legend(axes)
        return as_svg(figure, f"{TITLES[name]} of every trial")


def importance(by_objective: Mapping[str, Mapping[str, float]]) -> str:
    """Bars: how much each key matters, a panel an objective."""
    shown = {name: each for name, each in by_objective.items() if each}
    if not shown:
        return ""
    with _figure(0.8 + 0.3 * max(map(len, shown.values())), len(shown)) as (figure, panels):
        for axes, (name, each) in zip(panels, shown.items(), strict=True):
            ordered = sorted(each.items(), key=lambda item: item[1])
            bars = axes.barh([_short(key) for key, _ in ordered], [v for _, v in ordered], color=OTHER, height=0.6)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            axes.set_xlim(0, 1.1)
            axes.set_title(TITLES[name], fontsize=10, loc="left")
            axes.grid(False, axis="y")
            axes.tick_params(length=0)
        return as_svg(figure, "importance of each key")


class _Scale:
    """Where the values of a key stand on an axis: numbers as they are, or in their logarithm, else in their order."""

    def __init__(self, key: str, rows: Sequence[Row], space: Space) -> None:
        domain = space.domains[key]
        self.range, self.log = domain.range, domain.log is not None
        there = [row.params[key] for row in rows]
        self.names = [] if self.range else [plain(value) for value in domain.values() if value in there]
        self.at = [value if self.range else self.names.index(plain(value)) for value in there]

    def fractions(self) -> tuple[np.ndarray, list[tuple[float, str]]]:
        """Places between 0 and 1, and labels at such places."""
        low, high = self.range or (0, max(len(self.names) - 1, 1))
        read: Any = np.log if self.log else np.asarray
        places = (read(np.array(self.at, float)) - read(low)) / (read(high) - read(low))
        if self.range:
            return places, [(0.0, f"{low:g}"), (1.0, f"{high:g}")]
        return places, [(i / high, name) for i, name in enumerate(self.names)]


def parallel(rows: Sequence[Row], space: Space, name: str) -> str:
    """A line a point through its values, the better the darker; the last axis is the objective."""
    known = [row for row in rows if row.value(name) is not None]
    if len(known) < 2:
        return ""
    values = np.array([row.value(name) for row in known], float)
    low, high = values.min(), values.max()
    heights = (values - low) / (high - low or 1)
    good = heights if DIRECTIONS[name] == "max" else 1 - heights
    scales = [_Scale(key, known, space).fractions() for key in space.domains]
    columns = [*scales, (heights, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")])]
    with _figure(3.4) as (figure, (axes,)):
        for i in np.argsort(good):
            top = i == int(np.argmax(good))
            alpha = 1 if top else 0.12 + 0.6 * float(good[i]) ** 2
            axes.plot([places[i] for places, _ in columns], color=BEST if top else OTHER, alpha=alpha)
        for column, (_, labels) in enumerate(columns):
            for height, label in labels:
                axes.text(column, height, f" {label}", fontsize=7.5, va="center", color=INK)
        axes.set_xticks(range(len(columns)), [*map(_short, space.domains), TITLES[name]])
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(columns) - 0.65)
        axes.grid(True, axis="x", color=FAINT)
        axes.tick_params(length=0)
        return as_svg(figure, f"parallel coordinates of the trials, by {TITLES[name]}")


def slices(rows: Sequence[Row], space: Space, name: str) -> str:
    """The objective over each key by itself; a small mark where a trial was stopped."""
    known = [row for row in rows if row.value(name) is not None]
    if len(known) < 2:
        return ""
    values = np.array([row.value(name) for row in known], float)
    sizes = [26 if row.status == "done" else 8 for row in known]
    colours = [BEST if row is known[0] else OTHER for row in known]
    with _figure(2.4, len(space.domains)) as (figure, panels):
        for axes, key in zip(panels, space.domains, strict=True):
            scale = _Scale(key, known, space)
            axes.scatter(scale.at, values, s=sizes, color=colours, alpha=0.75)
            if scale.log:
                axes.set_xscale("log")
            if scale.names:
                axes.set_xticks(range(len(scale.names)), scale.names, rotation=60, fontsize=7.5)
            axes.set_title(_short(key), fontsize=10, loc="left")
            axes.sharey(panels[0])
            axes.tick_params(length=0, labelleft=axes is panels[0])
        panels[0].set_ylabel(TITLES[name])
        return as_svg(figure, f"{TITLES[name]} over each key")


def front(rows: Sequence[Row], best: Sequence[Row], objective: Sequence[str]) -> str:
    """The first two objectives of every finished point, and which are beaten in none."""
    y, x = objective[:2]
    ended = [row for row in rows if row.status == "done" and row.value(x) is not None and row.value(y) is not None]
    with _figure(3) as (figure, (axes,)):
        at, along = (np.array(sorted((row.value(x), row.value(y)) for row in some), float) for some in (ended, best))
        axes.scatter(at[:, 0], at[:, 1], color=OTHER, alpha=0.5, s=24)
        axes.plot(along[:, 0], along[:, 1], color=BEST, marker="o", linewidth=1.4, label="Pareto front")
        axes.set_xlabel(f"{TITLES[x]} ({DIRECTIONS[x]})")
        axes.set_ylabel(f"{TITLES[y]} ({DIRECTIONS[y]})")
        _legend(axes)
        return as_svg(figure, f"{TITLES[y]} against {TITLES[x]}, with the Pareto front")


def curves(trials: Sequence[Trial], name: str, best: Row) -> str:
    """The metric over the steps of every trial; the winner's in colour."""
    with _figure(2.6) as (figure, (axes,)):
        for trial in sorted(trials, key=lambda each: each in best.trials):
            points = [(entry["step"], entry[name]) for entry in trial.history if name in entry]
            if points:
                style: dict[str, Any] = {"color": OTHER, "alpha": 0.35, "linewidth": 1.2}
                style = {"color": BEST, "linewidth": 2.0} if trial in best.trials else style
                mark = "o" if trial.status == "done" else "x"
                axes.plot(*zip(*points, strict=True), marker=mark, markersize=3.5, **style)
        axes.set_xlabel("step (× where a trial was stopped)")
        axes.set_ylabel(TITLES[name])
        return as_svg(figure, f"{TITLES[name]} by step, of all trials")


def few_shot(variants: Mapping[str, Sequence[tuple[float, Mapping[str, Estimate | None]]]]) -> str:
    """GREEN and findings F1 by the fraction of training patients, a line a variant."""
    with _figure(2.6, 2) as (figure, panels):
        for axes, metric in zip(panels, ("green", "finding_f1"), strict=True):
            for colour, (name, points) in zip(RUNS, variants.items(), strict=False):
                known = [
                    (fraction, found)
                    for fraction, metrics in sorted(points, key=lambda p: p[0])
                    if (found := metrics[metric])
                ]
                x = [fraction for fraction, _ in known]
                axes.plot(x, [e.value for _, e in known], color=colour, marker="o", label=name)
                axes.fill_between(x, [e.low for _, e in known], [e.high for _, e in known], color=colour, alpha=0.15)
            axes.set_xscale("log")
            axes.set_xlabel("fraction of the training patients")
            axes.set_ylabel(TITLES[metric])
            _legend(axes)
        return as_svg(figure, "GREEN and findings F1 by the fraction of training patients")
