"""Manifests → case table: our own (JSON lines, CSV, Parquet) and those of the public data sets.

Our own has one row a case: `id`, `patient` (default: the id), `volume` (relative to `--volumes`, or a URI),
`report`, and optionally `split`, `questions`, `findings`, `labels`, `rescale`, `series`, `source`. `volume` and
`series` may be lists: the series of one examination. In CSV and Parquet the nested ones are JSON text.
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
from mu2llm.records import Case, Series
from mu2llm.settings.data import DataConfig

COLUMNS = [name for name in Case.model_fields if name != "further"]
NESTED = [field.name for field in Case.arrow_schema if field.metadata and field.name in COLUMNS]


def read_manifest(manifest: str, format: str, volumes: str, data: DataConfig, need_report: bool = True) -> CaseTable:
    """The case table of a manifest at a URI; `volumes` is the root of its relative paths.

    A UserError says when the manifest is not there, not of that format, or gives no case. What is wrong with single
    rows is counted and listed (`mu2llm.cases.NOTES`), and rejected where it costs a scan. Scans without a report
    are left out, unless there is no need for one.
    """
    check_manifest(manifest, format)
    if data.together and format not in TOGETHER:
        raise UserError(
            f"--format {format} has one series a case, there is nothing for data.reconstructions=together to put "
            f"together (in {', '.join(TOGETHER)} there is): take one"
        )
    table = CaseTable()
    manifest = manifest if manifest == INSTALLED.get(format) else storage.absolute(manifest)
    found = Volumes.below(storage.absolute(volumes))
    for case in _distinct(table, FORMATS[format](manifest, found, data, table)):
        if need_report and not case.report.strip():
            table.note("no_report", [case.id])
        elif missing := [each.volume for each in case.every_series if found.missing(each.volume)]:
            table.reject(missing[0], "not_found", "there is nothing under this path or URI", case.id)
        else:
            table.cases.append(case)
    if not table.cases:
        raise UserError(f"manifest {manifest} gives no case to use below {volumes}: {_counted(table)}")
    table.note("scan_without_row", found.unnamed())
    listed = {each.volume: found.facts(each.volume) for case in table.cases for each in case.every_series}
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


def _own(
    rows: list[dict[str, Any]], manifest: str, found: Volumes, data: DataConfig, table: CaseTable
) -> Iterator[Case]:
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
    table.note("unknown_columns", unused(rows, COLUMNS))
    for number, row in enumerate(rows, 1):
        try:
            yield _own_case(row, manifest, found, data.spec.series, table)
        except ValueError as error:
            name = name_of(row.get("id") or f"row {number}")
            table.reject(str(row.get("volume") or manifest), "invalid_row", f"row {number}: {_why(error)}", name)


def _column(name: str) -> str:
    """A column's name; ours in any case."""
    plain = name.strip().lower()
    return plain if plain in COLUMNS else name


def _own_case(row: dict[str, Any], manifest: str, found: Volumes, most: int, table: CaseTable) -> Case:
    """A row's case, of at most so many series; ValueError where it is none."""
    values = {name: value for name, value in row.items() if name in COLUMNS and value != [] and not is_nothing(value)}
    absent = [name for name in ("id", "volume") if name not in values]
    if absent:
        raise ValueError(f"no {' and no '.join(absent)}")
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
    first, *further = _series(values.pop("volume"), values.pop("series", None), found, most)
    where = {"volume": first.volume, "series": first.series, "further": further}
    case = Case.model_validate({"report": "", "source": manifest, **values, **where})
    table.note("name_mended", [f"{name} {values[name]}" for name in mended])
    return case


def _series(volume: Any, series: Any, found: Volumes, most: int) -> list[Series]:
    """What the cells `volume` and `series` name: one scan, several files, or several series at one place."""
    volumes, names = _listed(volume), _listed(series)
    if len(volumes) == 1:
        volumes = volumes * len(names)
    if len(names) == 1 and names[0] is None:
        names = names * len(volumes)
    if len(volumes) != len(names):
        raise ValueError(f"series: {len(names)} for {len(volumes)} volumes; name one of each, or none")
    if len(volumes) > most:
        raise ValueError(
            f"series: it lists {len(volumes)}, data.spec.series reads {most} of a case; raise it, or list fewer"
        )
    pairs = [(found.name(str(place).strip()), name) for place, name in zip(volumes, names, strict=True)]
    if len(set(pairs)) < len(pairs):
        raise ValueError("series: it lists one twice")
    return [Series(volume=place, series=name) for place, name in pairs]


def _listed(cell: Any) -> list[Any]:
    """A cell's list, also as JSON text; one value is a list of it."""
    if isinstance(cell, str) and cell.lstrip().startswith('["'):
        cell = json.loads(cell)
    return (cell or [None]) if isinstance(cell, list) else [cell]


def _why(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


Format = Callable[[str, Volumes, DataConfig, CaseTable], Iterator[Case]]
FORMATS: dict[str, Format] = {
    "jsonl": lambda manifest, found, data, table: _own(read_json_lines(manifest, table), manifest, found, data, table),
    "csv": lambda manifest, found, data, table: _own(list(read_csv(manifest, table)), manifest, found, data, table),
    "parquet": lambda manifest, found, data, table: _own(read_parquet(manifest, table), manifest, found, data, table),
    "ct-rate": ct_rate.cases,
    "amos-mm": amos_mm.cases,
    "abdomenatlas3": abdomenatlas3.cases,
    "m3d-cap": m3d_cap.cases,
    "flare26": flare26.cases,
    "lidc": lidc.cases,
    "idc": lambda manifest, found, data, table: _own(
        list(idc.rows(manifest, found, data, table)), manifest, found, data, table
    ),
}
TOGETHER = ("jsonl", "csv", "parquet", "ct-rate", "idc")
"""Formats of which the series of a study can be put together."""
INSTALLED = {"lidc": lidc.PACKAGE, "idc": idc.PACKAGE}
"""Formats whose table is in a package, which stands for a manifest by its name."""
