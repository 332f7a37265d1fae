"""Procedural CT phantoms of chest and abdomen: a volume in HU, its findings and its report, all from one seed.

They look like CT and are read like CT, but phantoms are not patients: what a model reaches on them says that the
pipeline works, nothing about medicine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from mu2llm import storage
from mu2llm.ct.phantom_body import LOBES, VERTEBRAE, Anatomy, Canvas, Planted, draw, draw_anatomy
from mu2llm.ct.phantom_report import write_report
from mu2llm.errors import Failure, UserError
from mu2llm.records import Finding, Question, Side

FINDINGS: dict[str, bool] = {
    "pleural effusion": True,
    "pneumothorax": True,
    "consolidation": True,
    "lung nodule": True,
    "pericardial effusion": False,
    "liver lesion": False,
    "renal cyst": True,
    "vertebral sclerosis": False,
}
"""The findings' names, and whether each has a side."""

SIZES_MM: dict[str, tuple[int, ...]] = {
    "lung nodule": (20, 25, 30, 35),
    "liver lesion": (30, 35, 40, 45),
    "renal cyst": (30, 35, 40),
}
ORIENTATIONS = ("RAS", "LPS", "LAS", "LPI", "RPS", "PSR")  # the axes of the file on disk
BLOCK = 20  # cases over which the share of each finding is exact; the last two are one patient's
PARALLEL_FROM = 48  # cases from which starting processes pays


@dataclass(frozen=True, eq=False)
class Phantom:
    """One phantom examination; `hu` is (x, y, z) int16 in RAS+ axes, `affine` in mm."""

    id: str
    patient: str
    hu: NDArray[np.int16]
    affine: NDArray[np.float64]
    findings: tuple[Finding, ...]
    report: str
    questions: tuple[Question, ...]
    orientation: str

    def nifti(self) -> bytes:
        """The .nii.gz, stored in `orientation`; the same phantom gives the same bytes."""
        change = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(tuple(self.orientation))
        )
        stored = nib.orientations.apply_orientation(self.hu, change)
        affine = self.affine @ nib.orientations.inv_ornt_aff(change, self.hu.shape)
        image = nib.Nifti1Image(stored, affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        return igzip.compress(image.to_bytes(), 2, mtime=0)

    def row(self) -> dict[str, Any]:
        """The phantom's line of the manifest; its volume is named relative to the manifest's folder."""
        return {
            "id": self.id,
            "patient": self.patient,
            "volume": f"volumes/{self.id}.nii.gz",
            "report": self.report,
            "findings": [finding.model_dump(exclude_none=True) for finding in self.findings],
            "questions": [question.model_dump() for question in self.questions],
        }


def make(seed: int, index: int, prevalence: float = 0.2) -> Phantom:
    """Phantom number `index` of a seed, whichever others are made.

    Each finding is in the share `prevalence` of every 20 consecutive cases, as likely left as right.
    """
    if seed < 0 or index < 0 or not 0 <= prevalence <= 1:
        raise UserError(
            f"phantom: expected seed ≥ 0, index ≥ 0, prevalence in 0…1; given {seed}, {index}, {prevalence}"
        )
    first = index - 1 if index % BLOCK == BLOCK - 1 else index  # of the patient's examinations
    anatomy = draw_anatomy(_rng(seed, first, 0))
    planted = plant(seed, index, prevalence)
    hu, affine = image(anatomy, planted, seed, index)
    rng = _rng(seed, index, 2)
    report, questions = write_report({p.finding.name: (p.finding, p.extent) for p in planted}, rng)
    return Phantom(
        id=f"phantom-{seed}-{index:05d}",
        patient=f"patient-{seed}-{first:05d}",
        hu=hu,
        affine=affine,
        findings=tuple(item.finding for item in planted),
        report=report,
        questions=questions,
        orientation=ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))],
    )


