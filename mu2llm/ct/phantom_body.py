"""The body of a phantom: organs, bones and findings drawn in HU from implicit shapes.

Coordinates are millimetres of the patient: x to the patient's right, y anterior, z superior from the lowest slice.
Shapes are drawn with soft edges (the share of the voxel that they fill), each in its own bounding box only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mu2llm.records import Finding

Array = NDArray[np.float32]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

SIGN = {"right": 1.0, "left": -1.0}
VERTEBRAE = (*(f"T{n}" for n in range(1, 13)), *(f"L{n}" for n in range(1, 5)))
LOBES = {"right": ("upper lobe", "middle lobe", "lower lobe"), "left": ("upper lobe", "lower lobe")}


@dataclass(frozen=True)
class Planted:
    """A finding as it is drawn: how much of it (0 to 1), and where within the reach of its place (−1 to 1 each)."""

    finding: Finding
    extent: float
    spot: Point


@dataclass(frozen=True)
class Anatomy:
    """One patient's measures: lengths in mm, densities in HU."""

    width: float  # half, to the outside of the muscle
    depth: float
    wall: float
    fat: float
    length: float
    dome: float  # height of the right diaphragm's dome
    heart: float  # scale of the heart
    kidney: float
    organ: float  # scale of liver, spleen, stomach
    lean: float  # sideways bend of the spine
    kyphosis: float
    arms: bool
    densities: Mapping[str, float]

    @property
    def a(self) -> float:
        """Half width of the cavity."""
        return self.width - self.wall

    @property
    def b(self) -> float:
        """Half depth of the cavity."""
        return self.depth - self.wall

    @property
    def hilum(self) -> float:
        """Height of the middle of the lungs."""
        return (self.dome + self.length) / 2 - 5

    def spine(self, z: Any) -> tuple[Any, Any]:
        """Centre (x, y) of the vertebral body at height z."""
        t = z / self.length
        return self.lean * np.sin(3 * t), 27 - self.b + self.kyphosis * np.sin(2 * np.pi * t + 0.4)

    def levels(self) -> NDArray[np.float64]:
        """Upper edges of T1…L4 and the lower edge of L4, in mm, from the top of the scan down to 0."""
        heights = np.concatenate([np.linspace(20, 27, 12), np.linspace(29, 33, 4)])
        return self.length * (1 - np.concatenate([[0.0], np.cumsum(heights)]) / heights.sum())


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A patient's measures within the range of adults."""
    u = rng.uniform
    return Anatomy(
        width=u(145, 172),
        depth=u(98, 116),
        wall=u(13, 18),
        fat=u(8, 34),
        length=u(385, 435),
        dome=u(180, 205),
        heart=u(0.9, 1.12),
        kidney=u(0.9, 1.12),
        organ=u(0.92, 1.08),
        lean=u(-6, 6),
        kyphosis=u(2, 8),
        arms=bool(u() < 0.1),
        densities={
            "fat": u(-112, -95),
            "muscle": u(48, 62),
            "lung": u(-875, -835),
            "liver": u(100, 122),
            "spleen": u(112, 135),
            "kidney": u(170, 195),
            "blood": u(165, 215),
            "myocardium": u(95, 115),
            "bone": u(180, 230),
            "rib": u(330, 460),
        },
    )


