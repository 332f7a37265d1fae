"""Published weights of a tower → those of its module: tensors only, every name of the tower's part accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mu2llm.errors import UserError
from mu2llm.model import published

_LAYOUTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "colipri": (
        ("image_encoder.", "image_encoder.", ""),
        ("backbone.", "", ""),
        ("eva.", "", "backbone."),  # Primus by itself
    ),
    "ct_fm": (("encoder.conv_init.", "encoder.", "encoder."), ("conv_init.", "", "encoder.")),
    "merlin": (
        ("encode_image.i3_resnet.", "encode_image.", ""),
        ("i3_resnet.", "", ""),
        ("conv1.", "", "i3_resnet."),
    ),
    "spectre": (("backbone.", "", "model."),),
    "own": (("", "", "tower."),),
}
"""How a published file tells its layout, the first that fits: a beginning that some name has, what all names of the
tower begin with there, and what stands in its place here."""
_WITHOUT_EFFECT = {"colipri": re.compile(r"^backbone\.(mask_token$|up_projection\.)")}
"""What the published encoder carries along and does not read."""


@dataclass
class Found:
    """A tower's tensors by our names; `left` are those of the file's other parts, such as a text encoder."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def find(tower: str, path: Path) -> Found:
    """The tower's tensors in a file or folder; a UserError where there are none of it."""
    tensors = _read_spectre(path) if tower == "spectre" else published.read_tensors(path)
    for mark, theirs, ours in _LAYOUTS[tower]:
        if any(name.startswith(mark) for name in tensors):
            return _found(tower, tensors, theirs, ours)
    expected = " or ".join(mark for mark, *_ in _LAYOUTS[tower])
    first = next(iter(tensors), "nothing")
    raise UserError(f"{path} holds no weights of tower {tower}: expected names from {expected}, found {first}")


def _found(tower: str, tensors: Mapping[str, Tensor], theirs: str, ours: str) -> Found:
    found, drop = Found(), _WITHOUT_EFFECT.get(tower)
    for name, tensor in tensors.items():
        renamed = ours + name.removeprefix(theirs)
        if not name.startswith(theirs):
            found.left.append(name)
        elif not (drop and drop.search(renamed)):
            found.tensors[f"tower.{renamed}"] = tensor
    return found


def _read_spectre(path: Path) -> dict[str, Tensor]:
    """Both parts, of one file or of one each, of which the combiner's has `combiner` in its name."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.suffix in published.SUFFIXES)
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = "feature_combiner." if "combiner" in file.name else "backbone."
        for name, tensor in published.read_tensors(file).items():
            whole = name.startswith(("backbone.", "feature_combiner."))
            tensors[name if whole else part + name] = tensor
    return tensors


def sizes_of(tower: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The published sizes, and where a COLIPRI's tensors say otherwise, theirs: its heads alone they do not say."""
    patches = tensors.get("tower.backbone.down_projection.proj.weight")
    if tower != "colipri" or patches is None:
        return dict(sizes)
    projector = tensors.get("tower.projector.weight")
    blocks = {name.split(".")[4] for name in tensors if name.startswith("tower.backbone.eva.blocks.")}
    found = {"width": patches.shape[0], "patch": patches.shape[2], "depth": len(blocks)}
    return {**sizes, **found, "projection": 0 if projector is None else projector.shape[0]}
