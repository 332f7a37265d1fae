"""CT-FM's feature extractor (Pai et al. 2025, arXiv 2501.09001): MONAI's SegResEncoder, its last and coarsest map."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from mu2llm.settings.towers import TowerSpec


class CtFm(nn.Module):
    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        from monai.networks.nets.segresnet_ds import SegResEncoder  # seconds: only where it is used

        self.scale = spec.scale
        self.encoder = SegResEncoder(
            init_filters=spec.sizes["filters"], blocks_down=tuple(spec.sizes["blocks"]), in_channels=1
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, K, H, W) of 0…1 → (N, K·H·W / stride³, width)"""
        low, high = self.scale
        return cast(Tensor, self.encoder(x * (high - low) + low)[-1]).flatten(2).transpose(1, 2)