class Canvas:
    """A grid of HU over a patient who may lie off centre and rolled about the long axis."""

    def __init__(self, shape: tuple[int, int, int], spacing: Point, centre: tuple[float, float], roll: float) -> None:
        self.hu = np.full(shape, -1000, np.float32)
        self.spacing, self.centre, self.roll = spacing, centre, roll
        across = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing[0] - centre[0]
        along = (np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1] - centre[1]
        cos, sin = np.cos(roll), np.sin(roll)
        self.x = (cos * across[:, None] + sin * along[None, :]).astype(np.float32)
        self.y = (cos * along[None, :] - sin * across[:, None]).astype(np.float32)
        self.z = (np.arange(shape[2]) * spacing[2]).astype(np.float32)

    def soft(self, distance: Array) -> Array:
        """Depth inside a shape in mm → share of the voxel that is filled; works in place."""
        distance *= 1 / self.spacing[0]
        distance += 0.5
        return np.clip(distance, 0, 1, out=distance)

    def box(self, centre: Point, reach: float, reach_z: float) -> Box:
        cos, sin = np.cos(self.roll), np.sin(self.roll)
        scan = (cos * centre[0] - sin * centre[1] + self.centre[0], sin * centre[0] + cos * centre[1] + self.centre[1])
        slices = []
        for axis, (at, r) in enumerate(((scan[0], reach), (scan[1], reach), (centre[2], reach_z))):
            size, step = self.hu.shape[axis], self.spacing[axis]
            origin = 0.0 if axis == 2 else -(size - 1) / 2 * step
            low, high = (at - r - origin) / step - 1, (at + r - origin) / step + 2
            slices.append(slice(min(size, max(0, int(low))), min(size, max(0, int(high)))))
        return slices[0], slices[1], slices[2]

    def ellipsoid(self, centre: Point, radii: Point, angle: float = 0.0) -> tuple[Box, Array]:
        """The box of an ellipsoid turned by `angle` about z, and its share of each voxel there."""
        box = self.box(centre, max(radii[:2]), radii[2])
        x, y = self.x[box[:2]] - centre[0], self.y[box[:2]] - centre[1]
        if angle:
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            x, y = cos * x + sin * y, cos * y - sin * x
        flat = (x / radii[0]) ** 2 + (y / radii[1]) ** 2
        square = flat[:, :, None] + ((self.z[box[2]] - centre[2]) / radii[2]) ** 2
        return box, self.soft((1 - square) * (min(radii) / 2))

    def tube(self, start: Point, end: Point, radius: float) -> tuple[Box, Array]:
        """The same for the points within `radius` of a line."""
        p, q = np.array(start, np.float32), np.array(end, np.float32)
        middle, half = (p + q) / 2, np.abs(q - p) / 2
        reach = float(np.hypot(half[0], half[1])) + radius
        box = self.box((float(middle[0]), float(middle[1]), float(middle[2])), reach, float(half[2]) + radius)
        d = (q - p) / max(float(np.dot(q - p, q - p)), 1e-6)
        x, y, z = self.x[box[:2]] - p[0], self.y[box[:2]] - p[1], self.z[box[2]] - p[2]
        t = np.clip((x * d[0] + y * d[1])[:, :, None] + z * d[2], 0, 1)
        v = q - p
        square = (x[:, :, None] - t * v[0]) ** 2 + (y[:, :, None] - t * v[1]) ** 2 + (z - t * v[2]) ** 2
        return box, self.soft(radius - np.sqrt(square))

    def paint(self, shape: tuple[Box | Any, Array], value: Any, within: Array | None = None) -> None:
        """Blends a value in HU into a shape, only where `within` (over the whole grid) lets it."""
        box, share = shape
        if within is not None:
            share = share * within[box]
        view = self.hu[box]
        view += share * (value - view)

    def superellipse(self, a: Any, b: Any, power: float = 2.3) -> Array:
        """|x/a|^p + |y/b|^p over the grid; a and b may change with z."""
        a, b = np.broadcast_to(a, self.z.shape), np.broadcast_to(b, self.z.shape)
        x = (np.abs(self.x) ** power)[:, :, None] * (a**-power).astype(np.float32)
        x += (np.abs(self.y) ** power)[:, :, None] * (b**-power).astype(np.float32)
        return x


EVERYWHERE = (slice(None), slice(None), slice(None))


def draw(canvas: Canvas, anatomy: Anatomy, planted: tuple[Planted, ...], rng: np.random.Generator) -> None:
    """Draws the patient with the findings planted. The random numbers used do not depend on the findings."""
    findings = {item.finding.name: item for item in planted}
    cavity, radius = _trunk(canvas, anatomy)
    above = _above_diaphragm(canvas, anatomy)
    below = cavity * (1 - above)
    _bowel(canvas, anatomy, rng)
    _abdomen(canvas, anatomy, below, findings)
    _lungs(canvas, anatomy, cavity * above, radius, findings, rng)
    _mediastinum(canvas, anatomy, findings)
    _bones(canvas, anatomy, radius, findings)


