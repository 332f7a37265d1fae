"""Which series of an examination a chunk is of: their chunks stand one behind the other (issue 23)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mu2llm.model.initialisation import Initialised


class SeriesEmbedding(Initialised):
    """Learned, nothing at the start, and added to all tokens of a series."""

    def __init__(self, series: int, chunks: int, width: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.each = nn.Parameter(torch.zeros(series, width))

    def initialise(self) -> None:
        init.zeros_(self.each)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, n, E) → the same; `chunks` of T are of one series."""
        return x + self.each.repeat_interleave(self.chunks, dim=0)[: x.shape[1], None]
