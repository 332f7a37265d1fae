"""Below the diaphragm: bowel, stomach, spleen, liver, kidneys, and their findings."""

from __future__ import annotations

import numpy as np

from mu2llm.ct.phantom.anatomy import SIGN, Anatomy
from mu2llm.ct.phantom.canvas import Array, Canvas
from mu2llm.ct.phantom.plan import Plan


def draw_abdomen(canvas: Canvas, anatomy: Anatomy, below: Array, plan: Plan, rng: np.random.Generator) -> None:
    """`below` is the share of each voxel that is cavity below the diaphragm. Findings use no random number."""
    _bowel(canvas, anatomy, rng)
    _stomach_and_spleen(canvas, anatomy, below)
    _liver(canvas, anatomy, below, plan)
    _kidneys(canvas, anatomy, plan)


def _bowel(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    for _ in range(44):
        r, turn = 0.66 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        x, y = r * np.cos(turn) * anatomy.a, (0.3 + 0.6 * r * np.sin(turn)) * anatomy.b
        z = rng.uniform(-5, anatomy.dome - 75)
        size = rng.uniform(11, 18)
        loop = canvas.ellipsoid((x, y, z), (size * rng.uniform(1, 2), size, size), rng.uniform(0, np.pi))
        canvas.paint(loop, rng.uniform(30, 100))
        if rng.uniform() < 0.3:
            canvas.paint(canvas.ellipsoid((x, y + size / 3, z), (size * 0.6, size * 0.4, size * 0.6)), -850)


def _stomach_and_spleen(canvas: Canvas, anatomy: Anatomy, below: Array) -> None:
    a, b, dome, scale = anatomy.a, anatomy.b, anatomy.dome, anatomy.organ
    for inset, value in ((0, 65), (6, 25)):
        radii = (46 - inset, 32 - inset, 48 - inset)
        canvas.paint(canvas.ellipsoid((-0.42 * a, 0.26 * b, dome - 64), radii, -0.4, rough=3), value, below)
    canvas.paint(canvas.ellipsoid((-0.42 * a, 0.44 * b, dome - 62), (28, 11, 28), -0.4), -900, below)
    spleen = canvas.ellipsoid((-0.72 * a, -0.42 * b, dome - 60), (25 * scale, 46 * scale, 50 * scale), 0.5, rough=2)
    canvas.paint(spleen, anatomy.hu["spleen"], below)


def _liver(canvas: Canvas, anatomy: Anatomy, below: Array, plan: Plan) -> None:
    """A wedge under the diaphragm: deepest at the right, its left lobe thin and in front; veins, gall bladder."""
    a, b, dome, hu = anatomy.a, anatomy.b, anatomy.dome, anatomy.hu
    box = canvas.slab(dome - 165, dome + 10)
    x, y = canvas.x / a, canvas.y / b
    floor = dome - 148 * anatomy.organ + 58 * (0.95 - x) + 45 * np.clip(-y, 0, 1) * np.clip(1 - 1.2 * x, 0, 1.2)
    left_edge = (x - 0.12 + 0.62 * np.clip((y + 0.1) / 0.5, 0, 1)) * a
    spine = np.hypot(canvas.x, canvas.y - anatomy.spine(dome - 60)[1]) - 36
    share = canvas.over(floor.astype(np.float32))
    share *= (canvas.soft(left_edge) * canvas.soft(spine.astype(np.float32)))[:, :, None]
    canvas.paint((box, share[box]), hu["liver"], below)
    root = (0.2 * a, -0.1 * b, dome - 62)
    for across, forward, down in ((0.75, 0.2, 30), (0.6, -0.4, 40), (0.4, 0.4, 25), (0.7, 0.0, 90), (-0.1, 0.5, 45)):
        canvas.paint(canvas.tube(root, (across * a, forward * b, dome - down), 4), hu["liver"] + 50, below)
    canvas.paint(canvas.ellipsoid((0.3 * a, 0.48 * b, dome - 128), (12, 14, 20)), 12)
    if lesion := plan.get("liver lesion"):
        u, v, w = lesion.spot
        centre = ((0.56 + 0.07 * u) * a, (0.12 + 0.2 * v) * b, dome - 60 + 14 * w)
        canvas.paint(canvas.ellipsoid(centre, (lesion.radius,) * 3, rough=2), 5)


def _kidneys(canvas: Canvas, anatomy: Anatomy, plan: Plan) -> None:
    k, hu = anatomy.kidney, anatomy.hu
    cyst = plan.get("renal cyst")
    for side, sign in SIGN.items():
        z = anatomy.dome - (108 if side == "right" else 94)
        y = float(anatomy.spine(z)[1]) + 12
        for across, inset, value in ((62, 0, hu["fat"]), (62, 8, hu["kidney"])):
            radii = (35 * k - inset, 40 * k - inset, 64 * k - inset)
            canvas.paint(canvas.ellipsoid((sign * across, y, z), radii, sign * 0.5), value)
        canvas.paint(canvas.ellipsoid((sign * 48, y + 6, z), (13 * k, 10 * k, 24 * k), rough=2), -40)
        if cyst and cyst.finding.side == side:
            u, v, w = cyst.spot
            centre = (sign * (72 + 4 * u), y + 8 + 4 * v, z - 27 + 6 * w)  # at the lower pole
            canvas.paint(canvas.ellipsoid(centre, (cyst.radius,) * 3), 5)
