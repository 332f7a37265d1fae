"""sweep.html: everything that a sweep found, in one file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mu2llm import storage
from mu2llm.evaluation.report.charts import as_png, as_svg, source
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps import charts, results
from mu2llm.sweeps.final import Final
from mu2llm.sweeps.trial import Trial

if TYPE_CHECKING:
    from mu2llm.sweeps.sweep import Sweep

PAGE, PICTURE = "sweep.html", "sweep.png"


def write_page(
    sweep: Sweep, trials: Sequence[Trial], rows: Sequence[results.Row], found: dict[str, Any], final: Final | None
) -> str:
    """Writes the page into the sweep's `out` and gives its URI; beside it the points as a picture."""
    objective = sweep.experiment.sweep.objective
    points = charts.ranking(rows, objective[0])
    shown = {"Finished points": as_svg(points, f"{results.TITLES[objective[0]]} of every finished point")}
    storage.write_bytes(storage.join(sweep.out, PICTURE), as_png(points))
    shown |= _charts(sweep, trials, rows, found)
    html = (
        environment()
        .get_template("sweep.html")
        .render(
            sweep=sweep,
            found=found,
            rows=rows,
            names=results.measured(rows, objective),
            keys=list(sweep.space.domains),
            best=results.front(rows, objective),
            final=final,
            charts={name: Markup(svg) for name, svg in shown.items() if svg},
            style=Markup(source("page.css")),
        )
    )
    storage.write_bytes(storage.join(sweep.out, PAGE), html.encode())
    return storage.join(sweep.out, PAGE)


def _charts(
    sweep: Sweep, trials: Sequence[Trial], rows: Sequence[results.Row], found: dict[str, Any]
) -> dict[str, str]:
    objective = sweep.experiment.sweep.objective
    best = results.winner(rows, objective)
    assert best
    curve = next((name for name in objective if name in METRICS), METRICS[0])
    return {
        "Optimisation history": charts.history(trials, objective[0]),
        "What mattered": charts.importance(found["importance"]),
        "Parallel coordinates": charts.parallel(rows, sweep.space, objective[0]),
        "Pareto front": charts.front(rows, results.front(rows, objective), objective) if len(objective) > 1 else "",
        "Learning curves": charts.curves(trials, curve, best),
    }


def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("mu2llm.sweeps", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["cell"] = results.cell
    made.filters["json"] = lambda value: json.dumps(value).strip('"')
    made.globals["titles"] = results.TITLES
    return made
