"""Which of many DICOM slices make the scan that is read, and what is said of the others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from mu2llm.ct.dicom_grouping import Scan, normal, place, scans, share_grid
from mu2llm.ct.dicom_headers import Slice
from mu2llm.errors import Rejection

_AXIAL = 0.7  # cosine between the slices' normal and the body's long axis
_PARALLEL = 0.9  # cosine between normals that a change of the gantry's tilt leaves


@dataclass(frozen=True)
class Choice:
    """The scan that is read, what of its series is left, and warning codes."""

    slices: list[Slice]
    left: list[Slice]
    warnings: set[str]


def choose(slices: list[Slice], uri: str, series: str | None, accept: frozenset[str]) -> Choice:
    """The scan asked for by its series' UID or description, else the largest axial one of CT images.

    Rejection: `no_series`, `other_modality`, `no_images`, `rgb`, `series_per_slice`, `mixed_grids`."""
    members = _by_series(_images(slices, uri, series))
    best = [_best(each) for each in members]
    index = max(range(len(best)), key=lambda index: _rank_of_series(best[index][0]))
    scan, others = best[index]
    warnings = {"stations_joined"} if scan.stations else set()
    names = {each.series for each in scan.slices}
    if len(names) > 1:
        if "series_per_slice" not in accept:
            message = f"each of {len(scan.slices)} slices has a series of its own; accept series_per_slice to join them"
            raise Rejection(uri, "series_per_slice", message)
        warnings.add("series_joined")
    _check_one_grid(scan, others, uri)
    if _lacks_pieces(scan):
        warnings.add("partial")
    kin = [other for other in others if _is_kin(scan, other) and other.slices[0].series in names]
    if len(kin) < len(others) or len(members[index]) < len(slices):
        warnings.add("files_set_aside")
    return Choice(scan.slices, [each for other in kin for each in other.slices], warnings)


def _rank_of_series(scan: Scan) -> tuple[bool, bool, int, str]:
    return _is_axial(scan), not scan.slices[0].projection, _voxels(scan), scan.slices[0].series


def _images(slices: list[Slice], uri: str, series: str | None) -> list[Slice]:
    """The grey CT images of a series, or of all; localisers and screen saves only where there is nothing else."""
    if series is not None:
        named = [each for each in slices if series in (each.series, each.description)]
        if not named:
            known = ", ".join(sorted({each.series for each in slices}))
            raise Rejection(uri, "no_series", f"no series {series}; there are {known}")
        slices = named
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


def _best(series: list[Slice]) -> tuple[Scan, list[Scan]]:
    """The scan of a series that is taken, and the others. Long ones before short ones, original ones before derived
    ones; of equal ones the first."""
    found = scans(series)
    longest = max(map(_length, found))

    def rank(scan: Scan) -> tuple[bool, bool, bool, bool, int, float]:
        first = scan.slices[0]
        area = np.prod(first.spacing) * first.rows * first.columns if first.spacing else 0.0
        long = 2 * _length(scan) >= longest
        return _is_axial(scan), not first.projection, long, first.original, _voxels(scan), float(area)

    best = max(found, key=rank)
    return best, [scan for scan in found if scan is not best]


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


def _check_one_grid(scan: Scan, others: list[Scan], uri: str) -> None:
    """Rejects a series that goes on beyond the scan on another grid: a part would be taken for the whole."""
    along, places = normal(scan.slices[0]), [at for at, _ in place(scan.slices)]
    for other in others:
        first = other.slices[0]
        if not places or share_grid(scan.slices[0], first) or not _is_kin(scan, other):
            continue
        positions = np.array([each.position for each in other.slices if each.position and each.spacing])
        beyond = sum(not places[0] <= at <= places[-1] for at in positions.reshape(-1, 3) @ along)
        if beyond > 1 and 2 * beyond >= len(other.slices):
            message = f"{len(scan.slices)} slices of {_grid(scan.slices[0])}, {len(other.slices)} of {_grid(first)}"
            raise Rejection(uri, "mixed_grids", message)


def _grid(each: Slice) -> str:
    spacing = "×".join(f"{size:g}" for size in each.spacing or ())
    return f"{each.rows}×{each.columns} pixels of {spacing} mm, ImageOrientationPatient {each.orientation}"


def _lacks_pieces(scan: Scan) -> bool:
    """Whether objects of a concatenation are missing."""
    pieces = {each.piece for each in scan.slices if each.piece[0]}
    return any(len({number for uid, number, _ in pieces if uid == name}) < total for name, _, total in pieces)