def _taper(anatomy: Anatomy, z: Any) -> Any:
    t = np.clip((z / anatomy.length - 0.7) / 0.34, 0, 1)
    return 1 - 0.5 * t * t * (3 - 2 * t)


def _trunk(canvas: Canvas, anatomy: Anatomy) -> tuple[Array, Array]:
    """Skin, fat, muscle and the fat of the cavity; gives the cavity's share and radius, 1 at its wall."""
    taper = _taper(anatomy, canvas.z)
    shoulder = 1 - taper
    fat, muscle = anatomy.densities["fat"], anatomy.densities["muscle"]
    a, b = anatomy.width * (1 + 0.12 * shoulder), anatomy.depth * (1 - 0.2 * shoulder)
    waist = 1 - 0.06 * np.exp(-(((canvas.z - 60) / 60) ** 2))
    a = a * waist
    scale = anatomy.width / 2.3
    outer = canvas.superellipse(a + anatomy.fat, b + 0.75 * anatomy.fat)
    skin = canvas.soft((1 - outer) * scale)
    canvas.paint((EVERYWHERE, skin), 10)
    canvas.paint((EVERYWHERE, canvas.soft((1 - outer) * scale - 3)), fat)
    canvas.paint((EVERYWHERE, canvas.soft((1 - canvas.superellipse(a, b)) * scale)), muscle)
    radius = canvas.superellipse(anatomy.a * taper * waist, anatomy.b * taper)
    cavity = canvas.soft((1 - radius) * scale)
    canvas.paint((EVERYWHERE, cavity), fat + 10)
    if anatomy.arms:
        _arms(canvas, anatomy, float(a.max()) + anatomy.fat + 42)
    return cavity, radius


def _arms(canvas: Canvas, anatomy: Anatomy, x: float) -> None:
    for sign in SIGN.values():
        for radius, value in ((40.0, anatomy.densities["fat"]), (34.0, 55.0), (12.0, 900.0), (6.0, 50.0)):
            canvas.paint(canvas.tube((sign * x, -15, -40), (sign * (x - 12), -5, anatomy.length + 40), radius), value)


def _above_diaphragm(canvas: Canvas, anatomy: Anatomy) -> Array:
    """Share of each voxel that lies above the diaphragm's two domes."""
    dome = np.where(canvas.x > 0, anatomy.dome, anatomy.dome - 12)
    fall = ((np.abs(canvas.x) - 0.5 * anatomy.a) / (0.6 * anatomy.a)) ** 2 + ((canvas.y - 8) / anatomy.b) ** 2
    surface = (dome - 75 * np.minimum(fall, 1)).astype(np.float32)
    height = canvas.z - surface[:, :, None]
    height *= canvas.spacing[0] / canvas.spacing[2]
    return canvas.soft(height)


