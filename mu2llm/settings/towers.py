"""The field's open vision towers: what each takes and gives, the transform it was trained with, licence and source.

A tower whose transform does not travel with it reads scans it has never seen the like of, without a word: so the
`PreprocessSpec` follows from the tower (`TowerSpec.preprocess`), and goes into shards and checkpoints as any other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from mu2llm.errors import UserError
from mu2llm.records import PreprocessSpec
from mu2llm.settings.section import Section

TowerName = Literal["m3d", "colipri", "ct_fm", "merlin", "spectre", "own"]


class TowerSpec(Section):
    """A vision tower. Sizes are in the order of `axes`, the three that a chunk (C, K, H, W) has.

    The first `grid` is of one chunk; `tiles` are the chunks along each axis. `windows` are the HU that become 0…1 in a
    channel each, `scale` what the tower takes 0…1 as. A chunk gives chunk/stride places of `width` numbers.
    """

    name: str
    about: str
    licence: str = Field("", description="of the weights")
    source: str = Field("", description="where the weights are")
    paper: str = ""
    package: str | None = Field(None, description="the extra that brings its code; None: it is written here")
    axes: str = "SAR"
    spacing_mm: tuple[float, float, float] | None = None
    windows: tuple[tuple[float, float], ...] = ((-1000, 1000),)
    scale: tuple[float, float] = (0, 1)
    fit: Literal["torchio", "monai", "tiles"] = "monai"
    crop_foreground: bool = False
    grid: tuple[int, int, int]
    tiles: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int, int]
    width: int = Field(ge=1)
    sizes: dict[str, Any] = Field({}, description="what its constructor takes, as published")

    @property
    def output(self) -> tuple[int, int, int, int]:
        """What a chunk becomes: places along its axes, and numbers a place."""
        first, second, third = (size // step for size, step in zip(self.grid, self.stride, strict=True))
        return first, second, third, self.width

    def preprocess(self) -> dict[str, Any]:
        """The fields of the PreprocessSpec that the tower's scans are prepared by."""
        chunks = self.tiles[0] * self.tiles[1] * self.tiles[2]
        along = self.tiles[1:] == (1, 1)
        spec = PreprocessSpec(
            name=self.name,
            axes=self.axes,
            spacing_mm=self.spacing_mm,
            windows=self.windows,
            crop_foreground=self.crop_foreground,
            fit=self.fit,
            grid=tuple(size * by for size, by in zip(self.grid, self.tiles, strict=True)),  # type: ignore[arg-type]
            chunks=chunks,
            tiles=None if along else self.tiles,
            dtype="float16",
        )
        return spec.model_dump(mode="json")


FIXED = ("orientation", "axes", "windows", "percentiles", "fit", "crop_foreground")
"""Fields of a PreprocessSpec that a tower does not leave open; grid, chunks, spacing and dtype may be others."""

M3D_ALONE = (
    *("hidden_size", "num_layers", "num_heads", "mlp_dim", "patch_size"),
    *("stem", "class_token", "standardise_input", "true_grid"),
)
"""Settings of the vision encoder that other towers do not have: theirs are `sizes`."""

