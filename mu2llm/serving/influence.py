"""What each sentence of a report depended on in its scan, as it is sent: a small volume in the scan's world."""

from __future__ import annotations

import base64
import re
import threading
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from mu2llm.engine.occlusion import Answer, Influence, Occlusion, Reader
from mu2llm.green import sentences
from mu2llm.serving.exchange import InfluenceRequest
from mu2llm.serving.loaded import LoadedModel


@dataclass(frozen=True)
class Span:
    """A sentence: characters `start` to `end` of the report."""

    text: str
    start: int
    end: int


def spans(report: str) -> list[Span]:
    """The sentences of a report where they stand in it; headings are in none."""
    found, place = [], 0
    for sentence in sentences(report):
        words = r"\s+".join(re.escape(word) for word in sentence.split())
        match = re.compile(words).search(report, place)
        if match:
            found.append(Span(match[0], match.start(), match.end()))
            place = match.end()
    return found


def influence(loaded: LoadedModel, request: InfluenceRequest, gone: threading.Event) -> list[dict[str, Any]]:
    """Of each sentence its text, start and end, drop and random (nats), and nifti in base64, None where random regions
    cost as much; no further once somebody is `gone`."""
    scan, said = request.scan, spans(request.report)
    if not said:
        return []
    reader = Reader(loaded.model, loaded.processor, loaded.precision, loaded.batch_size)
    answer = Answer(request.question, request.report, [(span.start, span.end) for span in said])
    occlusion = Occlusion(reader, scan.voxels, scan.chunk_mask, answer, going=lambda: not gone.is_set())
    found = occlusion.influences()
    return [
        {
            **vars(span),
            "drop": round(each.drop, 4),
            "random": round(each.random, 4),
            "nifti": _encoded(occlusion, each, scan.affine) if each.holds else None,
        }
        for span, each in zip(said, found, strict=True)
    ]


def _encoded(occlusion: Occlusion, found: Influence, affine: np.ndarray) -> str:
    shown = occlusion.within_outline(np.where(found.shown, found.weights, 0))
    return base64.b64encode(overlay(shown, affine, occlusion.spec.grid)).decode()


def overlay(weights: np.ndarray, affine: np.ndarray, grid: tuple[int, ...]) -> bytes:
    """Weights (z, y, x) of equal parts of a grid → an uncompressed NIfTI-1 in the scan's world, uint8, 255 the highest,
    0 what is not above 0.

    `affine` is the ModelInput's: the grid's (column, row, slice) to mm in RAS+.
    """
    volume = np.maximum(weights, 0).transpose(2, 1, 0)
    highest = float(volume.max())
    scaled = np.rint(255 * volume / highest if highest > 0 else volume).astype(np.uint8)
    cell = [size // count for size, count in zip(grid, weights.shape, strict=True)]
    image = nib.Nifti1Image(scaled, affine @ cell_to_grid(cell))
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


def cell_to_grid(cell: list[int]) -> np.ndarray:
    """A cell's index (x, y, z) → where its centre lies in the grid (column, row, slice); sizes are (z, y, x)."""
    size = np.array(cell[::-1], dtype=np.float64)
    there = np.diag([*size, 1.0])
    there[:3, 3] = (size - 1) / 2
    return there
