"""The ablation as a page, as a picture and for a terminal, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from mu2llm import storage
from mu2llm.evaluation.report.charts import INK, RUNS, STYLE, as_png, as_svg, source
from mu2llm.evaluation.results import TITLES
from mu2llm.sweeps.page import environment
from mu2llm.sweeps.results import cell as number

if TYPE_CHECKING:
    from mu2llm.sweeps.ablation import Cell


def write_page(out: str, cells: Sequence[Cell], found: dict[str, Any]) -> None:
    """Writes ablation.html."""
    with rc_context(STYLE):
        charts = [as_svg(_bars(cells), "GREEN of each variant, beside the paper's")]
        charts += [as_svg(few, "GREEN by the share of training patients")] if (few := _few_shot(cells)) else []
    template = environment().get_template("ablation.html")
    html = template.render(
        cells=cells, found=found, names=list(cells[0].metrics), metric_titles=TITLES,
        charts=[Markup(chart) for chart in charts], style=Markup(source("page.css")),
    )  # fmt: skip
    storage.write_bytes(storage.join(out, "ablation.html"), html.encode())


def write_plot(out: str, cells: Sequence[Cell]) -> None:
    """Writes ablation.png."""
    with rc_context(STYLE):
        storage.write_bytes(storage.join(out, "ablation.png"), as_png(_bars(cells)))


def _bars(cells: Sequence[Cell]) -> Figure:
    """Ours with intervals, and the paper's points."""
    whole = [cell for cell in cells if cell.fraction == 1]
    rows = np.arange(len(whole))
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(whole)), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for axes, metrics in ((ours, [cell.metrics["green"] for cell in whole]),):
        values = [estimate.value if estimate else 0.0 for estimate in metrics]
        axes.barh(rows, values, height=0.6, color=RUNS[0])
        for row, estimate in zip(rows, metrics, strict=True):
            if estimate:
                axes.plot([estimate.low, estimate.high], [row, row], color=INK, linewidth=1.2)
                axes.text(
                    max(estimate.high, estimate.value) + 0.01, row, f"{estimate.value:.2f}", va="center", fontsize=8
                )
    published = [cell.published.get("green") or 0.0 for cell in whole]
    theirs.barh(rows, published, height=0.6, color=RUNS[2])
    for row, value in zip(rows, published, strict=True):
        theirs.text(value + 0.01, row, f"{value:.2f}", va="center", fontsize=8)
    ours.set_yticks(rows, [cell.variant for cell in whole])
    ours.invert_yaxis()
    ours.set_title(f"GREEN here, {len(whole[0].seeds)} seeds, 95 % intervals", fontsize=10, loc="left")
    theirs.set_title("in the paper (AMOS-MM)", fontsize=10, loc="left")
    for axes in (ours, theirs):
        axes.set_xlim(0, max([0.5, *(e.high for c in whole if (e := c.metrics["green"]))]) * 1.12)
        axes.grid(False, axis="y")
        axes.tick_params(length=0)
    return figure


def _few_shot(cells: Sequence[Cell]) -> Figure | None:
    """The metric by the share of training patients, with and without DPO; None where only all were used."""
    names = list(dict.fromkeys(cell.variant for cell in cells if cell.fraction < 1))
    if not names:
        return None
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("green", "finding_f1"), strict=True):
        for colour, name in zip(RUNS, names, strict=False):
            points = sorted((cell.fraction, cell.metrics[metric]) for cell in cells if cell.variant == name)
            known = [(share, estimate) for share, estimate in points if estimate]
            x, y = [share for share, _ in known], [estimate.value for _, estimate in known]
            axes.plot(x, y, color=colour, marker="o", label=name)
            axes.fill_between(x, [e.low for _, e in known], [e.high for _, e in known], color=colour, alpha=0.15)
        axes.set_xscale("log")
        axes.set_xlabel("share of the training patients")
        axes.set_ylabel(TITLES[metric])
        axes.legend(fontsize=8)
    return figure


def terminal(cells: Sequence[Cell], found: dict[str, Any]) -> Table:
    """The table for a terminal."""
    names = [
        name
        for name in ("finding_f1", "green", "bleu_1", "rouge_1", "meteor", "bert_score")
        if name in cells[0].metrics
    ]
    shown = Table("", "patients", "seeds", *(TITLES[name] for name in names), "GREEN − baseline", "paper: GREEN")
    for cell in cells:
        values = [number(cell.metrics[name]) for name in names]
        published = cell.published.get("green")
        shown.add_row(
            cell.variant, f"{cell.fraction:.0%}", str(len(cell.seeds)), *values,
            number(cell.minus_baseline["green"], signed=True), "–" if published is None else f"{published:.3f}",
        )  # fmt: skip
    shown.caption = (
        f"{found['cases']} test cases, judge {found['judge']}; intervals 95 %: over seeds, of differences over patients"
    )
    return shown
