"""Other people's reports: tables and folders of texts → id and text, joined with references by id.

Read are CSV, JSON lines, Parquet, a folder of `<id>.txt`, VLM3D's results.json, and shards as references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mu2llm import storage
from mu2llm.cases import Shards
from mu2llm.cases.names import is_nothing, name_of
from mu2llm.cases.rows import clean, compose, read_csv, read_json, read_json_lines, read_parquet, read_texts
from mu2llm.cases.table import CaseTable
from mu2llm.errors import UserError
from mu2llm.evaluation import splits
from mu2llm.green import LABELS
from mu2llm.records import Case

IDS = (
    *("id", "case_id", "case", "study", "study_id", "volumename", "input_image_name", "image_name", "image", "name"),
    *("accessionno", "file", "filename", "path"),
)
"""Columns that name a case, in any case of letters; the first that is there counts."""
PREDICTED = ("prediction", "candidate", "generated_report", "hypothesis", "generated")
TRUE = ("reference", "ground_truth", "target")
SAID = ("report", "report_text", "text")
"""Columns with a text: one that says whose it is comes before one that does not."""
PARTS = (("findings_en", "impressions_en"), ("findings", "impression"), ("findings", "impressions"))
_SUFFIX = re.compile(r"\.(?:nii|nii\.gz|mha|mhd|nrrd|npz|npy|dcm|txt)$", re.IGNORECASE)
_CT_RATE = re.compile(r"((?:train|valid)_\d+)_[a-z]+(?:_\d+)?")
NAMED = 5  # ids that a message lists
PREDICTIONS, REFERENCES = "--predictions", "--references"
"""The options, as messages name them."""


@dataclass(frozen=True)
class Texts:
    """What a source holds: reports by id, whatever else its rows say, and the ids that came twice."""

    uri: str
    reports: dict[str, str]
    rows: dict[str, dict[str, Any]]
    doubled: list[str]
    nameless: int


@dataclass(frozen=True)
class Joined:
    """The cases that have a report, and what did not fit."""

    cases: list[Case]
    reports: list[str]
    finished: list[bool]
    unmatched: dict[str, list[str]]


def read(uri: str, option: str) -> Texts:
    """The texts at a URI; a UserError says what is not there."""
    if not storage.exists(uri):
        raise UserError(f"{option} {uri}: there is nothing")
    table = CaseTable()
    lower = uri.lower()
    if not storage.is_file(uri):
        rows = _folder(uri, option, table)
    elif lower.endswith(".json"):
        rows = _results(uri, option)
    elif lower.endswith((".jsonl", ".ndjson")):
        rows = read_json_lines(uri, table)
    elif lower.endswith(".parquet"):
        rows = read_parquet(uri, table)
    elif lower.endswith((".csv", ".tsv")):
        rows = [dict(row) for row in read_csv(uri, table)]
    else:
        raise UserError(
            f"{option} {uri}: expected .csv, .tsv, .jsonl, .parquet, VLM3D's results.json or a folder of <id>.txt"
        )
    return _texts(uri, rows, option)


def _folder(uri: str, option: str, table: CaseTable) -> list[dict[str, Any]]:
    names = [name for name in storage.files_below(uri) if name.lower().endswith(".txt")]
    if not names:
        raise UserError(f"{option} {uri}: the folder has no .txt files")
    texts = read_texts([storage.join(uri, name) for name in names], table)
    return [{"id": name.rpartition("/")[2], "report": text} for name, text in zip(names, texts, strict=True)]


def _results(uri: str, option: str) -> list[dict[str, Any]]:
    """VLM3D's results.json, a list of objects, or one object id → report."""
    found = read_json(uri)
    if isinstance(found, dict) and isinstance(found.get("generated_reports"), list):
        found = found["generated_reports"]
    elif isinstance(found, dict) and all(isinstance(text, str) for text in found.values()):
        found = [{"id": name, "report": text} for name, text in found.items()]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{option} {uri}: expected VLM3D's generated_reports, a list of objects, or id → report")
    return found


