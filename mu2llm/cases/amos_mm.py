"""AMOS-MM: one JSON document, `{split: [entry]}`, with findings by region of the body and multiple-choice questions.

Two shapes are in use: the challenge's `dataset.json` (findings and questions within) and preprocessed lists, whose
entries name JSON files with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mu2llm.cases.rows import clean, read_json, read_texts, unused
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes, stem
from mu2llm.errors import UserError
from mu2llm.records import Case, Question, Split
from mu2llm.settings.data import DataConfig

REGIONS = ("chest", "abdomen", "pelvis")
SPLITS: dict[str, Split] = {
    "training": "train",
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
USED = ("image", "labels", "text", "vqa", "spacing", "meta")


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """The report is the findings of all regions; each region's are also a question, and so are the choices.

    Regions without findings and negative spacings are noted.
    """
    document = read_json(manifest)
    if not isinstance(document, dict) or not set(document) & set(SPLITS):
        raise UserError(f"manifest {manifest} is not AMOS-MM: expected a JSON object of {', '.join(SPLITS)}")
    listed = [(split, entry) for name, split in SPLITS.items() for entry in document.get(name) or []]
    entries = [(split, entry) for split, entry in listed if isinstance(entry, dict)]
    table.counts["rows"] = len(listed)
    for split, entry in listed:
        if not isinstance(entry, dict):
            table.reject(manifest, "invalid_row", f"an entry of {split} is {entry!r:.40}, no object")
    table.note("unknown_columns", unused((entry for _, entry in entries), USED))
    texts = _linked(manifest, [entry.get("text") for _, entry in entries], found, table)
    questions = _linked(manifest, [entry.get("vqa") for _, entry in entries], found, table)
    for (split, entry), text, asked in zip(entries, texts, questions, strict=True):
        if not entry.get("image"):
            table.reject(manifest, "invalid_row", f"an entry of {split} has no image")
            continue
        try:
            yield _case(split, entry, text, asked, found, table)
        except (AttributeError, TypeError, ValueError) as error:
            table.reject(manifest, "invalid_row", f"{entry['image']}: {error}", stem(str(entry["image"])))


def _case(split: Split, entry: dict[str, Any], text: Any, asked: Any, found: Volumes, table: CaseTable) -> Case:
    identity = stem(entry["image"])
    labels = entry.get("labels") or {}
    findings = _findings(labels.get("report") or text)
    regions = {region: clean(findings.get(region)) for region in REGIONS}
    present = {region: words for region, words in regions.items() if words}
    if present:
        table.note("no_region", [f"{identity} {region}" for region in REGIONS if region not in present])
    spacing = entry.get("spacing") or (entry.get("meta") or {}).get("spacing") or ()
    if any(float(size) < 0 for size in spacing):
        table.note("negative_spacing", [identity])
    by_region = [
        Question(question=f"Describe the findings in the {region}.", answer=words, region=region)
        for region, words in present.items()
    ]
    return Case(
        id=identity,
        patient=identity,
        volume=found.scan(entry["image"], least=1),
        report=" ".join(f"{region.capitalize()}: {words}" for region, words in present.items()),
        split=split,
        questions=(*by_region, *_choices(labels.get("qa") or asked)),
        source="AMOS-MM",
    )


def _linked(manifest: str, links: list[str | None], found: Volumes, table: CaseTable) -> list[Any]:
    """The JSON documents that entries name; None for what is not there or no JSON."""
    named = [(place, link) for place, link in enumerate(links) if link]
    texts = read_texts([found.beside(manifest, link) for _, link in named], table)
    documents: list[Any] = [None] * len(links)
    for (place, _), text in zip(named, texts, strict=True):
        try:
            documents[place] = json.loads(text) if text else None
        except ValueError:
            table.note("unknown_files", [links[place] or ""])
    return documents


def _findings(value: Any) -> dict[str, str]:
    """Findings by region out of a report, however deep they lie in it."""
    while isinstance(value, dict) and not set(REGIONS) & set(value):
        value = value.get("report") or value.get("findings")
    if not isinstance(value, dict):
        return {}
    return {region: str(value.get(region) or "") for region in REGIONS}


def _choices(value: Any) -> list[Question]:
    """Multiple-choice questions, with the choices in the question and the right one as the answer."""
    asked = value if isinstance(value, list) else (value or {}).get("qa") or []
    questions = []
    for item in asked:
        options, answer = item.get("options") or {}, str(item.get("answer", ""))
        lines = [str(item.get("question", "")), *(f"{letter}. {option}" for letter, option in options.items())]
        full = f"{answer}. {options[answer]}" if answer in options else answer
        questions.append(Question(question="\n".join(lines), answer=full))
    return questions
