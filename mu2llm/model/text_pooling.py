"""How well texts fit a scan: a head on vision features, and the same on a language model's visual tokens."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.configuration import Mu2ContrastiveConfig
from mu2llm.model.initialisation import Initialised, initialise
from mu2llm.model.series import SeriesEmbedding

HEADS = 4
"""Of what is trained from nothing; a checkpoint says how many it has."""


class TextConditionedPooling(Initialised):
    """How well a text fits a scan: it attends to the scan's tokens, and what it finds is compared to it.

    In several heads: with one, a text that has not yet found its few tokens among hundreds waits, by chance for the
    whole training; several find them sooner, and sooner still where keys know their place along each axis of a scan's
    `grid` (docs/measured.md). The product with the text is taken token by token,
    before the pooling: the same as pooling first, without a pooled vector for every pair of text and scan. Neither
    attention nor product is scaled down by the width: started flat, finding takes long. `temperature` is none of the
    training's: it is fitted afterwards, so that logits over it are probabilities. Of several series of an examination
    each has the same chunks and places; beyond one an embedding says which it is.
    """

    temperature: Tensor

    def __init__(self, config: Mu2ContrastiveConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        width = config.num_heads * config.head_width
        chunks, self.count = config.chunks // config.series, config.series
        self.norm = nn.LayerNorm(config.hidden_size)
        self.chunks = nn.Parameter(torch.zeros(chunks, config.hidden_size))
        self.series = SeriesEmbedding(config.series, chunks, config.hidden_size) if config.series > 1 else None
        self.look = nn.Linear(config.text_width, width)
        self.mean = nn.Linear(config.text_width, width)
        self.key = nn.Linear(config.hidden_size, width)
        self.value = nn.Linear(config.hidden_size, width)
        axes = [chunks * config.grid[0], *config.grid[1:]] if config.grid else []
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
        """(B, T, n, E) → what texts look at (B, T·n, E)"""
        placed = features + self.chunks.repeat(self.count, 1)[: features.shape[1], None]
        return cast(Tensor, self.norm(placed if self.series is None else self.series(placed)).flatten(1, 2))

    def forward(self, texts: Tensor, scans: Tensor, mask: Tensor) -> Tensor:
        """(M, D), (B, T·n, E), (B, T·n) → logits (M, B), the sum over the heads

        Keys and values are never made: a few texts are brought to the tokens' width instead of all tokens to theirs.
        """
        look, mean = self._heads(self.look(texts)), self._heads(self.mean(texts))
        found = self._products(look, self.key, scans)
        if len(self.places):
            z, y, x = (torch.einsum("mhd,nhd->mhn", look, self._heads(places)) for places in self.places)
            places = (z[..., None, None] + y[..., None, :, None] + x[..., None, None, :]).flatten(2)
            places = places.repeat(1, 1, self.count)
            found = found + places[None, ..., : scans.shape[1]].to(found.dtype)
        share = found.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        return (share * self._products(mean, self.value, scans)).sum((-1, -2)).T + self.bias

    def _products(self, texts: Tensor, layer: nn.Linear, scans: Tensor) -> Tensor:
        """Texts (M, heads, head width) with what the layer makes of tokens (B, n, E), by head: (B, M, heads, n)"""
        weight, bias = layer.weight.unflatten(0, (self.heads, -1)), self._heads(layer.bias)
        queries = torch.einsum("mhd,hde->mhe", texts, weight)
        products = torch.matmul(queries.flatten(0, 1), scans.transpose(1, 2)).unflatten(1, queries.shape[:2])
        return products + (texts * bias).sum(-1)[..., None].to(products.dtype)

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
