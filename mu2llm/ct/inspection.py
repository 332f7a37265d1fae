"""What `mu2llm inspect` says of one scan, and its three-plane picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from mu2llm import storage
from mu2llm.ct.reading import read
from mu2llm.ct.volume import CTVolume
from mu2llm.errors import Rejection

_WINDOW = (-1000, 400)  # HU, lung to contrast
_LEFT_EDGE = {"axial": "R", "coronal": "R", "sagittal": "A"}  # the body's side at the picture's left


def inspect(source: str | Path, picture: str | None = None, **options: Any) -> dict[str, Any]:
    """One item of `mu2llm inspect --json`; `options` are those of `read`. A scan that is rejected is an item too.

    `shape` and `spacing` (mm) are along x, y, z of the volume in RAS+ axes, `orientation` is that of the file.
    `picture` is where a three-plane PNG goes; `png` then says where it is.
    """
    item: dict[str, Any] = {"path": str(source), "status": "ok", "reason": None, "message": None, "warnings": []}
    drawn = {} if picture is None else {"png": picture}
    try:
        volume = read(source, **options)
    except Rejection as rejection:
        nothing = dict.fromkeys(("shape", "spacing", "orientation", "hu_range", "sha256", "others", *drawn))
        return item | nothing | {"status": "rejected", "reason": rejection.reason, "message": rejection.args[2]}
    if picture is not None:
        three_planes(volume, picture)
    return item | describe(volume) | drawn


def describe(volume: CTVolume) -> dict[str, Any]:
    """The facts of a volume that `inspect` prints."""
    return {
        "warnings": list(volume.warnings),
        "shape": list(volume.hu.shape),
        "spacing": [round(size, 4) for size in volume.spacing_mm],
        "orientation": volume.stored_axes,
        "hu_range": list(volume.hu_range),
        "sha256": volume.sha256,
        "others": dict(volume.others),
    }


def three_planes(volume: CTVolume, path: str | Path) -> None:
    """Writes a PNG of the middle axial, coronal and sagittal plane, in radiological view (patient's right at left)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    hu, spacing = volume.hu, volume.spacing_mm
    x, y, z = (size // 2 for size in hu.shape)
    planes = {
        "axial": (hu[::-1, ::-1, z].T, spacing[1] / spacing[0]),
        "coronal": (hu[::-1, y, ::-1].T, spacing[2] / spacing[0]),
        "sagittal": (hu[x, ::-1, ::-1].T, spacing[2] / spacing[1]),
    }
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, (name, (plane, aspect)) in zip(figure.subplots(1, 3), planes.items(), strict=True):
        axes.imshow(np.asarray(plane), cmap="gray", vmin=_WINDOW[0], vmax=_WINDOW[1], aspect=aspect)
        axes.set_title(f"{_LEFT_EDGE[name]} – {name}", loc="left")
        axes.set_axis_off()
    shape = "×".join(map(str, hu.shape))
    figure.suptitle(f"{Path(volume.uri).name}  {shape}  {', '.join(volume.warnings)}", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    storage.write_bytes(str(path), png.getvalue())
