"""Above the diaphragm: lungs and pleural spaces, heart and great vessels, and their findings."""

from __future__ import annotations

import numpy as np

from mu2llm.ct.phantom.anatomy import SIGN, Anatomy
from mu2llm.ct.phantom.canvas import EVERYWHERE, Array, Canvas, Point
from mu2llm.ct.phantom.plan import Plan, Planted

# centre of each lobe: shares of the cavity's half width and depth, and height above the hilum in mm
LOBE_CENTRE = {"upper lobe": (0.6, 0.05, 50), "middle lobe": (0.6, 0.42, -38), "lower lobe": (0.58, -0.45, -30)}


def draw_chest(
    canvas: Canvas, anatomy: Anatomy, thorax: Array, oval: Array, plan: Plan, rng: np.random.Generator
) -> None:
    """`thorax` is the share of each voxel that is cavity above the diaphragm. Findings use no random number."""
    pleura = _lungs(canvas, anatomy, thorax)
    _vessels(canvas, anatomy, pleura, rng)
    if consolidation := plan.get("consolidation"):
        _consolidation(canvas, anatomy, pleura, consolidation, plan)
    if nodule := plan.get("lung nodule"):
        _nodule(canvas, anatomy, pleura, nodule, plan)
    if pneumothorax := plan.get("pneumothorax"):
        _pneumothorax(canvas, anatomy, pleura, oval, pneumothorax)
    if effusion := plan.get("pleural effusion"):
        _effusion(canvas, anatomy, pleura, oval, effusion)
    _great_vessels(canvas, anatomy)
    _heart(canvas, anatomy, plan)


def _lungs(canvas: Canvas, anatomy: Anatomy, thorax: Array) -> Array:
    """Both lungs, denser where they lie lower; gives their share of each voxel."""
    mediastinum = 13 + 17 * np.exp(-(((canvas.y + 22) / 34) ** 2)) + 14 * np.clip(-2 * canvas.y / anatomy.b - 1, 0, 1)
    pleura = thorax * canvas.soft(np.abs(canvas.x) - mediastinum)[:, :, None]
    pleura *= canvas.soft(anatomy.length - 14 - canvas.z)
    density = anatomy.hu["lung"] - 45 * canvas.y / anatomy.b
    canvas.paint((EVERYWHERE, pleura), density[:, :, None])
    return pleura


def _vessels(canvas: Canvas, anatomy: Anatomy, pleura: Array, rng: np.random.Generator) -> None:
    """Vessels fan out from the hila in bundles, thinner and fainter outwards (quadratic Bézier curves)."""
    bundles, each = 24, 9
    sign = np.where(np.arange(bundles) % 2, 1.0, -1.0)[:, None]
    reach = np.array([0.36 * anatomy.a, 0.8 * anatomy.b, 0.5 * (anatomy.length - anatomy.dome)])
    middle = rng.uniform(-0.8, 0.8, (bundles, 1, 3)) * reach
    end = middle + rng.uniform(-0.55, 0.55, (bundles, each, 3)) * reach
    middle[..., 0] = 0.75 * middle[..., 0] + sign * 0.42 * anatomy.a
    end[..., 0] += sign * 0.58 * anatomy.a
    hila = np.stack([sign * 30, np.full_like(sign, -8), np.full_like(sign, 10)], -1)
    t = np.linspace(0.05, 1, 36)[:, None]
    path = (1 - t) ** 2 * hila[:, :, None] + 2 * t * (1 - t) * middle[:, :, None] + t**2 * end[:, :, None]
    path[..., 2] += anatomy.hilum
    value = -280 - 480 * t[:, 0] ** 0.5
    canvas.brighten(path, np.broadcast_to(value, path.shape[:-1]), pleura)


def _in_lobe(anatomy: Anatomy, item: Planted, plan: Plan) -> Point:
    """Where a finding of a lobe lies; a collapsed lung draws it towards the hilum and back."""
    x, y, z = LOBE_CENTRE[item.finding.place or ""]
    u, v, w = item.spot
    air = plan.get("pneumothorax")
    collapsed = air is not None and air.finding.side == item.finding.side
    height = anatomy.hilum + z + 12 * w
    narrow = float(anatomy.taper(height)) * (0.8 if collapsed else 1)
    forward = (y + 0.1 * v - (0.15 if collapsed else 0)) * anatomy.b * narrow
    return SIGN[item.finding.side or ""] * (x + 0.06 * u) * anatomy.a * narrow, forward, height


def _nodule(canvas: Canvas, anatomy: Anatomy, pleura: Array, item: Planted, plan: Plan) -> None:
    """A solid ball in a halo of ground glass, or the shape of one that someone had."""
    centre = _in_lobe(anatomy, item, plan)
    if item.shape:
        canvas.paint(canvas.cells(centre, item.shape.cells, item.shape.cell_mm3), 40)
        return
    canvas.paint(canvas.ellipsoid(centre, (item.radius + 15,) * 3, rough=3), -400, pleura)
    canvas.paint(canvas.ellipsoid(centre, (item.radius,) * 3, rough=1), 40)


