"""How well texts fit a scan: a head on vision features, and the same on a language model's visual tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.configuration import Mu2ContrastiveConfig
from mu2llm.model.initialisation import Initialised, initialise

HEADS = 4
"""Of what is trained from nothing; a checkpoint says how many it has."""


class TextConditionedPooling(Initialised):
    """How well a text fits a scan: it attends to the scan's tokens, and what it finds is compared to it.

    In several heads: with one, a text that has not yet found its few tokens among hundreds waits, by chance for the
    whole training; several find them sooner, and sooner still where keys know their place along each axis of a scan's
    `grid` (docs/measured.md). The product with the text is taken token by token,
    before the pooling: the same as pooling first, without a pooled vector for every pair of text and scan. Neither
    attention nor product is scaled down by the width: started flat, finding takes long. `temperature` is none of the
    training's: it is fitted afterwards, so that logits over it are probabilities.
    """

    temperature: Tensor

    def __init__(self, config: Mu2ContrastiveConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        width = config.num_heads * config.head_width
        self.norm = nn.LayerNorm(config.hidden_size)
        self.chunks = nn.Parameter(torch.zeros(config.chunks, config.hidden_size))
        self.look = nn.Linear(config.text_width, width)
        self.mean = nn.Linear(config.text_width, width)
        self.key = nn.Linear(config.hidden_size, width)
        self.value = nn.Linear(config.hidden_size, width)
        axes = [config.chunks * config.grid[0], *config.grid[1:]] if config.grid else []
        self.places = nn.ParameterList([torch.zeros(length, width) for length in axes])
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("temperature", torch.ones(()))

    def initialise(self) -> None:
        init.zeros_(self.bias)
        init.ones_(self.temperature)
        init.normal_(self.chunks, std=0.02)
        for layer in (self.look, self.mean, self.key, self.value):
            heads = self.heads if layer is self.mean else 1  # their sum is then as large as one head's
            init.normal_(layer.weight, std=(3 * heads * layer.in_features) ** -0.5)
            init.zeros_(layer.bias)
        for places in self.places:
            init.zeros_(places)

    def scan(self, features: Tensor) -> Tensor:
        """(B, T, n, E) → keys and values (B, T·n, 2, heads · head width)"""
        tokens = self.norm(features + self.chunks[: features.shape[1], None]).flatten(1, 2)
        keys = self.key(tokens)
        if len(self.places):
            z, y, x = self.places
            places = (z[:, None, None] + y[:, None] + x).flatten(0, 2)
            keys = keys + places[: keys.shape[1]].to(keys.dtype)
        return torch.stack([keys, self.value(tokens)], dim=2)

    def forward(self, texts: Tensor, scans: Tensor, mask: Tensor) -> Tensor:
        """(M, D), (B, n, 2, heads · head width), (B, n) → logits (M, B), the sum over the heads"""
        keys, values = self._heads(scans).unbind(2)
        look = torch.einsum("mhd,bnhd->mbhn", self._heads(self.look(texts)), keys)
        share = look.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        fit = torch.einsum("mhd,bnhd->mbhn", self._heads(self.mean(texts)), values)
        return (share * fit).sum((-1, -2)) + self.bias

    def _heads(self, joined: Tensor) -> Tensor:
        """(…, heads · head width) → (…, heads, head width)"""
        return joined.unflatten(-1, (self.heads, -1))


class AlignmentHead(TextConditionedPooling):
    """The same on a language model's visual tokens, with its loss, as SFT puts it on the model it trains.

    The bias has a dimension: FSDP shards no single numbers. `scaled` tokens, small as words are, are read at a root
    mean square of 1, as those that are not.
    """

    def __init__(self, width: int, text_width: int, scaled: bool = False) -> None:
        super().__init__(Mu2ContrastiveConfig(hidden_size=width, text_width=text_width, chunks=1, num_heads=HEADS))
        self.scaled = scaled
        self.bias = nn.Parameter(torch.zeros(1))
        self.apply(initialise)

    def forward(self, texts: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """(M, D), (B, n, E), (M, B) → how badly the visual tokens tell which texts are true of their scans."""
        every = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        if self.scaled:
            tokens = F.rms_norm(tokens, tokens.shape[-1:])
        logits = super().forward(texts, self.scan(tokens[:, None]), every)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
