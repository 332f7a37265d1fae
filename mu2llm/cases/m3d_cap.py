"""M3D-Cap: one JSON document, `{split: [{image, text}]}`, where text is the path of the report's file.

The data set's own volumes are arrays scaled to 0…1 without HU or geometry, which reading rejects; scans of the same
name as NIfTI or DICOM folder beside them are taken instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mu2llm.cases.rows import clean, read_json, read_texts, unused
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes
from mu2llm.errors import UserError
from mu2llm.records import Case, Split
from mu2llm.settings.data import DataConfig

SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test", "test1k": "test"}


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """Reports are looked for below the volumes, then beside the manifest. Test1k is a part of test."""
    document = read_json(manifest)
    if not isinstance(document, dict) or not set(document) & set(SPLITS):
        raise UserError(f"manifest {manifest} is not M3D-Cap: expected a JSON object of {', '.join(SPLITS)}")
    lists = {name: [_entry(entry) for entry in document.get(name) or []] for name in SPLITS}
    test = {entry.get("image") for entry in lists["test"]}
    lists["test1k"] = [entry for entry in lists["test1k"] if entry.get("image") not in test]
    entries = [(split, entry) for name, split in SPLITS.items() for entry in lists[name]]
    table.note("unknown_columns", unused((entry for _, entry in entries), ("image", "text")))
    table.counts["rows"] = len(entries)
    reports = read_texts([found.beside(manifest, str(entry.get("text"))) for _, entry in entries], table)
    for (split, entry), report in zip(entries, reports, strict=True):
        image = str(entry.get("image") or "")
        if not image:
            table.reject(manifest, "invalid_row", f"an entry of {split} has no image")
            continue
        identity = image.removesuffix(".npy").removeprefix("./")
        yield Case(
            id=identity,
            patient=identity.rpartition("/")[0] or identity,
            volume=found.scan(identity if found.locate(identity, least=2) else image, least=2),
            report=clean(report),
            split=split,
            source="M3D-Cap",
        )


def _entry(value: Any) -> dict[str, Any]:
    """An entry of a list; what is no object is one without an image."""
    return value if isinstance(value, dict) else {}
