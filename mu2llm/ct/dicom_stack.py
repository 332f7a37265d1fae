"""The slices of one scan in order: by ImagePositionPatient along their normal, never by name, InstanceNumber or
SliceThickness; each place once."""

from __future__ import annotations

import hashlib

import numpy as np

from mu2llm.ct.dicom_grouping import Placed, place
from mu2llm.ct.dicom_headers import Slice
from mu2llm.ct.dicom_pixels import stored
from mu2llm.ct.geometry import same_place_mm
from mu2llm.errors import Rejection


def directions(first: Slice, uri: str, accept: frozenset[str]) -> tuple[np.ndarray, bool]:
    """Unit vectors (2, 3; LPS) along a row and along a column, and whether they had to be assumed.

    Rejection: `unknown_orientation`, `bad_geometry`."""
    if first.orientation is None:
        if "unknown_orientation" not in accept:
            raise Rejection(
                uri, "unknown_orientation", "no ImageOrientationPatient; accept unknown_orientation to take it as axial"
            )
        return np.array([[1.0, 0, 0], [0, 1.0, 0]]), True
    vectors = np.array(first.orientation).reshape(2, 3)
    lengths = np.linalg.norm(vectors, axis=1)
    if abs(lengths - 1).max() > 0.01 or abs(vectors[0] @ vectors[1]) > 0.01:
        raise Rejection(
            uri, "bad_geometry", f"ImageOrientationPatient {first.orientation} is not two perpendicular unit vectors"
        )
    return vectors / lengths[:, None], False


def order(slices: list[Slice], uri: str) -> tuple[list[Slice], np.ndarray, set[str]]:
    """Slices by place along their normal, one at each, their origins (n, 3) in mm (LPS), and warning codes.

    Rejection: `no_positions`, `enhanced_unreadable`, `single_slice`, `duplicate_positions`."""
    for each in slices:
        missing = each.position is None, each.spacing is None
        if any(missing):
            name = "ImagePositionPatient" if missing[0] else "PixelSpacing"
            if each.frames > 1:
                raise Rejection(uri, "enhanced_unreadable", f"no {name} of frame {each.frame + 1} in {each.part.name}")
            raise Rejection(uri, "no_positions", f"no {name} in {each.part.name}")
    if len(slices) == 1:
        raise Rejection(uri, "single_slice", "one slice alone is no volume")
    placed = place(slices)
    unique = _unique(placed, uri)
    if len(unique) == 1:
        raise Rejection(uri, "single_slice", f"{len(slices)} copies of one slice are no volume")
    ordered = [each for _, each in unique]
    warnings = {"duplicates_dropped"} if len(unique) < len(placed) else set()
    return ordered, np.array([each.position for each in ordered]), warnings


def leftovers(slices: list[Slice], left: list[Slice], uri: str) -> set[str]:
    """The warning code for slices of the same series that were left: `partial`, unless all are copies."""
    if not left:
        return set()
    places = {each.position: each for each in slices}
    twins = [places[each.position] for each in left if each.position in places]
    copies = len(twins) == len(left) and _first_difference(left, twins, uri) is None
    return {"duplicates_dropped"} if copies else {"partial"}


def _unique(placed: Placed, uri: str) -> Placed:
    """Drops slices whose pixels are already there at the same place; Rejection where they are others."""
    near = same_place_mm(np.array([at for at, _ in placed]))
    kept = placed[:1]
    copies, originals = [], []
    for at, each in placed[1:]:
        if at - kept[-1][0] >= near:
            kept.append((at, each))
        else:
            copies.append(each)
            originals.append(kept[-1])
    different = _first_difference(copies, [each for _, each in originals], uri)
    if different is not None:
        at = originals[different][0]
        where = sum(abs(other - at) < near for other, _ in placed)
        message = f"{where} of {len(placed)} slices, which differ, lie {at:g} mm along their normal: several phases?"
        raise Rejection(uri, "duplicate_positions", message)
    return kept


def _first_difference(some: list[Slice], others: list[Slice], uri: str) -> int | None:
    """The index of the first two slices that do not show the same; most often it is 0, and so looked at alone first."""
    for count in (1, len(some)):
        pairs = zip(_digests(some[:count], uri), _digests(others[:count], uri), strict=True)
        different = [index for index, (one, other) in enumerate(pairs) if one != other]
        if different:
            return different[0]
    return None


def _digests(slices: list[Slice], uri: str) -> list[bytes]:
    """What each slice shows: a digest of its stored values and their scaling."""
    once = list({id(each): each for each in slices}.values())
    digests = {}
    for index, pixels, _ in stored(once, uri):
        scaling = repr((once[index].slope, once[index].intercept)).encode()
        digests[id(once[index])] = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + scaling).digest()
    return [digests[id(each)] for each in slices]
