"""AbdomenAtlas 3.0: CSV tables by `BDMAP ID`, with reports in four styles, counts of lesions and notes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mu2llm.cases.names import is_nothing
from mu2llm.cases.rows import clean, number, read_folder, unused
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes
from mu2llm.errors import UserError
from mu2llm.records import Case
from mu2llm.settings.data import DataConfig

NAME = "BDMAP ID"
REPORTS = ("fusion narrative report", "narrative report", "fusion structured report", "structured report", "Notes")
COUNT = re.compile(r"number of (.+ (?:lesion|tumor|cyst|PDAC)) instances")


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """`manifest` is one table or a folder of them: rows of one `BDMAP ID` are put together.

    Of values that contradict each other the first stays, and is noted. The report is the first there is of the fused
    narrative, narrative, fused structured and structured ones and the notes. Counts of lesions become labels (any or
    none).
    """
    scans: dict[str, dict[str, str]] = {}
    for uri, rows in read_folder(manifest, table).items():
        if NAME not in rows[0]:
            table.note("unknown_files", [uri])
            continue
        counted = [name for name in rows[0] if COUNT.fullmatch(name)]
        table.note("unknown_columns", unused(rows, (NAME, *REPORTS, *counted)))
        for place, row in enumerate(rows, 1):
            if identity := row[NAME].strip():
                known = scans.setdefault(identity, {})
                values = {name: value for name, value in row.items() if not is_nothing(value)}
                if any(known.get(name, value) != value for name, value in values.items()):
                    table.note("duplicate_id", [identity])
                scans[identity] = {**values, **known}
            else:
                table.note("invalid_row", [f"{uri} row {place}"])
    if not scans:
        raise UserError(f"manifest {manifest}: no AbdomenAtlas table with rows (column {NAME})")
    table.counts["rows"] = len(scans)
    for identity, row in scans.items():
        report = next((text for text in (clean(row.get(name)) for name in REPORTS) if text), "")
        yield Case(
            id=identity,
            patient=identity,
            volume=_volume(identity, found),
            report=report.removeprefix("Radiologist's notes:").strip(),
            labels=_labels(row),
            source="AbdomenAtlas 3.0",
        )


def _labels(row: dict[str, str]) -> dict[str, int] | None:
    counts = {match[1]: row[name] for name in row if (match := COUNT.fullmatch(name))}
    numbers = {name: number(count) for name, count in counts.items()}
    return {name: int(count > 0) for name, count in numbers.items() if count is not None} or None


def _volume(identity: str, found: Volumes) -> str:
    """`<id>/ct.nii.gz`, or a file of the id."""
    for folder in found.find(identity):
        if f"{folder}/ct.nii.gz" in found.files:
            return found.name(f"{folder}/ct.nii.gz")
    for name in (f"{identity}.nii.gz", f"{identity}_0000.nii.gz"):
        if paths := found.find(name):
            return found.name(paths[0])
    return found.name(f"{identity}/ct.nii.gz")
