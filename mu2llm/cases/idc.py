"""NCI's Imaging Data Commons: rows of the package idc-index-data, one DICOM series each, in buckets open to all.

The index has no reports: a table of one's own may have them beside the index's columns, in the columns of our manifest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mu2llm import storage
from mu2llm.cases.names import is_nothing
from mu2llm.cases.rows import read_csv, unused
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes
from mu2llm.errors import UserError
from mu2llm.requirements import file_of
from mu2llm.settings.data import DataConfig

PACKAGE = "idc-index-data"
MEND = f"pip install 'mu2llm[idc]' ({PACKAGE}, 79 MB)"
NEEDED = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "collection_id", "license_short_name", "Modality")
PLACE = ("crdc_series_uuid", "series_aws_url")
ALSO = ("instanceCount",)
OURS = ("report", "split", "questions", "findings", "labels", "series")
FOLDERS = "{uuid}", "CT_{series}", "{series}"
"""How a series' folder is named: in the buckets, by idc-index, and by TCIA's downloaders."""
RESTRICTED = "NC"  # in a licence's short name


def rows(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[dict[str, Any]]:
    """Rows of our own manifest: of each study the CT series with most images, those with most together, or each by
    itself (`data.reconstructions`).

    `data.collections` are the collections to take. The source names collection and licence; what may not be used
    commercially is noted.
    """
    read = _read(manifest, data.collections, table)
    studies: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read:
        studies[row["StudyInstanceUID"]].append(row)
    for series in studies.values():
        ranked = sorted(series, key=lambda row: (-int(row.get("instanceCount") or 0), row["SeriesInstanceUID"]))
        if data.together:
            there = [row for row in ranked[1:] if not found.missing(storage.below(found.root, place(row, found)))]
            taken = [[ranked[0], *there[: data.spec.series - 1]]]
        else:
            taken = [[row] for row in (ranked if data.reconstructions == "all" else ranked[:1])]
        uids = [row["SeriesInstanceUID"] for rows in taken for row in rows]
        table.note("other_reconstruction", [uid for uid in (r["SeriesInstanceUID"] for r in ranked) if uid not in uids])
        for members in taken:
            yield _row(members, found, table)


def _row(members: list[dict[str, Any]], found: Volumes, table: CaseTable) -> dict[str, Any]:
    """One row of the series of a case; what is ours in it is of the first that says it."""
    first = members[0]
    for row in members:
        if RESTRICTED in row["license_short_name"]:
            table.note("non_commercial", [row["SeriesInstanceUID"]])
    ours = {name: [row[name] for row in members if not is_nothing(row.get(name))] for name in OURS}
    several = {"series": [row.get("series") for row in members]} if len(members) > 1 else {}
    return {
        **{name: values[0] for name, values in ours.items() if values},
        **several,
        "id": first["SeriesInstanceUID"],
        "patient": first["PatientID"],
        "volume": [place(row, found) for row in members],
        "source": f"IDC {first['collection_id']} ({first['license_short_name']})",
    }


def place(row: dict[str, Any], found: Volumes) -> str:
    """Where a series lies: its URI in the public buckets, or the folder of its name below a root of one's own."""
    if not found.root:
        return str(row["series_aws_url"]).removesuffix("*").rstrip("/")
    names = [name.format(uuid=row["crdc_series_uuid"], series=row["SeriesInstanceUID"]) for name in FOLDERS]
    return next((path for name in names for path in found.find(name)), names[0])


def index() -> str:
    """The table of the installed package; a UserError says how to get it."""
    if path := file_of("idc_index_data", "idc_index.parquet"):
        return str(path)
    raise UserError(f"the index of the Imaging Data Commons is in a package that is not installed: {MEND}")


def series(uids: list[str]) -> dict[str, dict[str, Any]]:
    """The installed index's rows of some series, by UID; those that it does not have are left out."""
    table = pq.read_table(index(), columns=[*NEEDED, *PLACE], filters=pc.field("SeriesInstanceUID").isin(uids))
    return {row["SeriesInstanceUID"]: row for row in table.to_pylist()}


def _read(manifest: str, collections: tuple[str, ...], table: CaseTable) -> list[dict[str, Any]]:
    """The rows of CT; a UserError where the columns are not the index's, or a collection is not there."""
    uri = index() if manifest == PACKAGE else manifest
    if uri.lower().endswith(".csv"):
        listed: list[dict[str, Any]] = list(read_csv(uri, table))
        columns = list(listed[0]) if listed else []
    else:
        listed, columns = _parquet(uri, collections)
    if missing := [name for name in (*NEEDED, *PLACE) if name not in columns]:
        raise UserError(f"manifest {manifest} has no rows of {PACKAGE}: no column {missing[0]}")
    if manifest != PACKAGE:
        table.note("unknown_columns", unused(listed, (*NEEDED, *PLACE, *ALSO, *OURS)))
    wanted = [row for row in listed if not collections or row["collection_id"] in collections]
    if absent := set(collections) - {row["collection_id"] for row in wanted}:
        raise UserError(f"data.collections: {min(absent)!r} is no collection of {manifest}")
    kept = [row for row in wanted if row["Modality"] == "CT"]
    if len(kept) < len(wanted):
        table.counts["other_modality"] = len(wanted) - len(kept)
    return kept


def _parquet(uri: str, collections: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of some collections, or all, and the names of the columns."""
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise UserError(f"manifest {uri} is not Parquet: {str(error).splitlines()[0]}") from None
    names = file.schema_arrow.names
    whole = file.read([name for name in names if name in (*NEEDED, *PLACE, *ALSO, *OURS)])
    if collections and "collection_id" in names:
        whole = whole.filter(pc.field("collection_id").isin(list(collections)))
    return whole.to_pylist(), names
