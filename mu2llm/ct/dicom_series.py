"""Which of many DICOM slices make the scan that is read, and what is said of the others."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from mu2llm.ct.dicom_grouping import Scan, normal, place, scans, share_grid
from mu2llm.ct.dicom_headers import CLUES, Slice
from mu2llm.errors import Rejection

_AXIAL = 0.7  # cosine between the slices' normal and the body's long axis
_PARALLEL = 0.9  # cosine between normals that a change of the gantry's tilt leaves
_STUDY = list(CLUES).index("StudyInstanceUID")
_PARTS = 5  # of what is said of a scan that is not read


@dataclass(frozen=True)
class Choice:
    """The scan that is read, what of its series is left, and warning codes. `others` are all that could be read
    instead: the name that `series` takes → what tells it apart."""

    slices: list[Slice]
    left: list[Slice]
    warnings: set[str]
    others: dict[str, str]


def choose(slices: list[Slice], uri: str, series: str | None, accept: frozenset[str]) -> Choice:
    """The scan asked for by its series' UID or description, and `#N` for the N-th of several in it; else the largest
    axial one of CT images.

    Rejection: `no_series`, `other_modality`, `no_images`, `rgb`, `series_per_slice`, `mixed_grids`."""
    wanted, number = _wanted(slices, uri, series)
    members = _by_series(_images(wanted, uri))
    found = [scans(each) for each in members]
    if number:
        scan = _numbered(found, number, uri, series)
    else:
        scan = max((_best(each) for each in found), key=_rank_of_series)
    index = next(index for index, each in enumerate(found) if any(scan is one for one in each))
    others = [each for each in found[index] if each is not scan]
    warnings = {"stations_joined"} if scan.stations else set()
    names = {each.series for each in scan.slices}
    if len(names) > 1:
        if "series_per_slice" not in accept:
            message = f"each of {len(scan.slices)} slices has a series of its own; accept series_per_slice to join them"
            raise Rejection(uri, "series_per_slice", message)
        warnings.add("series_joined")
    if not number:
        _check_one_grid(scan, found[index], uri)
    if _lacks_pieces(scan):
        warnings.add("partial")
    kin = [other for other in others if _is_kin(scan, other) and other.slices[0].series in names]
    if len(kin) < len(others) or len(members[index]) < len(slices):
        warnings.add("files_set_aside")
    named = found if series is None else [scans(each) for each in _by_series(_images(slices, uri))]
    return Choice(scan.slices, [each for other in kin for each in other.slices], warnings, _others(scan, named))


def of_examination(slices: list[Slice], uri: str) -> list[list[Slice]]:
    """The slices of each series that are read together. First the one that `choose` takes; then, by the same rank, the
    axial ones of the same study that are no projections and cover at least half of its length. All slices in one where
    the first is joined of several series.

    Rejection: as `choose`."""
    best = [_best(scans(each)) for each in _by_series(_images(slices, uri))]
    first, *others = sorted(best, key=_rank_of_series, reverse=True)
    if _is_joined(first):
        return [slices]
    likes = [
        scan
        for scan in others
        if not (_is_joined(scan) or scan.slices[0].projection)
        and _is_axial(scan)
        and scan.slices[0].clues[_STUDY] == first.slices[0].clues[_STUDY]
        and 2 * _length(scan) >= _length(first)
    ]
    return [[each for each in slices if each.series == scan.slices[0].series] for scan in (first, *likes)]


def _rank_of_series(scan: Scan) -> tuple[bool, bool, int, str]:
    return _is_axial(scan), not scan.slices[0].projection, _voxels(scan), scan.slices[0].series


def _wanted(slices: list[Slice], uri: str, series: str | None) -> tuple[list[Slice], int]:
    """The slices of the series asked for, and which of its scans; 0 for any."""
    if series is None:
        return slices, 0
    names = {series: 0}
    if numbered := re.fullmatch(r"(.+)#([1-9]\d{0,4})", series):
        names[numbered[1]] = int(numbered[2])
    for name, number in names.items():
        if named := [each for each in slices if name in (each.series, each.description)]:
            return named, number
    known = ", ".join(sorted({each.series for each in slices}))
    raise Rejection(uri, "no_series", f"no series {series}; there are {known}")


def _numbered(found: list[list[Scan]], number: int, uri: str, series: str | None) -> Scan:
    """The N-th scan, counted from 1."""
    every = [scan for members in found for scan in members]
    if number > len(every):
        raise Rejection(uri, "no_series", f"no series {series}: it has {len(every)} scans")
    return every[number - 1]


def _images(slices: list[Slice], uri: str) -> list[Slice]:
    """The grey CT images; localisers and screen saves only where there is nothing else."""
    ct = [each for each in slices if each.modality in ("CT", "")]
    if not ct:
        modalities = ", ".join(sorted({each.modality for each in slices}))
        raise Rejection(uri, "other_modality", f"modality {modalities}, expected CT")
    images = [each for each in ct if each.rows and each.columns]
    if not images:
        raise Rejection(uri, "no_images", "DICOM without pixels")
    grey = [each for each in images if each.grey]
    if not grey:
        raise Rejection(uri, "rgb", "colour pixels: a screen save or rendered image, not HU")
    return [each for each in grey if not each.localiser] or grey


def _by_series(images: list[Slice]) -> list[list[Slice]]:
    """Images by their series; all that are alone in theirs together."""
    series: dict[str, list[Slice]] = defaultdict(list)
    for each in images:
        series[each.series].append(each)
    alone = [each for members in series.values() if len(members) == 1 for each in members]
    return [*filter(None, [alone]), *(series[name] for name in sorted(series) if len(series[name]) > 1)]


def _best(found: list[Scan]) -> Scan:
    """The scan of a series that is taken. Long ones before short ones, original ones before derived ones; of equal
    ones the first."""
    longest = max(map(_length, found))

    def rank(scan: Scan) -> tuple[bool, bool, bool, bool, int, float]:
        first = scan.slices[0]
        area = np.prod(first.spacing) * first.rows * first.columns if first.spacing else 0.0
        long = 2 * _length(scan) >= longest
        return _is_axial(scan), not first.projection, long, first.original, _voxels(scan), float(area)

    return max(found, key=rank)


def _others(scan: Scan, found: list[list[Scan]]) -> dict[str, str]:
    """The scans that are not read, by the name that `series` takes, each with what tells it apart."""
    others = {}
    for series in found:
        for number, other in enumerate(series, start=1):
            first = other.slices[0]
            if not _is_joined(other) and {id(each) for each in other.slices} != {id(each) for each in scan.slices}:
                name = f"{first.series}#{number}" if len(series) > 1 else first.series
                others[name] = _told_apart(other, scan)
    return others


def _told_apart(other: Scan, scan: Scan) -> str:
    """Its slices, where they lie, and the tags that the scan which is read has not in common with it."""
    placed, first = place(other.slices), other.slices[0]
    parts = [f"{len(other.slices)} slices"]
    if placed:
        parts[0] += f" from {placed[0][0]:g} to {placed[-1][0]:g} mm"
    if first.description:
        parts.append(first.description)
    for index, name in enumerate(CLUES):
        ours, theirs = ({each.clues[index] for each in one.slices} for one in (scan, other))
        if not name.endswith("UID") and not ours & theirs:
            values = sorted(theirs - {""})
            parts += [f"{name} {values[0]}" + ("…" if len(values) > 1 else "")] if values else []
    return ", ".join(parts[:_PARTS])


def _is_joined(scan: Scan) -> bool:
    return any(each.series != scan.slices[0].series for each in scan.slices)


def _voxels(scan: Scan) -> int:
    return sum(each.rows * each.columns for each in scan.slices)


def _length(scan: Scan) -> float:
    placed = place(scan.slices)
    return placed[-1][0] - placed[0][0] if placed else 0.0


def _is_axial(scan: Scan) -> bool:
    return bool(abs(normal(scan.slices[0])[2]) > _AXIAL)


def _is_kin(scan: Scan, other: Scan) -> bool:
    """Whether another scan shows what this one might have shown: no projection, no localiser, no other plane."""
    return not other.slices[0].projection and abs(normal(scan.slices[0]) @ normal(other.slices[0])) > _PARALLEL


def _check_one_grid(scan: Scan, found: list[Scan], uri: str) -> None:
    """Rejects a series that goes on beyond the scan on another grid: a part would be taken for the whole."""
    along, places = normal(scan.slices[0]), [at for at, _ in place(scan.slices)]
    for other in found:
        first = other.slices[0]
        if not places or share_grid(scan.slices[0], first) or not _is_kin(scan, other):
            continue
        positions = np.array([each.position for each in other.slices if each.position and each.spacing])
        beyond = sum(not places[0] <= at <= places[-1] for at in positions.reshape(-1, 3) @ along)
        if beyond > 1 and 2 * beyond >= len(other.slices):
            name = f"{first.series}#{found.index(other) + 1}"
            message = (
                f"{len(scan.slices)} slices of {_grid(scan.slices[0])}, {len(other.slices)} of {_grid(first)}; "
                f"series {name}, or another number, reads one of them"
            )
            raise Rejection(uri, "mixed_grids", message)


def _grid(each: Slice) -> str:
    spacing = "×".join(f"{size:g}" for size in each.spacing or ())
    return f"{each.rows}×{each.columns} pixels of {spacing} mm, ImageOrientationPatient {each.orientation}"


def _lacks_pieces(scan: Scan) -> bool:
    """Whether objects of a concatenation are missing."""
    pieces = {each.piece for each in scan.slices if each.piece[0]}
    return any(len({number for uid, number, _ in pieces if uid == name}) < total for name, _, total in pieces)
