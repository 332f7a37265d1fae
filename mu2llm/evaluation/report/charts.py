"""Charts as inline SVG whose colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure

from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.pages import source
from mu2llm.evaluation.results import TITLES, Results
from mu2llm.records import Estimate

# colours that matplotlib writes → what the page makes of them
INK, FAINT = "#010203", "#040506"
RUNS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {INK: "--ink", FAINT: "--line", **{c: f"--run-{i}" for i, c in enumerate(RUNS)}}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mu2llm",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}
SHOWN = ("finding_f1", "green", "ce_macro_f1", "crg", "bleu_1", "rouge_l", "meteor", "bert_score")


def metrics(results: Results) -> str:
    """Bars with intervals: the chief metrics of every run, with a line at what needs no model and one at the most."""
    runs = list(results.runs)
    names = [name for name in SHOWN if any(result.metrics.get(name) for result in results.runs.values())]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.6 + (0.2 * len(runs) + 0.2) * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(names))
        for i, run in enumerate(runs):
            values = [results.runs[run].metrics.get(name) for name in names]
            _bars(axes, rows + (i - (len(runs) - 1) / 2) * 0.8 / len(runs), values, RUNS[i], run, 0.8 / len(runs))
        levels = {name: each.levels[name] for each in results.runs.values() for name in names if name in each.levels}
        for name, level in levels.items():
            _bounds(axes, names.index(name), level, named=name == next(iter(levels)))
        axes.set_yticks(rows, [TITLES[name] for name in names])
        axes.invert_yaxis()
        _finish(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs) + 2, borderaxespad=0, handlelength=1)
        return as_svg(figure, f"chief metrics of {', '.join(runs)}, with 95 % intervals")


def _bounds(axes: Axes, row: int, level: Level, named: bool) -> None:
    """Lines across a metric's bars, at its floor and at its ceiling."""
    ends, label = [row - 0.46, row + 0.46], "floor: no model" if named else None
    axes.plot([level.floor] * 2, ends, color=INK, linewidth=1.6, linestyle=(0, (2, 1.2)), label=label)
    axes.plot([level.ceiling] * 2, ends, color=INK, linewidth=0.8, label="ceiling" if named else None)


def grounding(results: Results) -> str:
    """Findings F1 of each run with its scan, with another patient's, with an empty one."""
    runs = [(i, run) for i, run in enumerate(results.runs) if "shuffled" in results.runs[run].audit.contrasts]
    if not runs:
        return ""
    variants = {"own scan": None, "another patient's": "shuffled", "empty": "zeroed"}
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.7 + 0.75 * len(runs)), layout="constrained")
        axes = figure.subplots()
        places, labels = [], []
        for row, (i, run) in enumerate(runs):
            for j, (label, variant) in enumerate(variants.items()):
                place = row * (len(variants) + 0.7) + j
                value = _f1(results, run, variant)
                _bars(axes, np.array([place]), [value], RUNS[i], None, 0.85, alpha=1 if variant is None else 0.35)
                places.append(place)
                labels.append(f"{run}: {label}" if variant is None else label)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        _finish(axes)
        return as_svg(figure, "findings F1 with the own scan, another patient's and an empty one")


def _f1(results: Results, run: str, variant: str | None) -> Estimate | None:
    result = results.runs[run]
    if variant is None:
        return result.metrics.get("finding_f1")
    contrast = result.audit.contrasts.get(variant, {}).get("finding_f1")
    return contrast.without if contrast else None


def green_distribution(results: Results) -> str:
    """How many cases have which GREEN, of each run."""
    runs = list(enumerate(results.runs))
    edges = np.linspace(0, 1, 11)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(runs) / 10
        for place, (i, run) in enumerate(runs):
            scores = [score for score in results.runs[run].green if score is not None]
            counts, _ = np.histogram(scores, edges)
            mean = f", mean {np.mean(scores):.2f}" if scores else ""
            axes.bar(edges[:-1] + 0.01 + (place + 0.5) * width, counts, width * 0.92, color=RUNS[i], label=run + mean)
        axes.set_xticks(edges)
        axes.set_xlabel("GREEN of a case")
        axes.set_ylabel("cases")
        axes.grid(False, axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs), borderaxespad=0, handlelength=1)
        return as_svg(figure, "distribution of GREEN over the cases")


def losses(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The loss of each stage over its steps."""
    curves = {
        stage: [(entry["step"], entry["loss"]) for entry in history if "loss" in entry and "step" in entry]
        for stage, history in sorted(
            histories.items(),
            key=lambda item: (
                ("contrastive", "sft", "dpo").index(item[0]) if item[0] in ("contrastive", "sft", "dpo") else 9
            ),
        )
    }
    curves = {stage: points for stage, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.5), layout="constrained")
        for axes, (stage, points) in zip(
            np.ravel(figure.subplots(1, len(curves), squeeze=False)), curves.items(), strict=True
        ):
            axes.plot(*zip(*points, strict=True), color=RUNS[0], linewidth=1.6)
            axes.set_title(f"{stage}: {points[0][1]:.3g} → {points[-1][1]:.3g}", fontsize=10, loc="left")
            axes.set_xlabel("step")
            axes.margins(x=0.02)
        return as_svg(figure, f"loss by step: {', '.join(curves)}")


def _bars(
    axes: Axes,
    rows: np.ndarray,
    values: Sequence[Estimate | None],
    colour: str,
    label: str | None,
    height: float,
    alpha: float = 1,
) -> None:
    """Horizontal bars with their intervals and numbers."""
    axes.barh(rows, [v.value if v else 0 for v in values], height * 0.9, color=colour, label=label, alpha=alpha)
    for row, value in zip(rows, values, strict=True):
        if value:
            axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1)
            axes.text(max(value.high, value.value) + 0.008, row, f"{value.value:.2f}", va="center", fontsize=8)


def _finish(axes: Axes) -> None:
    axes.set_xlim(0, 1.06)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.grid(False, axis="y")
    axes.tick_params(length=0)


def as_png(figure: Figure) -> bytes:
    """The figure as a picture on white, in the colours of the light page, which come first in its style."""
    style = source("page.css")
    light = {colour: re.findall(rf"{name}: (#\w+);", style)[0] for colour, name in _VARIABLES.items()}
    for artist in figure.findobj():
        for part in ("color", "facecolor", "edgecolor", "markeredgecolor", "markerfacecolor"):
            colour = getattr(artist, f"get_{part}", lambda: None)()
            if colour is not None and is_color_like(colour) and (painted := light.get(to_hex(colour))):
                getattr(artist, f"set_{part}")(painted)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, facecolor="white")
    return stream.getvalue()


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that scales with the page and says what it shows."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
