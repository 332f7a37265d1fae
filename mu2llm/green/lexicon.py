"""The lexicon of findings: lexicon.yaml, compiled once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""The abnormalities of CT-RATE, under its own names and in its order (METHOD.md §4.2)."""


Change = Literal["new", "worse", "better", "stable", "resolved"]


@dataclass(frozen=True, slots=True)
class Term:
    """A pattern, and a piece of text without which it cannot match."""

    pattern: re.Pattern[str]
    literal: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of finding: how it is said, and where it counts."""

    name: str
    terms: tuple[Term, ...]
    label: str | None
    sided: bool
    places: tuple[tuple[str, re.Pattern[str]], ...]
    within: re.Pattern[str] | None
    outside: re.Pattern[str] | None
    unless: re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class Lexicon:
    """lexicon.yaml, compiled."""

    entries: tuple[Entry, ...]
    by_name: dict[str, Entry]
    cues: dict[str, re.Pattern[str]]
    severity: dict[int, re.Pattern[str]]
    change: dict[Change, re.Pattern[str]]
    regions: dict[str, re.Pattern[str]]


@cache
def lexicon() -> Lexicon:
    """The findings in the order of lexicon.yaml."""
    source = yaml.safe_load((files("mu2llm.green") / "lexicon.yaml").read_text(encoding="utf-8"))
    places = {table: tuple((name, _compile(p)) for name, p in rows.items()) for table, rows in source["places"].items()}
    first: dict[str, dict[str, Any]] = {}
    for row in source["findings"]:
        first.setdefault(row["name"], row)
    entries = tuple(_entry(row, first[row["name"]], places) for row in source["findings"])
    cues = {name: "|".join(rows.split("\n")[:-1]) for name, rows in source["cues"].items()}
    verbs = f"({cues.pop('verbs')})"
    return Lexicon(
        entries,
        {entry.name: entry for entry in reversed(entries)},
        {name: _compile(pattern.replace("{verbs}", verbs)) for name, pattern in cues.items()},
        {grade: _compile(pattern) for grade, pattern in source["severity"].items()},
        {change: _compile(pattern) for change, pattern in source["change"].items()},
        {region: _compile(pattern) for region, pattern in source["regions"].items()},
    )


def _entry(
    row: dict[str, Any], first: dict[str, Any], places: dict[str, tuple[tuple[str, re.Pattern[str]], ...]]
) -> Entry:
    return Entry(
        name=row["name"],
        terms=tuple(Term(_compile(_undenied(term)), _literal(term)) for term in row["terms"].splitlines()),
        label=row.get("label"),
        sided=first.get("sided", False),
        places=places[first["places"]] if "places" in first else (),
        within=_compile(row["within"]) if "within" in row else None,
        outside=_compile(row["outside"]) if "outside" in row else None,
        unless=_compile(row["unless"]) if "unless" in row else None,
    )


def _undenied(term: str) -> str:
    """A term between whose words no denial stands: “effusion without thickening of the pleura” is two findings."""
    return term.replace(r"\w+ )", r"(?!(?:no|not|without|never|neither|nor|absent|but|rather|cannot)\b)\w+ )")


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{pattern.replace(' ', '[ -]')})(?!\w)")


def _literal(pattern: str) -> str:
    """The longest run of letters that every match of a term contains, or nothing."""
    flat = re.sub(r"\[[^]]*\]|\\.", " ", pattern)
    while "(" in flat:
        flat, found = re.subn(r"\([^()]*\)(?:[*+?]|\{[^}]*\})?", " ", flat)
        if not found:
            return ""
    if "|" in flat:
        return ""
    return max(re.findall(r"[a-z]+(?![?*a-z])", re.sub(r"[a-z][?*]|[a-z]\{", " ", flat)), key=len, default="")
