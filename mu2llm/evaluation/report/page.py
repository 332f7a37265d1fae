"""Results, texts and scans → the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mu2llm import green, storage
from mu2llm.cases import Shards
from mu2llm.cases.shards import read_rows
from mu2llm.engine.predictions import Prediction
from mu2llm.evaluation.floors import TITLES as FLOORS
from mu2llm.evaluation.floors import Level
from mu2llm.evaluation.pages import environment, source
from mu2llm.evaluation.report import scans
from mu2llm.evaluation.report.marks import SHORT, Piece, Sentence, Verdict, changes, mark, verdicts
from mu2llm.evaluation.results import TITLES, Results
from mu2llm.records import ERROR_CATEGORIES, Case, Estimate, Judgement

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """One run's report of a case, with its judgement."""

    run: str
    sentences: list[Sentence]
    changes: list[Piece]
    score: float | None
    why: str
    verdicts: list[Verdict]


@dataclass(frozen=True)
class CasePage:
    """One case: its scan's planes, its reference (what the last run missed is marked) and the runs' reports."""

    case: Case
    planes: list[scans.Plane]
    reference: list[Sentence]
    reports: list[Report]


def write_report(
    out: str,
    results: Results,
    cases: Sequence[Case],
    predictions: Sequence[Prediction],
    judgements: Mapping[tuple[str, str], Judgement],
    pages: int,
) -> str:
    """Writes report.html into `out` and gives its URI. `judgements` are by run and case."""
    chosen = choose(cases, results, pages)
    pictures, windows = _pictures(results, [case.id for case in chosen])
    texts = {(p.run, p.case_id): p.text for p in predictions if p.variant == "as_is" and p.region is None}
    shown = [
        _page(case, pictures.get(case.id, []), list(results.header.checkpoints), texts, judgements) for case in chosen
    ]
    templates = environment()
    templates.filters |= {"number": number, "share": share}
    html = templates.get_template("page.html").render(
        results=results,
        titles=TITLES,
        floors=FLOORS,
        charts={name: Markup(svg) for name, svg in _charts(results).items()},
        pages=shown,
        windows=windows,
        categories=ERROR_CATEGORIES,
        short=SHORT,
        style=Markup(source("page.css")),
        script=Markup(source("page.js")),
    )
    storage.write_bytes(storage.join(out, PAGE), html.encode())
    return storage.join(out, PAGE)


def choose(cases: Sequence[Case], results: Results, pages: int) -> list[Case]:
    """Cases evenly spread from the last run's best GREEN to its worst; invalid ones count as worst."""
    last = list(results.header.checkpoints)[-1]
    scores = [-1.0 if score is None else score for score in results.runs[last].green]
    ranked = [cases[i] for i in np.argsort([-score for score in scores], kind="stable")]
    places = np.unique(np.linspace(0, len(ranked) - 1, min(pages, len(ranked))).round().astype(int))
    return [ranked[place] for place in places]


def number(estimate: Estimate | None, signed: bool = False) -> Markup:
    """A value and, smaller, its interval; a dash where it is not defined."""
    if estimate is None:
        return Markup('<span class="none">–</span>')
    plus = "+" if signed else ""
    return Markup("{}<small>{} … {}</small>").format(
        f"{estimate.value:{plus}.2f}", f"{estimate.low:{plus}.2f}", f"{estimate.high:{plus}.2f}"
    )


def share(level: Level) -> Markup:
    """How far up from the floor to the ceiling, with both where the mouse rests."""
    title = f"floor: {FLOORS[level.of]}, {level.floor:.3f}; ceiling: {level.ceiling:.3f}"
    kind = "below" if level.below else "up"
    return Markup('<small class="{}" title="{}">{}</small>').format(kind, title, level.description)


def _page(
    case: Case,
    planes: list[scans.Plane],
    runs: list[str],
    texts: Mapping[tuple[str, str], str],
    judgements: Mapping[tuple[str, str], Judgement],
) -> CasePage:
    truth = case.findings if case.findings is not None else green.findings(case.report)
    reports: list[Report] = []
    for run in runs:
        text, judgement = texts[run, case.id], judgements[run, case.id]
        changed = changes(texts[runs[0], case.id], text) if reports else []
        lines = verdicts(judgement)
        reports.append(Report(run, mark(text, truth, "wrong"), changed, judgement.score, judgement.why, lines))
    found = green.findings(texts[runs[-1], case.id])
    return CasePage(case, planes, mark(case.report, found, "missed"), reports)


def _pictures(results: Results, ids: Sequence[str]) -> tuple[dict[str, list[scans.Plane]], list[str]]:
    """Planes by case and the names of the windows; nothing where the shards are out of reach."""
    header = results.header
    if not Shards.there(header.data):
        return {}, []
    shards = Shards.open(header.data)
    places = {case.id: i for i, case in enumerate(shards.cases(header.split))}
    rows = np.array([places[name] for name in ids if name in places], dtype=int)
    if not rows.size:
        return {}, []
    split = header.split
    table = read_rows(shards.files(split), shards.rows(split), ["id", "voxels", "affine"], rows)
    columns = zip(table["id"], table["voxels"], table["affine"], strict=True)
    windows = [f"{low:g} … {high:g} HU" for low, high in shards.spec.windows or ()]
    first = shards.spec.chunks  # of several series the first one's
    return {str(name): scans.planes(voxels[:first], affine) for name, voxels, affine in columns}, windows[:3]


def _charts(results: Results) -> dict[str, str]:
    from mu2llm.evaluation.report import charts  # matplotlib takes a second: only where a page is drawn

    return {
        "metrics": charts.metrics(results),
        "grounding": charts.grounding(results),
        "green": charts.green_distribution(results),
        "losses": charts.losses(results.header.histories),
    }
