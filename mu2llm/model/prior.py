"""Diagnostic prior: which findings a scan has, as tokens beside the visual ones (issue 19).

A classifier tells findings apart long before a language model has learned to read them from a scan; given its
probabilities, the language model needs far fewer cases. Not in the paper, nor in its reference face.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.configuration import Mu2Config, Mu2ContrastiveConfig
from mu2llm.model.initialisation import Initialised
from mu2llm.model.text_pooling import TextConditionedPooling


class DiagnosticPrior(Initialised):
    """A contrastive stage's head with the texts of `config.findings`: token f is (2 pᶠ − 1) · directionᶠ + baseᶠ.

    The probabilities p are the head's, which is trained no more: head and texts are buffers. Directions and bases are.
    """

    texts: Tensor

    def __init__(self, config: Mu2Config) -> None:
        super().__init__()
        findings, width = len(config.findings), config.tokenizer.hidden_size
        sizes = Mu2ContrastiveConfig(**config.finding_head or {})
        self.head = TextConditionedPooling(sizes)
        _fix(self.head)
        self.register_buffer("texts", torch.zeros(findings, sizes.text_width))
        self.directions = nn.Parameter(torch.zeros(findings, width))
        self.bases = nn.Parameter(torch.zeros(findings, width))

    def initialise(self) -> None:
        init.zeros_(self.texts)
        init.normal_(self.directions, std=0.5)
        init.normal_(self.bases, std=0.1)

    @torch.no_grad()
    def probabilities(self, vision_features: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """vision_features (B, T, n, vision width), chunk_mask (B, T) → (B, findings), calibrated on held-out scans."""
        if chunk_mask is None:
            chunk_mask = torch.ones(vision_features.shape[:2], dtype=torch.bool, device=vision_features.device)
        mask = chunk_mask.bool().repeat_interleave(vision_features.shape[2], dim=1)
        scans = self.head.scan(vision_features.to(self.texts.dtype))
        return cast(Tensor, (self.head(self.texts, scans, mask) / self.head.temperature).sigmoid().T)

    def forward(self, vision_features: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """vision_features (B, T, n, vision width), chunk_mask (B, T) → tokens (B, findings, μ²Tokenizer's width)"""
        signed = 2 * self.probabilities(vision_features, chunk_mask).to(self.bases.dtype) - 1
        return signed[..., None] * self.directions + self.bases


def _fix(module: nn.Module) -> None:
    """Parameters become buffers, which no optimiser, adapter or unfreezing ever moves."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.data)
