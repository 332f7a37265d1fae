"""Manifests → case table: our own (JSON lines, CSV, Parquet) and those of the public data sets.

Our own has one row a case: `id`, `patient` (default: the id), `volume` (relative to `--volumes`, or a URI),
`report`, and optionally `split`, `questions`, `findings`, `labels`, `rescale`, `source`. In CSV and Parquet
the nested ones are JSON text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mu2llm import storage
from mu2llm.cases.table import CaseTable, assign_splits
from mu2llm.cases.volumes import Volumes
from mu2llm.config import DataConfig
from mu2llm.errors import UserError
from mu2llm.records import Case

REQUIRED = ("id", "volume")


def read_manifest(manifest: str, format: str, volumes: str, data: DataConfig) -> CaseTable:
    """The case table of a manifest at a URI; `volumes` is the root of its relative paths.

    A UserError says when the manifest is not there, not of that format, or has no case. What is wrong with single
    rows is counted and listed (`mu2llm.cases.NOTES`), and rejected where no case can be made of it.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: there are {', '.join(FORMATS)}")
    if not storage.exists(manifest):
        raise UserError(f"manifest {manifest} is not there")
    table = CaseTable()
    found = Volumes.below(volumes)
    for case in _distinct(table, FORMATS[format](manifest, found, data, table)):
        if found.missing(case.volume):
            table.reject(case.volume, "not_found", "there is nothing under this path or URI", case.id)
        elif not case.report.strip():
            table.reject(case.volume, "no_report", "the manifest has no report for this scan", case.id)
        else:
            table.cases.append(case)
    if not table.cases and not table.rejections:
        raise UserError(f"manifest {manifest} has no rows")
    table.note("scan_without_row", found.unnamed())
    table.sizes = found.sizes
    assign_splits(table, data.split)
    table.counts["cases"] = len(table.cases)
    return table


def _distinct(table: CaseTable, cases: Iterable[Case]) -> Iterator[Case]:
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            table.reject(case.volume, "duplicate_id", f"an earlier row has the id {case.id}", case.id)
        else:
            seen.add(case.id)
            yield case


def own(rows: Iterable[dict[str, Any]], manifest: str, found: Volumes, table: CaseTable) -> Iterator[Case]:
    """Rows of our own manifest → cases."""
    unknown: dict[str, None] = {}
    nested = [field.name for field in Case.arrow_schema if field.metadata]
    for number, row in enumerate(rows, 1):
        table.counts["rows"] = number
        unknown.update(dict.fromkeys(name for name in row if name not in Case.model_fields))
        try:
            yield _own_case(row, nested, manifest, found)
        except (ValidationError, ValueError) as error:
            why = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(str(part) for part in why["loc"])
            name = str(row.get("id") or f"row {number}")
            table.reject(str(row.get("volume") or manifest), "invalid_row", f"row {number}: {where} {why['msg']}", name)
    table.note("unknown_columns", unknown)


def _own_case(row: dict[str, Any], nested: list[str], manifest: str, found: Volumes) -> Case:
    absent = [name for name in REQUIRED if not row.get(name)]
    if absent:
        raise ValueError(f"has no {' and no '.join(absent)}")
    values = {name: value for name, value in row.items() if name in Case.model_fields and value not in (None, "")}
    for name in nested:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    values["id"] = str(values["id"])
    values["patient"] = str(values.get("patient", values["id"]))
    values["volume"] = found.name(str(values["volume"]))
    values.setdefault("report", "")
    values.setdefault("source", manifest)
    return Case.model_validate(values)


def _json_lines(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    text = storage.read_bytes(manifest).decode("utf-8-sig", errors="replace")
    return own((_json_row(line) for line in text.splitlines() if line.strip()), manifest, found, table)


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _csv(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    rows = read_csv(manifest, table)
    _require(manifest, list(rows[0]) if rows else [])
    return own(rows, manifest, found, table)


def _parquet(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    try:
        read = pq.read_table(pa.BufferReader(storage.read_bytes(manifest)))
    except pa.ArrowInvalid as error:
        raise UserError(f"manifest {manifest} is not Parquet: {str(error).splitlines()[0]}") from None
    _require(manifest, read.column_names)
    return own(read.to_pylist(), manifest, found, table)


def _require(manifest: str, columns: list[str]) -> None:
    absent = [name for name in REQUIRED if name not in columns]
    if absent:
        raise UserError(f"manifest {manifest} has no column {', '.join(absent)}; it has {', '.join(columns) or 'none'}")


def read_csv(uri: str, table: CaseTable) -> list[dict[str, Any]]:
    """Rows of a CSV file, also with line breaks in fields; what is not UTF-8 is read as Windows-1252, and noted."""
    raw = storage.read_bytes(uri)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        table.note("decoded_as_latin", [uri])
    csv.field_size_limit(2**24)
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{name: value for name, value in row.items() if name} for row in rows]


Format = Callable[[str, Volumes, DataConfig, CaseTable], Iterator[Case]]
FORMATS: dict[str, Format] = {"jsonl": _json_lines, "csv": _csv, "parquet": _parquet}
