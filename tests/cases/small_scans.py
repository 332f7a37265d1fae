"""Small scans that look like CT, manifests of them, and a spec that fits them."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from mu2llm.cases.shards import Index, Shards, write_derived, write_file, write_index
from mu2llm.config import Experiment
from mu2llm.records import Case, PreprocessSpec

SPEC = PreprocessSpec(name="test", windows=((-1000, 200),), fit="stretch", grid=(4, 8, 8), chunks=2)
WINDOWS_OF_TWO = SPEC.model_copy(update={"name": "other", "windows": ((-1000, 200), (-120, 220))})


def body(seed: int) -> np.ndarray:
    """Air, a body of soft tissue with two lungs and a spine: (24, 24, 12) int16 in HU."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 24, 12)), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[x**2 / 0.8 + y**2 / 0.5 < 1] = 40
    hu[(np.abs(x) - 0.4) ** 2 / 0.06 + y**2 / 0.16 < 1] = -820
    hu[x**2 + (y + 0.5) ** 2 < 0.02] = 600
    return (hu + np.random.default_rng(seed).normal(0, 15, hu.shape)).astype(np.int16)


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(body(seed), np.diag([3.0, 3.0, 5.0, 1.0])), path)


def row(number: int) -> dict:
    """A row of our own manifest; two cases a patient."""
    return {
        "id": f"case-{number:03d}",
        "patient": f"patient-{number // 2:03d}",
        "volume": f"volumes/case-{number:03d}.nii.gz",
        "report": f"Findings: nodule {number}.",
        "findings": [{"name": "lung nodule", "side": "left"}],
        "questions": [{"question": "What is there?", "answer": f"nodule {number}"}],
    }


def write(folder: Path, count: int) -> list[dict]:
    """Scans and manifest.jsonl."""
    rows = [row(number) for number in range(count)]
    for number, each in enumerate(rows):
        save(folder / each["volume"], number)
    write_manifest(folder / "manifest.jsonl", rows)
    return rows


def write_manifest(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def experiment(**data: object) -> Experiment:
    """An experiment whose data section is the test's."""
    vision = {"patch_size": (1, 4, 4)}
    return Experiment.model_validate({"data": {"spec": SPEC, **data}, "model": {"vision": vision}})


def case(number: int) -> Case:
    return Case.model_validate({**row(number), "split": "train"})


def finished(uri: str, items: list[Case]) -> Shards:
    """Shards that have cases but no rows: parents for derived tables."""
    return write_index(uri, Index.of(SPEC, {"train": []}), items)


def derived(uri: str, parent: Shards, batches: list[dict]) -> Shards:
    """A table derived from shards, of their split `train`: a file of each batch of rows."""
    files = [write_file(uri, f"train/{number:05d}.parquet", iter([batch])) for number, batch in enumerate(batches)]
    return write_derived(uri, {"train": files}, parent)