def _bowel(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    for _ in range(34):
        r, turn = 0.66 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        centre = (r * np.cos(turn) * anatomy.a, 12 + r * np.sin(turn) * anatomy.b, rng.uniform(-5, anatomy.dome - 70))
        size = rng.uniform(11, 19)
        radii = (size * rng.uniform(1, 1.9), size, size)
        canvas.paint(canvas.ellipsoid(centre, radii, rng.uniform(0, 3.1)), rng.uniform(35, 95))
        if rng.uniform() < 0.3:
            top = (centre[0], centre[1] + size / 3, centre[2])
            canvas.paint(canvas.ellipsoid(top, (size * 0.6, size * 0.4, size * 0.6)), -800)


def _abdomen(canvas: Canvas, anatomy: Anatomy, below: Array, findings: Mapping[str, Planted]) -> None:
    a, b, dome, scale = anatomy.a, anatomy.b, anatomy.dome, anatomy.organ
    hu = anatomy.densities
    canvas.paint(canvas.ellipsoid((-0.42 * a, 0.3 * b, dome - 62), (46, 34, 45)), 60, below)
    canvas.paint(canvas.ellipsoid((-0.42 * a, 0.3 * b, dome - 62), (40, 28, 39)), 25, below)
    canvas.paint(canvas.ellipsoid((-0.42 * a, 0.52 * b, dome - 62), (26, 11, 26)), -900, below)
    spleen = canvas.ellipsoid((-0.7 * a, -0.42 * b, dome - 58), (27 * scale, 44 * scale, 50 * scale), 0.5)
    canvas.paint(spleen, hu["spleen"], below)
    for centre, radii in (
        ((0.5 * a, 0.02 * b, dome - 62), (0.6 * a, 0.88 * b, 88 * scale)),
        ((0.0, 0.42 * b, dome - 48), (0.52 * a, 0.4 * b, 40 * scale)),
    ):
        canvas.paint(canvas.ellipsoid(centre, radii), hu["liver"], below)
    for end in ((0.75, 0.2, -30), (0.6, -0.4, -40), (0.4, 0.4, -25), (0.7, 0.0, -85)):
        canvas.paint(
            canvas.tube((0.2 * a, -0.1 * b, dome - 62), (end[0] * a, end[1] * b, dome + end[2]), 5),
            hu["liver"] + 50,
            below,
        )
    canvas.paint(canvas.ellipsoid((0.34 * a, 0.5 * b, dome - 138), (13, 13, 22)), 12)
    if lesion := findings.get("liver lesion"):
        x, y, z = lesion.spot
        r = _size(lesion) / 2
        canvas.paint(canvas.ellipsoid(((0.55 + 0.08 * x) * a, 0.22 * y * b, dome - 62 + 14 * z), (r, r, r)), 20)
    _kidneys(canvas, anatomy, findings.get("renal cyst"))


def _size(item: Planted) -> float:
    if item.finding.size_mm is None:
        raise ValueError(f"{item.finding.name} is drawn by its size, and none is given")
    return item.finding.size_mm


def _kidneys(canvas: Canvas, anatomy: Anatomy, cyst: Planted | None) -> None:
    k, hu = anatomy.kidney, anatomy.densities
    for side, sign in SIGN.items():
        z = anatomy.dome - (108 if side == "right" else 94)
        y = float(anatomy.spine(z)[1]) + 12
        canvas.paint(canvas.ellipsoid((sign * 34, y - 12, z - 30), (17, 17, 90)), hu["muscle"])
        canvas.paint(canvas.ellipsoid((sign * 62, y, z), (34 * k, 38 * k, 62 * k)), hu["fat"])
        canvas.paint(canvas.ellipsoid((sign * 62, y, z), (25 * k, 31 * k, 53 * k), sign * 0.5), hu["kidney"])
        canvas.paint(canvas.ellipsoid((sign * 48, y + 6, z), (13 * k, 10 * k, 24 * k)), -40)
        if cyst and cyst.finding.side == side:
            r, (_, v, w) = _size(cyst) / 2, cyst.spot
            up = 1 if w > 0 else -1
            centre = (sign * (76 + 5 * cyst.extent), y + 12 + 5 * v, z + up * (20 + 8 * abs(w)))
            canvas.paint(canvas.ellipsoid(centre, (r, r, r)), 5)


def _lungs(
    canvas: Canvas,
    anatomy: Anatomy,
    thorax: Array,
    radius: Array,
    findings: Mapping[str, Planted],
    rng: np.random.Generator,
) -> None:
    """Both lungs with their vessels, then what fills the pleural spaces and the airspaces."""
    middle = 13 + 17 * np.exp(-(((canvas.y + 22) / 34) ** 2))
    pleura = thorax * canvas.soft(np.abs(canvas.x) - middle)[:, :, None]
    pleura *= canvas.soft(anatomy.length - 14 - canvas.z)
    dependent = anatomy.densities["lung"] - 45 * canvas.y / anatomy.b
    canvas.paint((EVERYWHERE, pleura), dependent[:, :, None])
    _vessels(canvas, anatomy, pleura, rng)
    if item := findings.get("consolidation"):
        _consolidation(canvas, anatomy, pleura, item, rng)
    if item := findings.get("lung nodule"):
        centre, r = _place(anatomy, item, findings), _size(item) / 2
        canvas.paint(canvas.ellipsoid(centre, (r, r, r)), 40)
    if item := findings.get("pneumothorax"):
        _pneumothorax(canvas, anatomy, pleura, radius, item)
    if item := findings.get("pleural effusion"):
        _effusion(canvas, anatomy, pleura, radius, item)


def _vessels(canvas: Canvas, anatomy: Anatomy, pleura: Array, rng: np.random.Generator) -> None:
    """Vessels fan out from the hila, thinner and fainter outwards."""
    count, steps = 90, 28
    t = np.linspace(0.05, 1, steps)[None, :, None]
    sign = np.where(np.arange(count) % 2, 1.0, -1.0)
    start = np.stack([sign * 32, np.full(count, -8.0), np.full(count, anatomy.hilum)], -1)
    reach = rng.uniform(-1, 1, (count, 3)) * (
        0.35 * anatomy.a,
        0.85 * anatomy.b,
        0.45 * (anatomy.length - anatomy.dome),
    )
    reach[:, 0] += sign * 0.55 * anatomy.a
    bend = rng.normal(0, 14, (count, 1, 3))
    end = np.stack([reach[:, 0], reach[:, 1], anatomy.hilum + reach[:, 2]], -1)
    points = start[:, None] * (1 - t) + end[:, None] * t + bend * t * (1 - t) * 4 * 0.5
    cos, sin = np.cos(canvas.roll), np.sin(canvas.roll)
    across = cos * points[..., 0] - sin * points[..., 1] + canvas.centre[0]
    along = sin * points[..., 0] + cos * points[..., 1] + canvas.centre[1]
    shape, spacing = canvas.hu.shape, canvas.spacing
    i = np.rint(across / spacing[0] + (shape[0] - 1) / 2).astype(int)
    j = np.rint(along / spacing[1] + (shape[1] - 1) / 2).astype(int)
    k = np.rint(points[..., 2] / spacing[2]).astype(int)
    value = (30 - 780 * t[..., 0] ** 0.7) * np.ones_like(across)
    inside = (i >= 0) & (i < shape[0]) & (j >= 0) & (j < shape[1]) & (k >= 0) & (k < shape[2])
    at = (i[inside], j[inside], k[inside])
    share = pleura[at]
    canvas.hu[at] = np.maximum(canvas.hu[at], canvas.hu[at] + share * (value[inside] - canvas.hu[at]))


def _lower(canvas: Canvas, anatomy: Anatomy) -> Array:
    """Share of each voxel below the oblique fissure."""
    return canvas.soft((anatomy.hilum - 0.9 * canvas.y)[:, :, None] - canvas.z)


PLACES: dict[str, Point] = {
    "upper lobe": (0.52, 0.05, 52),
    "middle lobe": (0.6, 0.42, -38),
    "lower lobe": (0.58, -0.45, -30),
}


def _place(anatomy: Anatomy, item: Planted, findings: Mapping[str, Planted]) -> Point:
    """Where in its lobe a nodule lies; a collapsed lung draws it towards the hilum."""
    finding = item.finding
    x, y, z = PLACES[finding.place or ""]
    u, v, w = item.spot
    air = findings.get("pneumothorax")
    pull = 0.8 if air and air.finding.side == finding.side else 1.0
    height = anatomy.hilum + z + 12 * w
    spread = pull * float(_taper(anatomy, height))
    across = (x + 0.06 * u) * anatomy.a * max(spread, 0.8 * pull)
    forward = (y + 0.1 * v) * anatomy.b * spread - (0.15 * anatomy.b if pull < 1 else 0)
    return SIGN[finding.side or ""] * across, forward, height


def _consolidation(canvas: Canvas, anatomy: Anatomy, pleura: Array, item: Planted, rng: np.random.Generator) -> None:
    """An ill-defined patch of a third of the lobe or more, with air in the bronchi."""
    lobe, side = item.finding.place, item.finding.side or ""
    centre = _place(anatomy, item, {})
    r = 36 + 8 * item.extent
    box, share = canvas.ellipsoid((centre[0] * 1.1, centre[1], centre[2]), (r, r, r * 1.15))
    lower = _lower(canvas, anatomy)[box]
    share = (
        share
        * (lower if lobe == "lower lobe" else 1 - lower)
        * pleura[box]
        * canvas.soft(SIGN[side] * canvas.x)[box[:2]][:, :, None]
    )
    texture = 35 + rng.normal(0, 1, share.shape).astype(np.float32) * 25
    canvas.paint((box, share), texture)


def _pneumothorax(canvas: Canvas, anatomy: Anatomy, pleura: Array, radius: Array, item: Planted) -> None:
    """Air in front of and beside a lung that has partly collapsed towards its hilum (supine patient)."""
    side = canvas.soft(SIGN[item.finding.side or ""] * canvas.x)[:, :, None]
    gap = (0.42 + 0.16 * item.extent) * (0.55 + 0.45 * np.clip(canvas.y / anatomy.b + 0.3, -0.6, 1))
    depth = (radius - 1 + 1.6 * gap[:, :, None]) * (anatomy.a / 2.3)
    hemithorax = pleura * side
    lung = canvas.hu
    lung += hemithorax * np.clip(-650 - lung, 0, 170)
    canvas.paint((EVERYWHERE, canvas.soft(depth + 4) * hemithorax), -350)
    canvas.paint((EVERYWHERE, canvas.soft(depth) * hemithorax), -1000)


def _effusion(canvas: Canvas, anatomy: Anatomy, pleura: Array, radius: Array, item: Planted) -> None:
    """Fluid layering behind the lung, deepest at the base, rising along the wall (meniscus)."""
    side = canvas.soft(SIGN[item.finding.side or ""] * canvas.x)[:, :, None]
    depth = (48 + 30 * item.extent) * np.clip(1.25 - (canvas.z - anatomy.dome + 70) / 240, 0, 1)
    meniscus = 14 * np.clip(radius, 0, 1) ** 3
    fluid = canvas.soft(depth - anatomy.b - canvas.y[:, :, None] + meniscus)
    canvas.paint((EVERYWHERE, fluid * pleura * side), 10)


def _mediastinum(canvas: Canvas, anatomy: Anatomy, findings: Mapping[str, Planted]) -> None:
    hu, hilum, s, dome = anatomy.densities, anatomy.hilum, anatomy.heart, anatomy.dome
    blood = hu["blood"]
    back = float(anatomy.spine(hilum)[1]) + 26
    low = float(anatomy.spine(60)[1]) + 30
    for start, end, r, value in (
        ((-24, back, hilum + 42), (-24, back, dome), 12.5, blood),
        ((-24, back, dome), (-9, low, 90), 11.5, blood),
        ((-9, low, 90), (-7, low, -20), 10, blood),
        ((20, low, -20), (22, low + 4, dome), 12, blood - 40),
        ((12, 28, hilum - 20), (12, 22, hilum + 38), 14, blood),
        ((12, 20, hilum + 42), (-24, back, hilum + 44), 12.5, blood),
        ((32, 16, hilum - 20), (30, 14, anatomy.length), 9, blood - 10),
        ((-16, 34, hilum - 10), (-14, 10, hilum + 12), 13, blood + 10),
        ((-14, 6, hilum + 10), (42, -8, hilum + 6), 10, blood + 10),
        ((-14, 6, hilum + 10), (-46, -10, hilum + 8), 10, blood + 10),
        ((-6, back + 8, anatomy.length), (-8, back + 12, dome), 7, 40),
        ((2, back + 22, anatomy.length + 20), (2, back + 20, hilum + 22), 10, -995),
        ((2, back + 20, hilum + 22), (38, back + 20, hilum - 4), 7, -985),
        ((2, back + 20, hilum + 22), (-40, back + 18, hilum - 4), 7, -985),
    ):
        canvas.paint(canvas.tube(start, end, r), value)
    centre, angle = (-20.0, 24.0, dome + 46), -0.6
    rim, value = 4.0, hu["fat"]
    if fluid := findings.get("pericardial effusion"):
        rim, value = 13 + 7 * fluid.extent, 10.0
    canvas.paint(canvas.ellipsoid(centre, (57 * s + rim, 42 * s + rim, 46 * s + rim), angle), value)
    canvas.paint(canvas.ellipsoid(centre, (57 * s, 42 * s, 46 * s), angle), hu["myocardium"])
    canvas.paint(canvas.ellipsoid((-36, 16, dome + 42), (28 * s, 19 * s, 30 * s), angle), blood)
    canvas.paint(canvas.ellipsoid((-8, 40, dome + 44), (32 * s, 16 * s, 28 * s), angle), blood + 10)
    canvas.paint(canvas.ellipsoid((14, 16, dome + 58), (20 * s, 20 * s, 26 * s)), blood)


def _bones(canvas: Canvas, anatomy: Anatomy, radius: Array, findings: Mapping[str, Planted]) -> None:
    _ribs(canvas, anatomy, radius)
    _spine(canvas, anatomy, findings.get("vertebral sclerosis"))
    rib, top = anatomy.densities["rib"], anatomy.length
    canvas.paint(canvas.ellipsoid((0, anatomy.b + 2, anatomy.hilum + 15), (19, 8, 85)), rib - 120)
    for sign in SIGN.values():
        canvas.paint(
            canvas.tube((sign * 22, 0.72 * anatomy.b, top - 22), (sign * 120, 0.4 * anatomy.b, top - 4), 7), rib + 60
        )
        blade = canvas.ellipsoid(
            (sign * 0.72 * anatomy.width, -0.72 * anatomy.depth, top - 70), (42, 6, 62), sign * 0.75
        )
        canvas.paint(blade, rib)


def _ribs(canvas: Canvas, anatomy: Anatomy, radius: Array) -> None:
    """Ribs run in the wall around the cavity and fall forwards."""
    low = int(np.searchsorted(canvas.z, anatomy.dome - 85))
    part = (slice(None), slice(None), slice(low, None))
    ring = canvas.soft(6 - np.abs((radius[part] - 1) * (anatomy.width / 2.3) - 6))
    phase = (canvas.z[low:] + 0.5 * canvas.y[:, :, None]) / (0.058 * anatomy.length)
    phase -= np.floor(phase)
    wave = canvas.soft((0.2 - np.abs(phase - 0.5)) * (0.058 * anatomy.length))
    near = canvas.soft(np.abs(canvas.x) - np.where(canvas.y > 0, 24, 18))
    end = np.clip(1 - (canvas.y / anatomy.b - 0.55) * 1.5, 0.35, 1)
    canvas.paint((part, ring * wave * (near * end)[:, :, None]), anatomy.densities["rib"])


def _spine(canvas: Canvas, anatomy: Anatomy, sclerosis: Planted | None) -> None:
    """Vertebral bodies with end plates and discs between, the canal, arches and processes."""
    edges = anatomy.levels()
    box = canvas.box((0, 0.2 * -anatomy.b - 60, anatomy.length / 2), 62, anatomy.length)
    z = canvas.z
    x0, y0 = anatomy.spine(z)
    x = canvas.x[box[:2]][:, :, None] - x0.astype(np.float32)
    y = canvas.y[box[:2]][:, :, None] - y0.astype(np.float32)
    level = np.clip(np.searchsorted(-edges, -z, side="right") - 1, 0, len(VERTEBRAE) - 1)
    height = edges[level] - edges[level + 1]
    share = np.clip((edges[level] - z) / height, 0, 1)
    disc = np.clip((np.abs(share - 0.5) - 0.36) * height / canvas.spacing[2] + 0.5, 0, 1)
    bone = np.full(z.shape, anatomy.densities["bone"])
    if sclerosis:
        bone[level == VERTEBRAE.index(sclerosis.finding.place or "")] = 700
    broad = 16 + 7 * (1 - z / anatomy.length)
    whole = (slice(box[0].start, box[0].stop), slice(box[1].start, box[1].stop), slice(None))

    def oval(cx: float, cy: float, rx: Any, ry: Any) -> Array:
        square = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2
        return canvas.soft(((1 - square) * (np.minimum(rx, ry) / 2)).astype(np.float32))

    arch = (1 - 0.8 * disc).astype(np.float32)
    canvas.paint((whole, oval(0, -24, 17, 13) * arch), bone + 150)
    canvas.paint((whole, oval(0, -40, 5, 14) * arch), bone + 150)
    for side in (-28, 28):
        canvas.paint((whole, oval(side, -22, 15, 5) * arch), bone + 100)
    canvas.paint((whole, oval(0, -22, 9, 8)), 35)
    canvas.paint((whole, oval(0, 0, broad, 0.8 * broad)), (bone + 110) * (1 - disc) + 90 * disc)
    canvas.paint((whole, oval(0, 0, broad - 4, 0.8 * broad - 4)), bone * (1 - disc) + 85 * disc)
