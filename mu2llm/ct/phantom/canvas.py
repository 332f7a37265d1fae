"""A grid of HU on which shapes are drawn: each in its own bounding box, with edges that fill voxels in part."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]
Shape = tuple[Box, Array]  # a part of the grid, and the share of each voxel there that the shape fills

EVERYWHERE: Box = (slice(None), slice(None), slice(None))


class Canvas:
    """HU (x, y, z) over a patient who may lie off the centre and rolled about the long axis.

    Coordinates are the patient's, in mm: x to the right side, y forwards, z upwards from the lowest slice.
    """

    def __init__(self, shape: tuple[int, int, int], spacing: Point, centre: tuple[float, float], roll: float) -> None:
        self.hu = np.full(shape, -1000, np.float32)
        self.spacing = spacing
        self._cos, self._sin = float(np.cos(roll)), float(np.sin(roll))
        self._origin = (centre[0] + (shape[0] - 1) / 2 * spacing[0], centre[1] + (shape[1] - 1) / 2 * spacing[1], 0.0)
        across = np.arange(shape[0])[:, None] * spacing[0] - self._origin[0]
        along = np.arange(shape[1])[None, :] * spacing[1] - self._origin[1]
        self.x = (self._cos * across + self._sin * along).astype(np.float32)
        self.y = (self._cos * along - self._sin * across).astype(np.float32)
        self.z = (np.arange(shape[2]) * spacing[2]).astype(np.float32)

    def soft(self, depth: Array) -> Array:
        """Depth inside a shape in mm → share of the voxel that is filled; works in place."""
        depth *= 1 / self.spacing[0]
        depth += 0.5
        return np.clip(depth, 0, 1, out=depth)

    def over(self, surface: Array) -> Array:
        """Share of each voxel over a surface z(x, y)."""
        return self.soft((self.z - surface[:, :, None]) * (self.spacing[0] / self.spacing[2]))

    def side(self, sign: float) -> Array:
        """Share of each column (x, y, 1) on the right (1) or left (-1) of the middle."""
        return self.soft(sign * self.x)[:, :, None]

    def slab(self, low: float, high: float) -> Box:
        """The box of the slices between two heights."""
        start, stop = np.searchsorted(self.z, [low, high])
        return slice(None), slice(None), slice(int(start), int(stop))

    def box(self, centre: Point, reach: float, reach_z: float) -> Box:
        """The box of what lies within `reach` of a point, cut at the grid's edges."""
        start = np.floor(self._index(np.array(centre)) - np.array([reach, reach, reach_z]) / self.spacing)
        stop = np.ceil(self._index(np.array(centre)) + np.array([reach, reach, reach_z]) / self.spacing) + 1
        low, high = (np.clip(edge, 0, self.hu.shape).astype(int) for edge in (start, stop))
        return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])

    def ellipsoid(self, centre: Point, radii: Point, turn: float = 0.0, rough: float = 0.0) -> Shape:
        """An ellipsoid turned about z by `turn`; `rough` is how far, in mm, its surface waves."""
        box = self.box(centre, max(radii[:2]) + rough, radii[2] + rough)
        x, y, z = self.x[box[:2]] - centre[0], self.y[box[:2]] - centre[1], self.z[box[2]] - centre[2]
        if turn:
            cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
            x, y = cos * x + sin * y, cos * y - sin * x
        square = ((x / radii[0]) ** 2 + (y / radii[1]) ** 2)[:, :, None] + (z / radii[2]) ** 2
        depth = (1 - square) * (min(radii) / 2)
        if rough:
            depth += (rough * np.sin(0.19 * x + 0.1 * y))[:, :, None] * np.cos(0.13 * z)
            depth += (rough * np.sin(0.23 * y - 0.07 * x))[:, :, None] * np.sin(0.17 * z + 1)
        return box, self.soft(depth)

    def cells(self, centre: Point, places: NDArray[np.float64], cell_mm3: float) -> Shape:
        """A body of small cells, by their places (n, 3) about a point in mm."""
        reach = np.abs(places).max(0)
        box = self.box(centre, float(np.hypot(reach[0], reach[1])) + self.spacing[0], float(reach[2]) + self.spacing[2])
        first, last = (np.array([getattr(each, edge) for each in box]) for edge in ("start", "stop"))
        index = np.rint(self._index(places + np.array(centre))).astype(int)
        index = index[np.all((index >= first) & (index < last), axis=1)] - first
        share = np.zeros(last - first, np.float32)
        np.add.at(share, tuple(index.T), np.float32(cell_mm3 / np.prod(self.spacing)))
        return box, np.minimum(share, 1)

    def tube(self, start: Point, end: Point, radius: float) -> Shape:
        """All that lies within `radius` of a line."""
        p, q = np.array(start, np.float32), np.array(end, np.float32)
        middle, half = (p + q) / 2, np.abs(q - p) / 2
        reach = float(np.hypot(half[0], half[1])) + radius
        box = self.box((float(middle[0]), float(middle[1]), float(middle[2])), reach, float(half[2]) + radius)
        x, y, z = self.x[box[:2]] - p[0], self.y[box[:2]] - p[1], self.z[box[2]] - p[2]
        v = q - p
        t = np.clip(((x * v[0] + y * v[1])[:, :, None] + z * v[2]) / float(v @ v), 0, 1)
        square = (x[:, :, None] - t * v[0]) ** 2 + (y[:, :, None] - t * v[1]) ** 2 + (z - t * v[2]) ** 2
        return box, self.soft(radius - np.sqrt(square))

    def oval(self, a: Any, b: Any, power: float = 2.3) -> Array:
        """|x/a|^power + |y/b|^power over the grid, 1 on the edge; the half axes a and b may change with z."""
        a, b = np.broadcast_to(a, self.z.shape), np.broadcast_to(b, self.z.shape)
        square = (np.abs(self.x) ** power)[:, :, None] * (a**-power).astype(np.float32)
        square += (np.abs(self.y) ** power)[:, :, None] * (b**-power).astype(np.float32)
        return square

    def paint(self, shape: Shape, value: Any, within: Array | None = None) -> None:
        """Blends a value in HU into a shape, only where `within` (over the whole grid) lets it."""
        box, share = shape
        if within is not None:
            share = share * within[box]
        view = self.hu[box]
        view += share * (value - view)

    def brighten(self, points: NDArray[np.float64], value: NDArray[np.float64], within: Array) -> None:
        """Raises the voxels nearest to points (…, 3) to a value, only where `within` lets it."""
        index = np.rint(self._index(points)).astype(int)
        inside = np.all((index >= 0) & (index < self.hu.shape), axis=-1)
        at = tuple(index[inside].T)
        before = self.hu[at]
        self.hu[at] = before + within[at] * np.maximum(value[inside] - before, 0)

    def _index(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Patient's coordinates (…, 3) → voxel indexes, not rounded."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        scan = np.stack([self._cos * x - self._sin * y, self._sin * x + self._cos * y, z], -1)
        return (scan + self._origin) / self.spacing
