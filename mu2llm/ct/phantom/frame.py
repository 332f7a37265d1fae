"""What holds a phantom together: skin, fat, muscle, bones, and the couch it lies on."""

from __future__ import annotations

from typing import Any

import numpy as np

from mu2llm.ct.phantom.anatomy import SIGN, VERTEBRAE, Anatomy
from mu2llm.ct.phantom.canvas import EVERYWHERE, Array, Canvas
from mu2llm.ct.phantom.plan import Plan


def draw_couch(canvas: Canvas, anatomy: Anatomy) -> None:
    height = canvas.y + anatomy.depth + 0.75 * anatomy.fat + 14 - 0.0007 * canvas.x**2
    canvas.hu[(np.abs(height) < 7) & (np.abs(canvas.x) < 200)] = -760


def draw_trunk(canvas: Canvas, anatomy: Anatomy) -> tuple[Array, Array]:
    """Skin, fat, muscle and a cavity filled with fat; gives the cavity's share of each voxel, and its `oval`."""
    hu, taper = anatomy.hu, anatomy.taper(canvas.z)
    waist = 1 - 0.06 * np.exp(-(((canvas.z - 60) / 60) ** 2))
    width = anatomy.width * waist * (1 + 0.12 * (1 - taper))
    depth = anatomy.depth * (1 - 0.2 * (1 - taper))
    scale = anatomy.width / 2.3  # turns an oval into a depth in mm
    skin = (1 - canvas.oval(width + anatomy.fat, depth + 0.75 * anatomy.fat)) * scale
    _arms_and_breasts(canvas, anatomy, float(width.max()) + anatomy.fat + 42)
    canvas.paint((EVERYWHERE, canvas.soft(skin.copy())), 10)
    canvas.paint((EVERYWHERE, canvas.soft(skin - 3)), hu["fat"])
    canvas.paint((EVERYWHERE, canvas.soft((1 - canvas.oval(width, depth)) * scale)), hu["muscle"])
    for sign in SIGN.values():
        armpit = (sign * 0.84 * anatomy.width, -5, anatomy.length - 62)
        canvas.paint(canvas.ellipsoid(armpit, (13, 30, 55), sign * 0.3, rough=4), hu["fat"])
    oval = canvas.oval(anatomy.a * taper * waist, anatomy.b * taper)
    cavity = canvas.soft((1 - oval) * scale)
    canvas.paint((EVERYWHERE, cavity), hu["fat"] + 8)
    return cavity, oval


def _arms_and_breasts(canvas: Canvas, anatomy: Anatomy, beside: float) -> None:
    hu = anatomy.hu
    for sign in SIGN.values():
        if anatomy.breast:
            centre = (sign * 0.48 * anatomy.a, anatomy.depth + 0.7 * anatomy.fat - 14, anatomy.hilum - 25)
            for inset, value in ((0.0, 10.0), (3.0, hu["fat"]), (10.0, 0.0)):
                radii = (58 - inset, anatomy.breast + 12 - 0.6 * inset, 55 - inset)
                canvas.paint(canvas.ellipsoid(centre, radii, rough=inset / 3), value)
        if anatomy.arms:
            for radius, value in ((40.0, hu["fat"]), (34.0, hu["muscle"]), (12.0, 900.0), (6.0, 50.0)):
                arm = canvas.tube((sign * beside, -15, -40), (sign * (beside - 12), -5, anatomy.length + 40), radius)
                canvas.paint(arm, value)


def draw_muscles(canvas: Canvas, anatomy: Anatomy) -> None:
    """Psoas and the muscles along the spine, as far as they lie within the cavity."""
    low, high = (float(anatomy.spine(z)[1]) for z in (0.0, anatomy.dome))
    for sign in SIGN.values():
        psoas = canvas.tube((sign * 40, low, -20), (sign * 26, high + 2, anatomy.dome - 70), 15)
        canvas.paint(psoas, anatomy.hu["muscle"])
        back = canvas.tube((sign * 26, low - 30, -20), (sign * 26, high - 30, anatomy.dome), 17)
        canvas.paint(back, anatomy.hu["muscle"])