TOWERS: dict[str, TowerSpec] = {
    "m3d": TowerSpec(
        name="m3d",
        about="3-D ViT of M3D-CLIP, or from scratch; any PreprocessSpec",
        licence="Apache-2.0",
        source="hf GoodBaiBai88/M3D-CLIP: pretrained_ViT.bin, or the whole model",
        paper="arXiv 2404.00578",
        grid=(32, 256, 256),
        tiles=(8, 1, 1),
        stride=(4, 16, 16),
        width=768,
    ),
    "colipri": TowerSpec(
        name="colipri",
        about="Primus-M on chest CT and reports",
        licence="MIT",
        source="hf microsoft/colipri: model.safetensors",
        paper="arXiv 2510.15042",
        axes="RAS",
        spacing_mm=(2, 2, 2),
        scale=(-1, 1),
        fit="torchio",
        grid=(192, 192, 192),
        stride=(8, 8, 8),
        width=768,
        sizes={"width": 864, "depth": 16, "heads": 12, "patch": 8, "projection": 768},
    ),
    "ct_fm": TowerSpec(
        name="ct_fm",
        about="SegResEncoder, contrast of 148,000 CT scans",
        licence="Apache-2.0",
        source="hf project-lighter/ct_fm_feature_extractor: model.safetensors",
        paper="arXiv 2501.09001",
        axes="SPL",
        windows=((-1024, 2048),),
        crop_foreground=True,
        grid=(32, 384, 384),
        tiles=(8, 1, 1),
        stride=(16, 16, 16),
        width=512,
        sizes={"filters": 32, "blocks": [1, 2, 2, 4, 4]},
    ),
    "merlin": TowerSpec(
        name="merlin",
        about="I3D-ResNet152 on abdominal CT, reports and codes",
        licence="MIT",
        source="hf stanfordmimi/Merlin: i3_resnet_clinical_longformer_best_clip_04-02-2024_23-21-36_epoch_99.pt",
        paper="doi 10.1038/s41586-026-10181-8",
        package="merlin-vlm",
        axes="RAS",
        spacing_mm=(1.5, 1.5, 3),
        grid=(224, 224, 160),
        stride=(32, 32, 16),
        width=2048,
    ),
    "spectre": TowerSpec(
        name="spectre",
        about="ViT-L on crops and a ViT over the crops: each crop's token with the scan's",
        licence="CC BY-NC-SA",
        source="hf cclaess/SPECTRE: a folder of spectre_backbone_*.pt and spectre_combiner_*.pt",
        paper="arXiv 2511.17209",
        package="spectre-fm",
        axes="RAS",
        fit="tiles",
        grid=(128, 128, 64),
        tiles=(4, 4, 6),
        stride=(128, 128, 64),
        width=2160,
        sizes={"preset": "spectre-large"},
    ),
}

_SPECTRE_WIDTHS = {"spectre-small": 768, "spectre-base": 1536, "spectre-large": 2160}


def tower_spec(tower: str, own: str | None = None, sizes: Mapping[str, Any] | None = None) -> TowerSpec:
    """The tower of a name at the `sizes` given, or the class `own` names; a UserError says what is wrong."""
    spec = tower_class(own).spec if tower == "own" else TOWERS[tower]
    unknown = sorted(set(sizes or {}) - set(spec.sizes))
    if unknown:
        raise UserError(
            f"model.vision.sizes: {unknown[0]} is no size of tower {tower}; there are {', '.join(spec.sizes) or 'none'}"
        )
    if not sizes:
        return spec
    given = {**spec.sizes, **sizes}
    return spec.model_copy(update={"sizes": given, **_scaled(tower, given)})


def _scaled(tower: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Stride and width that follow from other sizes than the published ones."""
    if tower == "colipri":
        return {"stride": (sizes["patch"],) * 3, "width": sizes["projection"] or sizes["width"]}
    if tower == "ct_fm":
        halvings = 2 ** (len(sizes["blocks"]) - 1)
        return {"stride": (halvings,) * 3, "width": sizes["filters"] * halvings}
    if tower == "spectre":
        if sizes["preset"] not in _SPECTRE_WIDTHS:
            raise UserError(f"model.vision.sizes.preset {sizes['preset']}: there are {', '.join(_SPECTRE_WIDTHS)}")
        return {"width": _SPECTRE_WIDTHS[sizes["preset"]]}
    return {}


def tower_class(own: str | None) -> Any:
    """The class of a tower of one's own, `python:MODULE:CLASS`, with its TowerSpec as `spec`."""
    named = re.fullmatch(r"python:([\w.]+):(\w+)", own or "")
    if not named:
        raise UserError(f"model.vision.own is {own!r}: tower own needs python:MODULE:CLASS")
    try:
        found = getattr(importlib.import_module(named[1]), named[2])
    except (ImportError, AttributeError) as error:
        raise UserError(f"model.vision.own {own}: {error}; give python:MODULE:CLASS that can be imported") from error
    if not isinstance(getattr(found, "spec", None), TowerSpec):
        raise UserError(
            f"model.vision.own {own}: {named[2]} has no TowerSpec as `spec`, which says what it takes and gives"
        )
    return found
