"""CT-RATE: reports, metadata and labels in CSV tables, by volume (`train_17051_a_1.nii.gz`: the first reconstruction
of scan a of patient train_17051). The tables are distinguished by their columns, not by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from mu2llm import storage
from mu2llm.cases.names import is_nothing, name_of
from mu2llm.cases.rows import compose, number, read_folder, unused
from mu2llm.cases.table import CaseTable, by_hash
from mu2llm.cases.volumes import Volumes
from mu2llm.errors import UserError
from mu2llm.records import Case, Series, Split
from mu2llm.settings.data import DataConfig

NAME = "VolumeName"
FINDINGS, IMPRESSION = "Findings_EN", "Impressions_EN"
SLOPE, INTERCEPT = "RescaleSlope", "RescaleIntercept"
A_LABEL = "Medical material"
Rows = dict[str, dict[str, str]]


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """`manifest` is a folder with the tables, or the table of reports with the others beside it.

    One reconstruction a scan, the first that is there, or the first ones together, or each a case
    (`data.reconstructions`). Slope and intercept of the metadata go into `rescale`. Of rows that name one volume the
    first counts, the others are noted.

    CT-RATE's `valid` is what results are published on and nothing is chosen by: the test split. The validation split is
    carved out of `train` by patient, as much of it as `data.split` says.
    """
    reports, metadata, labels = _tables(manifest, table)
    chosen = [[name] for name in reports] if data.reconstructions == "all" else _of_each(reports, found, data, table)
    first = [name for name, *_ in chosen]
    splits = _splits([name for name in first if found.find(name)] or first, data, table)
    for name, *others in chosen:
        identity = name.removesuffix(".nii.gz")
        table.note("no_rescale", [each.removesuffix(".nii.gz") for each in (name, *others) if each not in metadata])
        present = _present(labels.get(name, {}))
        if present is None:
            table.note("no_labels", [identity])
        yield Case(
            id=identity,
            patient=_patient(name),
            volume=_volume(name, found, table),
            report=compose(reports[name].get(FINDINGS), reports[name].get(IMPRESSION)),
            split=splits.get(_patient(name)),
            labels=present,
            rescale=metadata.get(name),
            further=tuple(Series(volume=_volume(e, found, table), rescale=metadata.get(e)) for e in others),
            source="CT-RATE",
        )
    table.note("scan_without_report", sorted(set(metadata) - set(reports)))


def _patient(name: str) -> str:
    """`train_17051` of `train_17051_a_1.nii.gz`."""
    return "_".join(name.removesuffix(".nii.gz").split("_")[:2])


def _splits(names: Iterable[str], data: DataConfig, table: CaseTable) -> dict[str, Split]:
    """Each patient's split; none for a name of neither `train` nor `valid`."""
    patients = sorted({_patient(name) for name in names})
    fractions: dict[Split, float] = {split: data.split.get(split, 0.0) for split in ("train", "validation")}
    found = by_hash([each for each in patients if each.startswith("train_")], fractions)
    table.note("validation_from_train", [patient for patient, split in found.items() if split == "validation"])
    return found | {each: "test" for each in patients if each.startswith("valid_")}


def _tables(manifest: str, table: CaseTable) -> tuple[Rows, dict[str, tuple[float, float]], Rows]:
    named = read_folder(manifest, table)
    beside = named
    if storage.is_file(manifest):
        beside = {**read_folder(storage.parent(manifest), table), **named}
    reports: Rows = {}
    metadata: dict[str, tuple[float, float]] = {}
    labels: Rows = {}
    counted = 0
    for uri, rows in beside.items():
        columns = rows[0]
        if NAME in columns and FINDINGS in columns:
            if uri in named:
                for row in rows:
                    if is_nothing(row[NAME]):
                        table.note("invalid_row", [f"{uri}: a row without {NAME}"])
                    elif reports.setdefault(name_of(row[NAME]), row) is not row:
                        table.note("duplicate_id", [name_of(row[NAME])])
                counted += len(rows)
                table.note("unknown_columns", unused(rows, (NAME, FINDINGS, IMPRESSION)))
        elif NAME in columns and SLOPE in columns:
            for row in rows:
                slope, intercept = number(row[SLOPE]), number(row.get(INTERCEPT))
                if slope and intercept is not None:
                    name = name_of(row[NAME])
                    if metadata.setdefault(name, (slope, intercept)) != (slope, intercept):
                        table.note("duplicate_id", [name])
            table.note("unknown_columns", unused(rows, (NAME, SLOPE, INTERCEPT)))
        elif NAME in columns and A_LABEL in columns:
            for row in rows:
                name = name_of(row.pop(NAME))
                if labels.setdefault(name, row) != row:
                    table.note("duplicate_id", [name])
        else:
            table.note("unknown_files", [uri])
    if not reports:
        raise UserError(f"manifest {manifest}: no CT-RATE table of reports (columns {NAME} and {FINDINGS})")
    table.counts["rows"] = counted
    return reports, metadata, labels


def _present(row: dict[str, str]) -> dict[str, int] | None:
    """A row of labels as 0 and 1; None where there is none, or a cell is no number."""
    values = {name: number(value or 0) for name, value in row.items()}
    if not values or None in values.values():
        return None
    return {name: int(value) for name, value in values.items() if value is not None}


def _of_each(reports: Rows, found: Volumes, data: DataConfig, table: CaseTable) -> list[list[str]]:
    """Of each scan's reconstructions the first that is there, or the first ones (`data.together`); the first of all
    where none is."""
    scans: dict[str, list[str]] = defaultdict(list)
    for name in reports:
        scans[name.removesuffix(".nii.gz").rpartition("_")[0]].append(name)
    chosen = []
    for names in scans.values():
        ranked = sorted(names, key=lambda name: (not found.find(name), len(name), name))
        there = [name for name in ranked if found.find(name)] or ranked[:1]
        chosen.append(there[: data.spec.series if data.together else 1])
        table.note("other_reconstruction", [name for name in ranked if name not in chosen[-1]])
    return chosen


def _volume(name: str, found: Volumes, table: CaseTable) -> str:
    """The volume wherever it lies; of a raw and a fixed release the fixed one."""
    paths = sorted(found.find(name), key=lambda path: ("_fixed" not in path, path))
    if len(paths) > 1:
        table.note("several_volumes", [name])
    return found.name(paths[0] if paths else name)
