"""SPECTRE (Claessens et al. 2026, arXiv 2511.17209), of the package spectre-fm: a ViT on crops, and one over the crops.

The second one tells the crops' places by the grid that a scan fills; so it takes scans, and not chunks one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mu2llm.errors import UserError
from mu2llm.settings.towers import TowerSpec


class Spectre(nn.Module):
    def __init__(self, spec: TowerSpec, tiles: tuple[int, ...], chunk: tuple[int, ...]) -> None:
        super().__init__()
        try:
            from spectre import SpectreImageFeatureExtractor
        except ImportError as error:
            raise UserError(f"tower spectre: {error}; pip install 'mu2llm[spectre]'") from error
        self.tiles = tiles
        self.model = SpectreImageFeatureExtractor.from_pretrained(spec.sizes["preset"], pretrained=False)
        if tuple(self.model.crop_size) != chunk:
            raise UserError(f"tower spectre reads crops of {self.model.crop_size}, data.spec cuts {chunk}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, K, H, W) of 0…1, the crops of one scan that fills them → (N, 1, width)"""
        return self.scans(x[None])[0]

    def scans(self, volumes: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, 1, K, H, W), (B, T) → (B, T, 1, width): each crop's token and its scan's, one behind the other. The
        crops of a series of an examination know that alone."""
        shape, crops_a_series = volumes.shape[:2], math.prod(self.tiles)
        volumes = volumes.reshape(-1, crops_a_series, *volumes.shape[2:])
        mask = None if mask is None else mask.reshape(-1, crops_a_series)
        out = volumes.new_zeros(*volumes.shape[:2], 1, 2 * self.model.feature_combiner.embed_dim)
        for row, crops in enumerate(volumes):
            filled = slice(None) if mask is None else mask[row]
            if mask is not None and not mask[row].any():
                continue
            grid = self.tiles if mask is None else _filled(mask[row], self.tiles)
            tokens = self.model([crops[filled]], grid_size=[grid])[0]
            both = torch.cat([tokens[1:], tokens[:1].expand(len(tokens) - 1, -1)], dim=-1)
            out[row, filled, 0] = both.to(out.dtype)
        return out.reshape(*shape, *out.shape[2:])


def _filled(mask: Tensor, tiles: tuple[int, ...]) -> tuple[int, ...]:
    """Crops along each axis that a scan fills: the first ones, as `fit: tiles` puts them."""
    held = mask.view(tiles)
    grid = tuple(int(held.movedim(axis, 0).flatten(1).any(1).sum()) for axis in range(3))
    if math.prod(grid) != int(mask.sum()):
        raise UserError(
            f"tower spectre: {int(mask.sum())} crops of a scan are no block of {grid}; prepare it by its spec"
        )
    return grid