def _consolidation(canvas: Canvas, anatomy: Anatomy, pleura: Array, item: Planted, plan: Plan) -> None:
    """Airspaces filled over a third of a lobe or more, up to its fissure, with air left in the bronchi."""
    sign = SIGN[item.finding.side or ""]
    x, y, z = _in_lobe(anatomy, item, plan)
    r = 38 + 8 * item.extent
    box, share = canvas.ellipsoid((1.1 * x, y, z), (r, r, 1.15 * r), rough=7)
    above_fissure = canvas.over(anatomy.hilum - 0.9 * canvas.y)[box]
    share *= {"lower lobe": 1 - above_fissure, "upper lobe": above_fissure}.get(item.finding.place or "", 1)
    canvas.paint((box, share * canvas.side(sign)[box[:2]]), 35, pleura)
    for turn in (-0.5, 0.1, 0.7):
        bronchus = canvas.tube((0.75 * x, y, z), (x + sign * 16, y + 26 * turn, z + 20 * turn), 2.2)
        canvas.paint(bronchus, -800, pleura)


def _pneumothorax(canvas: Canvas, anatomy: Anatomy, pleura: Array, oval: Array, item: Planted) -> None:
    """Air in front of and beside a lung that has partly collapsed towards its hilum (the patient lies supine)."""
    hemithorax = pleura * canvas.side(SIGN[item.finding.side or ""])
    gap = (0.67 + 0.26 * item.extent) * (0.55 + 0.45 * np.clip(canvas.y / anatomy.b + 0.3, -0.6, 1))
    depth = (oval - 1 + gap[:, :, None]) * (anatomy.a / 2.3)
    canvas.hu += hemithorax * np.clip(-650 - canvas.hu, 0, 170)
    canvas.paint((EVERYWHERE, canvas.soft(depth + 4)), -350, hemithorax)
    canvas.paint((EVERYWHERE, canvas.soft(depth)), -1000, hemithorax)


def _effusion(canvas: Canvas, anatomy: Anatomy, pleura: Array, oval: Array, item: Planted) -> None:
    """Fluid layering behind the lung, deepest at the base, rising along the wall (meniscus)."""
    hemithorax = pleura * canvas.side(SIGN[item.finding.side or ""])
    depth = ((48 + 30 * item.extent) * np.clip(1.25 - (canvas.z - anatomy.dome + 70) / 240, 0, 1)).astype(np.float32)
    meniscus = 14 * np.clip(oval, 0, 1) ** 3
    fluid = canvas.soft(depth - anatomy.b - canvas.y[:, :, None] + meniscus)
    canvas.paint((EVERYWHERE, fluid), 10, hemithorax)


def _great_vessels(canvas: Canvas, anatomy: Anatomy) -> None:
    """Aorta, caval veins, pulmonary arteries, oesophagus, windpipe and main bronchi, each as tubes."""
    hilum, dome, top, blood = anatomy.hilum, anatomy.dome, anatomy.length, anatomy.hu["blood"]
    back, low = float(anatomy.spine(hilum)[1]) + 26, float(anatomy.spine(60)[1]) + 30
    for start, end, radius, value in (
        ((-24, back, hilum + 42), (-24, back, dome), 12.5, blood),
        ((-24, back, dome), (-9, low, 90), 11.5, blood),
        ((-9, low, 90), (-7, low, -20), 10, blood),
        ((20, low, -20), (22, low + 4, dome), 12, blood - 40),
        ((12, 28, hilum - 20), (12, 22, hilum + 38), 14, blood),
        ((12, 20, hilum + 42), (-24, back, hilum + 44), 12.5, blood),
        ((32, 16, hilum - 20), (30, 14, top), 9, blood - 10),
        ((-16, 34, hilum - 10), (-14, 10, hilum + 12), 13, blood + 10),
        ((-14, 6, hilum + 10), (42, -8, hilum + 6), 10, blood + 10),
        ((-14, 6, hilum + 10), (-46, -10, hilum + 8), 10, blood + 10),
        ((-6, back + 8, top), (-8, back + 12, dome), 7, 40),
        ((2, back + 22, top + 20), (2, back + 20, hilum + 22), 10, -995),
        ((2, back + 20, hilum + 22), (38, back + 20, hilum - 4), 7, -985),
        ((2, back + 20, hilum + 22), (-40, back + 18, hilum - 4), 7, -985),
    ):
        canvas.paint(canvas.tube(start, end, radius), value)


def _heart(canvas: Canvas, anatomy: Anatomy, plan: Plan) -> None:
    """The heart in its pericardium, which holds a rim of fat or of fluid; four chambers filled with contrast."""
    s, dome, blood = anatomy.heart, anatomy.dome, anatomy.hu["blood"]
    fluid = plan.get("pericardial effusion")
    rim, content = (13 + 7 * fluid.extent, 10.0) if fluid else (4.0, anatomy.hu["fat"])
    centre, turn = (-20.0, 24.0, dome + 46), -0.6
    for width, value in ((rim, content), (0.0, anatomy.hu["myocardium"])):
        canvas.paint(canvas.ellipsoid(centre, (57 * s + width, 42 * s + width, 46 * s + width), turn), value)
    for chamber, radii, angle in (
        ((-36, 16, dome + 42), (28 * s, 19 * s, 30 * s), turn),
        ((-8, 40, dome + 44), (32 * s, 16 * s, 28 * s), turn),
        ((14, 16, dome + 58), (20 * s, 20 * s, 26 * s), 0.0),
        ((-14, 0, dome + 64), (22 * s, 14 * s, 20 * s), turn),
    ):
        canvas.paint(canvas.ellipsoid(chamber, radii, angle), blood)
