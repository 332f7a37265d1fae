"""sweep.html and ablation.html: everything that was found, in one file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from mu2llm import storage
from mu2llm.evaluation.pages import environment, source
from mu2llm.evaluation.report.charts import as_png, as_svg
from mu2llm.stages.validation import METRICS
from mu2llm.sweeps import charts, results
from mu2llm.sweeps.final import Final
from mu2llm.sweeps.results import TITLES, Row
from mu2llm.sweeps.trial import Plan, Trial

PAGE = "sweep.html"


def write_page(
    plan: Plan, trials: Sequence[Trial], rows: Sequence[Row], found: dict[str, Any], final: Final | None
) -> None:
    """Writes a sweep's page, and its finished points as a picture."""
    space, (chief, *others) = plan.space, found["objective"]
    objective, best = [chief, *others], results.front(rows, found["objective"])
    curve = next((name for name in objective if name in METRICS), METRICS[0])
    shown = {
        "Optimisation history": charts.history(trials, chief),
        "Importance of each key": charts.importance(found["importance"]),
        "Slices": charts.slices(rows, space, chief),
        "Parallel coordinates": charts.parallel(rows, space, chief),
        "Pareto front": charts.front(rows, best, objective) if others else "",
        "Learning curves": charts.curves(trials, curve, best[0]),
    }
    picture = charts.ranking(rows, chief)
    names = results.measured(rows, objective)
    write(plan.out, "sweep", picture, shown, plan=plan, found=found, final=final, rows=rows, names=names, best=best)


def write(out: str, kind: str, picture: Figure, shown: dict[str, str], **values: Any) -> None:
    """Writes `kind`.html and, of its first chart, `kind`.png."""
    first = as_svg(picture, f"{kind}: values with their 95 % intervals")
    storage.write_bytes(storage.join(out, f"{kind}.png"), as_png(picture))
    made = environment("mu2llm.sweeps")
    made.filters |= {"cell": results.cell, "plain": results.plain}
    chart = {name: Markup(svg) for name, svg in shown.items() if svg}
    html = made.get_template(f"{kind}.html").render(
        picture=Markup(first), charts=chart, titles=TITLES, style=Markup(source("page.css")), **values
    )
    storage.write_bytes(storage.join(out, f"{kind}.html"), html.encode())
