"""Merlin's image encoder (Blankemeier et al. 2026): the I3D-ResNet152 of the package merlin-vlm, its last map."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from mu2llm.errors import UserError

CODES = 1692
"""Diagnosis codes of the published checkpoint's classifier: its weights are loaded with the rest, and not used."""


class Merlin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        try:
            from merlin.models.i3res import I3ResNet
            from torchvision.models import resnet152
        except ImportError as error:
            raise UserError(f"tower merlin: {error}; pip install 'mu2llm[merlin]'") from error
        self.i3_resnet = I3ResNet(resnet152(weights=None), class_nb=CODES, conv_class=True, return_skips=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, K, H, W) of 0…1 → (N, K/32 · H/32 · W/16, 2048)"""
        _, _, maps = self.i3_resnet(x)
        return cast(Tensor, maps[-1]).flatten(2).transpose(1, 2)
