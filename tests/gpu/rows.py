"""What a check gives: rows of one table, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["ok", "missed", "measured", "skipped", "failed"]
"""missed: beside its aim; measured: it has none; skipped: something is not here; failed: it ended with an error."""


@dataclass(frozen=True)
class Row:
    """`value` is what `measured` says, as a number where it is one."""

    check: str
    what: str
    aim: str
    measured: str
    verdict: Verdict
    value: float | None = None


def within(check: str, what: str, value: float, most: float) -> Row:
    """A number that is to be no more than `most`."""
    return Row(check, what, f"≤ {most:.3g}", f"{value:.3g}", "ok" if value <= most else "missed", value)


def at_least(check: str, what: str, value: float, least: float) -> Row:
    """A number that is to be no less than `least`."""
    return Row(check, what, f"≥ {least:.3g}", f"{value:.3g}", "ok" if value >= least else "missed", value)


def told(check: str, what: str, measured: str, value: float | None = None, aim: str = "–") -> Row:
    """A measurement without an aim, or with one that this device is not asked for."""
    return Row(check, what, aim, measured, "measured", value)


def markdown(about: dict[str, str], rows: Iterable[Row]) -> str:
    lines = [f"{name}: {value}  " for name, value in about.items()]
    lines += ["", "| check | what | aim | measured | verdict |", "|---|---|---|---|---|"]
    cells = ([r.check, r.what, r.aim, r.measured, r.verdict] for r in rows)
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
    return "\n".join(lines) + "\n"


def as_json(about: dict[str, str], rows: Iterable[Row]) -> str:
    return json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1, ensure_ascii=False)
