"""Manifests → case table: our own (JSON lines, CSV, Parquet) and those of the public data sets.

Our own has one row a case: `id`, `patient` (default: the id), `volume` (relative to `--volumes`, or a URI),
`report`, and optionally `split`, `questions`, `findings`, `labels`, `rescale`, `series`, `source`. In CSV and Parquet
the nested ones are JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from mu2llm import storage
from mu2llm.cases import abdomenatlas3, amos_mm, ct_rate, flare26, idc, lidc, m3d_cap
from mu2llm.cases.names import is_nothing, name_of, split_of
from mu2llm.cases.rows import read_csv, read_json_lines, read_parquet, unused
from mu2llm.cases.table import CaseTable, assign_splits
from mu2llm.cases.volumes import Volumes
from mu2llm.errors import UserError
from mu2llm.records import Case
from mu2llm.settings.data import DataConfig

NESTED = [field.name for field in Case.arrow_schema if field.metadata]


def read_manifest(manifest: str, format: str, volumes: str, data: DataConfig, need_report: bool = True) -> CaseTable:
    """The case table of a manifest at a URI; `volumes` is the root of its relative paths.

    A UserError says when the manifest is not there, not of that format, or gives no case. What is wrong with single
    rows is counted and listed (`mu2llm.cases.NOTES`), and rejected where it costs a scan. Scans without a report
    are left out, unless there is no need for one.
    """
    check_manifest(manifest, format)
    table = CaseTable()
    manifest = manifest if manifest == INSTALLED.get(format) else storage.absolute(manifest)
    found = Volumes.below(storage.absolute(volumes))
    for case in _distinct(table, FORMATS[format](manifest, found, data, table)):
        if need_report and not case.report.strip():
            table.note("no_report", [case.id])
        elif found.missing(case.volume):
            table.reject(case.volume, "not_found", "there is nothing under this path or URI", case.id)
        else:
            table.cases.append(case)
    if not table.cases:
        raise UserError(f"manifest {manifest} gives no case to use below {volumes}: {_counted(table)}")
    table.note("scan_without_row", found.unnamed())
    listed = {case.volume: found.facts(case.volume) for case in table.cases}
    table.facts = {uri: facts for uri, facts in listed.items() if facts}
    assign_splits(table, data.split)
    table.counts["cases"] = len(table.cases)
    return table


def check_manifest(manifest: str, format: str) -> None:
    """A UserError where there is no such format, or nothing at the URI."""
    if format not in FORMATS:
        raise UserError(f"--format {format} is not known; there are {', '.join(FORMATS)}")
    if manifest != INSTALLED.get(format) and not storage.exists(manifest):
        raise UserError(f"manifest {manifest} is not there")


def _counted(table: CaseTable) -> str:
    return ", ".join(f"{code} {count}" for code, count in table.counts.items()) or "it has no rows"


def _distinct(table: CaseTable, cases: Iterable[Case]) -> Iterator[Case]:
    """Cases with different ids; patients that differ in the case of letters alone become one."""
    seen: dict[str, str] = {}
    patients: dict[str, str] = {}
    for case in cases:
        if first := seen.get(case.id.casefold()):
            table.reject(case.volume, "duplicate_id", f"an earlier row has the id {first}", case.id)
            continue
        seen[case.id.casefold()] = case.id
        patient = patients.setdefault(case.patient.casefold(), case.patient)
        if patient == case.patient:
            yield case
        else:
            table.note("patient_spelling", [f"{case.patient} ({patient})"])
            yield case.model_copy(update={"patient": patient})


def _own(rows: list[dict[str, Any]], manifest: str, found: Volumes, table: CaseTable) -> Iterator[Case]:
    """Rows of our own manifest → cases."""
    rows = [{_column(name): value for name, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if columns and not {"id", "volume"} <= set(columns):
        wanted = ", ".join(name for name in ("id", "volume") if name not in columns)
        raise UserError(
            f"manifest {manifest} has no column {wanted}; it has {', '.join(columns)}; wanted are id, patient, volume, "
            "report and what the documentation lists"
        )
    table.counts["rows"] = len(rows)
    table.note("unknown_columns", unused(rows, Case.model_fields))
    for number, row in enumerate(rows, 1):
        try:
            yield _own_case(row, manifest, found, table)
        except ValueError as error:
            name = name_of(row.get("id") or f"row {number}")
            table.reject(str(row.get("volume") or manifest), "invalid_row", f"row {number}: {_why(error)}", name)


def _column(name: str) -> str:
    """A column's name; ours in any case."""
    plain = name.strip().lower()
    return plain if plain in Case.model_fields else name


def _own_case(row: dict[str, Any], manifest: str, found: Volumes, table: CaseTable) -> Case:
    values = {name: value for name, value in row.items() if name in Case.model_fields and not is_nothing(value)}
    absent = [name for name in ("id", "volume") if name not in values]
    if absent:
        raise ValueError(f"no {' and no '.join(absent)}")
    if isinstance(values.get("series"), list):
        raise ValueError("series: a case is one scan, several series are not put together; give each a row of its own")
    for name in NESTED:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    mended = [name for name in ("id", "patient") if name in values and name_of(values[name]) != str(values[name])]
    values["id"] = name_of(values["id"])
    if "split" in values:
        values["split"] = split_of(values["split"])
    if "patient" in row and "patient" not in values:
        table.note("no_patient", [values["id"]])
    values["patient"] = name_of(values.get("patient", values["id"]))
    values["volume"] = found.name(str(values["volume"]).strip())
    case = Case.model_validate({"report": "", "source": manifest, **values})
    table.note("name_mended", [f"{name} {values[name]}" for name in mended])
    return case


def _why(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


Format = Callable[[str, Volumes, DataConfig, CaseTable], Iterator[Case]]
FORMATS: dict[str, Format] = {
    "jsonl": lambda manifest, found, _, table: _own(read_json_lines(manifest, table), manifest, found, table),
    "csv": lambda manifest, found, _, table: _own(list(read_csv(manifest, table)), manifest, found, table),
    "parquet": lambda manifest, found, _, table: _own(read_parquet(manifest, table), manifest, found, table),
    "ct-rate": ct_rate.cases,
    "amos-mm": amos_mm.cases,
    "abdomenatlas3": abdomenatlas3.cases,
    "m3d-cap": m3d_cap.cases,
    "flare26": flare26.cases,
    "lidc": lidc.cases,
    "idc": lambda manifest, found, data, table: _own(
        list(idc.rows(manifest, found, data, table)), manifest, found, table
    ),
}
INSTALLED = {"lidc": lidc.PACKAGE, "idc": idc.PACKAGE}
"""Formats whose table is in a package, which stands for a manifest by its name."""