def draw_bones(canvas: Canvas, anatomy: Anatomy, oval: Array, plan: Plan) -> None:
    """Ribs in the wall around the cavity's `oval`, sternum, clavicles, shoulder blades and the spine."""
    rib, top = anatomy.hu["rib"], anatomy.length
    _ribs(canvas, anatomy, oval)
    _spine(canvas, anatomy, plan)
    canvas.paint(canvas.ellipsoid((0, anatomy.b + 1, anatomy.hilum + 5), (19, 7, 75)), rib - 120)
    for sign in SIGN.values():
        inner, outer = (sign * 22, 0.66 * anatomy.b, top - 24), (sign * 125, 0.35 * anatomy.b, top - 2)
        canvas.paint(canvas.tube(inner, outer, 6), rib + 60)
        blade = (sign * 0.72 * anatomy.width, -0.72 * anatomy.depth, top - 70)
        canvas.paint(canvas.ellipsoid(blade, (42, 5, 62), sign * 0.75), rib)


def _ribs(canvas: Canvas, anatomy: Anatomy, oval: Array) -> None:
    """Ribs leave the spine and fall forwards around the chest; in front they end in cartilage."""
    box = canvas.slab(anatomy.dome - 90, anatomy.length)
    ring = canvas.soft(5 - np.abs((oval[box] - 1) * (anatomy.width / 2.3) - 5))
    around = np.arctan2(np.abs(canvas.x) / anatomy.a, -canvas.y / anatomy.b)  # 0 at the back, π in front
    pitch = 0.06 * anatomy.length
    phase = (canvas.z[box[2]] + 26 * around[:, :, None]) / pitch
    phase -= np.floor(phase)
    bar = canvas.soft((0.2 - np.abs(phase - 0.5)) * pitch)
    ossified = canvas.soft(np.abs(canvas.x) - 20) * np.clip(1 - (canvas.y / anatomy.b - 0.6) * 1.6, 0.3, 1)
    canvas.paint((box, ring * bar * ossified[:, :, None]), anatomy.hu["rib"])


def _spine(canvas: Canvas, anatomy: Anatomy, plan: Plan) -> None:
    """Vertebral bodies with end plates and discs between, the canal, arches and processes."""
    box = canvas.box((0, 12 - anatomy.b, anatomy.length / 2), 62, anatomy.length)
    x0, y0 = anatomy.spine(canvas.z)
    x = canvas.x[box[:2]][:, :, None] - x0.astype(np.float32)
    y = canvas.y[box[:2]][:, :, None] - y0.astype(np.float32)
    bone, disc = _along_spine(canvas, anatomy, plan)
    broad = 16 + 7 * (1 - canvas.z / anatomy.length)

    def paint(centre: tuple[float, float], rx: Any, ry: Any, value: Any, share: Any = 1.0) -> None:
        square = ((x - centre[0]) / rx) ** 2 + ((y - centre[1]) / ry) ** 2
        canvas.paint((box, canvas.soft((1 - square) * np.minimum(rx, ry) / 2) * share), value)

    arch = 1 - 0.8 * disc
    paint((0, -24), 17, 13, bone + 150, arch)
    paint((0, -40), 5, 14, bone + 150, arch)
    for across in (-28, 28):
        paint((across, -22), 15, 5, bone + 100, arch)
    paint((0, -22), 9, 8, 35)
    paint((0, 0), broad, 0.8 * broad, (bone + 110) * (1 - disc) + 90 * disc)
    paint((0, 0), broad - 4, 0.8 * broad - 4, bone * (1 - disc) + 85 * disc)


def _along_spine(canvas: Canvas, anatomy: Anatomy, plan: Plan) -> tuple[Array, Array]:
    """For each slice, the density of the vertebra there and the share that is disc."""
    discs = anatomy.discs()
    level = np.clip(np.searchsorted(-discs, -canvas.z, side="right") - 1, 0, len(VERTEBRAE) - 1)
    height = discs[level] - discs[level + 1]
    within = (discs[level] - canvas.z) / height
    disc = np.clip((np.abs(within - 0.5) - 0.36) * height / canvas.spacing[2] + 0.5, 0, 1)
    bone = np.full(canvas.z.shape, anatomy.hu["bone"], np.float32)
    if sclerosis := plan.get("vertebral sclerosis"):
        bone[level == VERTEBRAE.index(sclerosis.finding.place or "")] = 700
    return bone, disc.astype(np.float32)
