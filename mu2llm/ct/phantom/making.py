"""One phantom examination from a seed and an index: volume, findings, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from mu2llm.ct.phantom.abdomen import draw_abdomen
from mu2llm.ct.phantom.anatomy import Anatomy
from mu2llm.ct.phantom.canvas import Canvas
from mu2llm.ct.phantom.chest import draw_chest
from mu2llm.ct.phantom.frame import draw_bones, draw_couch, draw_muscles, draw_trunk
from mu2llm.ct.phantom.plan import BLOCK, NODULES, Plan, draw_plan
from mu2llm.ct.phantom.report import write_report
from mu2llm.errors import UserError
from mu2llm.records import Finding, Question

ORIENTATIONS = ("RAS", "LPS", "LAS", "LPI", "RPS", "PSR")  # of the axes of the file on disk


@dataclass(frozen=True, eq=False)
class Phantom:
    """`hu` is (x, y, z) int16 in RAS+ axes; `affine` maps its indexes to mm; the file is stored in `orientation`."""

    id: str
    patient: str
    hu: NDArray[np.int16]
    affine: NDArray[np.float64]
    findings: tuple[Finding, ...]
    report: str
    questions: tuple[Question, ...]
    orientation: str

    def nifti(self) -> bytes:
        """The .nii.gz; the same phantom gives the same bytes."""
        axes = nib.orientations.axcodes2ornt
        change = nib.orientations.ornt_transform(axes("RAS"), axes(self.orientation))
        affine = self.affine @ nib.orientations.inv_ornt_aff(change, self.hu.shape)
        image = nib.Nifti1Image(nib.orientations.apply_orientation(self.hu, change), affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        return igzip.compress(image.to_bytes(), 2, mtime=0)

    def row(self) -> dict[str, Any]:
        """Its line of the manifest; the volume is named relative to the manifest's folder."""
        return {
            "id": self.id,
            "patient": self.patient,
            "volume": f"volumes/{self.id}.nii.gz",
            "report": self.report,
            "findings": [finding.model_dump(exclude_none=True) for finding in self.findings],
            "questions": [question.model_dump() for question in self.questions],
        }


def make(seed: int, index: int, prevalence: float = 0.2, nodules: str = "balls") -> Phantom:
    """Phantom number `index` of a seed, the same whichever others are made.

    Each finding is in the share `prevalence` of every 20 consecutive cases. The last two of the 20 are examinations
    of one patient. `nodules` are "balls" that a coarse grid shows, or of the sizes and shapes of LIDC's ("lidc").
    A UserError names a negative seed or index, a prevalence outside 0…1, or the package that LIDC's need.
    """
    if seed < 0 or index < 0 or not 0 <= prevalence <= 1:
        raise UserError(
            f"phantom: expected seed ≥ 0, index ≥ 0, prevalence in 0…1; given {seed}, {index}, {prevalence}"
        )
    if nodules not in NODULES:
        raise UserError(f"phantom: nodules {nodules!r} are not known; there are {', '.join(NODULES)}")
    first = index - 1 if index % BLOCK == BLOCK - 1 else index  # of the patient's examinations
    anatomy = Anatomy.draw(np.random.default_rng([seed, first, 0]))
    plan = draw_plan(seed, index, prevalence, nodules)
    hu, affine = draw(anatomy, plan, np.random.default_rng([seed, index, 1]))
    rng = np.random.default_rng([seed, index, 2])
    report, questions = write_report(plan, rng)
    return Phantom(
        id=f"phantom-{seed}-{index:05d}",
        patient=f"patient-{seed}-{first:05d}",
        hu=hu,
        affine=affine,
        findings=tuple(item.finding for item in plan.values()),
        report=report,
        questions=questions,
        orientation=ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))],
    )


def draw(anatomy: Anatomy, plan: Plan, rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The volume (x, y, z) in HU and its affine; but for the findings it depends on the patient and `rng` alone."""
    canvas = _grid(anatomy, rng)
    draw_couch(canvas, anatomy)
    cavity, oval = draw_trunk(canvas, anatomy)
    draw_muscles(canvas, anatomy)
    above = _above_diaphragm(canvas, anatomy)
    draw_abdomen(canvas, anatomy, cavity * (1 - above), plan, rng)
    draw_chest(canvas, anatomy, cavity * above, oval, plan, rng)
    draw_bones(canvas, anatomy, oval, plan)
    _add_noise(canvas, rng)
    affine = np.diag([*canvas.spacing, 1.0])
    half = (canvas.hu.shape[0] - 1) / 2 * canvas.spacing[0]
    affine[:3, 3] = np.round([-half, -half, rng.uniform(-900, 200)], 2)
    return np.rint(canvas.hu).astype(np.int16), affine


def _grid(anatomy: Anatomy, rng: np.random.Generator) -> Canvas:
    """A square matrix of 3.8 to about 5 mm that the patient fits in, slices of 7 to 9 mm."""
    field = 2 * (anatomy.width * 1.06 + anatomy.fat + (85 if anatomy.arms else 0)) + rng.uniform(20, 45)
    inplane = float(np.round(max(rng.uniform(3.8, 5.0), field / 100), 2))
    thickness = float(np.round(rng.uniform(7, 9), 1))
    shape = (round(field / inplane), round(field / inplane), round(anatomy.length / thickness))
    centre = (float(rng.uniform(-6, 6)), float(rng.uniform(-6, 6)))
    return Canvas(shape, (inplane, inplane, thickness), centre, roll=float(rng.uniform(-0.1, 0.1)))


def _above_diaphragm(canvas: Canvas, anatomy: Anatomy) -> NDArray[np.float32]:
    """Share of each voxel above the diaphragm's two domes, of which the right is the higher."""
    dome = np.where(canvas.x > 0, anatomy.dome, anatomy.dome - 12)
    fall = ((np.abs(canvas.x) - 0.5 * anatomy.a) / (0.6 * anatomy.a)) ** 2 + ((canvas.y - 8) / anatomy.b) ** 2
    return canvas.over((dome - 75 * np.minimum(fall, 1)).astype(np.float32))


def _add_noise(canvas: Canvas, rng: np.random.Generator) -> None:
    """The scanner's noise, correlated within the slice, less in air."""
    noise = rng.standard_normal(canvas.hu.shape, dtype=np.float32)
    noise[1:] += 0.6 * noise[:-1]
    noise *= np.float32(rng.uniform(4, 8))
    noise *= np.clip(canvas.hu / 400 + 2.4, 0.12, 1)
    canvas.hu += noise
    np.clip(canvas.hu, -1024, 3071, out=canvas.hu)
