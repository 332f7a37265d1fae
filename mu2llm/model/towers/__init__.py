"""The field's open vision towers as modules: chunks (N, C, K, H, W) of 0…1 → (N, places, width).

Each keeps the names that its published weights have, so that they load as they are; `mu2llm.settings.towers` says what
each takes and gives. A module comes with its values: what a package makes does not say how it starts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from mu2llm.settings.towers import TOWERS, tower_class, tower_spec

if TYPE_CHECKING:
    from mu2llm.model.configuration import Mu2VisionConfig

logger = logging.getLogger(__name__)


def build(config: Mu2VisionConfig) -> nn.Module:
    """The tower that a configuration names, other than m3d; a UserError where its package is not installed."""
    spec = tower_spec(config.tower, config.own, config.sizes)
    if config.tower == "own":
        return Scaled(tower_class(config.own)(**spec.sizes), spec.scale)
    if TOWERS[config.tower].licence.startswith("CC BY-NC"):
        logger.warning("tower %s: its weights are %s, and what is made with them", config.tower, spec.licence)
    if config.tower == "colipri":
        from mu2llm.model.towers.colipri import Colipri

        return Colipri(tuple(config.chunk_shape), spec)
    if config.tower == "ct_fm":
        from mu2llm.model.towers.ct_fm import CtFm

        return CtFm(spec)
    if config.tower == "merlin":
        from mu2llm.model.towers.merlin import Merlin

        return Merlin()
    from mu2llm.model.towers.spectre import Spectre

    return Spectre(spec, tuple(config.tiles or (1, 1, 1)), tuple(config.chunk_shape))


class Scaled(nn.Module):
    """A tower of one's own, behind the scale of its TowerSpec."""

    def __init__(self, tower: nn.Module, scale: tuple[float, float]) -> None:
        super().__init__()
        self.tower, self.scale = tower, scale

    def forward(self, x: Any) -> Any:
        """(N, C, K, H, W) of 0…1 → (N, places, width)"""
        low, high = self.scale
        return self.tower(x * (high - low) + low)
