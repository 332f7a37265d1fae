"""A sweep's charts as inline SVG in the colours of the evaluation's pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mu2llm.evaluation.report.charts import FAINT, INK, RUNS, STYLE, as_svg
from mu2llm.sweeps.results import TITLES, Row
from mu2llm.sweeps.space import Space
from mu2llm.sweeps.trial import DIRECTIONS, Trial

BEST, OTHER = RUNS[1], RUNS[0]


def history(trials: Sequence[Trial], name: str) -> str:
    """Every trial's value in the order in which they ended, and the best so far."""
    known = [trial for trial in trials if trial.value(name) is not None]
    best = np.maximum if DIRECTIONS[name] == "max" else np.minimum
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        for status, alpha in (("done", 1.0), ("stopped", 0.35)):
            own = [trial for trial in known if trial.status == status]
            values = np.array([trial.value(name) for trial in own], float)
            axes.scatter([t.number + 1 for t in own], values, color=OTHER, alpha=alpha, s=24, label=status)
        ended = [trial for trial in known if trial.status == "done"]
        if ended:
            so_far = best.accumulate(np.array([trial.value(name) for trial in ended], float))
            axes.step(
                [t.number + 1 for t in ended], so_far, where="post", color=BEST, linewidth=1.6, label="best so far"
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial")
        axes.set_ylabel(TITLES[name])
        _legend(axes, 3)
        return as_svg(figure, f"{TITLES[name]} of every trial")


def ranking(rows: Sequence[Row], name: str) -> Figure:
    """The points that came to their end, best first, at most twenty: value and 95 % interval."""
    known = [(row, estimate) for row in rows if row.status == "done" and (estimate := row.estimate(name))][:20]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.26 * len(known)), layout="constrained")
        axes = figure.subplots()
        for place, (_, estimate) in enumerate(known):
            axes.plot([estimate.low, estimate.high], [place, place], color=OTHER, linewidth=1.6)
            axes.plot([estimate.value], [place], color=BEST, marker="o", markersize=5)
        axes.set_yticks(range(len(known)), [_named(row) for row, _ in known])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(f"{TITLES[name]}, 95 % interval")
    return figure


def _named(row: Row) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.params.items()) or "the default"


def importance(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Bars: how much each key matters, a panel an objective."""
    shares = {name: each for name, each in shares.items() if each}
    if not shares:
        return ""
    keys = sorted({key for each in shares.values() for key in each})
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.3 * len(keys)), layout="constrained")
        for axes, (name, each) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
            ordered = sorted(keys, key=lambda key: each.get(key, 0.0))
            values = [each.get(key, 0.0) for key in ordered]
            axes.barh([key.rpartition(".")[2] for key in ordered], values, color=OTHER, height=0.6)
            for place, value in enumerate(values):
                axes.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8)
            axes.set_xlim(0, 1.1)
            axes.set_title(TITLES[name], fontsize=10, loc="left")
            axes.grid(False, axis="y")
            axes.tick_params(length=0)
        return as_svg(figure, "importance of each key")


def parallel(rows: Sequence[Row], space: Space, name: str) -> str:
    """A line a point through its values, the best ones in colour; the last axis is the objective."""
    known = [row for row in rows if row.value(name) is not None]
    if len(known) < 2:
        return ""
    scales = [_Axis(key, [row.params[key] for row in known], space) for key in space.domains]
    values = np.array([row.value(name) for row in known], float)
    low, high = values.min(), values.max()
    good = (values - low) / (high - low or 1)
    good = good if DIRECTIONS[name] == "max" else 1 - good
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        axes = figure.subplots()
        for i in np.argsort(good):
            heights = [
                *(scale.place(known[i].params[scale.key]) for scale in scales),
                (values[i] - low) / (high - low or 1),
            ]
            top = i == int(np.argmax(good))
            axes.plot(heights, color=BEST if top else OTHER, alpha=1 if top else 0.12 + 0.6 * float(good[i]) ** 2)
        for place, scale in enumerate(scales):
            for height, label in scale.ticks:
                axes.text(place, height, f" {label}", fontsize=7.5, va="center", color=INK)
        for height, value in ((0, low), (1, high)):
            axes.text(len(scales), height, f" {value:.3g}", fontsize=7.5, va="center", color=INK)
        names = [*(scale.key.rpartition(".")[2] for scale in scales), TITLES[name]]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(scales) + 0.35)
        axes.grid(True, axis="x", color=FAINT)
        axes.tick_params(length=0)
        return as_svg(figure, f"parallel coordinates of the trials, by {TITLES[name]}")


class _Axis:
    """Where the values of a key stand between 0 and 1."""

    def __init__(self, key: str, given: Sequence[Any], space: Space) -> None:
        domain = space.domains[key]
        self.key, self.range, self.log = key, domain.log or domain.uniform or domain.integers, domain.log is not None
        if self.range:
            ends = [float(self.range[0]), float(self.range[1])]
            self.ticks = [(0.0, f"{ends[0]:g}"), (1.0, f"{ends[1]:g}")]
            return
        there = {json.dumps(value) for value in given}
        self.values = [json.dumps(value) for value in domain.values() if json.dumps(value) in there]
        self.ticks = [(self._at(i), value.strip('"')) for i, value in enumerate(self.values)]

    def _at(self, i: int) -> float:
        return i / (len(self.values) - 1) if len(self.values) > 1 else 0.5

    def place(self, value: Any) -> float:
        if not self.range:
            return self._at(self.values.index(json.dumps(value)))
        low, high, at = (np.log(float(v)) if self.log else float(v) for v in (*self.range, value))
        return float((at - low) / (high - low))


def front(rows: Sequence[Row], best: Sequence[Row], objective: Sequence[str]) -> str:
    """The first two objectives of every finished point, and which are beaten in none."""
    x, y = objective[1], objective[0]
    ended = [row for row in rows if row.status == "done" and row.value(x) is not None and row.value(y) is not None]
    if not ended:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots()
        at = np.array([(row.value(x), row.value(y)) for row in ended], float)
        axes.scatter(at[:, 0], at[:, 1], color=OTHER, alpha=0.5, s=24)
        along = np.array(sorted((row.value(x), row.value(y)) for row in best), float)
        axes.plot(along[:, 0], along[:, 1], color=BEST, marker="o", linewidth=1.4, label="Pareto front")
        axes.set_xlabel(f"{TITLES[x]} ({DIRECTIONS[x]})")
        axes.set_ylabel(f"{TITLES[y]} ({DIRECTIONS[y]})")
        _legend(axes, 1)
        return as_svg(figure, f"{TITLES[y]} against {TITLES[x]}, with the Pareto front")


def curves(trials: Sequence[Trial], name: str, best: Row) -> str:
    """The metric over the steps of every trial; the winner's in colour."""
    ids = {trial.id for trial in best.trials}
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        for trial in sorted(trials, key=lambda each: each.id in ids):
            points = [(entry["step"], entry[name]) for entry in trial.history if name in entry]
            if points:
                top = trial.id in ids
                steps, values = zip(*points, strict=True)
                mark = "o" if trial.status == "done" else "x"
                width, alpha = (2.0, 1.0) if top else (1.2, 0.35)
                axes.plot(
                    steps,
                    values,
                    color=BEST if top else OTHER,
                    alpha=alpha,
                    linewidth=width,
                    marker=mark,
                    markersize=3.5,
                )
        axes.set_xlabel("step (× where a trial was stopped)")
        axes.set_ylabel(TITLES[name])
        return as_svg(figure, f"{TITLES[name]} by step, of all trials")


def _legend(axes: Any, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, handlelength=1)
