"""`mu2llm towers`: what towers there are, and whether published weights are what a tower takes them for."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from mu2llm import config, ct, weights
from mu2llm.ct import phantom
from mu2llm.model import published
from mu2llm.model.building import vision_configuration
from mu2llm.model.towers import loading
from mu2llm.model.vision import VisionEncoder
from mu2llm.settings.towers import TOWERS, TowerSpec

_MODULES = {"merlin-vlm": "merlin", "spectre-fm": "spectre"}


class TowerCheck(BaseModel):
    """Weights against a tower: names without weights and weights without a place, those of the file's other parts
    (`left`), and of one phantom's features (chunks, places along the chunk's axes, width) their shape and numbers."""

    tower: str
    licence: str
    missing: list[str]
    unused: list[str]
    left: int
    spec: str
    shape: list[int]
    mean: float
    std: float
    finite: bool
    effective_rank: float
    seconds: float


def listed() -> list[dict[str, Any]]:
    """Each tower: licence, input, output, where its weights are and whether this machine has them, what it needs."""
    return [_row(spec) for spec in TOWERS.values()]


def _row(spec: TowerSpec) -> dict[str, Any]:
    grid, tiles = ("×".join(map(str, sizes)) for sizes in (spec.grid, spec.tiles))
    windows = ", ".join(f"{low:g}…{high:g} HU → {spec.scale[0]:g}…{spec.scale[1]:g}" for low, high in spec.windows)
    spacing = "×".join(f"{side:g}" for side in spec.spacing_mm) + " mm" if spec.spacing_mm else "as scanned"
    repository = spec.source.removeprefix("hf ").split(":")[0]
    there = spec.package is None or importlib.util.find_spec(_MODULES[spec.package]) is not None
    return {
        "name": spec.name,
        "about": spec.about,
        "licence": spec.licence,
        "input": "by data.spec"
        if spec.name == "m3d"
        else f"{spec.axes}, {spacing}, {grid} in {tiles} tiles, {windows}",
        "output": {"grid": list(spec.output[:3]), "width": spec.width},
        "weights": {"source": spec.source, "here": weights.at_hand(repository)},
        "package": spec.package,
        "installed": there,
        "paper": spec.paper,
    }


def check(tower: str, uri: str, preset: str = "paper", overrides: list[str] | None = None) -> TowerCheck:
    """Loads weights into a tower, encodes one phantom prepared by its spec, and says what came of it.

    `overrides` are `--set`'s. Raises UserError where the weights cannot be had or are of no such tower.
    """
    started = time.monotonic()
    named = [f"model.vision.tower={tower}", "model.vision.pooling=1", *(overrides or [])]
    experiment = config.load(preset, named)
    with weights.place(uri) as path:
        found = loading.Found() if tower == "m3d" else loading.find(tower, path)
        read = published.read_tensors(path) if tower == "m3d" else {}
    sizes = loading.sizes_of(tower, found.tensors, experiment.model.vision.sizes)
    if sizes:
        experiment = config.load(preset, [*named, f"model.vision.sizes={sizes}"])
    vision, spec = experiment.model.vision, experiment.data.spec
    encoder = VisionEncoder(vision_configuration(experiment.model, spec)).eval()
    tensors = published.vision_weights(read, encoder) if tower == "m3d" else found.tensors
    report = published.differences(encoder, tensors)
    own = encoder.state_dict()
    encoder.load_state_dict({n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}, strict=False)
    features = _features(encoder, spec)
    places = features.flatten(0, 1)
    return TowerCheck(
        tower=tower,
        licence=vision.spec.licence,
        **report,
        left=len(found.left),
        spec=spec.hash,
        shape=[len(features), *encoder.config.grid, features.shape[-1]],
        mean=float(places.mean()),
        std=float(places.std()),
        finite=bool(places.isfinite().all()),
        effective_rank=effective_rank(places),
        seconds=round(time.monotonic() - started, 2),
    )


@torch.no_grad()
def _features(encoder: VisionEncoder, spec: ct.PreprocessSpec) -> Tensor:
    """(chunks that hold something, places, width) of one phantom."""
    prepared = ct.prepare(ct.read(phantom.make(0, 0).nifti()), spec)
    mask = torch.from_numpy(prepared.chunk_mask)
    features: Tensor = encoder(torch.from_numpy(prepared.voxels)[None], mask[None])[0]
    return features[mask].float()


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), of centred features (n, E)."""
    spread = torch.linalg.svdvals((features - features.mean(0)).double())
    share = spread / spread.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp())
