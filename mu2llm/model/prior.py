"""Diagnostic prior: which findings a scan has, as tokens beside the visual ones (issue 19).

A classifier tells findings apart long before a language model has learned to read them from a scan; given its
probabilities, the language model needs far fewer cases. Not in the paper, nor in its reference face.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
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
        self.findings = list(config.findings)
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
    def start_from_words(self, embeddings: Tensor, tokenizer: Any) -> None:
        """From a trained language model's `embeddings` (vocabulary, its width) of the findings' names and of presence
        and absence: it then reads the tokens from the start, as it does class labels (Lester et al. 2021). Where the
        μ²Tokenizer is of another width, they stay as they are.
        """
        if embeddings.shape[1] != self.bases.shape[1]:
            return
        words = [f" {text}" for text in (*self.findings, "present", "absent")]
        tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
        means = torch.stack([embeddings[each].mean(0) for each in tokens]).to(self.bases.dtype)
        self.bases.copy_(_sized(means[:-2]))
        self.directions.copy_(_sized(means[-2] - means[-1]).expand_as(self.directions))

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


def _sized(embeddings: Tensor) -> Tensor:
    """(…, width) at a root mean square of 0.5, half as large as the visual tokens."""
    return F.rms_norm(embeddings, embeddings.shape[-1:]) / 2


def _fix(module: nn.Module) -> None:
    """Parameters become buffers, which no optimiser, adapter or unfreezing ever moves."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.data)
