"""One 512×512×300 scan (int16, .nii.gz) to the grid of spec `corrected`: time and peak memory, each way in a
process of its own.

baseline: nibabel's float64 `get_fdata`, MONAI's anti-aliased resize to 256×256×256, windows, uint8.
ours:     `mu2llm.ct.read` and `prepare`.

    python tests/benchmarks/bench_preprocess.py
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE = (512, 512, 300)
SPACING_MM = (0.75, 0.75, 1.2)


def make_scan(path: Path) -> None:
    """A body of soft tissue with lungs and spine, with the noise of a real scan."""
    import nibabel as nib

    rng = np.random.default_rng(0)
    x, y = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    hu = np.empty(SHAPE, np.int16)
    for z in range(SHAPE[2]):
        plane = np.full(SHAPE[:2], -1000.0)
        plane[(x / 0.9) ** 2 + (y / 0.65) ** 2 < 1] = 40
        for side in (-0.42, 0.42):
            plane[((x - side) / 0.3) ** 2 + (y / 0.42) ** 2 < 1] = -820
        plane[(x / 0.09) ** 2 + ((y + 0.45) / 0.12) ** 2 < 1] = 400
        hu[..., z] = np.maximum(plane + rng.normal(0, 15, plane.shape), -1024)
    nib.save(nib.Nifti1Image(hu, np.diag([*SPACING_MM, 1.0])), path)


def ours(path: str) -> np.ndarray:
    from mu2llm.ct import SPECS, prepare, read

    return prepare(read(path), SPECS["corrected"]).voxels


def baseline(path: str) -> np.ndarray:
    import nibabel as nib
    import torch
    from monai.transforms import Resize

    from mu2llm.ct import SPECS

    spec = SPECS["corrected"]
    hu = torch.from_numpy(nib.load(path).get_fdata().transpose(2, 1, 0)[None])
    grid = Resize(spec.grid, mode="trilinear", align_corners=True, anti_aliasing=True)(hu).numpy()[0]
    chunks = grid.reshape(spec.chunks, 1, -1, *spec.grid[1:])
    windows = [np.clip((chunks - low) / (high - low), 0, 1) * 255 for low, high in spec.windows or ()]
    return np.rint(np.concatenate(windows, axis=1)).astype(spec.dtype)


def measure(way: str, path: str) -> None:
    """Runs one way once, after its imports, and prints seconds, peak memory and the result's shape as JSON."""
    function = {"ours": ours, "baseline": baseline}[way]
    importlib.import_module({"ours": "mu2llm.ct", "baseline": "monai.transforms"}[way])
    start = time.perf_counter()
    voxels = function(path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "shape": voxels.shape, "mean": float(voxels.mean())}))


def main(repeats: int = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        make_scan(path)
        print(f"{'×'.join(map(str, SHAPE))} int16, {path.stat().st_size / 1e6:.0f} MB .nii.gz, best of {repeats}")
        best = {}
        for way in ("baseline", "ours"):
            command = [sys.executable, __file__, way, str(path)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(repeats)]
            best[way] = min(runs, key=lambda run: run["seconds"])
            print(f"{way:10} {best[way]['seconds']:7.2f} s {best[way]['peak'] / 2**30:7.2f} GiB  {best[way]['shape']}")
        faster = best["baseline"]["seconds"] / best["ours"]["seconds"]
        smaller = best["baseline"]["peak"] / best["ours"]["peak"]
        print(f"ours is {faster:.1f}× faster (wanted ≥ 8) and takes 1/{smaller:.1f} of the memory (wanted ≤ 1/6)")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) == 3 else main()