def image(
    anatomy: Anatomy, planted: tuple[Planted, ...], seed: int, index: int
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """The volume (x, y, z) in HU and its affine; apart from the findings it depends on seed and index alone."""
    rng = _rng(seed, index, 1)
    outline = anatomy.width * 1.06 + anatomy.fat + (85 if anatomy.arms else 0)
    field = 2 * outline + rng.uniform(20, 45)
    inplane = float(np.round(max(rng.uniform(3.8, 5.0), field / 100), 2))
    slice_mm = float(np.round(rng.uniform(7, 9), 1))
    size = round(field / inplane)
    shape = (size, size, round(anatomy.length / slice_mm))
    canvas = Canvas(shape, (inplane, inplane, slice_mm), tuple(rng.uniform(-6, 6, 2)), float(rng.uniform(-0.1, 0.1)))
    _table(canvas, anatomy)
    draw(canvas, anatomy, planted, rng)
    _noise(canvas, rng)
    affine = np.diag([inplane, inplane, slice_mm, 1.0])
    affine[:3, 3] = np.round([-(size - 1) / 2 * inplane, -(size - 1) / 2 * inplane, rng.uniform(-900, 200)], 2)
    return np.rint(canvas.hu).astype(np.int16), affine


def plant(seed: int, index: int, prevalence: float) -> tuple[Planted, ...]:
    """Which findings phantom `index` has, and where; lungs' findings keep out of each other's lobes."""
    sides = {name: side for name in FINDINGS if (side := _present(seed, index, prevalence, name)) is not None}
    rng = _rng(seed, index, 3)
    planted: dict[str, Planted] = {}
    for name in FINDINGS:
        extent, *spot = rng.uniform(0, 1), *rng.uniform(-1, 1, 3)
        choice = rng.uniform()
        if name in sides:
            finding = _finding(name, sides[name], planted, choice)
            planted[name] = Planted(finding, float(extent), (float(spot[0]), float(spot[1]), float(spot[2])))
    return tuple(planted.values())


def _present(seed: int, index: int, prevalence: float, name: str) -> Side | None:
    """The side of a finding (either, where it has none) if phantom `index` has it: drawn block by block."""
    block, position = divmod(index, BLOCK)
    rng = _rng(seed, block, 10 + list(FINDINGS).index(name))
    count = int(BLOCK * prevalence + rng.uniform())
    turn = int(rng.integers(2))
    rank = int(rng.permutation(BLOCK)[position])
    if rank >= count:
        return None
    return "left" if (rank + turn) % 2 else "right"


def _finding(name: str, side: Side, planted: dict[str, Planted], choice: float) -> Finding:
    size = _choose(SIZES_MM[name], choice) if name in SIZES_MM else None
    if name == "vertebral sclerosis":
        return Finding(name=name, place=_choose(VERTEBRAE[5:14], choice))
    if name in ("consolidation", "lung nodule"):
        free = _free_lobes(side, planted)
        if not free:
            side = "right" if side == "left" else "left"
            free = _free_lobes(side, planted)
        return Finding(name=name, side=side, place=_choose(free, choice), size_mm=size)
    return Finding(name=name, side=side if FINDINGS[name] else None, size_mm=size)


def _free_lobes(side: Side, planted: dict[str, Planted]) -> tuple[str, ...]:
    taken = {item.finding.place for item in planted.values() if item.finding.side == side}
    if (effusion := planted.get("pleural effusion")) and effusion.finding.side == side:
        taken.add("lower lobe")
    return tuple(lobe for lobe in LOBES[side] if lobe not in taken)


def _choose(choices: tuple[Any, ...], choice: float) -> Any:
    return choices[int(choice * len(choices))]


def _table(canvas: Canvas, anatomy: Anatomy) -> None:
    """The couch below the patient: a curved shell of low density."""
    y = canvas.y + anatomy.depth + 0.75 * anatomy.fat + 14 - 0.0007 * canvas.x**2
    inside = (np.abs(y) < 7) & (np.abs(canvas.x) < 200)
    canvas.hu[inside] = -760


def _noise(canvas: Canvas, rng: np.random.Generator) -> None:
    """Noise of the scanner, correlated in the slice; less in air."""
    noise = rng.standard_normal(canvas.hu.shape, dtype=np.float32)
    noise[1:] += 0.6 * noise[:-1]
    noise *= np.float32(rng.uniform(4, 8))
    noise *= np.clip(canvas.hu / 400 + 2.4, 0.12, 1)
    canvas.hu += noise
    np.clip(canvas.hu, -1024, 3071, out=canvas.hu)


def _rng(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, stream])


def write(
    out: str, cases: int, seed: int, prevalence: float = 0.2, progress: Callable[[int, int], None] | None = None
) -> str:
    """Writes `<out>/volumes/<id>.nii.gz` and, last, `<out>/manifest.jsonl`; gives the manifest's URI.

    `progress` is called with (done, all). Many cases are made in parallel processes, started anew (spawn), so a
    script that calls this needs the usual `if __name__ == "__main__"`.
    """
    if cases < 1:
        raise UserError(f"phantoms: expected at least one case, given {cases}")
    lines: list[str] = []
    try:
        for written in _written(out, cases, seed, prevalence):
            lines += written
            if progress:
                progress(len(lines), cases)
        manifest = storage.join(out, "manifest.jsonl")
        storage.write_bytes(manifest, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise Failure(f"{out}: phantoms could not be written: {error}") from error
    return manifest


def _written(out: str, cases: int, seed: int, prevalence: float) -> Iterator[list[str]]:
    """The manifest's lines, a batch at a time, in order, each once its volumes are in storage."""
    batches = [range(start, min(start + 8, cases)) for start in range(0, cases, 8)]
    write_batch = partial(_write_batch, out, seed, prevalence)
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    if cases < PARALLEL_FROM or workers == 1:
        yield from map(write_batch, batches)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write_batch, batches)


def _write_batch(out: str, seed: int, prevalence: float, indexes: range) -> list[str]:
    lines = []
    for index in indexes:
        phantom = make(seed, index, prevalence)
        row = phantom.row()
        storage.write_bytes(storage.join(out, row["volume"]), phantom.nifti())
        lines.append(json.dumps(row))
    return lines