def _texts(uri: str, rows: Sequence[Mapping[str, Any]], option: str) -> Texts:
    plain = [{str(name).strip().lower(): value for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for row in plain for name in row))
    name = next((each for each in IDS if each in columns), None)
    own = (*PREDICTED, *SAID) if option == PREDICTIONS else (*TRUE, *SAID)
    text = next((each for each in own if each in columns), None)
    parts = next((each for each in PARTS if each[0] in columns), None)
    if name is None or not (text or parts):
        wanted = f"an id ({', '.join(IDS[:6])} …)" if name is None else f"a text ({', '.join(own)}, findings)"
        raise UserError(f"{option} {uri}: no column for {wanted}; it has {', '.join(columns) or 'no rows'}")
    reports: dict[str, str] = {}
    kept: dict[str, dict[str, Any]] = {}
    doubled, nameless = [], 0
    for row in plain:
        if is_nothing(row.get(name)):
            nameless += 1
            continue
        identity = _SUFFIX.sub("", name_of(row[name]).rpartition("/")[2] if name == "path" else name_of(row[name]))
        if identity in reports:
            doubled.append(identity)
            continue
        whole = text if text and not is_nothing(row.get(text)) else None
        reports[identity] = clean(str(row[whole])) if whole else _composed(row, parts)
        kept[identity] = row
    return Texts(uri, reports, kept, doubled, nameless)


def _composed(row: Mapping[str, Any], parts: tuple[str, str] | None) -> str:
    return compose(*(str(row.get(part) or "") for part in parts)) if parts else ""


def references(uri: str, split: str | None, option: str = REFERENCES) -> tuple[list[Case], list[str]]:
    """The cases of shards' split (default test), or of a table of texts; and the ids that came twice.

    `split` may name one of CT-RATE's, which takes the cases that it has.
    """
    known = split in splits.SELECTIONS
    if Shards.there(uri):
        cases, doubled = Shards.open(uri).cases("validation" if known else split or "test"), []
    else:
        found = read(uri, option)
        cases, doubled = [_case(name, found) for name, text in found.reports.items() if text], found.doubled
    if not cases:
        raise UserError(f"{option} {uri}: no reference report{f' in split {split}' if split else ''}")
    return (splits.select(cases, str(split)) if known else cases), doubled


def _case(name: str, found: Texts) -> Case:
    row = found.rows[name]
    patient = next((row[each] for each in ("patient", "patient_id") if not is_nothing(row.get(each))), None)
    if patient is None:
        study = _CT_RATE.fullmatch(name)
        patient = study[1] if study else name
    return Case(
        id=name, patient=name_of(patient), volume="", report=found.reports[name], labels=_labels(row), source=found.uri
    )


def _labels(row: Mapping[str, Any]) -> dict[str, int] | None:
    """The 18 labels of a row, as an object in the column `labels` or each in a column of its own."""
    given = row.get("labels")
    values = {str(name).lower(): value for name, value in given.items()} if isinstance(given, dict) else row
    found = {label: values[label.lower()] for label in LABELS if not is_nothing(values.get(label.lower()))}
    return {label: int(float(value)) for label, value in found.items()} if len(found) == len(LABELS) else None


def join(cases: Sequence[Case], twice: Sequence[str], predictions: Texts) -> Joined:
    """Cases and predictions by id; a UserError where nothing fits. A prediction that is there and empty counts."""
    there = {case.id.casefold(): case for case in cases}
    by_name = {name.casefold(): name for name in predictions.reports}
    both = [case for case in cases if case.id.casefold() in by_name]
    if not both:
        ours, theirs = cases[0].id, next(iter(predictions.reports), "none")
        raise UserError(
            f"{PREDICTIONS} {predictions.uri}: no id is among the references'; they are like {theirs}, there {ours}"
        )
    names = [by_name[case.id.casefold()] for case in both]
    unmatched = {
        "missing": [case.id for case in cases if case.id.casefold() not in by_name],
        "left_over": [name for folded, name in by_name.items() if folded not in there],
        "doubled": predictions.doubled,
        "doubled_references": list(twice),
        "without_id": [""] * predictions.nameless,
    }
    return Joined(
        cases=both,
        reports=[predictions.reports[name] for name in names],
        finished=[_finished(predictions.rows[name]) for name in names],
        unmatched={reason: ids for reason, ids in unmatched.items() if ids},
    )


def _finished(row: Mapping[str, Any]) -> bool:
    """Whether a prediction came to its end; a column `finished` may say that it was cut off."""
    return str(row.get("finished", True)).strip().lower() not in ("false", "0", "no")


def describe(unmatched: Mapping[str, Sequence[str]]) -> list[str]:
    """What did not fit, counted and named."""
    words = {
        "missing": "references without a prediction",
        "left_over": "predictions without a reference",
        "doubled": "predictions of an id that came before, left out",
        "doubled_references": "references of an id that came before, left out",
        "without_id": "predictions without an id",
    }
    lines = []
    for reason, ids in unmatched.items():
        some = [name for name in ids[:NAMED] if name]
        named = f": {', '.join(some)}{' …' if len(ids) > NAMED else ''}" if some else ""
        lines.append(f"{len(ids)} {words[reason]}{named}")
    return lines
