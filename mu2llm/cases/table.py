"""The case table: what every manifest is made into, what was found wrong in it, and patient-level splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mu2llm.cases.volumes import Facts
from mu2llm.errors import Rejection
from mu2llm.records import Case, Split

NOTES: dict[str, str] = {
    "rows": "rows of the manifest",
    "cases": "cases that are to be ingested",
    "excluded": "cases that data.exclude leaves out",
    "unknown_columns": "columns of the manifest that nothing uses",
    "unknown_files": "files of the manifest that nothing uses, or that cannot be read",
    "invalid_row": "rows that are no case: a field is missing or of a wrong type",
    "blank_row": "rows of the manifest without any value, left out",
    "extra_cells": "rows with more cells than the header has columns: what is beyond it is not read",
    "duplicate_id": "further rows with the id of an earlier one, also where the case of letters differs",
    "name_mended": "ids and patients with spaces or what cannot be seen around them, set right",
    "patient_spelling": "patients whose name differs from an earlier one's in the case of letters: taken as one",
    "no_patient": "cases whose row names no patient (NA, NaN, empty …): the id stands for him",
    "no_report": "scans of the manifest without a report, left out",
    "not_found": "reports without a scan: the volume is not there",
    "scan_without_row": "scans below --volumes that no row names",
    "scan_without_report": "scans of the metadata table that the table of reports does not name",
    "several_volumes": "volumes whose name is there more than once; the first was taken",
    "other_reconstruction": "further reconstructions of a scan, left out (data.reconstructions)",
    "fewer_series": "cases with fewer series than data.spec.series: the others' chunks are empty",
    "other_modality": "series of another modality than CT, left out",
    "non_commercial": "series whose licence forbids commercial use",
    "not_in_index": "series that the index of the Imaging Data Commons does not have, left out",
    "unsure_nodules": "scans with nodules that a single reader marked, which are left out of report and findings",
    "no_side": "scans with nodules whose image does not say which side is left",
    "no_rescale": "volumes without slope and intercept in the metadata table",
    "no_labels": "cases without a row in the table of labels",
    "no_region": "regions of the body without findings",
    "negative_spacing": "cases whose manifest gives a negative spacing: the volume's own header is used",
    "validation_from_train": "training patients of a data set without a validation set of its own, taken for one",
    "patient_in_several_splits": "patients whom the data set puts into several splits",
    "decoded_as_latin": "tables that are not UTF-8 and were read as Windows-1252",
}
"""What is counted and listed about a manifest: code → description."""


@dataclass
class CaseTable:
    """Cases, what was noted about their manifest (`NOTES`: counts, and the ids or names), and rejected rows.

    `facts` are the bytes and the stamp of the volumes that were seen in a listing, by URI.
    """

    cases: list[Case] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[str]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)

    def note(self, code: str, names: Iterable[str]) -> None:
        """Counts and lists names under a code."""
        for name in names:
            self.listed.setdefault(code, []).append(name)
            self.counts[code] = self.counts.get(code, 0) + 1

    def reject(self, uri: str, code: str, message: str, case_id: str = "") -> None:
        """Notes a row that cannot become a case and puts it among the rejections."""
        self.note(code, [case_id or uri])
        self.rejections.append(Rejection(uri, code, message, case_id))


def assign_splits(table: CaseTable, fractions: Mapping[Split, float]) -> None:
    """Gives each case without a split one, patient by patient.

    A patient goes where the data set puts him; else the SHA-256 of the patient id decides, so that more cases
    never move him. Where that leaves a wanted split empty, the patient nearest to its range of hashes moves there.
    """
    own: dict[str, set[Split]] = defaultdict(set)
    for case in table.cases:
        if case.split:
            own[case.patient].add(case.split)
    table.note("patient_in_several_splits", sorted(patient for patient, splits in own.items() if len(splits) > 1))
    free = sorted({case.patient for case in table.cases} - set(own))
    chosen = by_hash(free, fractions)
    chosen.update({patient: min(splits) for patient, splits in own.items()})
    table.cases = [
        case if case.split else case.model_copy(update={"split": chosen[case.patient]}) for case in table.cases
    ]


def by_hash(patients: list[str], fractions: Mapping[Split, float]) -> dict[str, Split]:
    """Each patient's split; of no fraction at all the first."""
    places = {patient: int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8]) / 2**64 for patient in patients}
    total, edge, ranges = sum(fractions.values()) or 1.0, 0.0, {}
    for split, fraction in fractions.items():
        ranges[split] = (edge, edge + fraction / total)
        edge += fraction / total
    last = next((split for split in reversed(ranges) if fractions[split]), next(iter(ranges)))
    chosen = {
        patient: next((split for split, (low, high) in ranges.items() if low <= place < high), last)
        for patient, place in places.items()
    }
    for split, (low, high) in ranges.items():
        members = list(chosen.values())
        fullest = max(ranges, key=members.count)
        if high > low and split not in members and members.count(fullest) > 1:
            donors = [patient for patient in patients if chosen[patient] == fullest]
            chosen[min(donors, key=lambda patient: abs(places[patient] - (low + high) / 2))] = split
    return chosen
