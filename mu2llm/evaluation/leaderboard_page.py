"""The leaderboard as a page: tables that sort, each number with its interval between floors and ceiling."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from mu2llm.evaluation.floors import CEILING
from mu2llm.evaluation.floors import FLOORS as BELOW
from mu2llm.evaluation.floors import TITLES as FLOORS
from mu2llm.evaluation.leaderboard import League, Named, Row, cell, leagues
from mu2llm.evaluation.pages import environment, source
from mu2llm.evaluation.results import TITLES
from mu2llm.records import Estimate

Number = Estimate | float | None
WIDTH, HEIGHT = 92, 22  # of a strip, px
SIGNED = ("green_length_correlation",)  # from −1 to 1; all others from 0 to 1


def html(table: Iterable[Row]) -> str:
    """A page that stands alone, in the style of the report; without JavaScript its tables do not sort."""
    templates = environment()
    templates.filters |= {"value": value, "number": number}
    return templates.get_template("leaderboard.html").render(
        leagues=leagues(table),
        titles=TITLES,
        floors=FLOORS,
        strip=strip,
        groups=groups,
        cell=cell,
        style=Markup(source("page.css")),
        scripts=[Markup(source(name)) for name in ("page.js", "sort.js")],
    )


def value(estimate: Number) -> float | None:
    """What is sorted by."""
    return estimate.value if isinstance(estimate, Estimate) else estimate


def number(estimate: Number) -> str:
    known = value(estimate)
    return "–" if known is None else f"{known:.3f}"


def strip(league: League, name: str, estimate: Number) -> Markup:
    """A picture of one number: a line for each floor (the highest is thick), one for the ceiling, the interval and the
    value. Those of a column stand below each other, so that its lines go on from row to row."""
    floors = [known for floor in BELOW if (known := value(league.floors.get(floor, {}).get(name))) is not None]
    ceiling = value(league.floors.get(CEILING, {}).get(name))
    parts = [_line("floor", _x(name, floor), 0, HEIGHT) for floor in sorted(floors)]
    if floors:
        parts[-1] = _line("floor best", _x(name, max(floors)), 0, HEIGHT)
    if ceiling is not None:
        parts.append(_line("ceiling", _x(name, ceiling), 0, HEIGHT))
    known, middle = value(estimate), HEIGHT / 2
    if isinstance(estimate, Estimate):
        low, high = _x(name, estimate.low), _x(name, estimate.high)
        parts.append(Markup('<path class="interval" d="M{} {}H{}"/>').format(low, middle, high))
    if known is not None:
        below = " below" if floors and known <= max(floors) else ""
        parts.append(Markup('<circle class="dot{}" cx="{}" cy="{}" r="3.5"/>').format(below, _x(name, known), middle))
    inner = Markup("").join(parts)
    return Markup('<svg class="strip" width="{}" height="{}" aria-hidden="true">{}</svg>').format(WIDTH, HEIGHT, inner)


def _line(kind: str, x: float, top: float, bottom: float) -> Markup:
    return Markup('<path class="{}" d="M{} {}V{}"/>').format(kind, x, top, bottom)


def _x(name: str, at: float) -> float:
    low = -1.0 if name in SIGNED else 0.0
    share = min(max((at - low) / (1 - low), 0.0), 1.0)
    return round(4 + share * (WIDTH - 8), 1)


def groups(league: League, kind: str) -> list[tuple[str, int, list[Named | None]]]:
    """Of `findings` or `labels`: name, cases of the truth that have it, and each row's F1."""
    by_row = [{each.name: each for each in getattr(row, kind)} for row in league.rows]
    names = {each.name: each.n for row in league.rows for each in getattr(row, kind)}
    return [(name, n, [found.get(name) for found in by_row]) for name, n in names.items()]
