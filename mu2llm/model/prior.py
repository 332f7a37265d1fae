"""Diagnostic prior: which findings a scan has, as tokens beside the visual ones (issue 19).

A classifier tells findings apart long before a language model has learned to read them from a scan; given its
probabilities, the language model needs far fewer cases. Not in the paper, nor in its reference face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.configuration import Mu2Config, Mu2ContrastiveConfig
from mu2llm.model.initialisation import Initialised
from mu2llm.model.text_pooling import TextConditionedPooling


class DiagnosticPrior(Initialised):
    """A contrastive stage's head with the texts of `config.findings`: token f is (2 pᶠ − 1) · directionᶠ + baseᶠ.

    The probabilities p are the head's, which is trained no more: head and texts are buffers. Directions and bases are.
    With `config.finding_names` there are none: the names of the likely findings are told in the language model's words.
    """

    texts: Tensor

    def __init__(self, config: Mu2Config) -> None:
        super().__init__()
        self.findings, self.length = list(config.findings), config.finding_names
        findings, width = len(config.findings), config.tokenizer.hidden_size
        sizes = Mu2ContrastiveConfig(**config.finding_head or {})
        self.head = TextConditionedPooling(sizes)
        _fix(self.head)
        self.register_buffer("texts", torch.zeros(findings, sizes.text_width))
        self.ids = list(config.finding_ids)
        if not self.length:
            self.directions = nn.Parameter(torch.zeros(findings, width))
            self.bases = nn.Parameter(torch.zeros(findings, width))

    def initialise(self) -> None:
        init.zeros_(self.texts)
        if not self.length:
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

    def names(self, vision_features: Tensor, chunk_mask: Tensor | None = None) -> Tensor:
        """The same → ids (B, finding_names) of the names of what is likelier than not, the likeliest first; names that
        find no room are left out, and where there is room the last of `finding_ids` stands."""
        probabilities = self.probabilities(vision_features, chunk_mask)
        names, filler = self.ids[:-1], self.ids[-1][-1]
        sizes = torch.tensor([len(name) for name in names], device=probabilities.device)
        table = nn.utils.rnn.pad_sequence([torch.tensor(name) for name in names], batch_first=True).to(sizes.device)
        likely, order = probabilities.sort(dim=1, descending=True)
        taken = sizes[order] * (likely > 0.5)  # (B, findings)
        ends = taken.cumsum(1)
        places = (ends - taken)[..., None] + torch.arange(table.shape[1], device=sizes.device)
        there = (places < ends[..., None]) & (ends <= self.length)[..., None]
        told = probabilities.new_full((len(probabilities), self.length + 1), filler, dtype=torch.long)
        where = places.masked_fill(~there, self.length)  # what is not told goes behind the end
        return told.scatter(1, where.flatten(1), table[order].flatten(1))[:, : self.length]


def name_ids(findings: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Each finding's name as a language model reads it in a list, and what stands behind the list."""
    texts = [*(f" {each}," for each in findings), "\n"]
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def _fix(module: nn.Module) -> None:
    """Parameters become buffers, which no optimiser, adapter or unfreezing ever moves."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.data)
